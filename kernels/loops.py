"""What all kernels have in common: decode some blocks into a scratch, store that as asked, go on.

The scratch keeps decoding and storing apart: a type is written once for all dtypes, and stores are
in order and aligned whatever order a block has its weights in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numaload.kernels.lanes import (
    CHUNK,
    LANES,
    ahead,
    fence,
    load,
    narrow_bf16,
    narrow_f16,
    put,
    scratch,
    stream,
)

# (src, byte at which the block begins, float32 scratch, number of the block's first weight in it)
Decode = Callable[[Any, int, Any, int], None]
# (src, byte at which 16 floats begin) -> 16 float32
Read = Callable[[Any, int], Any]
# 16 float32 -> the lanes that are stored
Narrow = Callable[[Any], Any]
# (src, out, n_blocks, whether past the caches) -> n_blocks
Loop = Callable[[Any, Any, int, int], int]


def unchanged(lanes: Any) -> Any:
    return lanes


# {dtype that is asked for: how it is made of float32}
NARROW: dict[str, Narrow] = {
    "float32": unchanged,
    "float16": narrow_f16,
    "bfloat16": narrow_bf16,
}


def make_store(read: Read, narrow: Narrow, item_size: int) -> Callable[..., None]:
    """A function that stores ``count`` weights, a multiple of LANES, from where ``read`` reads.

    item_size: what lies between two weights, in the unit in which ``read`` takes its place.
    """

    def store(src: Any, begin: int, out: Any, at: int, count: int, past_caches: int) -> None:
        if past_caches:
            first = ahead(out, at)
            if first > 0:  # unaligned up to the cache line, and at the end from the last one on
                put(out, at, narrow(read(src, begin)))
            for i in range(first, count - LANES + 1, LANES):
                stream(out, at + i, narrow(read(src, begin + i * item_size)))
            if first > 0:
                last = count - LANES
                put(out, at + last, narrow(read(src, begin + last * item_size)))
        else:
            for i in range(0, count, LANES):
                put(out, at + i, narrow(read(src, begin + i * item_size)))

    return store


def make_loop(decode: Decode, store: Callable[..., None], block_size: int, type_size: int) -> Loop:
    """Blocks [0, n_blocks) of ``src`` to ``out``, by way of the scratch.

    store: from a scratch of float32. block_size: weights, type_size: bytes.
    """
    blocks_at_once = CHUNK // block_size

    def loop(src: Any, out: Any, n_blocks: int, past_caches: int) -> int:
        w = scratch()
        for first in range(0, n_blocks, blocks_at_once):
            count = n_blocks - first
            count = min(count, blocks_at_once)
            for block in range(count):
                decode(src, (first + block) * type_size, w, block * block_size)
            store(w, 0, out, first * block_size, count * block_size, past_caches)
        fence()
        return n_blocks

    return loop


def make_float_loop(store: Callable[..., None], step: int) -> Loop:
    """The same for floats: ``store`` is from ``src``, without scratch; a block is ``step`` weights.

    They are read as fast as they are written, and reading ahead must not wait for the scratch.
    """

    def loop(src: Any, out: Any, n_blocks: int, past_caches: int) -> int:
        store(src, 0, out, 0, n_blocks * step, past_caches)
        fence()
        return n_blocks

    return loop


def build_loop(
    function: Any, narrow: Narrow, sizes: tuple[int, int], prepare: Callable[[Any], Any]
) -> Loop:
    """The loop of a kernel from its parts; ``prepare`` makes what they call callable for them.

    function: Decode, or Read of floats. sizes: (weights, bytes) of a block or of a step.
    """
    step, nbytes = sizes
    function, narrow = prepare(function), prepare(narrow)
    if step == LANES:
        return make_float_loop(prepare(make_store(function, narrow, nbytes // step)), step)
    return make_loop(function, prepare(make_store(load, narrow, 1)), *sizes)
