"""Copies and pickles: values have them, what owns files or memory refuses, neither harms it."""

from __future__ import annotations

import ast
import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import numaload as api
from commands import LIMIT_S
from numaload import errors
from numaload.files.source import SourceFile
from numaload.files.ways import IntoCache, IntoMemory
from numaload.linux.mapping import map_private
from numaload.replicas.arena import Arena, private_memory, store_memory
from numaload.replicas.layout import Layout

Way = Callable[[Any], Any]
WAYS: dict[str, Way] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),  # noqa: S301 - our own
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Held(NamedTuple):
    """What is open in a test: a model, and its replica in the store."""

    weights: api.Weights
    mirror: api.Mirror


@pytest.fixture
def held(store: Path, model: str) -> Iterator[Held]:
    with api.open(model) as weights, api.mirror(weights, shared=True) as mirror:
        yield Held(weights, mirror)


def descriptors() -> dict[str, str]:
    """{number: what it leads to} of all that this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return {link.name: os.readlink(link) for link in links if link.is_symlink()}


def sums(held: Held) -> list[int]:
    """Of bytes that are read from the file, of the mapped file and of the replica."""
    name = next(iter(held.weights))
    tensor, view = held.weights[name], held.mirror.local()[name]
    read = bytearray(tensor.nbytes)
    tensor.read_into(memoryview(read))
    return [int(np.frombuffer(b, np.uint8).sum()) for b in (read, tensor.buffer, view.buffer)]


def in_a_module(held: Held) -> Any:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 2)
    module.weights = held.weights
    return module


def gguf_reader(held: Held) -> Any:
    from numaload.backends.gguf_reader import GGUFReader

    return GGUFReader(held.weights.paths[0])


def gguf_loader(held: Held) -> Any:
    from numaload.backends.ktransformers import GGUFLoader

    return GGUFLoader(os.path.dirname(held.weights.paths[0]))


def prewarm_job(held: Held) -> Any:
    job = api.prewarm_async(held.weights)
    job.result()
    return job


OWNERS: dict[str, Callable[[Held], Any]] = {
    "weights": lambda held: held.weights,
    "tensor": lambda held: next(iter(held.weights.values())),
    "part": lambda held: held.weights.parts[0],
    "file": lambda held: held.weights.parts[0].file,
    "mirror": lambda held: held.mirror,
    "view": lambda held: held.mirror.local(),
    "lease": lambda held: held.mirror._leases[0],
    "mapping": lambda _: map_private(1 << 20),
    "job": prewarm_job,
    "GGUFReader": gguf_reader,
    "GGUFLoader": gguf_loader,
    "in a dict": lambda held: {"source": held.weights, "rate": 1e-3},
    "in a module": in_a_module,
}
SHARING = {"tensor", "part", "in a dict", "in a module"}  # shallow copies that close nothing


@pytest.mark.parametrize("owner", OWNERS)
def test_what_owns_files_or_memory_refuses_and_goes_on(held: Held, owner: str) -> None:
    thing = OWNERS[owner](held)
    gc.collect()  # what earlier tests left
    expected, before = sums(held), descriptors()
    for way in WAYS.values():
        if way is copy.copy and owner in SHARING:
            way(thing)
        else:
            with pytest.raises(errors.NotCopyableError, match=r"cannot copy or pickle \w+: .*open"):
                way(thing)
    gc.collect()
    assert descriptors() == before
    assert sums(held) == expected


VALUES: dict[str, Callable[[Held], Any]] = {
    "topology": lambda _: api.topology(),
    "prewarm": lambda held: api.prewarm(held.weights),
    "residency": lambda held: api.residency(held.weights),
    "evict": lambda held: api.evict(held.weights.paths[0]),
    "mirror": lambda held: held.mirror.report,
    "verified": lambda held: held.mirror.verify(),
    "model": lambda held: held.weights.model(),
    "tensor info": lambda held: held.weights.parts[0].header.tensors,
    "holder": lambda _: api.PrewarmHolder(1, 2, ["/m.gguf"], lock=True),
}


@pytest.mark.parametrize("value", VALUES)
def test_reports_and_the_like_are_values(held: Held, value: str) -> None:
    thing = VALUES[value](held)
    for way in WAYS.values():
        assert way(thing) == thing
        assert way({"it": thing}) == {"it": thing}


@every_way
def test_metadata_outlives_its_file(model: str, way: Way) -> None:
    with api.open(model) as expected, api.open(model) as weights:
        again = way(weights.metadata)
        if way is copy.copy:  # shares the arrays, which are read from the file when looked at
            assert dict(again) == dict(expected.metadata)
        weights.close()
        assert dict(again) == dict(expected.metadata)
        array = next(key for key, value in again.items() if hasattr(value, "tolist"))
        assert again.type_name(array) == expected.metadata.type_name(array)
        assert again[array].offset == expected.metadata[array].offset


def test_fields_of_a_gguf_reader_are_copied_without_the_file(model: str) -> None:
    from numaload.backends.gguf_reader import GGUFReader

    reader = GGUFReader(model)
    for field in reader.fields.values():
        raw = pickle.dumps(field)
        assert len(raw) < len(reader.data) // 4
        for again in (pickle.loads(raw), copy.copy(field), copy.deepcopy(field)):  # noqa: S301
            assert again.contents() == field.contents()


@every_way
def test_arrays_of_a_tensor_are_copied_with_their_bytes(held: Held, way: Way) -> None:
    blocks = next(iter(held.weights.values())).blocks
    again = way(blocks)
    assert (again == blocks).all()
    assert not np.shares_memory(again, blocks)


@pytest.mark.filterwarnings("ignore:torch tensors of weights share read-only memory")
def test_torch_tensors_are_copied_with_their_bytes(held: Held) -> None:
    torch = pytest.importorskip("torch")
    tensor = next(iter(held.weights.values())).torch()
    again = copy.deepcopy(tensor)
    assert again.data_ptr() != tensor.data_ptr()
    again += 1  # memory of its own, which can be written to
    assert torch.equal(again - 1, tensor)


def test_a_pool_hands_errors_back_and_refuses_weights(held: Held) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(errors.ReadError, match="/absent") as caught:
            pool.apply(api.open, ("/absent.gguf",))
        assert caught.value.path == "/absent.gguf"
        with pytest.raises(errors.NotCopyableError):
            pool.apply(len, (held.weights,))
        assert pool.apply(len, ("it goes on",)) == 10


def cache_reader(held: Held) -> IntoCache:
    reader = IntoCache()
    file = held.weights.parts[0].file
    reader.read(file, 0, file.size, "mapped")
    return reader


def arena(_: Held) -> Arena:
    folder = os.open("/dev/shm", os.O_RDONLY)  # noqa: S108 - as the store has it
    try:
        return store_memory(folder, bound=False)(1 << 20, Layout((0,)), 0)
    finally:
        os.close(folder)


HALF_MADE: dict[str, Callable[[Held], Any]] = {
    name: OWNERS[name] for name in ("weights", "file", "mirror", "lease", "mapping")
} | {
    "arena": arena,
    "private arena": lambda _: private_memory(bound=False)(1 << 20, Layout((0,)), 0),
    "cache reader": cache_reader,
    "memory reader": lambda held: IntoMemory(held.weights.parts[0].file, direct=True, quiet=True),
}


@pytest.mark.parametrize("owner", HALF_MADE)
def test_half_made_objects_free_only_what_they_own(
    held: Held, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made without __init__, or of another one's __dict__, as some libraries rebuild objects."""
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    thing = HALF_MADE[owner](held)
    gc.collect()  # what earlier tests left
    expected, before = sums(held), descriptors()
    none: dict[str, Any] = {}
    for fields in (none, vars(thing)):
        half = object.__new__(type(thing))
        vars(half).update(fields)
        del half
    gc.collect()
    assert said == []
    assert descriptors() == before
    assert sums(held) == expected


def test_every_class_with_a_finalizer_refuses_copies_and_keeps_what_it_frees_in_slots() -> None:
    package = Path(api.__file__).parent
    trees = [ast.parse(path.read_text()) for path in package.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = 0
    for kind in classes:
        text = ast.unparse(kind)
        if "def __del__" in text:
            found += 1
            assert "NotCopyable" in map(ast.unparse, kind.bases), kind.name
            assert "__slots__ = " in text, kind.name
    assert found >= 5


@pytest.mark.parametrize("path", ["/absent.gguf", "/", "/dev/null", "nul\0.gguf", ""])
def test_files_that_cannot_be_opened_leave_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    gc.collect()  # what earlier tests left
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    before = descriptors()
    with pytest.raises(errors.ReadError):
        SourceFile(path)
    gc.collect()
    assert said == []
    assert descriptors() == before


@pytest.mark.parametrize("owner", ["weights", "file", "mirror", "lease", "mapping", "job"])
def test_closing_twice_closes_nothing_of_others(held: Held, owner: str) -> None:
    thing = OWNERS[owner](held)
    close = getattr(thing, "close", lambda: thing.__exit__(None, None, None))
    close()
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]  # the numbers that were closed
    close()
    if hasattr(thing, "__enter__"):
        with thing:
            pass
    for fd in others:
        os.fstat(fd)
        os.close(fd)


FORKED = """
import os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of threads
import numaload

weights = numaload.open(sys.argv[1])
mirror = numaload.mirror(weights, shared=True)
name = next(iter(weights))
mapped = weights[name].blocks
expected = int(mapped.sum())

def right():
    read = bytearray(weights[name].nbytes)
    weights[name].read_into(memoryview(read))
    found = [sum(read), int(weights[name].blocks.sum()), int(mirror.local()[name].blocks.sum())]
    return found == [expected] * 3

class Asking:  # of its files the prewarming hears only when the child has ended
    @property
    def paths(self):
        ended.wait()
        return weights.paths

ended = threading.Event()
job = numaload.prewarm_async(Asking())

child = os.fork()
if not child:
    ok = right() and not job.done()
    try:
        job.result()
    except numaload.errors.UsageError:
        pass
    mirror.close()
    weights.close()
    ok = ok and int(mapped.sum()) == expected
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert right()
ended.set()
assert job.result().paths == weights.paths
from numaload.replicas import reclaim, store
(released,) = reclaim.release(store.entries())
assert released.in_use  # the child let go of its own lease alone
"""


def test_a_forked_child_reads_and_closes_for_itself(store: Path, model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, model], capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
