"""The loop that all kernels share: decode some blocks into a scratch, store that, go on.

The scratch keeps decoding and storing apart: a type is written once for all dtypes, and stores are
in order and aligned whatever order a block has its weights in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numaload.kernels.lanes import (
    CHUNK,
    LANES,
    ahead,
    fence,
    join,
    load,
    load_f32,
    narrow_bf16,
    narrow_f16,
    narrow_normal_bf16,
    put,
    scratch,
    stream,
)

STEP = 2 * LANES  # weights that are stored together; every type's blocks are multiples of it

# (src, byte at which the block begins, float32 scratch, number of the block's first weight in it)
Decode = Callable[[Any, int, Any, int], None]
# (src, byte at which 16 floats begin) -> 16 float32
Read = Callable[[Any, int], Any]
# (16 float32, and the next 16) -> the 32 lanes that are stored
Narrow = Callable[[Any, Any], Any]
# (src, out, n_blocks, whether past the caches, scales or None) -> n_blocks
Loop = Callable[..., int]


def _to_f16(low: Any, high: Any) -> Any:
    return join(narrow_f16(low), narrow_f16(high))


def _to_bf16(low: Any, high: Any) -> Any:
    return join(narrow_bf16(low), narrow_bf16(high))


def fill(src: Any, _at: int) -> Any:
    """Read the same 16 floats again and again: with it a loop only writes."""
    return load_f32(src, 0)


# {dtype that is asked for: how it is made of float32}
NARROW: dict[str, Narrow] = {"float32": join, "float16": _to_f16, "bfloat16": _to_bf16}
# The same where no float32 is subnormal.
NARROW_NORMAL: dict[str, Narrow] = {**NARROW, "bfloat16": narrow_normal_bf16}


def _make_convert(read: Read, narrow: Narrow, item_size: int) -> Read:
    """Make a function that reads STEP weights and converts them to what is stored.

    item_size: the distance of two weights, in the unit in which ``read`` takes its place.
    """

    def convert(src: Any, at: int) -> Any:
        # Together they fill cache lines, of 16 bits too. And a store of 16 whose upper halves go
        # would be one instruction, which forgets that it should go past the caches.
        return narrow(read(src, at), read(src, at + LANES * item_size))

    return convert


def _make_store(convert: Read, item_size: int) -> Callable[..., None]:
    """Make a function that stores ``count`` weights, a multiple of STEP, read by ``convert``."""

    def store(src: Any, begin: int, out: Any, at: int, count: int, past_caches: int) -> None:
        if past_caches and count > 0:
            first = ahead(out, at)
            if first > 0:  # unaligned up to the cache line, and at the end from the last one on
                put(out, at, convert(src, begin))
            for i in range(first, count - STEP + 1, STEP):
                stream(out, at + i, convert(src, begin + i * item_size))
            if first > 0:
                last = count - STEP
                put(out, at + last, convert(src, begin + last * item_size))
        else:
            for i in range(0, count, STEP):
                put(out, at + i, convert(src, begin + i * item_size))

    return store


def _make_plain(decode: Decode) -> Callable[..., None]:
    """Make a function that decodes a block; there are no scales besides those in it."""

    def plain(src: Any, at: int, w: Any, to: int, _scales: Any, _first: int) -> None:
        decode(src, at, w, to)

    return plain


def _make_scaled(decode: Decode, block_size: int, group: int) -> Callable[..., None]:
    """Make a function that decodes a block and multiplies each ``group`` of weights by its scale.

    The scales, float32, are an array of their own: number ``first`` is the block's first.
    """
    parts, each = block_size // LANES, group // LANES

    def scaled(src: Any, at: int, w: Any, to: int, scales: Any, first: int) -> None:
        decode(src, at, w, to)
        for part in range(parts):
            here = to + LANES * part
            put(w, here, load(w, here) * scales[first + part // each])

    return scaled


def _make_loop(
    decode: Callable[..., None],
    store: Callable[..., None],
    block_size: int,
    type_size: int,
    scales_each: int,
) -> Loop:
    """Make the loop that takes blocks [0, n_blocks) of ``src`` to ``out`` through the scratch.

    store: from a scratch of float32. block_size: weights, type_size: bytes, scales_each: scales of
    a block.
    """
    blocks_at_once = CHUNK // block_size

    def loop(src: Any, out: Any, n_blocks: int, past_caches: int, scales: Any = None) -> int:
        w = scratch()
        for first in range(0, n_blocks, blocks_at_once):
            count = min(n_blocks - first, blocks_at_once)
            for block in range(count):
                number = first + block
                decode(src, number * type_size, w, block * block_size, scales, number * scales_each)
            store(w, 0, out, first * block_size, count * block_size, past_caches)
        fence()
        return n_blocks

    return loop


def _make_float_loop(store: Callable[..., None], step: int) -> Loop:
    """Make the same for floats: ``store`` reads ``src``, without scratch, ``step`` weights a block.

    They are read as fast as they are written, and reading ahead must not wait for the scratch.
    """

    def loop(src: Any, out: Any, n_blocks: int, past_caches: int, _scales: Any = None) -> int:
        store(src, 0, out, 0, n_blocks * step, past_caches)
        fence()
        return n_blocks

    return loop


class Parts(NamedTuple):
    """The functions and sizes that a kernel is made of."""

    function: Any  # Decode, or Read of floats
    narrow: Narrow
    weights: int  # of a block, or STEP floats
    nbytes: int
    floats: bool  # whether they are stored from where they are, or decoded to the scratch first
    group: int = 0  # weights that share one of the scales that are given; 0: none are


def build_loop(parts: Parts, prepare: Callable[[Any], Any]) -> Loop:
    """Build the loop of a kernel; ``prepare`` makes what its parts call callable for them."""
    function, narrow, weights, nbytes, floats, group = parts
    read, item_size = (function, nbytes // weights) if floats else (load, 1)
    convert = prepare(_make_convert(prepare(read), prepare(narrow), item_size))
    store = prepare(_make_store(convert, item_size))
    if floats:
        return _make_float_loop(store, weights)
    decode, each = prepare(function), weights // group if group else 0
    decode = prepare(_make_scaled(decode, weights, group) if group else _make_plain(decode))
    return _make_loop(decode, store, weights, nbytes, each)
