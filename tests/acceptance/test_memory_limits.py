"""Whatever allocates looks at limits first: smaller buffers, then a named error, never a kill."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import confined
from cgroups import memory_limit
from commands import LIMIT_S, Numaload
from numaload.demo import write_model

MIB = 1 << 20
PROGRAM = """
import json, sys, threading
import numpy as np
import numaload

def used(call):
    try:
        call()
    except numaload.errors.NodeMemoryError as error:
        return str(error)
    return ""

weights = numaload.open(sys.argv[1])
first = next(iter(weights.values()))
first.dequantize()

def in_threads(call, count=4):
    said = []
    threads = [threading.Thread(target=lambda: said.append(used(call))) for _ in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return all(said) and said[0]

def dequantized():
    for tensor in weights.values():
        kept.append(tensor.dequantize())

kept = []
CALLS = {
    "stream": lambda: sum(a.nbytes for _, a in numaload.stream(weights, "bfloat16")),
    "kept": lambda: list(numaload.stream(weights, "float32")),
    "all_kept": dequantized,
    "dequantize": lambda: [tensor.dequantize() for tensor in weights.values()],
    "copy": lambda: numaload.open(sys.argv[1], copy=True).close(),
    "cast": lambda: [tensor.torch("float64") for tensor in weights.values()],
}
if len(sys.argv) > 3:
    print(json.dumps(in_threads(CALLS[sys.argv[2]])))
else:
    print(json.dumps(used(CALLS[sys.argv[2]])))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("large")
    (path,) = write_model(str(folder / "model.gguf"), 200 * MIB)
    return path


def said_in(nbytes: int, *words: str) -> str:
    """The error of a call in a group of so much memory, or an empty string; it is not killed."""
    command = [sys.executable, "-c", PROGRAM, *words]
    with memory_limit(nbytes) as group:
        within = [sys.executable, confined.__file__, "--cgroup", group, "--", *command]
        done = subprocess.run(
            within, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout))


def test_a_stream_in_a_small_group_is_smaller(numaload: Numaload, large: str) -> None:
    numaload.python(PROGRAM, large, "stream")  # kernels are compiled outside
    assert said_in(100 * MIB, large, "stream") == ""


@pytest.mark.parametrize(
    ("call", "mib"),
    [("kept", 200), ("dequantize", 200), ("copy", 150), ("cast", 600)],
)
def test_what_does_not_fit_into_a_group_is_a_named_error(large: str, call: str, mib: int) -> None:
    if call == "cast":
        pytest.importorskip("torch")
    said = said_in(mib * MIB, large, call)
    assert "has room for" in said
    assert "memory.limit_in_bytes" in said or "memory.max" in said


@pytest.mark.parametrize("call", ["all_kept", "kept"])
def test_threads_that_allocate_at_the_same_time_are_not_killed(large: str, call: str) -> None:
    for _ in range(3):
        said = said_in(100 * MIB, large, call, "in threads")
        assert "has room for" in said


LIMITED = """
import ctypes, json, resource, sys, threading, time
import numaload
import numaload.files.copy, numaload.pipeline  # which take memory of their own
from numaload.machine.memory import TRUSTED_S

ctypes.CDLL(None).mallopt(-8, 1)  # one arena: making another takes 128 MiB for a moment
weights = numaload.open(sys.argv[1])
tensors = sorted(weights.values(), key=lambda tensor: tensor.size)
there = tensors[-1].dequantize()  # so its kernel is, and each thread that needs a stack:
workers = weights.workers()
all_at_once = threading.Barrier(workers.count)
for future in [workers.submit(all_at_once.wait) for _ in range(workers.count)]:
    future.result()
with open("/proc/self/statm") as file:
    columns = file.read().split()
column = 0 if sys.argv[2] == "AS" else 5
limit = int(columns[column]) * resource.getpagesize() + (8 << 20)
resource.setrlimit(getattr(resource, "RLIMIT_" + sys.argv[2]), (limit, limit))
time.sleep(2 * TRUSTED_S)  # for so long the last look at limits counts
said = []
for call in (tensors[-1].dequantize, lambda: list(numaload.stream(weights)),
             lambda: numaload.open(sys.argv[1], copy=True)):
    try:
        kept = call()
    except numaload.errors.NumaloadError as error:
        said.append([type(error).__name__, str(error)])
print(json.dumps(said))
"""


@pytest.mark.parametrize("limit", ["AS", "DATA"])
def test_limits_of_the_process_are_named(numaload: Numaload, large: str, limit: str) -> None:
    said = numaload.python(LIMITED, large, limit)
    assert [name for name, _ in said] == ["NodeMemoryError"] * 3, said
    assert all("ulimit -" in text for _, text in said), said


KEPT_ERROR = """
import json, sys
import numaload
from numaload.machine import memory

weights = numaload.open(sys.argv[1])
def fail(done, total):
    if done > total // 4:
        raise KeyError("mine")
try:
    list(numaload.stream(weights, "float32", progress=fail))
except KeyError as error:
    kept = error
print(json.dumps(sum(n for _, n in memory.promised())))
"""


def test_a_stream_that_fails_leaves_no_promise(numaload: Numaload, large: str) -> None:
    assert numaload.python(KEPT_ERROR, large) == 0
