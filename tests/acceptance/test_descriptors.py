"""A process that may open too few files gets named errors, loses nothing, and goes on after."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import numaload as api
from commands import LIMIT_S, Numaload
from forked import ForkedNumaload
from numaload import errors
from numaload.demo import write_model

ENOUGH = 64  # descriptors; every verb needs fewer
SWEEP = """
import json, os, resource, sys, warnings
import numaload
from numaload import errors
from numaload.demo import write_model
from numaload.replicas.mirror import mirror
from numaload.replicas import reclaim, store
import numaload.files.copy, numaload.pagecache.prewarm, numaload.machine.workers
import numaload.doctor.opinion, numaload.replicas.opening

path, call = sys.argv[1:]
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

def limit(soft):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

def fds():
    return len(os.listdir("/proc/self/fd"))

def verify():
    with numaload.attach(path) as found:
        assert found.verify().right

CALLS = {
    "open": lambda: numaload.open(path).close(),
    "copy": lambda: numaload.open(path, copy=True).close(),
    "prewarm": lambda: numaload.prewarm(path),
    "private": lambda: numaload.mirror(path).close(),
    "shared": lambda: numaload.mirror(path, shared=True).close(),
    "attach": lambda: numaload.attach(path).close(),
    "verify": verify,
    "release": lambda: reclaim.release(store.entries()),
}
if call in ("attach", "verify", "release"):
    CALLS["shared"]()
limit(hard)
numaload.topology()
before, said = fds(), []
assert before < 8
# The lowest free number counts, not how many are open.
for soft in range(3, 64):
    numaload.evict(path)  # so that there is something to read
    limit(soft)
    try:
        CALLS[call]()
        wrong = None
    except errors.NumaloadError as error:
        wrong = [type(error).__name__, str(error)]
    limit(hard)
    assert fds() == before, (soft, os.listdir("/proc/self/fd"))
    said.append([soft, wrong])
    if wrong is None:
        break
print(json.dumps({"said": said}))
"""


def entries(store: Path) -> list[str]:
    """Names in the store that are replicas, hidden ones of half-made ones included."""
    return [name for name in os.listdir(store) if "." in name] if store.exists() else []


CALLS = ("open", "copy", "prewarm", "private", "shared", "attach", "verify", "release")


@pytest.mark.parametrize("call", CALLS)
def test_calls_with_too_few_descriptors(numaload: Numaload, model: str, call: str) -> None:
    """Every limit from none to enough: a named error with the way out, then success."""
    found = numaload.python(SWEEP, model, call)
    *failed, (_, last) = found["said"]
    assert last is None
    assert len(failed) > 1
    for _, (name, text) in failed:
        assert issubclass(getattr(errors, name), errors.NumaloadError)
        assert "ulimit -n" in text
    assert len(entries(numaload.store)) == (call in ("shared", "attach", "verify"))


# Whether each verb needs to find replicas.
VERBS = {
    "inspect": False, "nodes": False, "prewarm": False, "plan": False, "mirror": False,
    "status": True, "verify": True, "release": True,
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_with_too_few_descriptors(numaload: Numaload, model: str, verb: str) -> None:
    enough = ForkedNumaload(numaload.store)
    if VERBS[verb]:
        enough("mirror", model)
    files = [] if verb == "nodes" else [model]
    statuses = []
    for limit in range(python_needs(), ENOUGH):
        line = f'ulimit -n {limit}; exec "$0" "$@"'
        done = subprocess.run(
            ["sh", "-c", line, *numaload.command(verb, *files)], capture_output=True, text=True,
            env=numaload.environment, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        statuses.append(done.returncode)
        assert "Traceback" not in done.stderr
        if done.returncode == 0:
            break
        assert done.returncode == 1, done.stderr
        assert "numaload: error: " in done.stderr
        assert "ulimit -n" in done.stderr
        assert len(entries(numaload.store)) == VERBS[verb]
    assert statuses[-1] == 0
    if verb != "release":
        enough("mirror", model)
        assert "all checksums right" in enough("verify", model).stdout


@cache
def python_needs() -> int:
    """The lowest limit at which Python itself starts."""
    for limit in range(3, ENOUGH):
        line = f'ulimit -n {limit}; exec "$0" "$@"'
        command = ["sh", "-c", line, sys.executable, "-m", "numaload", "--version"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return limit
    raise AssertionError


def test_no_descriptor_is_left_behind(store: Path, tmp_path: Path) -> None:
    model = write_model(str(tmp_path / "small.gguf"), 1)[0]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF, but no more of it")
    calls: list[Callable[[], Any]] = [
        lambda: api.open(model).close(),
        lambda: api.open(model)["blk.0.attn_q.weight"].blocks,
        lambda: api.mirror(model, shared=True).close(),
        lambda: api.attach(model).close(),
        lambda: api.prewarm(model),
    ]
    fails: list[Callable[[], Any]] = [
        lambda: api.open(bad),
        lambda: api.open(bad, copy=True),
        lambda: api.mirror(bad, shared=True),
        lambda: api.attach(bad),
        lambda: api.mirror(model, shared=True, nodes=999),
        lambda: api.open(model, copy=True, progress=lambda *_: False),
    ]

    def once() -> None:
        for call in calls:
            call()
        for call in fails:
            with pytest.raises(errors.NumaloadError):
                call()

    once()  # pools and caches are made
    gc.collect()  # what earlier tests left in circles
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        once()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_each_file_is_open_once(tmp_path: Path) -> None:
    """Also where what was given is a link to a file of another name."""
    files = write_model(str(tmp_path / "m.gguf"), 1 << 20, splits=2)
    (tmp_path / "latest.gguf").symlink_to(files[0])
    for given in (files[0], str(tmp_path / "latest.gguf")):
        with api.open(given):
            links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            held = [os.readlink(link) for link in links if os.path.exists(link)]
            assert sorted(name for name in held if name.startswith(str(tmp_path))) == files


MANY = """
import json, resource, sys
import numaload

with numaload.open(sys.argv[1]) as weights:
    total = sum(tensor.nbytes for tensor in weights.values())
numaload.prewarm(sys.argv[1])
numaload.mirror(sys.argv[1], shared=True).close()
print(json.dumps([len(weights.paths), total, resource.getrlimit(resource.RLIMIT_NOFILE)[0]]))
"""


def test_more_files_than_the_soft_limit_allows(numaload: Numaload, tmp_path: Path) -> None:
    """The command line raises it when it begins, the API where a model has so many files."""
    count, soft = 150, 100
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 8 * count:
        pytest.skip("the hard limit allows no more")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama", split_max_tensors=1)
    for i in range(count):
        writer.add_tensor(f"blk.{i}.w", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = min(map(str, tmp_path.glob("m-*.gguf")))

    def run(*command: str) -> str:
        line = f'ulimit -S -n {soft}; exec "$0" "$@"'
        return subprocess.run(
            ["sh", "-c", line, *command], capture_output=True, text=True, check=True,
            env=numaload.environment, timeout=LIMIT_S,
        ).stdout  # fmt: skip

    run(*numaload.command("mirror", path))
    assert "all checksums right" in run(*numaload.command("verify", path))
    run(*numaload.command("release"))
    files, total, limit = json.loads(run(sys.executable, "-W", "ignore", "-c", MANY, path))
    assert (files, total) == (count, count * 128)
    assert limit > soft
