"""Write a model to try things on: random weights in several types, written with the gguf package.

``python -m numaload.demo DIR --size 300M --splits 3``
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterator
from typing import Any

from numaload.errors import printable, reason
from numaload.formats.qtypes import QuantType
from numaload.samples import random_blocks

WIDTH, HIDDEN, EXPERTS = 1024, 2816, 8
TYPES = ("Q4_K", "Q6_K", "Q8_0", "BF16", "F16", "F32", "Q5_K")


def _layers(size: int, rng: Any) -> Iterator[tuple[str, QuantType, Any]]:
    import numpy as np

    written, layer = 0, 0
    while written < size:
        qtype = QuantType[TYPES[layer % len(TYPES)]]
        shapes = {"attn_q": (WIDTH, WIDTH), "ffn_down": (WIDTH, HIDDEN // 256 * 256)}
        for name, (rows, columns) in shapes.items():
            blocks = random_blocks(qtype, rows, columns, rng)
            yield f"blk.{layer}.{name}.weight", qtype, blocks
            written += blocks.nbytes
        if layer % 4 == 0:
            blocks = random_blocks(QuantType.Q4_K, EXPERTS * 512, WIDTH, rng)
            yield (
                f"blk.{layer}.ffn_gate_exps.weight",
                QuantType.Q4_K,
                blocks.reshape(EXPERTS, 512, -1),
            )
            written += blocks.nbytes
        norm = np.ones((1, WIDTH), np.float32).view(np.uint8)
        yield f"blk.{layer}.attn_norm.weight", QuantType.F32, norm.reshape(-1)
        layer += 1


def write_model(path: str, size: int, splits: int = 1, seed: int = 0) -> list[str]:
    """Write a model of about ``size`` bytes at ``path`` (a .gguf); return the files written.

    With splits over 1 the names are those of gguf-split: NAME-00001-of-0000N.gguf.
    """
    import gguf
    import numpy as np

    rng = np.random.default_rng(seed)
    tensors = list(_layers(size, rng))
    per_file = -(-len(tensors) // splits)
    writer = gguf.GGUFWriter(
        path, "llama", split_max_tensors=per_file if splits > 1 else 0, small_first_shard=False
    )
    writer.add_name("numaload demo")
    writer.add_block_count(sum(name.endswith("attn_norm.weight") for name, _, _ in tensors))
    writer.add_embedding_length(WIDTH)
    writer.add_token_list([f"token {i}" for i in range(1000)])
    for name, qtype, blocks in tensors:
        raw = None if qtype is QuantType.F32 else gguf.GGMLQuantizationType[qtype.name]
        writer.add_tensor(name, blocks.view(np.float32) if raw is None else blocks, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stem = glob.escape(path.removesuffix(".gguf"))
    return [path] if splits == 1 else sorted(glob.glob(f"{stem}-0*"))


def parse_size(text: str) -> int:
    """Read ``300M`` as bytes; units are powers of 1024."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    scale = units.get(text[-1:].upper(), 1)
    return int(float(text[:-1] if scale > 1 else text) * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a demo model.")
    parser.add_argument("path", help="the .gguf to write")
    parser.add_argument("--size", type=parse_size, default="300M")
    parser.add_argument("--splits", type=int, default=1)
    options = parser.parse_args()
    try:
        for file in write_model(options.path, options.size, options.splits):
            print(printable(file))
    except OSError as error:
        parser.error(f"{error.filename or options.path}: {reason(error)}")


if __name__ == "__main__":
    main()
