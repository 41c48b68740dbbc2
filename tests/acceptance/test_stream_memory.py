"""Streaming a model into given buffers needs at most 32 MiB beyond them.

The kernel enforces it here: a process that asks for more private memory gets MemoryError.
"""

from __future__ import annotations

from pathlib import Path

from commands import Numaload
from numaload.demo import write_model

PROGRAM = """
import json, resource, sys
import numpy as np, numaload
from numaload.dequantize import LARGE

MORE = 32 << 20
weights = numaload.open(sys.argv[1])
most = max(tensor.size for tensor in weights.values())
buffer = np.zeros(most, np.float32)
outs = {"float32": buffer, "bfloat16": buffer.view(np.uint16), "float16": buffer.view(np.uint16)}

def stream(rows=None):
    for tensor in weights.values():
        count = tensor.size if rows is None else tensor.dims[0]
        for dtype, out in outs.items():
            tensor.dequantize(dtype, out=out[:count], rows=rows)
    return sum(tensor.size for tensor in weights.values())

stream(rows=(0, 1))  # kernels and threads are there, for other models too
with open("/proc/self/status") as file:
    data = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + MORE, data + MORE))
done = stream()
try:
    np.zeros(MORE + (8 << 20), np.uint8)
    refused = False
except MemoryError:
    refused = True
print(json.dumps({"weights": done, "large": 4 * most > LARGE, "refused": refused}))
"""


def test_at_most_32_mib_beyond_the_buffers(numaload: Numaload, tmp_path: Path) -> None:
    (path,) = write_model(str(tmp_path / "model.gguf"), 200 << 20)
    found = numaload.python(PROGRAM, path)
    assert found["weights"] > 100 << 20
    assert found["large"]
    assert found["refused"], "the limit was none: the test says nothing"
