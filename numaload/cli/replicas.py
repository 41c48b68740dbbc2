"""Verbs that make replicas: ``plan`` and ``mirror``."""

from __future__ import annotations

import argparse
from typing import Any

from numaload.cli.output import complain, note, print_json, progress_bar, rate, say, size
from numaload.cli.placements import ALLOW, PLACED, by_replica, node_list, where

TEACH = (
    "no models known since boot: numaload mirror MODEL.gguf, or numaload prewarm MODEL.gguf first"
)


def add_verbs(verbs: Any) -> None:
    for name, run, text in (
        ("mirror", mirror, "put a verified replica into every node's memory, kept until released"),
        ("plan", show_plan, "say what mirror would build and whether it fits; changes nothing"),
    ):
        parser = verbs.add_parser(name, help=text)
        _common(parser, run, "any one of a model's files; by default the models used since boot")
        parser.add_argument("--nodes", metavar="LIST", default="all", help="default: all")
        parser.add_argument(
            "--per",
            choices=["node", "socket"],
            default="node",
            help="socket: one replica per socket, interleaved over its nodes (default: node)",
        )
        parser.add_argument(
            "--hold",
            action="store_true",
            help="keep the memory in a holder process: not limited by the tmpfs, not emptied at"
            " logout",
        )
        parser.add_argument(
            "--strict",
            action="store_true",
            help="refuse where memory cannot be bound, instead of placing it by first touch",
        )
        parser.add_argument(
            "--drop-source",
            action="store_true",
            help="give back all page cache of the files, not only what reading them brought in",
        )
        parser.add_argument(
            "--policy", choices=["mirror"], default="mirror", help="a replica per node"
        )


def _common(parser: argparse.ArgumentParser, run: Any, help_: str) -> None:
    parser.add_argument("files", metavar="FILE", nargs="*", help=help_)
    parser.add_argument("--json", action="store_true", help="print the API's report")
    parser.set_defaults(run=run)


def _models(files: list[str]) -> list[Any]:
    """The models given, or those used since boot that are still what they were."""
    from numaload.errors import NumaloadError
    from numaload.storage import known
    from numaload.weights import open_weights, reopen

    if files:  # of which several may belong to one model: model-*.gguf
        return list({opened.model().key: opened for opened in map(open_weights, files)}.values())
    found = []
    for model in known.recall():
        if not model.unchanged():
            note(f"{model.paths[0]} changed or went away since it was used; left out")
            continue
        try:
            found.append(reopen(model.paths))
        except NumaloadError as error:
            note(f"{error}; left out")
    return found


def _plan(options: argparse.Namespace) -> tuple[list[Any], Any, Any]:
    from numaload.cli.machine import left_out
    from numaload.numa.topology import topology
    from numaload.replicas.mirror import MirrorOptions

    machine = topology()
    nodes = machine.select(options.nodes)
    if options.nodes == "all":
        for line in left_out(machine):
            note(line)
        if machine.copies_note and options.per == "node":
            note(machine.copies_note)
    wanted = MirrorOptions(
        machine.groups(nodes, options.per), options.hold, options.strict, options.drop_source
    )
    return _models(options.files), machine, wanted


def show_plan(options: argparse.Namespace) -> int:
    from numaload.replicas.mirror import plan_shared

    models, machine, wanted = _plan(options)
    if not models:
        complain(TEACH)
        return 2
    todo = plan_shared(models, machine, wanted)
    if options.json:
        print_json(todo)
    else:
        _print_plan(todo, say)
    return 0 if todo.fits else 1


def _print_plan(todo: Any, tell: Any) -> None:
    from numaload.numa.lists import format_list

    for model, groups in todo.builds:
        parts = [f"interleaved over {format_list(group)}" for group in groups if len(group) > 1]
        alone = [group[0] for group in groups if len(group) == 1]
        parts += [f"on node {format_list(alone)}"] if alone else []
        on = "; ".join(parts)
        where = f"to build {on}" if groups else "already on every node asked for"
        tell(f"plan: {model.paths[0]}, {size(model.size)}: {where}")
    for need in todo.needs:
        tell(f"plan: {need}")


def mirror(options: argparse.Namespace) -> int:
    from numaload.replicas.mirror import mirror_shared

    models, machine, wanted = _plan(options)
    if not models:
        complain(TEACH)
        return 2
    with progress_bar("mirror", quiet=options.json) as progress:
        mirrors = mirror_shared(
            models, machine, wanted, progress, lambda todo: _print_plan(todo, note)
        )
    if options.json:
        print_json([m.report for m in mirrors])
    for one in () if options.json else mirrors:
        _tell(one.report)
    _tell_how_long(hold=options.hold)
    return 0 if all(m.report.placed for m in mirrors) else 1


def _tell_how_long(*, hold: bool) -> None:
    """Where logging out ends what was made, said while it can still be made otherwise."""
    from numaload.storage import logout, userdir

    ends = logout.killed_note() if hold else logout.emptied_note(userdir.path())
    if ends:
        note(ends)


def _tell(report: Any) -> None:
    if report.copied:
        speed = rate(report.copied, report.seconds)
        how = PLACED if report.unbound else f"bound by {report.binding}"
        say(f"{report.paths[0]}: {size(report.copied)} in {report.seconds:.2f} s ({speed}), {how}")
        if report.plan:
            say(f"read: {report.plan}")
    else:
        say(f"{report.paths[0]}: replicas were there already")
    for nodes, placement in by_replica(report.placements):
        say(f"node {nodes}: {where(placement)}")
    if report.unbound:
        note(f"node {node_list(report.unbound)}: {PLACED}: {ALLOW}")
    for pid in report.holders:
        say(f"held by process {pid} until: numaload release {report.paths[0]}")
