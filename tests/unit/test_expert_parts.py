"""kt_kernel.tp against a plain model of kt-kernel's loop: which bytes of which row are whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_builder as gb
from moe_model import MIXED, NAMES, PLAIN, Shape, write_moe
from numaload import weights as package
from numaload.backends.kt_kernel import place, tp
from numaload.backends.kt_kernel.parts import part_of
from numaload.errors import NodeMemoryError, UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.machine import memory
from numaload.machine.topology import topology
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
        view = tp(weights, part, parts)
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
    part = tp(weights, 1, 2)["blk.0.ffn_down_exps.weight"]
    assert np.shares_memory(part.blocks, whole.blocks)
    assert not part.blocks.flags.writeable
    assert not part.blocks.flags.c_contiguous
    with pytest.raises(UsageError, match=r"ffn_down_exps.*place"):
        part.address  # noqa: B018


@pytest.mark.parametrize("on_node", [False, True])
def test_placed_is_contiguous_in_one_node(weights: Any, on_node: bool) -> None:
    node = topology().all[-1] if on_node else None
    view = tp(weights, 0, 2)
    placed = place(view, node)
    assert list(placed) == list(view)
    for name, part in placed.items():
        assert part.nbytes == view[name].nbytes
        assert part.blocks.tobytes() == view[name].blocks.tobytes()
        assert part.address % 64 == 0
        assert part.blocks.flags.c_contiguous
        assert not part.blocks.flags.writeable
        if node is not None:
            assert set(by_move_pages(part.address, part.nbytes)) == {node}


def test_what_does_not_fit_is_refused(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "node_free", lambda _: 1000)
    parts = tp(weights, 0, 2)
    with pytest.raises(NodeMemoryError, match="node 0 has room for 1000") as caught:
        place(parts, topology().all[0])
    assert caught.value.free == 1000
    assert caught.value.needed >= sum(part.nbytes for part in parts.values())


def test_other_tensors_are_left_out(tmp_path: Path) -> None:
    names = ["blk.0.ffn_up_exps.weight", "blk.0.ffn_up.weight", "blk.0.ffn_up_exps.bias"]
    rows = [gb.tensor(name, (256, 512, 1), offset=i << 19) for i, name in enumerate(names)]
    (tmp_path / "m.gguf").write_bytes(gb.build([], rows, bytes(3 << 19)))
    with package.open_weights(tmp_path / "m.gguf") as weights:
        assert list(tp(weights, 0, 2)) == names[:1]


@pytest.mark.parametrize(("part", "parts"), [(0, 0), (2, 2), (-1, 2), (0, 6)])
def test_parts_that_cannot_be(weights: Any, part: int, parts: int) -> None:
    with pytest.raises(UsageError, match=f"part {part} of {parts}"):
        tp(weights, part, parts)


@pytest.mark.parametrize("total", [100, 300, 0])
def test_the_inner_dimension_is_in_units(total: int) -> None:
    with pytest.raises(UsageError, match="units of 256"):
        part_of(total, 0, 1)
