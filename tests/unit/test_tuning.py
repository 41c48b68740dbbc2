"""How ``numaload tune`` chooses: on a disk that answers as told, by its own clock."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from commands import evict, resident
from numaload.bench import tune
from numaload.bench.tune import BEFORE, LEAST, PARTS, TunedSink, _Tuner
from numaload.cli.main import main
from numaload.errors import ReadError
from numaload.files.plan import BUFFERED, CACHE, DIRECT, MAPPED, MEMORY, ReadMethod, Tuned
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.files.tuned import keep, records
from numaload.machine.devices import Device, device_of

MIB = 1 << 20
Rate = Callable[[ReadMethod], float]
PART = BEFORE + LEAST
DEFAULT = ReadMethod(MAPPED, 4)  # of NVMe into the page cache


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tuning") / "file"
    path.write_bytes(os.urandom(PARTS * PART))
    evict([str(path)])
    if resident(path):
        pytest.skip("no disk under the temporary folder")
    return str(path)


@pytest.fixture
def file(path: str) -> Iterator[SourceFile]:
    evict([path])
    with SourceFile(path) as opened:
        yield opened


class Simulated(_Tuner):
    """A tuner of a disk that reads as fast as told; ``turns`` are what was read."""

    def __init__(self, file: SourceFile, rate: Rate) -> None:
        super().__init__(file, lambda _: None)
        self.device = Device("nvme", "disk0", "ext4", 1)
        self.rate = rate
        self.turns: list[ReadMethod] = []

    def _turn(self, sink: str, way: ReadMethod, *, first: bool = False) -> float:  # noqa: ARG002
        self.turns.append(way)
        return self.rate(way)


def chosen(file: SourceFile, rate: Rate) -> TunedSink:
    return Simulated(file, rate).tune(CACHE)


def test_more_threads_are_found_where_they_pay(file: SourceFile) -> None:
    found = chosen(file, lambda way: 1e8 * min(way.threads, 16))
    assert found.default == DEFAULT
    assert found.way.threads >= 16
    assert found.gain == pytest.approx(4)
    assert max(found.rates, key=lambda way: found.rates[way][0]).threads == found.way.threads


def test_a_way_that_is_faster_only_in_the_middle_of_a_file_is_not_taken(file: SourceFile) -> None:
    class Beginning(Simulated):
        def _turn(self, sink: str, way: ReadMethod, *, first: bool = False) -> float:
            return 1e9 if first else super()._turn(sink, way)

    found = Beginning(file, lambda way: 1e8 * way.threads).tune(CACHE)
    assert (found.way, found.gain) == (DEFAULT, 1)


def test_another_way_is_found(file: SourceFile) -> None:
    found = chosen(file, lambda way: 2e9 if way.name == BUFFERED else 1e9)
    assert (found.way.name, found.gain) == (BUFFERED, 2)


def test_noise_does_not_replace_the_default(file: SourceFile) -> None:
    """But for one time in forty, as the interval has it."""
    others = 0
    for seed in range(40):
        noise = random.Random(seed)
        found = chosen(file, lambda _: noise.lognormvariate(0, 0.5))  # noqa: B023 - called now
        others += found.way != DEFAULT
    assert others <= 2


def test_a_little_is_not_worth_leaving_the_default(file: SourceFile) -> None:
    found = chosen(file, lambda way: 1e9 if way == DEFAULT else 1.04e9)
    assert (found.way, found.gain) == (DEFAULT, 1)


def test_a_clear_difference_shows_through_noise(file: SourceFile) -> None:
    noise = random.Random(1)
    found = chosen(
        file, lambda way: (1 + (way.name == BUFFERED)) * noise.lognormvariate(0, 0.1) * 1e9
    )
    assert found.way.name == BUFFERED
    assert 1.7 < found.gain < 2.3


@pytest.mark.parametrize("turn_s", [2, 3, 30])
def test_a_device_is_too_slow_if_the_time_is_over_before_all_rounds(
    file: SourceFile, monkeypatch: pytest.MonkeyPatch, turn_s: int
) -> None:
    def rate(way: ReadMethod) -> float:
        return 1e9 * way.threads

    tuner = Simulated(file, rate)
    monkeypatch.setattr(
        tune, "time", SimpleNamespace(perf_counter=lambda: turn_s * len(tuner.turns))
    )
    found = tuner.tune(CACHE)
    assert (found.too_slow, found.way, found.gain) == (True, DEFAULT, 1)
    assert not chosen(file, lambda _: 1e9).too_slow


def test_what_is_too_slow_to_tell_is_said_and_not_kept(
    file: SourceFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    earlier = keep(file, device_of(file.path), {CACHE: Tuned(DEFAULT, 1.0, "")})
    assert main(["tune", file.path]) == 0
    assert not os.path.exists(earlier)
    said = capsys.readouterr().out
    assert said.count(": too slow to tell within 0 s; later reads go on trying\n") == 2
    assert "kept" not in said
    report = tune.tune(file.path)
    assert (report.record, records()) == ("", [])
    assert all(one["too_slow"] for one in report.to_dict()["sinks"].values())


def bring_in(file: SourceFile, offset: int) -> None:
    """Read a MiB as another program, and nothing ahead of it."""
    with open(file.path, "rb", buffering=0) as reader:
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(reader.fileno(), MIB, offset)


def test_an_error_does_not_leave_a_step_on_the_terminal(
    file: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[object] = []
    monkeypatch.setattr("numaload.cli.tune.show_step", shown.append)
    Path(file.path).read_bytes()
    assert main(["tune", file.path]) == 1
    assert shown == [""]


@pytest.mark.parametrize("first", [False, True])
def test_what_others_read_meanwhile_is_neither_measured_nor_given_back(
    file: SourceFile, *, first: bool
) -> None:
    tuner = _Tuner(file, lambda _: None)
    bring_in(file, MIB)
    there = resident(file.path)
    tuner.todo = iter(tuner._parts())
    tuner._turn(CACHE, DEFAULT, first=first)
    assert next(tuner.todo)[0] == 2 * PART
    assert resident(file.path) == there > 0


@pytest.mark.parametrize("sink", [CACHE, MEMORY])
def test_a_turn_reads_a_part_and_gives_it_back(file: SourceFile, sink: str) -> None:
    bring_in(file, PART + 4 * MIB)
    there = resident(file.path)
    with pytest.raises(
        ReadError, match=r"expected 4 pieces of 48 MiB .* found 3: numaload evict FILE"
    ):
        _Tuner(file, lambda _: None)  # one part of four is in RAM
    evict([file.path])
    tuner = _Tuner(file, lambda _: None)
    name = {CACHE: MAPPED, MEMORY: DIRECT}[sink]
    for _ in range(2 * PARTS):
        assert tuner._turn(sink, ReadMethod(name, 2, 4 * MIB)) > 0
    assert tuner.nbytes == 2 * PARTS * PART
    assert resident(file.path) == 0 < there


def test_all_parts_are_read_before_any_again(file: SourceFile) -> None:
    tuner = _Tuner(file, lambda _: None)
    parts = [tuner._next() for _ in range(2 * PARTS)]
    assert len({*parts[:PARTS]}) == len({*parts[PARTS:]}) == PARTS
    assert {stop - start for start, stop in parts} == {PART}


def test_a_file_in_pieces_keeps_parts_that_they_hold(file: SourceFile) -> None:
    tuner = Simulated(file, lambda _: 1e9)
    tuner.ranges = [(54 * i * MIB, (54 * i + 50) * MIB) for i in range(9)]
    tuner.tune(CACHE)
    assert (tuner.part, len(tuner._parts())) == (LEAST, 9)
    tuner.ranges = [(0, 1 << 40)]
    tuner.tune(CACHE)
    assert tuner.part > LEAST


def test_parts_that_others_brought_in_are_not_measured(file: SourceFile) -> None:
    tuner = _Tuner(file, lambda _: None)
    Path(file.path).read_bytes()
    with pytest.raises(ReadError, match="another program"):
        tuner._next()


def test_files_of_which_nobody_tells_what_is_in_ram_are_refused(
    file: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "residency", lambda file: residency(file)._replace(known=False))
    with pytest.raises(ReadError, match="tune a file of yours"):
        _Tuner(file, lambda _: None)


def test_ways_around_one_keep_their_threads_busy(file: SourceFile) -> None:
    tuner = _Tuner(file, lambda _: None)
    around = tuner._around(ReadMethod(MAPPED, 1, 32 * MIB))
    assert around[0] == ReadMethod(MAPPED, 2, LEAST // 2)
    assert around[1] == ReadMethod(MAPPED, 4, LEAST // 4)
    assert all(way.threads * way.chunk <= tuner.part for way in around)
    assert all(way.chunk >= MIB for way in tuner._around(ReadMethod(MAPPED, 16, MIB)))


@pytest.mark.parametrize("moment", [(tune, "_into_cache"), (SourceFile, "drop_cache")])
def test_ctrl_c_at_any_moment_of_a_turn_leaves_nothing(
    file: SourceFile, monkeypatch: pytest.MonkeyPatch, moment: tuple[object, str]
) -> None:
    """While it reads, and while it gives back what was read."""
    does = getattr(*moment)
    raised: list[int] = []

    def interrupted(*args: object) -> object:
        if raised:
            return does(*args)
        raised.append(1)
        if moment[0] is tune:
            does(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(*moment, interrupted)
    tuner = _Tuner(file, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        tuner.tune(CACHE)
    tuner.give_back()
    assert resident(file.path) == 0
