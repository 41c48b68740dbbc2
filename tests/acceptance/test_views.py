"""Point 7, views and pinning: local views, pinned threads, addresses, and what close() ends."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import numaload as api
from commands import Numaload
from numaload.linux.syscalls import memory_at
from numaload.replicas import reclaim
from numaload.replicas import store as stores
from witness import mapped

NAME = "blk.0.attn_q.weight"


@pytest.fixture
def mirror(numaload: Numaload, model: str) -> Iterator[api.Mirror]:
    with api.mirror(model, shared=True) as built:
        yield built


def test_views_have_the_weights_of_the_file(mirror: api.Mirror, model: str) -> None:
    node = mirror.nodes[0]
    view = mirror.view(node)
    with api.open(model) as weights:
        assert list(view) == list(weights)
        for name, tensor in weights.items():
            assert np.array_equal(view[name].blocks, tensor.blocks)
            assert view[name].node == node
            assert tensor.node is None
    assert mirror.local().node in mirror.nodes


def test_pinned_runs_there_and_restores(mirror: api.Mirror) -> None:
    node, before = mirror.nodes[0], os.sched_getaffinity(0)
    with mirror.pinned(node) as view:
        assert os.sched_getaffinity(0) == api.topology().nodes[node].usable_cpus
        assert view[NAME].node == node
    assert os.sched_getaffinity(0) == before


def test_affinity_comes_back_after_an_exception(mirror: api.Mirror) -> None:
    one = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, one)
    try:
        with pytest.raises(ZeroDivisionError), mirror.pinned(mirror.nodes[0]):
            raise ZeroDivisionError
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, before)


def test_addresses_point_at_the_blocks(mirror: api.Mirror) -> None:
    addresses = mirror.addresses(NAME)
    assert list(addresses) == mirror.nodes
    for node, address in addresses.items():
        tensor = mirror.view(node)[NAME]
        assert bytes(memory_at(address, tensor.nbytes)) == tensor.blocks.tobytes()


def test_paths_are_the_replica_s_own_files(mirror: api.Mirror, model_files: list[str]) -> None:
    paths = mirror.paths(mirror.nodes[0])
    assert not set(paths) & set(model_files)
    for path, source in zip(paths, model_files, strict=True):
        assert Path(path).read_bytes() == Path(source).read_bytes()
    with pytest.raises(api.errors.UsageError, match="no replica on node 1000"):
        mirror.paths(1000)


def test_paths_are_the_source_where_nothing_was_copied(store: Path, model_files: list[str]) -> None:
    if len(api.topology().usable) > 1:
        pytest.skip("replicas of one process are copies on this machine")
    with api.mirror(model_files[0]) as mirror:
        assert mirror.paths(mirror.nodes[0]) == model_files


def test_paths_of_held_replicas_are_files_too(numaload: Numaload, model_files: list[str]) -> None:
    with api.mirror(model_files[0], shared=True, hold=True) as mirror:
        paths = mirror.paths(mirror.nodes[0])
        assert Path(paths[0]).read_bytes() == Path(model_files[0]).read_bytes()
    numaload("release", model_files[0])


def test_arrays_outlive_close_and_addresses_do_not(mirror: api.Mirror) -> None:
    tensor = mirror.view(mirror.nodes[0])[NAME]
    blocks, copy = tensor.blocks, tensor.blocks.copy()
    address = mirror.addresses(NAME)[mirror.nodes[0]]
    mirror.close()
    for use in (mirror.local, mirror.verify, lambda: mirror.addresses(NAME), lambda: tensor.blocks):
        with pytest.raises(api.errors.ClosedError):
            use()
    gc.collect()
    assert np.array_equal(blocks, copy)
    assert mapped(address)
    del blocks
    gc.collect()
    assert not mapped(address)


def test_unknown_nodes_and_names(mirror: api.Mirror) -> None:
    with pytest.raises(api.errors.UsageError, match="no replica on node 77"):
        mirror.view(77)
    with pytest.raises(api.errors.TensorNotFoundError, match=r"close: blk\.0\.attn_q"):
        mirror.addresses("blk.0.attn_q.weigth")


def test_views_are_read_only(mirror: api.Mirror) -> None:
    blocks = mirror.view(mirror.nodes[0])[NAME].blocks
    assert not blocks.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        blocks[0, 0] = 1


def test_leases_end_with_close(mirror: api.Mirror, numaload: Numaload) -> None:
    mirror.close()
    assert "still in use" not in numaload("release").stdout


def test_attach_finds_only_what_is_there(numaload: Numaload, model: str, store: Path) -> None:
    with pytest.raises(api.errors.ReplicaNotFoundError, match="numaload mirror"):
        api.attach(model)
    assert not store.exists()


def test_on_one_node_all_policies_are_found(store: Path, model: str) -> None:
    api.mirror(model, "local", policy="bind", shared=True).close()
    for policy in ("mirror", "bind", "interleave", "stripe"):
        with api.attach(model, policy=policy) as found:
            assert found.report.policy == "mirror"
    with pytest.raises(api.errors.UsageError, match=r"policy 'foo': expected mirror or .* mixed"):
        api.attach(model, policy="foo")
    with pytest.raises(api.errors.ReplicaNotFoundError):
        api.attach(model, policy="mixed")


def test_a_closed_mirror_tells_no_rows(store: Path, model: str) -> None:
    with api.open(model) as weights:
        mirror = api.mirror(weights, "local", shared=True)
        assert mirror.local_rows(NAME).size
        mirror.close()
        for ask in (lambda: mirror.local_rows(NAME), lambda: mirror.rows(NAME, 1)):
            with pytest.raises(api.errors.ClosedError):
                ask()


def test_attach_holds_only_what_it_uses(mirror: api.Mirror, model: str) -> None:
    """A mirror of some nodes does not keep the replicas of others in use."""
    mirror.close()
    (entry,) = stores.entries()
    other = dataclasses.replace(entry, name=f"{entry.name[:-8]}{0:08x}", groups=((77,),))
    root = os.path.dirname(os.path.dirname(os.path.dirname(entry.path(entry.groups[0], 0))))
    os.mkdir(f"{root}/{other.name}", 0o700)
    Path(f"{root}/{other.name}/manifest.json").write_text(json.dumps(other.manifest()))
    with api.attach(model, nodes=entry.nodes[0]):
        done = reclaim.release(stores.entries())
    assert {one.entry.name: one.in_use for one in done} == {entry.name: True, other.name: False}
