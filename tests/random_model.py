"""GGUF files of random blocks, and what they are as float32 by gguf-py's dequantization."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from numaload.formats.qtypes import QuantType
from numaload.samples import random_blocks

Q = QuantType
TYPES = (Q.Q4_K, Q.Q6_K, Q.Q5_K, Q.Q3_K, Q.Q8_0, Q.Q2_K, Q.BF16, Q.F16, Q.F32)


@dataclass
class Made:
    """A GGUF file, and the float32 arrays of the module's keys."""

    path: Path
    expected: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class Writer:
    """Adds tensors with random blocks, types in turn; says what they are as float32."""

    def __init__(self, path: Path, architecture: str, seed: int = 0) -> None:
        self.rng, self.count = np.random.default_rng(seed), 0
        self.writer = gguf.GGUFWriter(str(path), architecture)

    def add(self, name: str, shape: tuple[int, ...], qtype: QuantType | None = None) -> Any:
        if qtype is None:
            qtype = Q.F32 if len(shape) == 1 or "norm" in name else TYPES[self.count % len(TYPES)]
            self.count += len(shape) > 1
        rows = int(np.prod(shape[:-1]))
        blocks = random_blocks(qtype, rows, shape[-1], self.rng)
        if qtype is Q.F32:
            values = blocks.view(np.float32).reshape(shape)
            self.writer.add_tensor(name, values)
            return values
        raw = gguf.GGMLQuantizationType(qtype)
        self.writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=raw)
        return gguf.dequantize(blocks, raw).reshape(shape).astype(np.float32)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
