"""Weights mean the file that was opened, wherever the program is and whatever has its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import numaload as api
from commands import LIMIT_S, evict
from lora_files import TENSORS, write_gguf
from numaload import errors
from numaload.replicas import store as stores

NAME = "demo-00001-of-00002.gguf"
OTHER = "demo-00002-of-00002.gguf"


class Opened(NamedTuple):
    """Weights that were opened as ``link/NAME`` from ``folder``, where link leads to real."""

    weights: api.Weights
    folder: Path
    paths: list[str]


@pytest.fixture
def opened(
    model_files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Opened]:
    for folder in ("real", "other"):
        (tmp_path / folder).mkdir()
        for path in model_files:
            shutil.copy(path, tmp_path / folder / os.path.basename(path))
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with api.open(f"link/{NAME}") as weights:
        yield Opened(weights, tmp_path, [str(tmp_path / "link" / name) for name in (NAME, OTHER)])


def replace(folder: Path) -> None:
    os.replace(folder / "other" / OTHER, folder / "real" / OTHER)


def replace_folder(folder: Path) -> None:
    os.rename(folder / "real", folder / "moved")
    (folder / "real").mkdir()


def retarget(folder: Path) -> None:
    (folder / "link").unlink()
    (folder / "link").symlink_to("other")


# What becomes of the names, and whether the files themselves stay as they were.
GOINGS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "renamed": (lambda folder: os.rename(folder / "real" / OTHER, folder / "real/b.gguf"), False),
    "replaced": (replace, False),
    "removed": (lambda folder: os.unlink(folder / "real" / OTHER), False),
    "folder renamed": (lambda folder: os.rename(folder / "real", folder / "moved"), True),
    "folder replaced": (replace_folder, True),
    "link retargeted": (retarget, True),
}
BY_NAME: dict[str, Callable[[api.Weights], Any]] = {
    "prewarm": api.prewarm,
    "prewarm of a part": lambda weights: api.prewarm([weights], layers="0"),
    "prewarm in the background": lambda weights: api.prewarm(weights, background=True),
    "prewarm_async": lambda weights: api.prewarm_async(weights).result(),
    "residency": lambda weights: api.residency([weights]),
    "evict": api.evict,
}


def mirrored(weights: api.Weights, **options: Any) -> None:
    with api.mirror(weights, **options) as mirror:
        assert mirror.report.paths == weights.paths
        assert [t.buffer for t in mirror.local().values()]


BY_DESCRIPTOR: dict[str, Callable[[api.Weights], Any]] = {
    "stream": lambda weights: list(api.stream(weights, None)),
    "dequantize": lambda weights: [t.dequantize() for t in weights.values()],
    "a private mirror": mirrored,
    "a shared mirror": lambda weights: mirrored(weights, shared=True),
}


@pytest.mark.parametrize("going", GOINGS)
def test_verbs_say_that_the_name_is_another_file_s(opened: Opened, store: Path, going: str) -> None:
    change, stays = GOINGS[going]
    change(opened.folder)
    for verb in BY_NAME.values():
        with pytest.raises(errors.FileChangedError, match=f"{opened.folder}/link/demo.* since it"):
            verb(opened.weights)
    assert not store.exists() or not stores.entries()
    for verb in BY_DESCRIPTOR.values():
        if stays:
            verb(opened.weights)
        else:
            with pytest.raises(errors.FileChangedError, match=f"{opened.folder}/link/demo"):
                verb(opened.weights)


def test_verbs_act_on_the_opened_file_from_anywhere(
    opened: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a file of the same name where the program goes, and none where it goes then."""
    shutil.copytree("other", "elsewhere/link")
    (opened.folder / "nowhere").mkdir()
    evict(opened.paths)
    for place in ("elsewhere", "nowhere"):
        monkeypatch.chdir(opened.folder / place)
        assert opened.weights.paths == opened.paths
        assert {tensor.path for tensor in opened.weights.values()} == set(opened.paths)
        assert api.prewarm(opened.weights).paths == opened.paths
        assert api.prewarm(opened.weights, tensors="attn_q").paths == opened.paths
        found = [file.path for file in api.residency(opened.weights).files]
        assert found == opened.paths
        assert [file.path for file in api.evict(opened.weights).files] == opened.paths
        report = api.prewarm(opened.weights, background=True)
        assert all(map(os.path.samefile, report.paths, opened.paths))
        if report.holder:
            report.holder.wait()
        for verb in BY_DESCRIPTOR.values():
            verb(opened.weights)
        (entry,) = stores.entries()
        assert entry.model.paths == tuple(opened.paths)
        assert entry.model.state() == "unchanged"


def test_names_mean_the_folder_in_which_they_were_given(
    opened: Opened, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"link/{OTHER}"
    weights = api.open(given)
    metadata, job = weights.metadata, api.prewarm_async([given])
    with job, weights, api.mirror(given, shared=True) as made, api.attach(given) as attached:
        monkeypatch.chdir("/")
        assert job.result().paths == opened.paths
        assert list(metadata["tokenizer.ggml.tokens"])
        for mirror in (made, attached):
            assert mirror.verify().right
            assert mirror.report.paths == opened.paths
            assert mirror.local().metadata == metadata


def test_what_is_above_a_link_is_not_taken_for_the_folder_that_it_is_in(opened: Opened) -> None:
    """link/.. is where real is, not where link is."""
    inside = opened.folder / "real" / "inside"
    inside.mkdir()
    (opened.folder / "other" / "deep").symlink_to(inside)
    for given in (f"other/deep/../{NAME}", f"{opened.folder}/other/deep/../{NAME}"):
        with api.open(given) as weights:
            expected = [str(opened.folder / "real" / name) for name in (NAME, OTHER)]
            assert weights.paths == expected
            assert api.residency(given).files[0].path == expected[0]
            assert weights.model().paths == tuple(expected)


def test_a_program_whose_folder_is_gone_opens_names_from_the_root(opened: Opened) -> None:
    code = """
import os, sys, numaload
path = sys.argv[1]
os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
with numaload.open(path) as weights:
    assert weights.paths[0] == path, weights.paths
    numaload.prewarm(weights)
try:
    numaload.open("m.gguf")
except numaload.errors.ReadError as error:
    assert "m.gguf: No such file" in str(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, opened.paths[0]], capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_name_is_no_name(opened: Opened) -> None:
    """Rather than the working directory, which may have a model in it."""
    for verb in (api.open, api.prewarm, api.evict):
        with pytest.raises(errors.ReadError, match="No such file"):
            verb("")


def test_loaders_of_other_programs_stay_in_their_folder(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numaload.backends.gguf_reader import GGUFReader
    from numaload.backends.ktransformers import GGUFLoader
    from numaload.backends.lora import open_adapter

    write_gguf(opened.folder / "adapter.gguf")
    loader, reader, adapter = (
        GGUFLoader("link"),
        GGUFReader(opened.paths[0]),
        open_adapter("adapter.gguf"),
    )
    monkeypatch.chdir("/")
    assert loader.gguf_path == str(opened.folder / "link")
    assert sorted(loader.file_data_map) == opened.paths
    assert {loader.tensor_file_map[t.name] for t in reader.tensors} == {opened.paths[0]}
    assert adapter.path == f"{opened.folder}/adapter.gguf"
    pytest.importorskip("torch")
    assert adapter.state_dict(name_map={name: name for name in TENSORS}, heads=(0, 0))
    adapter.close()


def test_a_loader_refuses_a_replica_of_another_file_of_that_name(
    opened: Opened, store: Path
) -> None:
    from numaload.backends.ktransformers import GGUFLoader

    with api.mirror(opened.weights, shared=True) as mirror:
        assert GGUFLoader("link", replica=mirror).tensor_info
        replace(opened.folder)
        with pytest.raises(errors.FileChangedError, match="another file now"):
            GGUFLoader("link", replica=mirror)
