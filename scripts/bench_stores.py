"""Plain stores and stores past the caches, by the size of the output: why `dequantize.LARGE` is."""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np

from numaload.bench.machine import in_turns, prefaulted
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry
from numaload.samples import random_blocks

SIZES = [1 << n for n in range(20, 27)]  # bytes of output
COLD = 512 << 20  # outputs go round in this: none is in a cache when it is written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--qtype", default="Q4_K")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    qtype = QuantType[options.qtype]
    kernel = registry.load(qtype, "float32")
    assert kernel is not None
    memory = prefaulted(COLD)
    print(f"{qtype.name} to float32, Gweights/s")
    print(f"{'output':>8}{'cold plain':>12}{'cold past':>12}{'warm plain':>12}{'warm past':>12}")
    for size in SIZES:
        weights = size // 4
        pattern = random_blocks(qtype, 1, weights, np.random.default_rng(0))
        blocks = pattern.reshape(-1, BLOCKS[qtype][1])
        places = iter(range(1 << 30))

        def cold(past: bool, size: int = size, places: object = places) -> None:
            begin = 3 * next(places) * size % (COLD - size)  # type: ignore[call-overload]
            kernel(blocks, memory[begin : begin + size].view(np.float32), past)  # noqa: B023

        def warm(past: bool, size: int = size) -> None:
            kernel(blocks, memory[:size].view(np.float32), past)  # noqa: B023

        things = {
            name: (partial(run, past), weights / 1e9)
            for name, run, past in (
                ("cold plain", cold, False), ("cold past", cold, True),
                ("warm plain", warm, False), ("warm past", warm, True),
            )
        }  # fmt: skip
        rates = in_turns(things, options.rounds)
        print(f"{size >> 20:>4} MiB" + "".join(f"{rates.median(name):12.1f}" for name in things))


if __name__ == "__main__":
    main()
