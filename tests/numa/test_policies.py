"""Replicas that several nodes share: in turn, in a ratio, in stripes; of each page its node."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest

import numaload as api
from commands import Numaload, sparse_model
from confined import DOCKER
from numaload.errors import NumaloadWarning, NumaUnavailableError, UsageError
from witness import PAGE, by_move_pages, cpus_of

MIB = 1 << 20
BLOCK = 2 * MIB
EXPERTS = "blk.0.ffn_gate_exps.weight"


class Page(NamedTuple):
    """Bytes of a file that shall be on a node."""

    start: int
    stop: int
    node: int


@pytest.fixture(scope="module")
def striped_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Experts, matrices, a norm, and rows that no number of nodes divides."""
    path = tmp_path_factory.mktemp("striped") / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (1003, 1024),
        EXPERTS: (8, 512, 1024),
        "blk.0.attn_norm.weight": (1024,),
        "blk.0.ffn_down.weight": (1024, 1536),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.random(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def in_stripes(path: str, nodes: list[int]) -> list[Page]:
    """Where the rows and experts of this file shall be: reckoned by gguf-py, without numaload."""
    found: list[Page] = []
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tensor.shape[::-1]
        units = int(shape[0]) if len(shape) > 1 else 1
        each, start = int(tensor.n_bytes) // units, int(tensor.data_offset)
        stops = [start + each * (units * i // len(nodes)) for i in range(len(nodes) + 1)]
        found += map(Page, stops, stops[1:], nodes)
    return found


def in_turns(size: int, turns: list[int]) -> list[Page]:
    starts = range(0, size, BLOCK)
    return [Page(at, min(at + BLOCK, size), turns[at // BLOCK % len(turns)]) for at in starts]


def assert_placed(path: str, pages: list[Page]) -> None:
    """Every whole page of these is on its node, by move_pages, in a mapping of our own."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        mapped = np.frombuffer(memory, np.uint8)
        assert int(mapped[::PAGE].sum()) >= 0
        for page in pages:
            first, last = -(-page.start // PAGE) * PAGE, page.stop // PAGE * PAGE
            if first < last:
                where = by_move_pages(mapped.ctypes.data + first, last - first)
                assert where == {page.node: (last - first) // PAGE}, page
        del mapped


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def all_nodes(nodes: list[int]) -> list[int]:
    """Those without CPUs too."""
    return sorted({*nodes, *api.topology().usable})


def replica(numaload: Numaload) -> str:
    (row,) = numaload.json("status")["replicas"]
    ((path,),) = row["replicas"].values()
    return str(path)


def test_policy_stripe_gives_each_node_its_rows(
    numaload: Numaload, striped_model: str, nodes: list[int]
) -> None:
    nodes = all_nodes(nodes)
    listed = ",".join(map(str, nodes))
    (report,) = numaload.json("mirror", striped_model, "--policy", "stripe", "--nodes", listed)
    assert (report["policy"], report["placed"], report["asked"]) == ("stripe", True, nodes)
    placement = report["placements"][str(nodes[0])]
    assert placement["on"] == placement["expected"]
    assert placement["checked"] >= 2 * len(nodes)
    assert placement["misplaced"] == []
    assert 0 < report["off_node"] <= len(in_stripes(striped_model, nodes)) * PAGE
    path = replica(numaload)
    assert digest(path) == digest(striped_model)
    assert os.path.basename(path) == os.path.basename(striped_model)
    assert_placed(path, in_stripes(striped_model, nodes))
    assert "all checksums right" in numaload("verify", striped_model).stdout
    (row,) = numaload.json("store")["rows"]
    assert row["policy"] == "stripe"
    assert sum(row["nodes"].values()) == -(-os.path.getsize(striped_model) // PAGE) * PAGE


@pytest.mark.parametrize("weights", ["", "other"])
def test_policy_interleave_takes_turns(
    numaload: Numaload, striped_model: str, nodes: list[int], weights: str
) -> None:
    """In equal parts, or as many blocks as the node's weight says."""
    turns, words = nodes, list[str]()
    if weights:
        turns = [node for node in nodes for _ in range(2 if node == nodes[0] else 1)]
        words = ["--weights", ",".join(f"{node}={turns.count(node)}" for node in nodes)]
    (report,) = numaload.json("mirror", striped_model, "--policy", "interleave", *words)
    assert (report["policy"], report["placed"]) == ("interleave", True)
    path = replica(numaload)
    assert digest(path) == digest(striped_model)
    assert_placed(path, in_turns(os.path.getsize(path), turns))
    other = ",".join(f"{node}=3" if node == nodes[0] else f"{node}=1" for node in nodes)
    done = numaload("mirror", striped_model, "--policy", "interleave", "--weights", other, status=1)
    assert "mirrored already, placed otherwise; release it first" in done.stderr


def test_policy_bind_is_one_replica_on_one_node(
    numaload: Numaload, striped_model: str, nodes: list[int]
) -> None:
    done = numaload("mirror", striped_model, "--policy", "bind", status=2)
    assert f"expected one node, found {api.topology().all[0]}" in done.stderr
    numaload("mirror", striped_model, "--policy", "bind", "--nodes", nodes[-1])
    path = replica(numaload)
    assert_placed(path, [Page(0, os.path.getsize(path), nodes[-1])])


def test_policies_beside_each_other(
    numaload: Numaload, striped_model: str, nodes: list[int]
) -> None:
    for policy in ("interleave", "stripe", "mirror"):
        numaload("mirror", striped_model, "--policy", policy)
    assert len(numaload.json("store")["rows"]) == 3
    for policy in ("interleave", "stripe"):
        with api.attach(striped_model, policy=policy) as mirror:
            assert mirror.report.policy == policy
            assert mirror.verify().right
            assert digest(mirror.paths(nodes[0])[0]) == digest(striped_model)
    with api.attach(striped_model) as mirror:
        assert mirror.view(nodes[1]).nodes == (nodes[1],)  # its own comes first


def test_rows_of_a_stripe_are_on_the_threads_node(striped_model: str, nodes: list[int]) -> None:
    with api.mirror(striped_model, policy="stripe") as mirror:
        assert mirror.report.placed
        stops = [8 * part // len(nodes) for part in range(len(nodes) + 1)]
        for part, node in enumerate(nodes):
            if not cpus_of(node):
                continue
            with mirror.pinned(node) as view:
                share = mirror.local_rows(EXPERTS)
                assert share == (stops[part], stops[part + 1], "experts")
                tensor = view[EXPERTS]
                each = tensor.nbytes // 8
                start = tensor.address + each * share.start
                inside = -(-start // PAGE) * PAGE
                nbytes = each * share.size - 2 * PAGE
                assert set(by_move_pages(inside, nbytes)) == {node}
        rows = mirror.rows("token_embd.weight", 1)
        assert [(share.start, share.stop) for (share,) in rows.values()] == [
            (1003 * i // len(nodes), 1003 * (i + 1) // len(nodes)) for i in range(len(nodes))
        ]
        with api.open(striped_model) as source:
            for name in source:
                assert bytes(mirror.local()[name].buffer) == bytes(source[name].buffer)


def test_ranges_are_refused_where_binding_is(numaload: Numaload, striped_model: str) -> None:
    confined = numaload.within(deny=DOCKER)
    for policy in ("stripe", "interleave"):
        done = confined("mirror", striped_model, "--policy", policy, status=1)
        assert f"{policy} places ranges: take the policy mirror, or bind" in done.stderr
    assert numaload.json("store")["rows"] == []


def test_a_page_that_moved_is_found(striped_model: str, nodes: list[int]) -> None:
    from numaload.linux import syscalls

    with api.mirror(striped_model, policy="stripe") as mirror:
        tensor = mirror.local()["blk.0.ffn_down.weight"]
        address = -(-tensor.address // PAGE) * PAGE
        (there,) = by_move_pages(address, PAGE)
        try:
            syscalls.move_pages([address], [next(n for n in nodes if n != there)])
        except NumaUnavailableError:
            pytest.skip("this user may not move pages")
        if by_move_pages(address, PAGE) == {there: 1}:
            pytest.skip("the kernel moves no such page")
        found = mirror.verify()
        assert not found.right
        (wrong, *_) = found.placements[nodes[0]].misplaced
        assert wrong.node == there


# Tensors placed by patterns


def placed() -> list[tuple[str, str]]:
    return [
        ("ffn_gate_exps", "stripe"),
        ("token_embd", "skip"),
        ("ffn_down", "interleave"),
        (".*", "mirror"),
    ]


def test_place_puts_each_tensor_where_its_pattern_says(
    numaload: Numaload, striped_model: str, nodes: list[int]
) -> None:
    words = [word for pair in placed() for word in ("--place", "=".join(pair))]
    (report,) = numaload.json("mirror", striped_model, *words)
    assert (report["policy"], report["placed"]) == ("mixed", True)
    size = os.path.getsize(striped_model)
    assert size / 2 < report["copied"] < size
    stripes = in_stripes(striped_model, nodes)
    with api.open(striped_model) as source, api.attach(striped_model) as mirror:
        for node in nodes:
            view = mirror.view(node)
            for name in source:
                assert bytes(view[name].buffer) == bytes(source[name].buffer)
            experts, start = view[EXPERTS], source[EXPERTS].offset
            stop = start + experts.nbytes
            pages = [one for one in stripes if start <= one.start < one.stop <= stop]
            assert len(pages) == len(nodes)
            for page in pages:
                first, last = -(-page.start // PAGE) * PAGE, page.stop // PAGE * PAGE
                where = by_move_pages(experts.address + first - start, last - first)
                assert where == {page.node: (last - first) // PAGE}
            assert set(by_move_pages(view["blk.0.attn_norm.weight"].address, PAGE)) == {node}
            assert (view[EXPERTS].node, view["token_embd.weight"].node) == (None, None)
        down = mirror.view(nodes[0])["blk.0.ffn_down.weight"]
        first = -(-down.offset // BLOCK) * BLOCK
        where = by_move_pages(down.address + first - down.offset, BLOCK)
        assert where == {nodes[first // BLOCK % len(nodes)]: BLOCK // PAGE}
        with mirror.pinned(nodes[-1]):
            assert mirror.local_rows(EXPERTS).stop == 8
            assert mirror.local_rows("token_embd.weight") == (0, 1003, "rows")
        assert mirror.verify().right
        for refused in (lambda: mirror.paths(nodes[0]), lambda: mirror.folder(nodes[0])):
            with pytest.raises(UsageError, match="placed by patterns"):
                refused()
        with pytest.raises(UsageError, match="no memory has the whole file"):
            mirror.view(nodes[0]).image()
    assert "placed by patterns" in numaload("store", "path", striped_model, status=2).stderr
    program = ("--node", nodes[0], striped_model, "--", "cat", "{model}")
    assert "placed by patterns" in numaload("exec", *program, status=2).stderr
    (row,) = numaload.json("status")["replicas"]
    assert set(map(tuple, row["replicas"].values())) == {()}
    assert "all checksums right" in numaload("verify", "--checksum", striped_model).stdout
    done = numaload("mirror", striped_model, "--place", ".*=interleave", status=1)
    assert "mirrored already, placed otherwise; release it first" in done.stderr
    numaload("mirror", striped_model)  # beside it, and then attached first
    with api.attach(striped_model) as mirror:
        assert mirror.report.policy == "mirror"
    numaload("release")
    assert [path for path in numaload.store.rglob("*") if path.suffix == ".parts"] == []


def test_place_in_this_process_alone(striped_model: str, nodes: list[int]) -> None:
    place = [("exps", f"bind:{nodes[-1]}"), ("token_embd", "stripe"), ("", "skip")]
    with api.mirror(striped_model, place=place) as mirror, api.open(striped_model) as source:
        assert mirror.report.placed
        for node in nodes:
            view = mirror.view(node)
            for name in source:
                assert bytes(view[name].buffer) == bytes(source[name].buffer)
            experts = view[EXPERTS]
            inside = -(-experts.address // PAGE) * PAGE
            assert set(by_move_pages(inside, experts.nbytes - 2 * PAGE)) == {nodes[-1]}
        assert mirror.rows(EXPERTS, 1)[nodes[-1]] == [(0, 8, "experts")]
        assert mirror.verify().right


def test_plan_compares_the_policies(numaload: Numaload, tmp_path: Path, nodes: list[int]) -> None:
    """Of a model that is larger than what is free on any node, and not than all together."""
    empty = numaload.json("plan", sparse_model(tmp_path / "small.gguf", 4 * MIB))["choices"]
    assert next(tuple(row["words"]) for row in empty["rows"] if row["fits"]) == ()
    free = max(empty["free"].values())
    path = sparse_model(tmp_path / "large.gguf", free + 32 * MIB)
    found = numaload.json("plan", path)
    rows = {tuple(row["words"])[:2]: row for row in found["choices"]["rows"]}
    assert not rows[()]["fits"]
    stripe = rows["--policy", "stripe"]
    assert stripe["fits"]
    assert sorted(map(int, stripe["nodes"])) == nodes
    assert not rows["--policy", "bind"]["fits"]
    assert found["choices"]["command"].startswith(f"numaload mirror {path} ")
    told = numaload("plan", path)
    assert "mirror: node " in told.stdout
    assert "best that fits: numaload mirror " in told.stdout
    assert "100 %" in told.stdout  # its one tensor
    whole = numaload("plan", sparse_model(tmp_path / "huge.gguf", 64 << 30), status=1).stdout
    assert "larger than the memory of these nodes" in whole
    assert "the page cache keeps what it can: numaload prewarm" in whole
    assert numaload.json("store")["rows"] == []


# Huge pages that were set aside


POOL = "/sys/devices/system/node/node{}/hugepages/hugepages-2048kB/nr_hugepages"


@pytest.fixture
def set_aside(nodes: list[int]) -> Iterator[Callable[[int], None]]:
    """Sets so many huge pages aside on each node."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to set huge pages aside")

    def change(pages: int) -> None:
        for node in nodes:
            Path(POOL.format(node)).write_text(str(pages))
            if int(Path(POOL.format(node)).read_text()) != pages:
                pytest.skip(f"node {node} has no {pages} huge pages in one piece")

    yield change
    for node in nodes:
        Path(POOL.format(node)).write_text("0")


@pytest.mark.parametrize("policy", ["mirror", "interleave"])
def test_hugetlb_pages_are_taken_where_they_were_set_aside(
    striped_model: str, nodes: list[int], set_aside: Callable[[int], None], policy: str
) -> None:
    size = os.path.getsize(striped_model)
    set_aside(-(-size // BLOCK))
    with api.mirror(striped_model, policy=policy, hugetlb=True) as mirror:
        assert mirror.report.placed
        for node in nodes:
            assert mirror.report.placements[node].huge_pages >= size
            tensor = mirror.view(node)[EXPERTS]
            first = -(-tensor.offset // BLOCK) * BLOCK
            where = by_move_pages(tensor.address + first - tensor.offset, BLOCK)
            on = node if policy == "mirror" else nodes[first // BLOCK % len(nodes)]
            assert where == {on: BLOCK // PAGE}
        maps = Path("/proc/self/numa_maps").read_text()
        assert "kernelpagesize_kB=2048" in maps
        assert mirror.verify().right
        with api.open(striped_model) as source:
            assert bytes(mirror.local()[EXPERTS].buffer) == bytes(source[EXPERTS].buffer)


@pytest.mark.usefixtures("nothing_said")
def test_hugetlb_falls_back_where_a_node_has_too_few(
    striped_model: str, nodes: list[int], set_aside: Callable[[int], None]
) -> None:
    set_aside(1)
    said = f"node {nodes[0]} has 1 free huge pages set aside, .* are needed .*nr_hugepages"
    with (
        pytest.warns(NumaloadWarning, match=said),
        api.mirror(striped_model, hugetlb=True) as mirror,
    ):
        assert mirror.report.placed
    with pytest.raises(UsageError, match="hugetlb: only of replicas of this process"):
        api.mirror(striped_model, hugetlb=True, shared=True)
