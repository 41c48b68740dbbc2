"""Plans for reading: what is chosen, what can be forced, what trying them changes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import numaload as api
from numaload.errors import CancelledError, UsageError
from numaload.files import plan, reader
from numaload.files.plan import (
    BUFFERED,
    CACHE,
    CANDIDATES,
    DIRECT,
    MAPPED,
    MEMORY,
    Forced,
    ReadMethod,
    make_plan,
)
from numaload.files.reader import Chunk, Ranges, Reading, in_stripes
from numaload.machine.devices import Device
from numaload.machine.stopping import stopping

GIB, MIB = 1 << 30, 1 << 20
CPUS = api.topology().cpus


def device(kind: str = "nvme") -> Device:
    return Device(kind, "disk0", "ext4", 1)


@pytest.mark.parametrize("kind", CANDIDATES)
@pytest.mark.parametrize("sink", [CACHE, MEMORY])
def test_a_plan_says_why(kind: str, sink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "huge_reads", lambda: True)
    made = make_plan(sink, device(kind), 64 * GIB)
    assert made.way == CANDIDATES[kind][sink][0]
    assert made.why == str(device(kind))
    told = made.to_dict()
    assert told["way"] in str(made)
    assert (told["threads"], told["chunk"]) == made.way[1:]
    assert told["device"]["kind"] == kind


def test_a_hard_disk_gets_one_stream_and_is_not_tried() -> None:
    for sink in (CACHE, MEMORY):
        made = make_plan(sink, device("hdd"), 64 * GIB)
        assert [way.threads for way in made.candidates] == [1]


def test_older_kernels_and_other_people_s_files_are_read_through_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_plan(CACHE, device(), 64 * GIB, seen=False)
    assert {way.name for way in made.candidates} == {BUFFERED}
    assert "only owners" in made.why
    monkeypatch.setattr(plan, "huge_reads", lambda: False)
    made = make_plan(CACHE, device("hdd"), 64 * GIB)
    assert made.candidates == (ReadMethod(BUFFERED, 1),)
    assert "5.18" in made.why


@pytest.mark.parametrize(
    ("release", "able"), [("6.18.1-fc", True), ("5.18", True), ("5.17.9", False), ("4.19.0", False)]
)
def test_kernels_that_read_huge_folios(
    monkeypatch: pytest.MonkeyPatch, release: str, able: bool
) -> None:
    class Named:
        def __init__(self) -> None:
            self.release = release

    monkeypatch.setattr(os, "uname", Named)
    monkeypatch.setattr(os.path, "isdir", lambda _: True)
    assert plan.huge_reads() == able


def test_what_is_forced_is_what_is_planned() -> None:
    made = make_plan(CACHE, device(), GIB, forced=Forced(BUFFERED, 3, MIB, "stripes"))
    assert made.candidates == (ReadMethod(BUFFERED, 3, MIB),)
    assert made.order == "stripes"
    assert "as asked for" in made.why
    assert make_plan(CACHE, device(), GIB, forced=Forced(threads=5)).way.threads == 5
    assert make_plan(MEMORY, device("network"), GIB, forced=Forced(DIRECT)).way.name == DIRECT


@pytest.mark.parametrize(
    ("sink", "forced", "said"),
    [
        (CACHE, Forced(DIRECT), "expected mapped or buffered"),
        (MEMORY, Forced(MAPPED), "expected direct or buffered"),
        (CACHE, Forced("fast"), "fast"),
        (CACHE, Forced(order="random"), "expected file or stripes"),
        (CACHE, Forced(threads=0), "expected at least 1"),
        (CACHE, Forced(chunk=1000), "expected a multiple of 4096"),
        (CACHE, Forced(chunk=0), "expected a multiple"),
        (CACHE, Forced(chunk=1 << 40), "up to"),
    ],
)
def test_what_cannot_be_forced(sink: str, forced: Forced, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_plan(sink, device(), GIB, forced=forced)


def test_no_more_threads_than_there_is_to_read() -> None:
    assert make_plan(MEMORY, device(), 20 * MIB).way.threads == 3
    assert make_plan(MEMORY, device(), 0).way.threads == 1


class Disk:
    """Reads so many bytes a second, by name of the way, on a clock of its own: others are busy."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates, self.now, self.lock = rates, 0.0, threading.Lock()
        self.seen: list[str] = []

    def work(self, chunk: Chunk, way: ReadMethod) -> None:
        with self.lock:
            self.seen.append(way.name)
            self.now += chunk.nbytes / self.rates[way.name]


def reading(
    rates: dict[str, float], ways: Sequence[ReadMethod], monkeypatch: pytest.MonkeyPatch
) -> plan.ReadPlan:
    disk = Disk(rates)
    clock = SimpleNamespace(perf_counter=lambda: disk.now, monotonic=time.monotonic)
    monkeypatch.setattr(reader, "time", clock)
    monkeypatch.setattr(reader, "TRY_BYTES", 4 * MIB)
    total = 200 * MIB
    made = make_plan(CACHE, device(), total).forced_to(ways)
    done = Reading(total).run([[(0, total)]], made, disk.work, CPUS, "numaload-test")
    assert disk.seen.count(done.way.name) > len(disk.seen) // 2
    return done


def test_the_fastest_that_was_tried_reads_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = (ReadMethod(BUFFERED, 1, MIB), ReadMethod(MAPPED, 1, MIB))
    done = reading({BUFFERED: 0.2e9, MAPPED: 2e9}, ways, monkeypatch)
    assert done.way == ways[1]
    assert [one.way for one in done.tried] == list(ways)
    assert "tried on this file" in done.why


def test_one_that_is_hardly_faster_does_not_replace_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = (ReadMethod(BUFFERED, 1, MIB), ReadMethod(MAPPED, 1, MIB))
    first = make_plan(CACHE, device(), GIB).forced_to(ways)
    tried = [plan.Tried(ways[0], 1.00e9), plan.Tried(ways[1], 1.05e9)]
    assert first.with_tried(tried).way == ways[0]
    tried[1] = plan.Tried(ways[1], 1.2e9)
    assert first.with_tried(tried).way == ways[1]
    assert set(first.with_tried(tried).candidates) == set(ways)


def test_small_readings_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(CACHE, device("virtual"), 100 * MIB)
    done = Reading(100 * MIB).run([[(0, 100 * MIB)]], made, lambda *_: None, CPUS, "numaload-test")
    assert done.tried == ()
    assert done == made


RUNS = st.lists(st.integers(0, 400), unique=True, max_size=12).map(
    lambda edges: list(zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False))
)


@given(st.lists(RUNS, max_size=3), st.integers(1, 50), st.lists(st.integers(1, 200), max_size=4))
def test_pieces_are_all_bytes_once(
    runs: list[list[tuple[int, int]]], chunk: int, shares: list[int]
) -> None:
    ranges = Ranges(runs)
    chunks = [part for share in shares for part in ranges.first(share, chunk)]
    chunks += ranges.first(ranges.left, chunk)
    naive = [(i, at) for i, its in enumerate(runs) for a, b in its for at in range(a, b)]
    assert [(p.which, at) for p in chunks for at in range(p.offset, p.stop)] == naive
    assert all(p.offset // chunk == (p.stop - 1) // chunk for p in chunks)


@given(st.integers(0, 100), st.integers(1, 9))
def test_stripes_are_all_pieces(count: int, threads: int) -> None:
    chunks = [Chunk(0, i, 1) for i in range(count)]
    striped = list(in_stripes(chunks, threads))
    assert sorted(striped) == chunks
    each = -(-count // threads)
    if each > 1:
        firsts = [chunk.offset for chunk in striped[: -(-count // each)]]
        assert firsts == list(range(0, count, each))


def test_the_rate_is_kept() -> None:
    begin = time.monotonic()
    Reading(4 * MIB, rate=8 * MIB).run(
        [[(0, 4 * MIB)]],
        make_plan(CACHE, device(), 4 * MIB),
        lambda *_: None,
        CPUS,
        "numaload-test",
    )
    assert time.monotonic() - begin > 0.3  # half a second less its last read


def test_an_error_ends_the_reading_in_all_threads() -> None:
    done: list[int] = []

    def work(chunk: Chunk, _: ReadMethod) -> None:
        if chunk.offset == 8 * MIB:
            raise OSError("bad block")
        if chunk.offset > 8 * MIB:
            assert job.token.wait(60)
        done.append(chunk.offset)

    made = make_plan(CACHE, device(), 10 * GIB).forced_to([ReadMethod(BUFFERED, 2, MIB)])
    job = Reading(10 * GIB)
    with pytest.raises(OSError, match="bad block"):
        job.run([[(0, 10 * GIB)]], made, work, CPUS, "numaload-test")
    assert len(done) <= 9
    assert not [t for t in threading.enumerate() if t.name.startswith("numaload-test")]


def test_a_thread_that_read_enough_ends_the_others_without_an_error() -> None:
    """Those that ask a network file system give up as soon as nobody wants the answer."""
    waiting = threading.Event()

    def work(chunk: Chunk, _: ReadMethod) -> None:
        if chunk.offset == 0:
            assert waiting.wait(60)
            job.token.cancel()
        else:
            waiting.set()
            assert job.token.wait(60)
            assert stopping()
            raise CancelledError("interrupted")

    made = make_plan(CACHE, device(), 10 * MIB).forced_to([ReadMethod(BUFFERED, 2, MIB)])
    job = Reading(10 * MIB)
    job.run([[(0, 10 * MIB)]], made, work, CPUS, "numaload-test")
    assert job.done == MIB


@pytest.mark.slow
def test_cancelled_while_it_waits_for_its_rate() -> None:
    made = make_plan(CACHE, device(), 100 * MIB)
    job = Reading(100 * MIB, lambda done, _: done < MIB, rate=MIB)
    with pytest.raises(CancelledError) as caught:
        job.run([[(0, 100 * MIB)]], made, lambda *_: None, CPUS, "numaload-test")
    assert MIB <= caught.value.done < 3 * MIB
