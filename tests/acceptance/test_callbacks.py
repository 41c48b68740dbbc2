"""Progress callbacks are the user's code: they may call anything, raise, fork, and end late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from commands import LIMIT_S, Numaload
from numaload.demo import write_model

MIB = 1 << 20
# What a program of these tests begins with: a hang ends it, and says where.
BEGIN = f"""
import faulthandler, json, os, signal, sys, threading
faulthandler.register(signal.SIGALRM, chain=True)
signal.alarm({LIMIT_S // 2})  # not by a thread of faulthandler's: forked children have none
import numpy as np
import numaload
from numaload.errors import NumaloadError, UsageError
from numaload.pipeline import Target, fill

path = sys.argv[1]
weights = numaload.open(path)
name = max(weights, key=lambda n: weights[n].size)  # work for all threads of the pool
few = "^blk.0.attn_norm"  # an ordinary user may lock 8 MiB
expected = weights[name].dequantize().tobytes()

def targets():
    return [Target(t, np.empty(t.size, np.float32), "float32") for t in weights.values()]

def prewarm(**options):
    numaload.evict(path)
    return numaload.prewarm(path, way="buffered", chunk=1 << 20, **options)

VERBS = {{
    "stream": lambda **how: [n for n, _ in numaload.stream(weights, **how)],
    "fill": lambda **how: fill(targets(), **how),
    "copy": lambda **how: numaload.open(path, copy=True, **how).close(),
    "mirror": lambda **how: numaload.mirror(path, shared=True, **how).close(),
    "prewarm": prewarm,
    "job": lambda **how: numaload.prewarm_async(path, **how).result(),
}}
"""
VERBS = ("stream", "fill", "copy", "mirror", "prewarm", "job")
ANYTHING = (
    BEGIN
    + """
CALLS = VERBS | {
    "dequantize": lambda: weights[name].dequantize(),
    "verify": lambda: numaload.mirror(path).verify(),
    "evict": lambda: numaload.evict(path),
    "prewarm in another": lambda: numaload.prewarm(path, tensors=few, lock=True).holder.release(),
    "closed": lambda: numaload.open(path).close(),
}
verb, answers, said = sys.argv[2], {}, []

def progress(done, total):
    said.append((threading.get_ident(), done, total))
    for call, run in CALLS.items() if len(said) == 2 else ():
        try:
            run()
            answers[call] = "done"
        except UsageError as error:
            answers[call] = str(error)

if verb == "job":
    numaload.evict(path)
VERBS[verb](progress=progress)
done = [done for _, done, _ in said]
print(json.dumps({
    "answers": answers, "threads": len({thread for thread, _, _ in said}),
    "ordered": done == sorted(done) and done[-1] == said[-1][2],
    "right": weights[name].dequantize().tobytes() == expected,
}))
"""
)


@pytest.fixture
def big(tmp_path: Path) -> str:
    return write_model(str(tmp_path / "m.gguf"), 24 * MIB)[0]


@pytest.mark.parametrize("verb", VERBS)
def test_a_callback_may_call_anything(numaload: Numaload, big: str, verb: str) -> None:
    """All of it is done there, or is a named error that says when it can be."""
    found: dict[str, Any] = numaload.python(ANYTHING, big, verb)
    refused = {call: said for call, said in found["answers"].items() if said != "done"}
    expected = {
        "mirror": {"mirror": "one builder at a time"},
        "prewarm": {"prewarm in another": "call it when that has returned"},
        "job": {"prewarm in another": "call it when that has returned"},
    }.get(verb, {})
    assert len(found["answers"]) > len(VERBS)
    assert refused.keys() == expected.keys(), refused
    assert all(text in refused[call] for call, text in expected.items())
    assert found["right"]
    assert found["ordered"]
    assert found["threads"] == 1


FAILING = (
    BEGIN
    + """
answers = {}
for verb, run in VERBS.items():
    def fails(done, total):
        if done:
            raise ZeroDivisionError

    def stops(done, total):
        return not done

    for callback in (fails, stops):
        try:
            if verb == "job":
                numaload.evict(path)
            run(progress=callback)
        except (ZeroDivisionError, NumaloadError) as error:
            answers.setdefault(verb, []).append(type(error).__name__)
    assert weights[name].dequantize().tobytes() == expected
    run()
left = [t.name for t in threading.enumerate() if t.name in ("numaload-ahead", "numaload-prewarm")]
print(json.dumps([answers, left]))
"""
)


def test_a_callback_that_raises_or_stops_leaves_all_working(numaload: Numaload, big: str) -> None:
    answers, left = numaload.python(FAILING, big)
    assert answers == {key: ["ZeroDivisionError", "CancelledError"] for key in VERBS}
    assert left == []


GARBAGE = (
    BEGIN
    + """
import gc
small, counts = min(weights, key=lambda n: weights[n].size), {"verb": 0, "stream": 0}

class Garbage:
    '''Found by the collector in whatever thread runs, inside whatever lock.'''

    busy = threading.local()

    def __init__(self):
        self.cycle, self.stream = self, numaload.stream(weights, ahead=1 << 20)
        next(self.stream)

    def __del__(self):
        if not getattr(self.busy, "now", False):
            self.busy.now = True
            counts["verb"] += weights[name].dequantize().tobytes() == expected
            counts["stream"] += len(dict(numaload.stream(weights, names=[small])))
            self.busy.now = False

gc.set_threshold(1)
for verb in ("stream", "fill", "copy", "prewarm"):
    for _ in range(4):
        for _ in range(3):
            Garbage()
        VERBS[verb](progress=lambda done, total: [[] for _ in range(9)])
gc.collect()
print(json.dumps(counts))
"""
)


def test_garbage_that_calls_us_back_at_any_moment(numaload: Numaload, big: str) -> None:
    counts = numaload.python(GARBAGE, big)
    assert counts["verb"] == counts["stream"] > 8


FORKING = (
    BEGIN
    + """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
verb = sys.argv[2]
parent, children = os.getpid(), []

def fork():
    '''True in the child, in which everything works that is begun there.'''
    pid = os.fork()
    if pid:
        children.append(pid)
        return False
    signal.alarm(60)
    assert weights[name].dequantize().tobytes() == expected
    assert len(VERBS["stream"]()) == len(weights)
    VERBS["fill"]()
    numaload.open(path, copy=True).close()
    numaload.prewarm(path)
    return True

def progress(done, total):
    if len(children) < 2:  # at once, and when something was done
        fork()

try:
    VERBS[verb](progress=progress)
except UsageError as error:
    assert os.getpid() != parent and f"process {parent}" in str(error)
    sys.exit(7)  # as programs end: what is left is cleared away, threads are waited for
assert os.getpid() == parent
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))
"""
)


@pytest.mark.parametrize("verb", VERBS[:-1])
def test_a_callback_that_forks(numaload: Numaload, big: str, verb: str) -> None:
    """Its child works, but the parent's call is not the child's to go on with."""
    assert numaload.python(FORKING, big, verb) == [7, 7]


ITERATING = (
    BEGIN
    + """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
parent, children, found = os.getpid(), [], []
for one, _ in (stream := numaload.stream(weights, ahead=4 << 20)):
    found.append(one)
    if os.getpid() != parent or len(children) == 4:
        continue
    pid = os.fork()
    if pid:
        children.append(pid)
        continue
    assert weights[name].dequantize().tobytes() == expected
    if len(children) % 2:
        sys.exit(5)  # in the middle of it
    try:
        next(stream)
    except UsageError as error:
        assert f"process {parent}" in str(error)
        sys.exit(5)
assert found == list(weights)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))
"""
)


def test_a_fork_inside_a_stream(numaload: Numaload, big: str) -> None:
    assert numaload.python(ITERATING, big) == [5, 5, 5, 5]


BESIDE = (
    BEGIN
    + """
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)
verb, over = sys.argv[2], threading.Event()

def again():
    while not over.is_set():
        weights[name].dequantize() if verb == "dequantize" else VERBS[verb]()

def child():
    signal.alarm(60)
    assert weights[name].dequantize().tobytes() == expected
    assert weights[name].blocks.any()
    VERBS["prewarm"]()
    for kind in VERBS:
        VERBS[kind]()
    weights.close()

thread = threading.Thread(target=again, daemon=True)
thread.start()
context = multiprocessing.get_context("fork")
for _ in range(2):
    process = context.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode
over.set()
thread.join()
assert weights[name].dequantize().tobytes() == expected
print(json.dumps("done"))
"""
)


@pytest.mark.parametrize("verb", ["dequantize", "stream", "mirror", "prewarm"])
def test_a_child_forked_while_another_thread_works(numaload: Numaload, big: str, verb: str) -> None:
    """Also in the middle of what is imported on first use."""
    assert numaload.python(BESIDE, big, verb) == "done"
