"""On which node each range of a replica lies: in turn, by weight, in stripes, by patterns."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import numaload as api
from machines import EVERY_CPU, MACHINES
from numaload.errors import NumaloadWarning, UsageError
from numaload.linux.syscalls import HUGE, PAGE
from numaload.linux.sysfs import SysFiles
from numaload.machine.topology import topology
from numaload.replicas.arena import hugetlb_lacks
from numaload.replicas.layout import (
    CHUNK,
    Layout,
    are_spans,
    are_stripes,
    divided,
    in_turn,
    kernel_weights,
    off_node,
    pieces_of,
    placed_by,
    striped,
    unit_of,
)
from numaload.replicas.mirror import MirrorOptions
from numaload.replicas.views import Mirror
from numaload.weights import Weights

SHAPES = {
    "blk.0.attn_norm.weight": (100,),
    "blk.0.ffn_gate_exps.weight": (8, 64, 1000),
    "blk.0.ffn_down.weight": (333, 4096),
    "token_embd.weight": (50, 64),
    "blk.1.few_exps.weight": (2, 300, 512),
    "blk.1.attn_norm.weight": (100,),
}


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Weights]:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for name, shape in SHAPES.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with api.open(tmp_path / "m.gguf") as opened:
        yield opened


def by_byte(layout: Layout, size: int, file: int = 0) -> list[tuple[int, int, int]]:
    """All ranges of a file: they follow each other and are whole pages."""
    found = list(layout.ranges(file, 0, size))
    at = 0
    for start, stop, _ in found:
        assert start == at < stop
        assert start % PAGE == 0
        at = stop
    assert at == size
    return found


def assert_is_sum_of_parts(layout: Layout, weights: Weights, size: int) -> None:
    """What it says of nodes, and of parts of a file, is what its ranges say."""
    whole: Counter[int] = Counter()
    nodes = np.empty(-(-size // PAGE), int)
    for start, stop, node in layout.ranges(0, 0, size):
        nodes[start // PAGE : -(-stop // PAGE)] = node
        whole[node] += -(-stop // PAGE) * PAGE - start
    assert layout.on_nodes(weights.model()) == dict(whole)
    rng = random.Random(0)
    for _ in range(50):
        first = rng.randrange(size // PAGE) * PAGE
        last = rng.randint(first + 1, size)
        for start, stop, node in layout.ranges(0, first, last):
            assert set(nodes[start // PAGE : -(-stop // PAGE)]) == {node}
            assert layout.node_at(0, start) == node


@pytest.mark.parametrize("nodes", [(0,), (0, 1), (1, 4, 7), tuple(range(8))])
def test_stripes_are_runs_of_rows_and_experts(weights: Weights, nodes: tuple[int, ...]) -> None:
    layout, size = striped(weights, nodes), weights.nbytes
    found = by_byte(layout, size)
    assert_is_sum_of_parts(layout, weights, size)
    assert are_stripes(layout.stripes[0], size, nodes)
    elsewhere = off_node(weights, layout)
    assert elsewhere <= 2 * PAGE * len(SHAPES) * len(nodes)
    assert (elsewhere == 0) == (len(nodes) == 1)
    for name in SHAPES:
        tensor = weights[name]
        unit, count = unit_of(tensor, len(nodes))
        stops = divided(count, len(nodes))
        each = tensor.nbytes // count
        for part, node in enumerate(nodes):
            start, stop = (tensor.offset + each * stops[part + i] for i in (0, 1))
            inside = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
            for first, last, on in found:
                if first < inside[1] and last > inside[0]:
                    assert on == node, (name, unit, part)


@pytest.mark.parametrize(
    ("name", "parts", "unit"),
    [
        ("blk.0.ffn_gate_exps.weight", 2, ("experts", 8)),
        ("blk.0.ffn_gate_exps.weight", 9, ("rows", 512)),
        ("blk.1.few_exps.weight", 3, ("rows", 600)),
        ("blk.0.ffn_down.weight", 2, ("rows", 333)),
        ("blk.0.attn_norm.weight", 2, ("rows", 1)),
    ],
)
def test_unit_is_experts_where_each_node_gets_one(
    weights: Weights, name: str, parts: int, unit: tuple[str, int]
) -> None:
    assert unit_of(weights[name], parts) == unit


def test_turns_go_by_weight(weights: Weights) -> None:
    layout = in_turn((0, 2), {0: 2, 2: 1})
    assert layout.turns == (0, 0, 2)
    assert [node for *_, node in layout.ranges(0, 0, 5 * HUGE)] == [0, 0, 2, 0, 0]
    assert_is_sum_of_parts(layout, weights, weights.nbytes)
    assert in_turn((0, 2)).turns == (0, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({0: 1}, "weights for node 0, expected 0-1"),
        ({0: 1, 2: 1}, "weights for node 0,2, expected 0-1"),
        ({}, "weights for node none, expected 0-1"),
        ({0: 0, 1: 1}, "weight 0 of node 0: expected a number from 1 to 255"),
        ({0: 1, 1: 256}, "weight 256 of node 1"),
        ({0: 1.5, 1: 1}, r"weight 1\.5 of node 0"),
        ("0=2", "expected {node: weight}"),
    ],
)
def test_weights_that_are_none_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        in_turn((0, 1), given)


def test_the_kernels_weights_are_read_if_all_nodes_have_one(tmp_path: Path) -> None:
    folder = tmp_path / "kernel/mm/mempolicy/weighted_interleave"
    assert kernel_weights((0, 1), str(tmp_path)) is None
    folder.mkdir(parents=True)
    (folder / "node0").write_text("3\n")
    (folder / "__auto_type").write_text("true\n")
    assert kernel_weights((0, 1), str(tmp_path)) is None
    (folder / "node1").write_text("1\n")
    assert kernel_weights((0, 1), str(tmp_path)) == {0: 3, 1: 1}


def test_pieces_are_whole_chunks(weights: Weights) -> None:
    sizes = [0, 1, CHUNK, CHUNK + 1]
    assert [len(pieces_of([Layout((0, 1))], 0, size)) for size in sizes] == [0, 1, 1, 2]


PLACE = [("exps", "stripe"), ("down", "interleave"), ("embd", "bind:1"), ("norm", "mirror")]


def test_patterns_part_a_file_into_copies_and_what_there_is_once(weights: Weights) -> None:
    layouts = placed_by(weights, PLACE, (0, 1), (0, 1))
    assert list(layouts) == [(0,), (1,), (0, 1)]
    size = weights.nbytes
    for layout in layouts.values():
        assert are_spans(layout.only[0], size)
    for name in SHAPES:
        tensor = weights[name]
        stop = tensor.offset + tensor.nbytes
        once = "norm" not in name
        where = layouts[(0, 1) if once else (0,)]
        assert where.covers(0, tensor.offset, stop)
    pieces = pieces_of(layouts.values(), 0, size)
    for start, stop in pieces:  # a piece is one layout's, or that of both
        for layout in layouts.values():
            assert layout.covers(0, start, stop) or not list(layout.ranges(0, start, stop))
    assert layouts[0, 1].node_at(0, weights["token_embd.weight"].offset + PAGE) == 1


def test_bytes_beside_their_rows_are_not_counted_where_patterns_placed_some(
    weights: Weights,
) -> None:
    for place, expected in (([("", "stripe")], None), ([("", "mirror")], 0)):
        layouts = placed_by(weights, place, (0, 1), (0, 1))
        assert Mirror(weights, {}, [(0, 1)], None, None, {}, layouts).off_node() == expected


def test_what_is_skipped_is_in_no_layout(weights: Weights) -> None:
    layouts = placed_by(weights, [("down", "mirror"), ("", "skip")], (0, 1), (0, 1))
    assert list(layouts) == [(0,), (1,)]
    tensor, other = weights["blk.0.ffn_down.weight"], weights["blk.0.ffn_gate_exps.weight"]
    assert layouts[0,].covers(0, tensor.offset, tensor.offset + tensor.nbytes)
    assert not layouts[0,].covers(0, other.offset, other.offset + other.nbytes)
    with pytest.raises(UsageError, match="every tensor is skipped"):
        placed_by(weights, [("", "skip")], (0, 1), (0, 1))


def test_on_one_node_all_that_is_placed_is_a_copy(weights: Weights) -> None:
    place = [("embd", "skip"), *PLACE]
    assert list(placed_by(weights, place, (0,), (0,))) == [(0,)]


def test_a_tensor_that_no_pattern_matches_is_named(weights: Weights) -> None:
    with pytest.raises(UsageError, match=r"no pattern matches tensor 'blk.0.attn_norm.weight'"):
        placed_by(weights, [("exps", "stripe")], (0, 1), (0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy 'best': expected mirror or interleave or stripe or bind"),
        ({"policy": "bind"}, "policy bind: expected one node, found 0-1"),
        ({"policy": "stripe", "per": "socket"}, "per socket: only of the policy mirror"),
        ({"policy": "stripe", "ratio": {0: 1, 1: 1}}, "weights: only of the policy interleave"),
        ({"place": ["mirror"]}, r"expected \(pattern, policy\)"),
        ({"place": {"": "mirror"}}, r"expected \(pattern, policy\)"),
        ({"place": [("(", "mirror")]}, r"place '\(': .*, expected a regular expression"),
        ({"place": [("x", "best")]}, "place 'x': 'best', expected mirror, interleave, stripe"),
        ({"place": [("x", "bind:9")]}, "'bind:9', expected .* bind:NODE with one of 0-1"),
        ({"place": [("x", "skip")], "policy": "stripe"}, "expected no other"),
    ],
)
def test_options_that_are_none_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    machine = topology(**MACHINES["dual-xeon"].write(tmp_path), allowed=EVERY_CPU)
    with pytest.raises(UsageError, match=message):
        MirrorOptions.of(machine, [0, 1], **options)


def test_rows_of_threads_are_all_rows_once(weights: Weights) -> None:
    name = "blk.0.ffn_down.weight"
    with api.mirror(weights) as mirror:
        with pytest.warns(NumaloadWarning, match="3 would have as many"):
            rows = mirror.rows(name, 4)
        every = [share for shares in rows.values() for share in shares]
        assert every[0].start == 0
        assert [share.start for share in every[1:]] == [share.stop for share in every[:-1]]
        assert every[-1].stop == 333
        assert mirror.local_rows(name) == (0, 333, "rows")
        with pytest.raises(UsageError, match="threads 0"):
            mirror.rows(name, 0)


@pytest.mark.parametrize("nodes", [(0, 1), (1, 4, 7)])
def test_runs_of_nodes_are_all_of_a_tensor_once(weights: Weights, nodes: tuple[int, ...]) -> None:
    """Also where less than a page at its end is on the node of the next tensor."""
    layout = striped(weights, nodes)
    for name in SHAPES:
        tensor = weights[name]
        runs = [layout.run_of(tensor, node) for node in nodes]
        at = tensor.offset
        for start, stop in sorted(run for run in runs if run and run[0] < run[1]):
            assert start == at
            at = stop
        assert at == tensor.offset + tensor.nbytes
    assert in_turn((0, 1)).run_of(weights["blk.0.ffn_down.weight"], 0) is None


def test_huge_pages_that_cannot_be_counted_are_not_called_none(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SysFiles, "number", lambda *_: None)
    said = hugetlb_lacks(weights.model(), [Layout((0,))])
    assert said.startswith("how many huge pages node 0 has cannot be read (/sys/devices/")
