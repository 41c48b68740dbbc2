"""Weights on their way from files to memory of the caller: read, dequantized and put in place.

``stream`` yields tensors in file order; ``fill`` puts many into memory that is there.
"""

from __future__ import annotations

from numaload.pipeline.fill import fill
from numaload.pipeline.pieces import Target
from numaload.pipeline.stream import stream

__all__ = ["Target", "fill", "stream"]
