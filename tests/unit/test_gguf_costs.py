"""What parsing costs: memory within a multiple of the header, time in proportion to it."""

from __future__ import annotations

import struct
import time
import timeit
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

import gguf_builder as gb
from headers import Source, check_survives, peak
from numaload.errors import FormatError
from numaload.formats.cursor import FIRST_READ, MAX_HEADER
from numaload.formats.gguf import parse_header
from numaload.formats.qtypes import QuantType

pytestmark = pytest.mark.slow  # large headers, read again and again

TIMES = 32  # as the docstrings of formats.gguf and of MetadataArray promise


@cache
def bulky() -> dict[str, bytes]:
    """Headers of what takes the most memory for its bytes in the file."""

    def value(type_id: int, count: int, elements: bytes) -> bytes:
        array = struct.pack("<IQ", type_id, count) + elements
        return gb.build([gb.entry("a", gb.ARRAY, array)], data=b"")

    many = range(20_000)
    align_1 = gb.u32("general.alignment", 1)
    rows = [gb.tensor(f"{i:x}", (), QuantType.I8, i) for i in many]
    wide = [gb.tensor(f"{i:x}", (300, 300, 300, 300), 999) for i in many]
    noise = np.random.default_rng(0).bytes(400_000)
    return {
        "entries": gb.build([gb.entry(f"{i:x}", gb.U8, b"\1") for i in many], data=b""),
        "arrays": gb.build([gb.entry(f"{i:x}", gb.ARRAY, gb.array(gb.U8)) for i in many], data=b""),
        "strings": gb.build([gb.entry(f"{i:x}", gb.STRING, gb.string(b"\xff")) for i in many]),
        "tensors": gb.build([align_1], rows, bytes(len(many)), alignment=1),
        "wide-tensors": gb.build([], wide),
        "long-string": gb.build(
            [gb.entry("s", gb.STRING, gb.string(b"\xff" * 400_000 + "\U0001f600".encode()))]
        ),
        "u8s": value(gb.U8, 400_000, noise),
        "u16s": value(gb.U16, 200_000, noise),
        "f32s": value(gb.F32, 100_000, noise),
        "short-strings": value(gb.STRING, 40_000, gb.string(b"\xff") * 40_000),
        "empty-arrays": value(gb.ARRAY, 40_000, gb.array(gb.U8) * 40_000),
        "small-arrays": value(gb.ARRAY, 40_000, gb.array(gb.U16, b"\xff\xff") * 40_000),
    }


@pytest.mark.parametrize("kind", bulky())
def test_parsing_and_decoding_cost_a_small_multiple(kind: str) -> None:
    raw = bulky()[kind]
    assert len(raw) > 300_000
    assert len(raw) < peak(raw, refused=False) < TIMES * len(raw)


GROWING: dict[str, Callable[[int], bytes]] = {
    "entries": lambda n: gb.build([gb.u32(f"k{i}", i) for i in range(n)]),
    "arrays": lambda n: gb.build(
        [gb.entry("a", gb.ARRAY, gb.array(gb.ARRAY, *[gb.array(gb.U8)] * n))]
    ),
    "strings": lambda n: gb.build(
        [gb.entry("a", gb.ARRAY, gb.array(gb.STRING, *[gb.string("ab")] * (4 * n)))]
    ),
    "tensors": lambda n: gb.build([], [gb.tensor(f"t{i}", (0,), offset=0) for i in range(n)]),
    "backwards": lambda n: gb.build(
        [], [gb.tensor(f"t{i}", (8,), offset=32 * (n - i)) for i in range(n)], bytes(32 * n + 32)
    ),
    "same-place": lambda n: gb.build([], [gb.tensor(f"t{i}", (8,)) for i in range(n)]),
}


@pytest.mark.parametrize("kind", GROWING)
def test_time_grows_with_the_header(kind: str) -> None:
    """Four times as much takes about four times as long, not sixteen."""
    small, large = (GROWING[kind](n) for n in (4_000, 16_000))
    assert any(_seconds(large) / _seconds(small) < 9 for _ in range(5))


def _seconds(raw: bytes) -> float:
    """The best of some runs: what else this machine does shall not count."""
    clock = time.thread_time
    return min(timeit.repeat(lambda: check_survives(raw), timer=clock, number=1, repeat=3))


@pytest.mark.parametrize(
    "value",
    [gb.string("v", 1 << 32), gb.array(gb.STRING, gb.string("", 1 << 32), count=2)],
    ids=["string", "array"],
)
def test_a_header_larger_than_headers_are(value: bytes) -> None:
    """A sparse file has room for anything; it is still not read."""
    kind = gb.STRING if value[8:] == b"v" else gb.ARRAY
    source = Source(gb.build([gb.entry("k", kind, value)]), size=1 << 40)
    with pytest.raises(FormatError, match=f"header of over {MAX_HEADER} bytes, in value of 'k'"):
        parse_header(source.read_at, source.size)
    assert source.reads <= FIRST_READ + 4
