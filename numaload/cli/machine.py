"""``numaload nodes``, and the threads of a process: the machine, and who runs where on it."""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from numaload.cli.output import complain, print_json, print_table, say, size

if TYPE_CHECKING:
    from numaload.doctor.findings import ThreadReport
    from numaload.doctor.pools import ThreadPool
    from numaload.machine.devices import FileDevice, Gpu
    from numaload.machine.topology import Node, Topology

K = TypeVar("K", bound=Hashable)


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("nodes", help="NUMA nodes, their CPUs, memory and distances")
    parser.add_argument(
        "files", metavar="FILE", nargs="*", help="also say which disk and node these files are on"
    )
    parser.set_defaults(run=nodes)


def nodes(options: argparse.Namespace) -> int:
    from numaload.doctor.opinion import second_opinion
    from numaload.linux.syscalls import binding
    from numaload.machine.devices import gpus
    from numaload.machine.topology import topology

    machine, cards = topology(), gpus()
    opinion, places = second_opinion(machine), _places(options.files)
    status = 0 if len(places) == len(options.files) else 1
    if options.json:
        found = machine.to_dict() | {"binding": binding().name, "libnuma_says": opinion}
        print_json(found | {"gpus": cards, "files": places})
        return status
    print_nodes(machine)
    for line in [*map(gpu_line, cards), *map(file_line, places)]:
        say(line)
    say(f"memory is bound {_how(binding().name)}")
    say(f"second opinion: {opinion}")
    return status


def _places(paths: list[str]) -> list[FileDevice]:
    from numaload.errors import ReadError
    from numaload.machine.devices import disk_of

    found = []
    for path in paths:
        try:
            found.append(disk_of(path))
        except ReadError as error:  # noqa: PERF203 - the others are still worth showing
            complain(str(error))
    return found


def print_nodes(machine: Topology) -> None:
    """Print a line per node: nodes at one distance are named together, long lists come last."""
    from numaload.linux.lists import format_list

    header = ["node", "memory", "free", "distances", "CPUs"]
    rows = [
        [node.id, *memory(node), _distances(node), _cpus(node)] for node in machine.nodes.values()
    ]
    print_table(header, rows)
    say(f"all: {format_list(machine.all) or 'none'}")
    for line in left_out(machine):
        say(line)
    if machine.copies_note:
        say(machine.copies_note)
    if machine.quota is not None:
        say(f"cpu quota {machine.quota:.4g} of {len(machine.cpus)} CPUs (cgroup)")


def memory(node: Node) -> tuple[str, str]:
    """Return what a node has, and what of it is free, in words."""
    if node.has_memory and not node.memory_total:
        return "unknown", "unknown"
    return size(node.memory_total), size(node.memory_free)


def gpu_line(gpu: Gpu) -> str:
    """Write ``GPU 0000:3b:00.0 10de:2330 (3D, nvidia): node 1, CPUs 8-15``."""
    from numaload.linux.lists import format_list
    from numaload.machine.devices import SILENT

    what = f"GPU {gpu.address} {gpu.id} ({gpu.kind}, {gpu.driver or 'no driver'})"
    own = "" if gpu.memory_node is None else f", its memory is node {gpu.memory_node}"
    if gpu.node is None:
        return f"{what}: node unknown ({SILENT}){own}"
    return f"{what}: node {gpu.node}, CPUs {format_list(gpu.cpus) or 'none'}{own}"


def file_line(place: FileDevice) -> str:
    """Write ``model.gguf: ext4 on dm-0 (nvme0n1, nvme1n1): node 0-1``."""
    from numaload.linux.lists import format_list

    if not place.device:
        return f"{place.path}: node unknown ({place.why})"
    disks = "" if place.disks in ((), (place.device,)) else f" ({', '.join(place.disks)})"
    where = format_list(place.nodes) if place.nodes else f"unknown ({place.why})"
    return f"{place.path}: {place.file_system} on {place.device}{disks}: node {where}"


def left_out(machine: Topology) -> list[str]:
    """Return a line per reason why ``all`` does not include some nodes."""
    usable = set(machine.usable)
    reasons = ((why, n in usable) for n, why in machine.left_out.items())
    return [
        f"node {ids} is left out of all: {why}{', but may be named' if named else ''}"
        for (why, named), ids in _grouped(reasons, machine.left_out).items()
    ]


def _how(name: str) -> str:
    from numaload.linux.syscalls import LIBNUMA, LIBNUMA_HINT, NO_CALLS

    missing = f"{LIBNUMA} not found ({LIBNUMA_HINT})"
    return {
        LIBNUMA: f"through {LIBNUMA}",
        NO_CALLS: f"by nothing: {missing}, and no system call numbers for this processor",
    }.get(name, f"by system calls used directly: {missing}")


def _cpus(node: Node) -> str:
    from numaload.linux.lists import format_list

    forbidden = len(node.cpus - node.usable_cpus)
    rest = f" ({forbidden} {'more ' if node.usable_cpus else ''}not allowed here)"
    return (format_list(node.usable_cpus) or "none") + (rest if forbidden else "")


def _distances(node: Node) -> str:
    """Write ``10 to 0; 12 to 1-3``: one number per node is unreadable beyond eight nodes."""
    near = _grouped(node.distances.values(), node.distances)
    return "; ".join(f"{distance} to {ids}" for distance, ids in sorted(near.items())) or "unknown"


def _grouped(keys: Iterable[K], ids: Iterable[int]) -> dict[K, str]:
    """Return {key: list of the ids that have it}."""
    from numaload.linux.lists import format_list

    groups: dict[K, list[int]] = {}
    for key, number in zip(keys, ids, strict=True):
        groups.setdefault(key, []).append(number)
    return {key: format_list(numbers) for key, numbers in groups.items()}


def print_threads(seen: ThreadReport) -> None:
    """Print a line per pool of threads."""
    header = ["threads", "name", "CPUs", "node", "last on", "have work", "CPU time", "waited"]
    print_table(header, [_row(seen, pool) for pool in seen.pools])


def _row(seen: ThreadReport, pool: ThreadPool) -> list[Any]:
    from numaload.linux.lists import format_list

    row = pool.to_dict()
    own = f", {pool.each} each" if pool.each < len(pool.cpus) else ""
    return [
        len(pool.threads),
        str(pool),
        f"{format_list(pool.cpus) or 'unknown'}{own}",
        format_list(pool.nodes) or "unknown",
        format_list(row["last_on"]) or "unknown",
        len(seen.runnable.intersection(row["tids"])),
        f"{row['cpu_s']:.1f} s",
        f"{row['waited_s']:.1f} s",
    ]
