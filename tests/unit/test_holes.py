"""Holes in files are said once, with the tensors that are in them; other files cost nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import gguf_builder as gb
import numaload
import safetensors_builder as sb
from commands import evict
from numaload.backends.gguf_reader import GGUFReader
from numaload.backends.ktransformers import SafeTensorLoader
from numaload.errors import NumaloadWarning

MIB = 1 << 20
SAID = "are on no disk and read as zeros: a download that did not finish, or zeros"
pytestmark = pytest.mark.usefixtures("nothing_said")


def rows(names: str) -> list[bytes]:
    return [gb.tensor(name, (MIB,), offset=4 * MIB * at) for at, name in enumerate(names)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three tensors of 4 MiB; all is on the disk."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([], rows("abc"), os.urandom(12 * MIB)))
    return path


def start_of(path: Path, name: str) -> int:
    with numaload.open(path) as weights:
        return int(weights[name].offset)


def punch(path: Path, at: int, nbytes: int) -> None:
    """Write all of the file again but for these bytes."""
    raw = path.read_bytes()
    path.unlink()
    with path.open("wb") as file:
        file.write(raw[:at])
        file.seek(at + nbytes)
        file.write(raw[at + nbytes :])
        file.truncate(len(raw))


def test_a_whole_file_is_not_mentioned(model: Path, recwarn: pytest.WarningsRecorder) -> None:
    numaload.open(model).close()
    numaload.prewarm(model)
    assert not recwarn


@pytest.mark.parametrize(
    ("at", "nbytes", "tensors"),
    [(0, 4 * MIB, "a"), (2 * MIB, 4 * MIB, "a, b"), (8 * MIB, 4 * MIB, "c"), (MIB, 2 * MIB, "a")],
    ids=["first", "across", "to-the-end", "inside"],
)
def test_a_hole_is_said_once(model: Path, at: int, nbytes: int, tensors: str) -> None:
    at += start_of(model, "a")
    punch(model, at, nbytes)
    with pytest.warns(NumaloadWarning, match=rf"m\.gguf: .*in tensors {tensors} {SAID}") as said:
        numaload.open(model).close()
    found = re.search(r"(\d+) bytes from byte (\d+) on", str(said[0].message))
    assert found is not None
    page = os.sysconf("SC_PAGESIZE")
    assert nbytes - 2 * page <= int(found[1]) <= nbytes
    assert at <= int(found[2]) <= at + page
    numaload.open(model).close()


@pytest.mark.parametrize("at", [0, 4 * MIB - (512 << 10)], ids=["small", "small-across"])
def test_small_holes_are_not_mentioned(
    model: Path, at: int, recwarn: pytest.WarningsRecorder
) -> None:
    punch(model, start_of(model, "a") + at, MIB - 1)
    numaload.open(model).close()
    assert not recwarn


def test_holes_between_tensors_are_not_mentioned(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "m.gguf"
    ends = [gb.tensor("a"), gb.tensor("b", offset=8 * MIB)]
    path.write_bytes(gb.build([], ends, os.urandom(8 * MIB + 128)))
    punch(path, MIB, 4 * MIB)
    numaload.open(path).close()
    assert not recwarn
    with pytest.warns(NumaloadWarning, match=rf"on {SAID}"):  # of bytes that nobody named
        prewarmed(path)


def test_room_that_was_set_aside_is_a_hole(model: Path) -> None:
    """As aria2 does, whose own file says that it is not done."""
    size = model.stat().st_size
    if not os.major(model.stat().st_dev):
        pytest.skip("needs a file system on a disk: room on others is not told from data")
    os.truncate(model, 5 * MIB)
    fd = os.open(model, os.O_RDWR)
    os.posix_fallocate(fd, 0, size)
    os.fsync(fd)
    os.close(fd)
    Path(f"{model}.aria2").touch()
    with pytest.warns(NumaloadWarning, match=r"in tensors b, c .*zeros: .*m\.gguf\.aria2 is"):
        numaload.open(model).close()


def reader(path: Path) -> None:
    GGUFReader(path)


def opened(path: Path) -> None:
    numaload.open(path, copy=True).close()


def prewarmed(path: Path) -> None:
    evict([str(path)])
    numaload.prewarm(path)


@pytest.mark.parametrize("how", [reader, opened, prewarmed])
def test_every_reader_says_it(model: Path, how: Callable[[Path], None]) -> None:
    punch(model, 2 * MIB, 4 * MIB)
    with pytest.warns(NumaloadWarning, match=SAID):
        how(model)


def test_safetensors_loaders_say_it(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(sb.model({"a": ("U8", (16,)), "b": ("U8", (2 * MIB,))}))
    punch(path, 4096, MIB + 8192)
    with pytest.warns(NumaloadWarning, match=f"in tensors b {SAID}"):
        SafeTensorLoader(path)
