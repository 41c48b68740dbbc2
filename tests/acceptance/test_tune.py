"""``numaload tune``: measured once, used and named by prewarm, mirror and copies, forgotten."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import Numaload, evict, resident
from numaload.demo import write_model

MIB = 1 << 20
COPY = """
import json, sys, numaload
plans = []
numaload.open(sys.argv[1], copy=True, announce=plans.append).close()
print(json.dumps([plan.to_dict() for plan in plans]))
"""
MIRROR = """
import json, sys, numaload
with numaload.mirror(sys.argv[1], shared=True) as mirror:
    print(json.dumps(mirror.report.plan.to_dict()))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    (path,) = write_model(str(tmp_path_factory.mktemp("tune") / "model.gguf"), 200 * MIB)
    evict([path])
    if resident(path):
        pytest.skip("no disk under the temporary folder")
    return path


@pytest.fixture
def model(written: str) -> str:
    """A model of 200 MiB, cold."""
    evict([written])
    return written


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuned"


@pytest.fixture
def report(numaload: Numaload, model: str, cache: Path) -> Any:
    """What tuning found; the record is in the cache, and the file cold."""
    return numaload.json("tune", model)


def edit(report: Any, change: Callable[[Any], object]) -> None:
    record = Path(report["record"])
    data = json.loads(record.read_text())
    change(data)
    record.write_text(json.dumps(data))


def test_every_sink_is_measured_and_ram_is_as_before(report: Any, model: str) -> None:
    assert resident(model) == 0
    assert report["path"] == model
    assert report["nbytes"] > 200 * MIB
    assert set(report["sinks"]) == {"page cache", "memory"}
    for found in report["sinks"].values():
        assert found["gain"] >= 1
        assert len(found["ways"]) > 1
        assert all(rate > 0 for one in found["ways"] for rate in one["rates"])
        same = {name: found[name] for name in found["default"]} == found["default"]
        assert same == (found["gain"] == 1)


def test_prewarm_mirror_and_copies_use_it_and_say_so(
    numaload: Numaload, model: str, report: Any
) -> None:
    way = {"name": "buffered", "threads": 3, "chunk": 2 * MIB, "gain": 1.44}
    edit(report, lambda data: data["plans"].update({"page cache": way, "memory": way}))
    read: dict[str, Callable[[], Any]] = {
        "prewarm": lambda: numaload.json("prewarm", model)["plan"],
        "copy": lambda: numaload.python(COPY, model)[0],
        "mirror": lambda: numaload.python(MIRROR, model),
    }
    for name, plan_of in read.items():
        plan = plan_of()
        evict([model])
        assert plan["way"] == "buffered"
        # Twice as many fill memory; a replica has at least one for each CPU.
        assert plan["threads"] >= {"prewarm": 3, "copy": 6, "mirror": 6}[name]
        assert plan["why"].endswith(": 1.4 times the default")
        assert plan["tried"] == []
    numaload("release")
    assert "1.4 times the default" in numaload("prewarm", model).stderr
    evict([model])
    assert "1.4 times the default" in numaload("mirror", model).stdout
    numaload("release")
    evict([model])
    forced = numaload.json("prewarm", model, "--way", "mapped", "--threads", "2")["plan"]
    assert (forced["way"], forced["threads"]) == ("mapped", 2)
    assert "tuned" not in forced["why"]


@pytest.mark.parametrize("what", ["device", "file system", "kernel", "numaload"])
def test_a_plan_is_dropped_when_something_changed(
    numaload: Numaload, model: str, report: Any, what: str
) -> None:
    edit(report, lambda data: data["conditions"].update({what: "older"}))
    done = numaload("prewarm", model)
    assert f"is not used: {what} is " in done.stderr
    assert "was older; run numaload tune FILE again" in done.stderr
    plan = next(line for line in done.stderr.splitlines() if "plan: " in line)
    assert "; tuned" not in plan


def test_forgotten_plans_are_named_and_gone(
    numaload: Numaload, model: str, report: Any, cache: Path
) -> None:
    kept = Path(report["record"]).read_bytes()
    said = numaload("tune", "--forget", model).stdout
    assert said.startswith("removed: tuned 2")
    assert list(cache.iterdir()) == []
    assert numaload("tune", "--forget").stdout == "no tuned plan was kept\n"
    assert numaload.json("tune", "--forget") == {"removed": [], "damaged": 0}
    record = Path(report["record"])
    record.write_bytes(kept)
    (one,) = numaload.json("tune", "--forget", model)["removed"]
    assert one["name"] == record.name
    assert set(one["plans"]["page cache"]) == {"name", "threads", "chunk", "gain"}
    record.write_text("{")
    done = numaload("tune", "--forget", model)
    assert done.stdout == "no tuned plan was kept\n"
    assert f"{record}: no tuned plan that can be used" in done.stderr
    assert numaload.json("tune", "--forget", model) == {"removed": [], "damaged": 1}
    done = numaload("tune", "--forget")
    assert (done.stdout, done.stderr) == ("removed: 1 damaged record\n", "")
    record.write_text("{")
    assert numaload.json("tune", "--forget") == {"removed": [], "damaged": 1}


def test_what_is_in_ram_cannot_be_measured_and_the_fix_is_named(
    numaload: Numaload, model: str, cache: Path, tmp_path: Path
) -> None:
    numaload("prewarm", model)
    assert "numaload evict FILE" in numaload("tune", model, status=1).stderr
    small = tmp_path / "small"
    small.write_bytes(bytes(MIB))
    assert "take a larger file" in numaload("tune", small, status=1).stderr
    assert "nothing is read there" in numaload("tune", in_memory(numaload), status=1).stderr
    assert "FILE is missing" in numaload("tune", status=2).stderr
    assert not cache.exists()


def in_memory(numaload: Numaload) -> Path:
    path = numaload.store.parent / "file"
    path.write_bytes(bytes(MIB))
    return path


def test_nothing_is_measured_that_cannot_be_kept(
    numaload: Numaload, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", str(tmp_path / "file"))
    done = numaload("tune", model, status=1)
    assert "tuned plans cannot be kept" in done.stderr
    assert "set NUMALOAD_CACHE_DIR" in done.stderr


@pytest.mark.parametrize("seconds", [0, 0.02, 0.06, 0.11, 0.17, 0.24, 0.32, 0.41])
def test_an_interrupted_tuning_leaves_nothing(
    numaload: Numaload, model: str, cache: Path, seconds: float
) -> None:
    running = numaload.start("tune", model)
    while running.poll() is None and not resident(model):
        time.sleep(0.001)
    time.sleep(seconds)  # within a turn, between two, while one is given back
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    if running.returncode:  # else it was over before
        assert running.returncode == 130, said
        assert list(cache.iterdir()) == []
    assert resident(model) == 0


def test_a_resident_file_is_prewarmed_without_looking_for_a_plan(
    numaload: Numaload, model: str, report: Any
) -> None:
    program = (
        "import json, sys, numaload; report = numaload.prewarm(sys.argv[1]);"
        " weights = numaload.open(sys.argv[1]); weights.close();"
        " print(json.dumps([report.read, 'numaload.files.tuned' in sys.modules]))"
    )
    numaload("prewarm", model)
    read, looked = numaload.python(program, model)
    assert looked == bool(read)  # some may have been paged out since
