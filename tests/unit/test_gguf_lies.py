"""Headers that lie about themselves: each lie has its named error, and costs no memory."""

from __future__ import annotations

import struct

import pytest

import gguf_builder as gb
from headers import parse, peak
from numaload.errors import (
    FormatError,
    MetadataError,
    NotGGUFError,
    TensorInfoError,
    TruncatedError,
    UnsupportedVersionError,
)
from numaload.formats.cursor import FIRST_READ, MAX_ARRAYS
from numaload.formats.gguf import ENTRIES, TENSORS
from numaload.formats.qtypes import QuantType


def nested(depth: int) -> bytes:
    value = gb.array(gb.U8, b"\7")
    for _ in range(depth):
        value = gb.array(gb.ARRAY, value)
    return gb.entry("deep", gb.ARRAY, value)


ROOM = bytes(8 << 20)  # for any count that is only a little too large
HOSTILE: dict[str, tuple[bytes, type[FormatError], str]] = {
    "empty": (b"", NotGGUFError, "the file is empty"),
    "three-bytes": (b"GGU", NotGGUFError, "found b'GGU'"),
    "other-magic": (gb.build(magic=b"GGML"), NotGGUFError, "found b'GGML'"),
    "git-lfs": (b"version https://git-lfs", NotGGUFError, "fetch the real file"),
    "version-0": (gb.build(version=0), UnsupportedVersionError, "version 0;"),
    "version-1": (gb.build(version=1), UnsupportedVersionError, "quantize OLD NEW COPY"),
    "version-4": (gb.build(version=4), UnsupportedVersionError, "version 4;"),
    "version-5": (gb.build(version=5), UnsupportedVersionError, "a later numaload may read it"),
    "no-version-at-all": (gb.build(version=0x3F3F3F3F), UnsupportedVersionError, "it is damaged"),
    "big-endian-version-1": (
        gb.build(version=1 << 24), UnsupportedVersionError, "version 1, big-endian; versions 2 and"
    ),
    "big-endian-only-in-the-version": (gb.build(version=3 << 24, n_kv=1), TruncatedError, "room"),
    "ggml": (gb.build(magic=b"tjgg"), NotGGUFError, "convert the model again"),
    "zeros": (bytes(100), NotGGUFError, "a download that did not finish"),
    "no-version": (b"GGUF", TruncatedError, "version ends at byte 8"),
    "half-counts": (gb.build()[:20], TruncatedError, "counts"),
    "n-kv": (gb.build(n_kv=gb.HUGE), TruncatedError, "18446744073709551615 metadata entries"),
    "n-kv-one-too-many": (gb.build(n_kv=1, data=b""), TruncatedError, "room for 0"),
    "n-tensors": (gb.build(n_tensors=1 << 62), TruncatedError, "tensors announced"),
    "key-length": (gb.build([gb.string("k", gb.HUGE)]), MetadataError, "at most 65535"),
    "key-past-end": (gb.build([gb.string("k", 60000)]), TruncatedError, "metadata key ends"),
    "key-no-text": (gb.build([gb.entry(b"\xff", 0, b"1")]), MetadataError, "is not UTF-8"),
    "key-twice": (gb.build([gb.u32("k", 1), gb.u32("k", 2)]), MetadataError, "'k' appears twice"),
    "value-type": (gb.build([gb.entry("k", 13, b"")]), MetadataError, "the id 13"),
    "string-length": (
        gb.build([gb.entry("k", gb.STRING, gb.string("v", gb.HUGE))]),
        TruncatedError,
        "value of 'k' ends",
    ),
    "string-past-end": (
        gb.build([gb.entry("k", gb.STRING, gb.string("v", 2000))]),
        TruncatedError,
        "value of 'k' ends",
    ),
    "array-count": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.U64, count=gb.HUGE))]),
        TruncatedError,
        "18446744073709551615 elements",
    ),
    "array-count-wraps": (  # 2^61 elements of 8 bytes are 0 modulo 2^64
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.U64, count=1 << 61))]),
        TruncatedError,
        "elements ends",
    ),
    "array-type": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(77, count=1))]),
        MetadataError,
        "the id 77",
    ),
    "array-string-backwards": (  # as a signed number the length would go back to the start
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.STRING, gb.string("", 2**64 - 8), count=9))]),
        TruncatedError,
        "value of 'k' ends",
    ),
    "array-last-string": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.STRING, gb.string("", gb.HUGE)))]),
        TruncatedError,
        "value of 'k' ends",
    ),
    "array-in-array-count": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.ARRAY, gb.array(gb.U8, count=gb.HUGE)))]),
        TruncatedError,
        "elements ends",
    ),
    "arrays-too-many": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.ARRAY, count=MAX_ARRAYS + 1))], data=ROOM),
        MetadataError,
        f"{MAX_ARRAYS + 1} arrays in arrays, at most {MAX_ARRAYS}",
    ),
    "arrays-too-many-in-all": (
        gb.build(
            [
                gb.entry("a", gb.ARRAY, gb.array(gb.ARRAY, gb.array(gb.U8), gb.array(gb.U8))),
                gb.entry("b", gb.ARRAY, gb.array(gb.ARRAY, count=MAX_ARRAYS - 1)),
            ],
            data=ROOM,
        ),
        MetadataError,
        f"{MAX_ARRAYS + 1} arrays in arrays",
    ),
    "too-many-entries": (
        gb.build(n_kv=ENTRIES.most + 1, data=ROOM), FormatError, f"at most {ENTRIES.most} are read"
    ),
    "too-many-tensors": (
        gb.build(n_tensors=TENSORS.most + 1, data=ROOM),
        FormatError,
        f"at most {TENSORS.most} are read",
    ),
    "arrays-too-deep": (gb.build([nested(6)]), MetadataError, "nested over 4 deep"),
    "alignment-0": (gb.build([gb.u32("general.alignment", 0)]), MetadataError, "power of two"),
    "alignment-3": (gb.build([gb.u32("general.alignment", 3)]), MetadataError, "is 3, expected"),
    "alignment-2^40": (
        gb.build([gb.entry("general.alignment", gb.U64, gb.scalar(gb.U64, 1 << 40))]),
        MetadataError,
        "is 1099511627776",
    ),
    "alignment-negative": (
        gb.build([gb.entry("general.alignment", gb.I32, gb.scalar(gb.I32, -32))]),
        MetadataError,
        "is -32",
    ),
    "alignment-string": (
        gb.build([gb.entry("general.alignment", gb.STRING, gb.string("32"))]),
        MetadataError,
        "is '32'",
    ),
    "alignment-true": (
        gb.build([gb.entry("general.alignment", gb.BOOL, b"\1")]), MetadataError, "is True"
    ),
    "name-length": (gb.build([], [gb.string("t", 65536)]), TensorInfoError, "at most 65535"),
    "name-no-text": (gb.build([], [gb.tensor(b"\x80")]), TensorInfoError, "is not UTF-8"),
    "name-twice": (
        gb.build([], [gb.tensor("t"), gb.tensor("t", offset=128)]),
        TensorInfoError,
        "'t' appears twice",
    ),
    "nine-dims": (gb.build([], [gb.tensor("t", [1] * 9)]), TensorInfoError, "9 dims, at most 8"),
    "n-dims": (
        gb.build([], [gb.string("t") + struct.pack("<I", 2**32 - 1)]), TensorInfoError, "at most 8"
    ),
    "dims-wrap-to-0": (gb.build([], [gb.tensor("t", (2**32, 2**32))]), TensorInfoError, "2^60"),
    "dims-wrap-to-32": (
        gb.build([], [gb.tensor("t", (2**63 + 16, 2))]), TensorInfoError, "over 2^60 elements"
    ),
    "dim-of-0-hides": (gb.build([], [gb.tensor("t", (2**63, 0))]), TensorInfoError, "over 2^60"),
    "no-whole-block": (
        gb.build([], [gb.tensor("t", (48,), QuantType.Q8_0)]),
        TensorInfoError,
        "no whole Q8_0 blocks of 32",
    ),
    "block-across-rows": (
        gb.build([], [gb.tensor("t", (16, 2), QuantType.Q8_0)]), TensorInfoError, "rows of 16"
    ),
    "no-dims-no-block": (
        gb.build([], [gb.tensor("t", (), QuantType.Q8_0)]), TensorInfoError, "rows of 1"
    ),
    "offset-unaligned": (
        gb.build([], [gb.tensor("t", offset=4)]), TensorInfoError, "4 is no multiple of 32"
    ),
    "offset-past-end": (
        gb.build([], [gb.tensor("t", offset=1 << 40)]), TruncatedError, "'t' ends at byte"
    ),
    "offset-wraps": (
        gb.build([], [gb.tensor("t", offset=2**64 - 32)]), TruncatedError, "bytes are missing"
    ),
    "unknown-type-past-end": (
        gb.build([], [gb.tensor("t", (1,), 99, 4096)]), TruncatedError, "bytes are missing"
    ),
    "data-cut": (gb.build([], [gb.tensor("t", (32,))], bytes(127)), TruncatedError, "1 bytes are"),
    "overlap": (
        gb.build([], [gb.tensor("late", (32,), offset=32), gb.tensor("early", (16,))]),
        TensorInfoError,
        "'early' and 'late' overlap",
    ),
    "same-place": (gb.build([], [gb.tensor("a"), gb.tensor("b")]), TensorInfoError, "overlap"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "error", "words"), HOSTILE.values(), ids=HOSTILE)
def test_named_errors(raw: bytes, error: type[FormatError], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse(raw)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert str(caught.value).startswith("model.gguf: ")
    assert caught.value.path == "model.gguf"
    assert caught.value.offset is not None
    assert f"(at byte {caught.value.offset})" in str(caught.value)


@pytest.mark.parametrize("raw", [row[0] for row in HOSTILE.values()], ids=HOSTILE)
def test_lies_cost_no_memory(raw: bytes) -> None:
    """However large what they announce: a read of the beginning, and what refusing it takes."""
    assert peak(raw) < 100_000 + 2 * min(len(raw), FIRST_READ)
