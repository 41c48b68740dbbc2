"""Prewarming: what is counted, remembered and said; policies end with the threads of the job."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import numaload as api
from commands import KEPT, evict, resident
from numaload.cli.output import print_json
from numaload.cli.prewarming import tell
from numaload.files import known
from numaload.files.ways import IntoCache
from numaload.linux import syscalls
from numaload.pagecache import prewarm

pytestmark = pytest.mark.usefixtures("store")
NODE = api.topology().all[0]


@pytest.fixture
def cold(tmp_path: Path) -> str:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    evict([str(path)])
    return str(path)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_that_cannot_be(cold: str, threads: int) -> None:
    with pytest.raises(api.errors.UsageError, match="expected at least 1"):
        api.prewarm(cold, threads=threads)


def test_no_more_threads_than_chunks(cold: str) -> None:
    assert api.prewarm(cold, threads=1000).threads == 1


def test_a_file_given_twice_or_through_a_link_counts_once(
    cold: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(cold)
    monkeypatch.chdir(tmp_path)
    report = api.prewarm([cold, "file", str(tmp_path / "link")])
    assert report.size == os.path.getsize(cold)
    assert len(report.paths) == 1


VERBS = [api.prewarm, api.evict, api.residency, lambda what: api.prewarm_async(what).result()]


@pytest.mark.parametrize("verb", VERBS, ids=["prewarm", "evict", "residency", "prewarm_async"])
def test_verbs_take_names_as_bytes_and_refuse_what_names_no_file(
    cold: str, verb: Callable[[Any], Any]
) -> None:
    assert cold in str(verb(os.fsencode(cold)).to_dict())
    for what in (None, 5, [None], bytearray(b"/a"), {cold}):
        named = type(what[0] if isinstance(what, list) else what).__name__
        with pytest.raises(
            api.errors.UsageError, match=f"^{named}: expected a path or opened weights$"
        ):
            verb(what)


def test_the_policy_ends_with_the_threads_of_the_job(
    cold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = syscalls.get_mempolicy(), IntoCache.read
    seen: list[tuple[int, list[int]]] = []

    def noting(self: IntoCache, *chunk: Any) -> None:
        seen.append(syscalls.get_mempolicy())
        read(self, *chunk)

    monkeypatch.setattr(IntoCache, "read", noting)
    api.prewarm(cold, nodes=NODE, policy="bind")
    assert seen[-1] == (syscalls.MPOL_BIND, [NODE])
    assert syscalls.get_mempolicy() == before
    assert not [t for t in threading.enumerate() if t.name.startswith("numaload-prewarm")]


def test_where_residency_is_unknown_placement_is_counted_all_the_same(
    cold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numaload.files.residency.may_ask", lambda _: False)
    monkeypatch.setattr("numaload.linux.syscalls.cachestat", lambda *_: None)
    report = api.prewarm(cold, nodes=NODE)
    assert not report.residency_known
    assert report.on_nodes == {NODE: report.size}
    assert report.done


def test_what_is_remembered_is_what_was_read(tmp_path: Path, cold: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF and more")
    expected = known.identify([str(path)])

    def replace(*_: int) -> None:
        (tmp_path / "new").write_bytes(b"GGUF, another")
        (tmp_path / "new").replace(path)

    evict([str(path)])
    api.prewarm([cold, str(path)], progress=replace)
    (model,) = known.recall()  # and not the file that is no GGUF
    assert model.paths == expected.paths
    assert model.identities[0].inode == expected.identities[0].inode
    assert not model.unchanged()


def test_split_files_given_by_two_names(
    model_files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of a model is a link into a folder that holds another copy of the whole."""
    for index, path in enumerate(model_files):
        there = tmp_path / os.path.basename(path)
        if index == 0:
            there.symlink_to(path)
        else:
            there.write_bytes(Path(path).read_bytes())
    mixed = [str(tmp_path / os.path.basename(path)) for path in model_files]
    api.prewarm([mixed[0], model_files[0]])
    assert {model.paths for model in known.recall()} >= {tuple(model_files)}
    assert [model for model in known.recall() if not model.unchanged()] == []


def test_the_advice_for_the_wrong_node_works(cold: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(cold).read_bytes()
    os.sync()
    assert resident(cold) > KEPT * len(before)
    report = prewarm.PrewarmReport(
        [cold], len(before), 0, len(before), len(before), 1.0, nodes=[1], policy="bind",
        on_nodes={0: len(before)},
    )  # fmt: skip
    tell(report)
    advice = re.search(r"numaload (evict FILE)", capsys.readouterr().err)
    assert advice
    words = advice[1].replace("FILE", cold).split()
    subprocess.run([sys.executable, "-m", "numaload", *words], check=True, capture_output=True)
    assert resident(cold) == 0
    assert Path(cold).read_bytes() == before


def test_reports_can_be_compared_copied_and_told(cold: str) -> None:
    report = api.prewarm(cold)
    assert copy.copy(report) == copy.deepcopy(report) == report
    assert api.PrewarmReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert repr(report).startswith(f"PrewarmReport(paths=[{cold!r}], size={report.size}, ")
    other = copy.copy(report)
    other.read += 1
    assert other != report
    told = report.to_dict()
    told["nodes"].append(7)
    assert report.nodes == []


def test_json_has_no_words_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"a": math.nan, "b": [1.5, -math.inf], "c": np.array([math.inf, 1]), "d": (1, None)}
    print_json(data | {"e": SimpleNamespace(to_dict=lambda: {"f": math.nan})})

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {
        "a": "nan", "b": [1.5, "-inf"], "c": ["inf", 1.0], "d": [1, None], "e": {"f": "nan"},
    }  # fmt: skip
