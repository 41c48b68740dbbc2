"""Weights.tp against a plain model of kt-kernel's loop: which bytes of which row are whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_model import MIXED, NAMES, PLAIN, Shape, write_moe
from numaload import weights as package
from numaload.errors import NodeMemoryError, TensorNotFoundError, UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.numa import memory
from numaload.numa.topology import topology
from numaload.weights.slices import Slice, part_of
from witness import by_move_pages

SMALL = Shape(experts=3, hidden=256, inner=1280, layers=1)
TYPES = {"mixed": MIXED, "plain": PLAIN, "floats": (QuantType.BF16, QuantType.F16, QuantType.F32)}


@pytest.fixture(params=TYPES, scope="module")
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    shape = Shape(SMALL.experts, 2, SMALL.hidden, SMALL.inner, 1, TYPES[request.param])
    path = write_moe(tmp_path_factory.mktemp("moe") / "m.gguf", shape)
    with package.open_weights(path) as opened:
        yield opened


def sizes(total: int, parts: int) -> list[int]:
    """As kt-kernel counts them: blocks of 256, the first parts get what is left over."""
    blocks, extra = total // 256 // parts, total // 256 % parts
    return [(blocks + (1 if part < extra else 0)) * 256 for part in range(parts)]


def copied(raw: bytes, name: str, qtype: QuantType, part: int, parts: int) -> bytes:
    """What kt-kernel's loop would copy, byte by byte, with its strides."""
    block, size = BLOCKS[qtype]
    hidden, inner = SMALL.hidden, SMALL.inner
    mine, offset = sizes(inner, parts)[part], sum(sizes(inner, parts)[:part])
    out = b""
    for expert in range(SMALL.experts):
        at = expert * inner * hidden // block * size
        if name != "down":
            start = at + offset * hidden // block * size
            out += raw[start : start + mine * hidden // block * size]
            continue
        for row in range(hidden):
            start = at + (row * inner + offset) // block * size
            out += raw[start : start + mine // block * size]
    return out


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_those_that_kt_kernel_copies(weights: Any, parts: int) -> None:
    for part in range(parts):
        view = weights.tp(part, parts)
        for name in NAMES:
            key = f"blk.0.ffn_{name}_exps.weight"
            whole, found = weights[key], view[key]
            wanted = copied(bytes(whole.buffer), name, whole.qtype, part, parts)
            assert found.blocks.tobytes() == wanted
            assert found.nbytes == len(wanted)
            inner = sizes(SMALL.inner, parts)[part]
            shape = (SMALL.hidden, inner) if name == "down" else (inner, SMALL.hidden)
            assert found.shape == (SMALL.experts, *shape)


def test_slices_are_views_of_the_same_memory(weights: Any) -> None:
    whole = weights["blk.0.ffn_down_exps.weight"]
    part = weights.tp(1, 2)["blk.0.ffn_down_exps.weight"]
    assert np.shares_memory(part.blocks, whole.blocks)
    assert not part.blocks.flags.writeable
    assert not part.blocks.flags.c_contiguous
    with pytest.raises(UsageError, match=r"placed\(\)"):
        part.address  # noqa: B018
    with pytest.raises(UsageError, match="ffn_down_exps"):
        part.buffer  # noqa: B018


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floats_of_parts_are_those_of_the_whole(weights: Any, dtype: str) -> None:
    for name, axis in (("gate", 1), ("up", 1), ("down", 2)):
        key = f"blk.0.ffn_{name}_exps.weight"
        parts = [weights.tp(part, 2)[key].dequantize(dtype) for part in range(2)]
        assert np.array_equal(np.concatenate(parts, axis), weights[key].dequantize(dtype))


@pytest.mark.parametrize("on_node", [False, True])
def test_placed_is_contiguous_in_one_node(weights: Any, on_node: bool) -> None:
    node = topology().all[-1] if on_node else None
    view = weights.tp(0, 2)
    with view.placed(node) as placed:
        assert placed.node == node
        assert placed.nbytes == view.nbytes
        for name in NAMES:
            key = f"blk.0.ffn_{name}_exps.weight"
            assert bytes(placed[key].buffer) == view[key].blocks.tobytes()
            assert placed[key].address % 64 == 0
            assert placed[key].blocks.flags.c_contiguous
            if node is not None:
                assert set(by_move_pages(placed[key].address, placed[key].nbytes)) == {node}
            floats = placed[key].dequantize()
            assert np.array_equal(floats, view[key].dequantize())
        kept = placed["blk.0.ffn_up_exps.weight"].blocks
    assert kept.any()  # arrays stay valid after close


def test_what_does_not_fit_is_refused(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "node_free", lambda _: 1000)
    with pytest.raises(NodeMemoryError, match="node 0 has room for 1000") as caught:
        weights.tp(0, 2).placed(topology().all[0])
    assert caught.value.free == 1000
    assert caught.value.needed >= weights.tp(0, 2).nbytes


def test_other_tensors_and_names(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", SMALL)
    with package.open_weights(path) as weights:
        view = weights.tp(0, 2)
        assert list(view) == list(weights)
        assert len(view) == len(weights)
        assert all(isinstance(view[name], Slice) for name in weights)
        assert view.metadata["general.architecture"] == "qwen3moe"
        with pytest.raises(TensorNotFoundError):
            view["blk.9.ffn_up_exps.weight"]


@pytest.mark.parametrize(("part", "parts"), [(0, 0), (2, 2), (-1, 2), (0, 6)])
def test_parts_that_cannot_be(weights: Any, part: int, parts: int) -> None:
    with pytest.raises(UsageError, match=f"part {part} of {parts}"):
        weights.tp(part, parts)


@pytest.mark.parametrize("total", [100, 300, 0])
def test_the_inner_dimension_is_in_units(total: int) -> None:
    with pytest.raises(UsageError, match="units of 256"):
        part_of(total, 0, 1)
