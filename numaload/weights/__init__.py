"""Weights and Tensor: what users hold. Headers are read at once, weights only when looked at."""

from __future__ import annotations

from numaload.weights.model import Part, Weights
from numaload.weights.opening import open_weights, reopen
from numaload.weights.tensor import Rows, Tensor

__all__ = ["Part", "Rows", "Tensor", "Weights", "open_weights", "reopen"]
