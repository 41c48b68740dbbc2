"""What all tests share: a demo model, and a store of their own instead of the user's."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import Numaload
from numaload.demo import write_model


def pytest_configure() -> None:
    """What nohup, or a shell with jobs in the background, ignores for all that they start."""
    for number, action in (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, action)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of units as fast, but not the slow ones. Acceptance tests say it themselves."""
    for item in items:
        if item.path.parent.name == "unit" and not item.get_closest_marker("slow"):
            item.add_marker("fast")


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The split files of a model; in a guest they were written outside, its disk is its memory."""
    given = os.environ.get("NUMALOAD_TEST_MODELS")
    if given:
        return sorted(str(path) for path in Path(given).glob("demo-*.gguf"))
    folder = tmp_path_factory.mktemp("model")
    return write_model(str(folder / "demo.gguf"), 40 << 20, splits=2)


@pytest.fixture
def model(model_files: list[str]) -> str:
    """One of the split files: any one will do."""
    return model_files[-1]


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """Count the files that this process has open; what earlier tests left is collected first."""
    gc.collect()
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every fallback reported again, though this process may have done so."""
    monkeypatch.setattr("numaload.errors._said", set())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty store in shared memory for this test."""
    folder = Path(tempfile.mkdtemp(prefix="numaload-test-", dir="/dev/shm"))
    store = folder / f"numaload-{os.geteuid()}"
    monkeypatch.setenv("NUMALOAD_STORE", str(store))
    yield store
    shutil.rmtree(folder)


@pytest.fixture
def numaload(store: Path) -> Numaload:
    """The command line, on this test's store."""
    return Numaload(store)
