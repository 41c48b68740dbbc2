"""Bring weights from files into the caller's memory: read, dequantized and put in place.

``stream`` yields tensors in file order; ``fill`` puts many into memory that is there.
"""

from __future__ import annotations

from numaload.pipeline.fill import Target, fill
from numaload.pipeline.stream import stream

__all__ = ["Target", "fill", "stream"]
