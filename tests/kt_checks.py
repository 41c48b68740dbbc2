"""What the tests of kt-kernel do in a process of its own each, by name; the result is JSON.

kt-kernel keeps its workers, its loaders and its buffers for the process, and writes to stdout.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # of torch and kt-kernel; numaload's are asked for by name

import torch  # noqa: E402

import kt_moe as kt  # noqa: E402
import numaload as api  # noqa: E402
from moe_model import SHAPES, Shape  # noqa: E402
from numaload.backends import kt_kernel  # noqa: E402
from numaload.backends.kt_kernel import place, tp  # noqa: E402
from numaload.errors import ClosedError, NumaloadError, UsageError  # noqa: E402
from numaload.replicas.mirror import MirrorOptions, private  # noqa: E402

COUNTS = (1, 20)  # tokens: kt-kernel has a way for few and one for many
ROUNDS = 100


def wrapper_class() -> Any:
    from kt_kernel.utils.llamafile import LlamafileMoEWrapper

    return LlamafileMoEWrapper


def outputs(made: Any, shape: Shape) -> list[Any]:
    return [kt.forward(made, kt.tokens(shape, count)) for count in COUNTS]


def equal(found: list[Any], wanted: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def inside(handle: kt_kernel.Handle, node: int | None, layers: int) -> bool:
    """Whether the addresses given away are in numaload's memory, as the kernel lists it."""
    (weights,) = handle.views(node)
    flat = torch.frombuffer(weights.image(), dtype=torch.uint8)
    image = flat.data_ptr()
    given = [handle.loader(node).get_undequanted_tensor_and_ggml_type(name)[0].data_ptr()
             for layer in range(layers) for name in kt.names(layer)]  # fmt: skip
    return all(image < address < image + len(flat) for address in given)


@contextmanager
def a_private_mirror(path: str) -> Iterator[api.Mirror]:
    """Replicas of this process, which ``mirror`` does not make on a machine with one node."""
    machine = api.topology()
    with api.open(path) as weights:
        wanted = MirrorOptions(machine.groups(machine.all), hold=False, strict=False)
        with private(weights, machine, wanted, None) as mirror:
            yield mirror


@contextmanager
def installed(path: str, kind: str) -> Iterator[kt_kernel.Handle]:
    """A handle of each kind of memory there is."""
    if kind == "private":
        with a_private_mirror(path) as mirror, kt_kernel.install(path, mirrors=mirror) as handle:
            yield handle
    elif kind == "attached":
        api.mirror(path, shared=True).close()
        with api.attach(path) as mirror, kt_kernel.install(path, mirrors=mirror) as handle:
            yield handle
    else:
        nodes = None if kind == "files" else "all"
        with kt_kernel.install(path, nodes, shared=kind == "shared") as handle:
            yield handle


def same_output(path: str, name: str, kind: str) -> dict[str, Any]:
    """By kt-kernel's own loader, by ours through its class, by ours through its lowest level."""
    shape = SHAPES[name]
    own = outputs(kt.wrapper(path, shape), shape)
    with installed(path, kind) as handle:
        node = handle.nodes[0] if handle.nodes else None
        ours = outputs(kt.wrapper(path, shape), shape)
        report = handle.check()
        loader = handle.loader(node)
        found = [loader.get_undequanted_tensor_and_ggml_type(n)[0] for n in kt.names()]
        low = kt.Experts(kt.pool([0]), shape, shape.inner, [t.data_ptr() for t in found])
        lowest = [low(kt.tokens(shape, count)) for count in COUNTS]
        view = handle.view(node)
        errors = [
            kt.error(out, kt.reference(view, kt.tokens(shape, count)))
            for out, count in zip(ours, COUNTS, strict=True)
        ]
        return {
            "equal": equal(ours, own),
            "lowest": equal(lowest, own),
            "errors": errors,
            "inside": inside(handle, node, 1),
            "right": report.right,
            "copied": report.copied,
            "pages": [given.pages for given in report.given],
            "nodes": [given.nodes for given in report.given],
            "kept": handle.kept,
            "text": str(report),
        }


def later_use(path: str, name: str) -> dict[str, Any]:
    """The memory stays after close, and after the last reference to the handle, until release."""
    shape = SHAPES[name]
    handle = kt_kernel.install(path, nodes="all", shared=True)
    made = kt.wrapper(path, shape)
    before = outputs(made, shape)
    handle.close()
    kept, loader = handle.kept, made.gguf_loader
    try:
        loader.get_undequanted_tensor_and_ggml_type(kt.names()[0])
        refused = False
    except ClosedError:
        refused = True
    del handle, loader
    gc.collect()
    filler = [torch.ones(1 << 20) for _ in range(64)]  # whatever was unmapped would be used again
    return {"equal": equal(outputs(made, shape), before), "kept": kept, "refused": refused,
            "filler": len(filler)}  # fmt: skip


def subpools(path: str, name: str, count: int) -> dict[str, Any]:
    """Several subpools: kt-kernel copies. How much, and to which nodes?"""
    shape = SHAPES[name]
    with kt_kernel.install(path) as handle:
        made = kt.wrapper(path, shape, nodes=[0] * count)
        found = outputs(made, shape)
        report, weights = handle.check(), handle.view()
        errors = [
            kt.error(out, kt.reference(weights, kt.tokens(shape, n)))
            for out, n in zip(found, COUNTS, strict=True)
        ]
        return {
            "errors": errors,
            "text": str(report),
            "copied": report.copied,
            "nbytes": shape.nbytes(),
        }


def parts_add_up(path: str, name: str, count: int) -> dict[str, Any]:
    """One subpool for each part of ``tp``; the sum, in float32, is what ``count`` subpools give."""
    shape = SHAPES[name]
    with api.open(path) as weights:
        whole = kt.Experts(
            kt.pool([0] * count), shape, shape.inner,
            [weights[n].address for n in kt.names()], kt.FLOAT32,
        )  # fmt: skip
        wanted = [whole(kt.tokens(shape, n)) for n in COUNTS]
        sums: list[Any] = [0, 0]
        cpu, placed = kt.pool([0]), [place(tp(weights, part, count)) for part in range(count)]
        for view in placed:
            parts = [view[n] for n in kt.names()]
            low = kt.Experts(cpu, shape, parts[0].shape[1], [p.address for p in parts], kt.FLOAT32)
            sums = [s + low(kt.tokens(shape, n)) for s, n in zip(sums, COUNTS, strict=True)]
        return {"equal": equal(sums, wanted)}


def counts() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "anonymous": int(anonymous.split()[1]) << 10,
        "maps": Path("/proc/self/maps").read_text().count("\n"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def rounds(path: str, name: str, kind: str) -> dict[str, Any]:
    """Open, load, compute, close, release, a hundred times."""
    shape, after = SHAPES[name], []
    wanted: list[Any] = []
    same = True
    cpu = kt.pool([0])
    for _ in range(ROUNDS):
        with installed(path, kind) as handle:
            wrapper_class()._cpu_infer_instance = cpu
            made = kt.wrapper(path, shape)
            found = outputs(made, shape)
            wanted = wanted or found
            same &= equal(found, wanted)
            node = handle.nodes[0] if handle.nodes else None
            handle.loader(node).file_data_map  # noqa: B018
            handle.check()
            del made
        handle.release()
        gc.collect()
        after.append(counts())
    return {"after": after, "same": same}


def two_in_one(path: str, name: str) -> dict[str, Any]:
    """Two MOEs in one process, each with workers and a replica of its own."""
    shape = SHAPES[name]
    own = outputs(kt.wrapper(path, shape), shape)
    pools = [wrapper_class()._cpu_infer_instance]
    with kt_kernel.install(path, nodes="all") as handle:
        found = []
        for node in [*handle.nodes, handle.nodes[0]]:
            with handle.on(node):
                made = kt.wrapper(path, shape, nodes=[node])
            pools.append(made.cpu_infer)
            found.append(equal(outputs(made, shape), own))
        later = kt.wrapper(path, shape)
        pools.append(later.cpu_infer)
    first, on, again, last = (pools[0], pools[1], pools[-2], pools[-1])
    return {"equal": found, "apart": on is not first, "again": again is on, "back": last is first}


def refusals(path: str) -> dict[str, Any]:
    """What cannot be is said by name, and the hook is as before afterwards."""
    loaders = wrapper_class()._gguf_loaders_by_path
    said = {}

    def attempt(what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except (NumaloadError, OSError) as error:
            said[what] = f"{type(error).__name__}: {error}"

    handle = kt_kernel.install(path)
    attempt("twice", lambda: kt_kernel.install(path))
    attempt("node", lambda: handle.loader(5))
    attempt("both", lambda: kt_kernel.install(path + "x", nodes=0, mirrors=[]))
    attempt("shared", lambda: kt_kernel.install(path + "x", shared=True))
    attempt("absent", lambda: kt_kernel.install(path + "x"))
    attempt("folder", lambda: kt_kernel.install(os.path.dirname(kt_kernel.__file__)))
    attempt("tensor", lambda: handle.loader().get_undequanted_tensor_and_ggml_type("nothing"))
    try:
        with handle.on(5):
            pass
    except UsageError:
        said["on"] = "UsageError"
    handle.close()
    handle.close()
    attempt("closed", handle.loader)
    said["left"] = str(list(loaders))
    loaders[os.path.realpath(path)] = "of before"
    kt_kernel.install(path).close()
    said["before"] = loaders.pop(os.path.realpath(path))
    return said


def absent_node(path: str, name: str) -> dict[str, Any]:
    """kt-kernel goes on where it was told a node that is not there; the report names it."""
    shape = SHAPES[name]
    with kt_kernel.install(path, nodes="all") as handle:
        kt.wrapper(path, shape, nodes=[3])
        report = handle.check()
        return {"right": report.right, "text": str(report), "nodes": handle.nodes}


def folder(path: str, name: str) -> dict[str, Any]:
    """A folder of files, a layer each, merged as kt-kernel does."""
    shape = SHAPES[name]
    own = [outputs(kt.wrapper(path, shape, layer), shape) for layer in range(2)]
    with kt_kernel.install(path, nodes="all") as handle:
        made = [kt.wrapper(path, shape, layer) for layer in range(2)]
        return {
            "equal": [equal(outputs(m, shape), o) for m, o in zip(made, own, strict=True)],
            "models": len(handle.views()),
        }


def older(path: str, name: str) -> dict[str, Any]:
    """0.7.0: one loader for the process, and a copy also for one subpool."""
    shape = SHAPES[name]
    own = outputs(kt.wrapper(path, shape), shape)
    wrapper_class()._gguf_loader_instance = None
    with kt_kernel.install(path, nodes="all") as handle:
        ours = outputs(kt.wrapper(path, shape), shape)
        report = handle.check()
        loader = wrapper_class()._gguf_loader_instance
        result = {
            "equal": equal(ours, own), "version": report.version, "hook": report.hook,
            "ours": isinstance(loader, kt_kernel.Loader), "copied": bool(report.copied),
        }  # fmt: skip
    return result | {"left": wrapper_class()._gguf_loader_instance is None}


def main() -> None:
    """``kt_checks.py RESULT CHECK ARGUMENT...``: numbers are passed as such."""
    result, check, *arguments = sys.argv[1:]
    values = [int(word) if word.isdigit() else word for word in arguments]
    found = globals()[check](*values)
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
