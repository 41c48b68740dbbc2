"""Damaged headers by the hundred: a FormatError or a header that holds, never anything else.

scripts/fuzz-headers tries many more.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_builder as gb
import seeds
from headers import check_survives, parse
from numaload.errors import FormatError
from numaload.formats.qtypes import QuantType

PROPERTY = settings(derandomize=True, deadline=None, max_examples=300, database=None)
NESTED = gb.entry("deep", gb.ARRAY, gb.array(gb.ARRAY, gb.array(gb.ARRAY, gb.array(gb.U8, b"\7"))))
VALID = gb.build(
    [
        gb.entry("general.architecture", gb.STRING, gb.string("llama")),
        gb.u32("general.alignment", 64),
        gb.entry("tokens", gb.ARRAY, gb.array(gb.STRING, *map(gb.string, ["a", "", "bcd"]))),
        gb.entry("f", gb.ARRAY, gb.array(gb.F32, *[b"\0\0\x80?"] * 3)),
        NESTED,
    ],
    [gb.tensor("a", (32, 2), QuantType.Q8_0), gb.tensor("b", (4, 3, 2), offset=128)],
    bytes(128 + 96),
    alignment=64,
)
BEFORE_DATA = len(VALID) - 128 - 96


def test_any_truncation_is_a_format_error() -> None:
    assert len(parse(VALID).tensors) == 2
    for length in range(len(VALID)):
        with pytest.raises(FormatError):
            parse(VALID[:length])


@PROPERTY
@given(st.integers(0, BEFORE_DATA - 1), st.integers(1, 255))
def test_any_changed_byte_is_survived(at: int, flip: int) -> None:
    raw = bytearray(VALID)
    raw[at] ^= flip
    check_survives(bytes(raw))


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, BEFORE_DATA - 1), st.integers(0, 255)), min_size=2))
def test_any_changed_bytes_are_survived(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(VALID)
    for at, value in changes:
        raw[at] = value
    check_survives(bytes(raw))


SEEDS = [path.read_bytes() for path in sorted(seeds.FOLDER.iterdir())]


def test_the_corpus_is_as_written_small_and_read() -> None:
    assert {path.name: path.read_bytes() for path in seeds.FOLDER.iterdir()} == seeds.seeds()
    assert sum(map(len, SEEDS)) < 64 << 10
    for raw in SEEDS:
        parse(raw)


@PROPERTY
@given(st.sampled_from(SEEDS), st.data())
def test_any_seed_is_survived_with_a_number_changed(raw: bytes, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([4, 8]))
    at = data.draw(st.integers(4, len(raw) - width))
    number = data.draw(st.integers(0, 256**width - 1) | st.integers(0, 64))
    order: Any = data.draw(st.sampled_from(["little", "big"]))
    check_survives(raw[:at] + number.to_bytes(width, order) + raw[at + width :])


@PROPERTY
@given(st.sampled_from(SEEDS), st.sampled_from(SEEDS), st.data())
def test_two_seeds_in_one_are_survived(one: bytes, other: bytes, data: st.DataObject) -> None:
    start, stop = data.draw(st.integers(0, len(one))), data.draw(st.integers(0, len(other)))
    check_survives(one[:start] + other[stop:])


@PROPERTY
@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic_are_survived(tail: bytes) -> None:
    check_survives(b"GGUF\3\0\0\0" + tail)
