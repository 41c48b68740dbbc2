"""``numaload bench mirror``: how fast replicas are built of a model in RAM, and what limits it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

from numaload.bench.machine import LOAD_AFTER, Progress, Series, check_rounds, describe, load
from numaload.errors import ReadError, reason
from numaload.files.source import SourceFile
from numaload.linux.lists import Group, format_list
from numaload.linux.mapping import MappedMemory, map_private
from numaload.linux.syscalls import PAGE
from numaload.machine import memory
from numaload.machine.probe import why_not_bound
from numaload.machine.topology import topology
from numaload.pagecache.prewarm import prewarm
from numaload.replicas.arena import private_memory
from numaload.replicas.build import build
from numaload.replicas.layout import Layout
from numaload.weights import open_weights

CHUNK = 8 << 20
MARGIN = 0.25  # see machine.Series
TMPFS = "/dev/shm"  # noqa: S108 - the file system that replicas lie on
REPLICAS, COPY, COPIES, CP, CLEAR = (
    "replicas", "copy, 1 thread", "copy, all CPUs", "cp to tmpfs", "clearing",
)  # fmt: skip

Timed = Callable[[], float]  # seconds


@dataclass
class MirrorReport:
    """nbytes: of the model; replicas: how many are built. rates: {what: GB/s in order}, of memory
    that is filled.
    """

    machine: dict[str, str]
    paths: list[str]
    nbytes: int
    nodes: list[int]
    bound: bool
    rounds: int
    rates: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, what: str) -> float:
        """Return how many times as fast as a copy by one thread: the median over rounds."""
        pairs = zip(self.rates[what], self.rates[COPY], strict=True)
        return median(rate / base for rate, base in pairs)

    @property
    def series(self) -> list[Series]:
        """Return the replicas' rounds, beside a copy by as many threads."""
        beside = self.rates[COPIES]
        return [Series(REPLICAS, "GB/s", self.rates[REPLICAS], MARGIN, COPIES, beside)]

    def to_dict(self) -> dict[str, Any]:
        ratios = {what: self.ratio(what) for what in self.rates}
        return asdict(self) | {"ratios": ratios, "series": [asdict(one) for one in self.series]}


def measure(path: str, rounds: int = 15, progress: Progress | None = None) -> MirrorReport:
    """Build private replicas on all nodes, each time beside its limits, in shuffled turns.

    The model is brought into RAM first, and the memory that a round takes is touched and freed.
    Raises: UsageError, ReadError, FormatError for what is no model, NodeMemoryError;
    PlacementError, ChecksumError of a replica.
    """
    check_rounds(rounds)
    nodes = topology().all
    with open_weights(path) as weights:
        files = [part.file for part in weights.parts]
        paths, nbytes = [file.path for file in files], sum(file.size for file in files)
        memory.require((len(nodes) + 1) * nbytes, "replicas to measure", "take a smaller model")
        bound = why_not_bound(nodes) is None
        machine = describe() | {"replicas on": format_list(nodes), "bound": str(bound)}
        report = MirrorReport(machine, paths, nbytes, nodes, bound, rounds)
        ways: dict[str, tuple[Timed, int]] = {
            REPLICAS: (partial(_build, files, nodes, bound=bound), len(nodes)),
            COPY: (partial(copied, paths, 1), 1),
            COPIES: (partial(copied, paths, len(topology().cpus)), 1),
            CLEAR: (partial(cleared, nbytes), 1),
        }
        why = _why_not_cp(nbytes)
        if why:
            report.notes.append(f"{CP} is not measured: {why}")
        else:
            ways[CP] = (partial(_cp, paths), 1)
        report.rates = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name in random.sample(list(ways), len(ways)):
                run, copies = ways[name]
                if progress is not None:
                    progress(f"round {turn} of {rounds}: {name}" if turn else f"warming up: {name}")
                prewarm(path)  # machines page out what is idle
                cleared(copies * nbytes)
                seconds = run()
                if turn:  # the first one imports and compiles
                    report.rates[name].append(copies * nbytes / seconds / 1e9)
    report.machine[LOAD_AFTER] = load()
    return report


def _why_not_cp(nbytes: int) -> str:
    """Say why cp cannot make files of so many bytes on the tmpfs; "" where it can."""
    if shutil.which("cp") is None:
        return "no cp is installed"
    try:
        free = shutil.disk_usage(TMPFS).free
        os.close(_nameless())
    except OSError as error:
        return f"{TMPFS}: {reason(error)}"
    return "" if free > nbytes else f"{TMPFS}: it has room for {free} bytes, {nbytes} are needed"


def _nameless() -> int:
    """Make a file that is gone with its last descriptor, whatever ends this process."""
    return os.open(TMPFS, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _build(files: Sequence[SourceFile], nodes: Sequence[int], *, bound: bool) -> float:
    """Build, with checksums and proof of placement; giving the memory back is not timed."""
    layouts: dict[Group, Layout] = {(node,): Layout((node,)) for node in nodes}
    begin = time.perf_counter()
    made = build(files, layouts, private_memory(bound=bound), topology(), bound=bound)
    seconds = time.perf_counter() - begin
    made.close()
    return seconds


def copied(paths: Sequence[str], threads: int) -> float:
    """Read files into fresh anonymous huge pages: the least that a replica costs. Return seconds.

    What the mapping costs to take away is not in them.
    """
    seconds = 0.0
    for path in paths:
        size = os.path.getsize(path)
        each = max(PAGE, -(-size // threads // PAGE) * PAGE)
        with map_private(size) as mapping, open(path, "rb") as file:
            starts = range(0, size, each)
            begin = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                futures = [pool.submit(_read, file.fileno(), mapping, at, each) for at in starts]
            seconds += time.perf_counter() - begin
            for future in futures:
                future.result()
    return seconds


def _read(fd: int, mapping: MappedMemory, start: int, nbytes: int) -> None:
    stop = min(start + nbytes, mapping.length)
    for at in range(start, stop, CHUNK):
        with mapping.view(at, min(CHUNK, stop - at), write=True) as view:
            os.preadv(fd, [view], at)


def cleared(nbytes: int) -> float:
    """Touch and free memory: the kernel clears each page. Return seconds of the touching.

    Hosts of virtual machines take idle memory back: what was touched shortly before is fast.
    """
    with map_private(nbytes) as mapping, mapping.view(write=True) as view:
        begin = time.perf_counter()
        for page in range(0, nbytes, PAGE):
            view[page] = 1
        return time.perf_counter() - begin


def _cp(paths: Sequence[str]) -> float:
    """Copy files by cp, with its start. Return seconds."""
    begin, targets = time.perf_counter(), list[int]()
    try:
        for path in paths:
            targets.append(_nameless())
            command = ["cp", "--", path, f"/dev/fd/{targets[-1]}"]
            done = subprocess.run(command, capture_output=True, check=False, pass_fds=targets)
            if done.returncode:
                raise ReadError(done.stderr.decode(errors="replace").strip(), path=path)
        return time.perf_counter() - begin
    finally:
        for target in targets:
            os.close(target)
