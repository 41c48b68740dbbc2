"""``numaload plan`` and ``numaload mirror``, and where replicas are, in words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from numaload.cli.output import (
    complain,
    count,
    files_of,
    interval,
    note,
    on_nodes,
    print_json,
    print_table,
    progress_bar,
    rate,
    say,
    size,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numaload.linux.placement import Placement
    from numaload.replicas.choices import Choice, Choices
    from numaload.replicas.plan import MirrorPlan, Need
    from numaload.replicas.views import MirrorReport

PLACED = "placed, not bound"
WATCH_S, SETTLE_S = 5.0, 0.5  # between two looks, and where a file was only seen once
ALLOW = (
    "memory may move later; in a container, --cap-add SYS_NICE (or seccomp=unconfined) allows"
    " binding"
)
TEACH = (
    "no models known since boot; name one: numaload mirror MODEL.gguf, or first"
    " numaload prewarm MODEL.gguf"
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
            "--pool",
            metavar="POOL",
            default="",
            help="for room, unused replicas of the same pool go (default: base)",
        )
        parser.add_argument("--keep", action="store_true", help="these never go for room")
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
            "--policy",
            choices=["mirror", "interleave", "stripe", "bind"],
            default="mirror" if run is mirror else None,
            help="mirror: a replica per node (default); interleave: one, its blocks in turn;"
            " stripe: one, each node has rows or experts of every tensor; bind: one, on one node",
        )
        parser.add_argument(
            "--weights",
            metavar="NODE=N,...",
            type=_ratio,
            help="of interleave: blocks each node takes in turn (default: the kernel's weights)",
        )
        parser.add_argument(
            "--place",
            metavar="PATTERN=POLICY",
            action="append",
            type=_place,
            default=[],
            help="instead of one policy: of tensors whose names the pattern is in; the first that"
            " is counts; also skip (left in the page cache), bind:NODE; for numaload.attach alone",
        )
        if run is mirror:
            parser.add_argument(
                "--watch",
                metavar="SECONDS",
                nargs="?",
                const=WATCH_S,
                type=interval,
                help="stay, and mirror again what changes or goes: looked at every so often"
                f" (default: {WATCH_S:g})",
            )


def _ratio(text: str) -> dict[int, int]:
    """Read "0=2,1=1"; what is wrong with the numbers is said by who uses them."""
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        found = {int(node): int(weight) for node, _, weight in pairs}
    except ValueError:
        found = {}
    if len(found) != len(pairs):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected NODE=N,..., as in 0=2,1=1")
    return found


def _place(text: str) -> tuple[str, str]:
    pattern, equals, policy = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected PATTERN=POLICY, as .*=mirror")
    return pattern, policy


def _common(parser: argparse.ArgumentParser, run: Any, help_: str) -> None:
    parser.add_argument("files", metavar="FILE", nargs="*", help=help_)
    parser.set_defaults(run=run)


def _models(files: list[str]) -> list[Any]:
    """Open the models given, or those used since boot that are still what they were."""
    from numaload.errors import NumaloadError
    from numaload.files import known
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
    from numaload.machine.topology import topology
    from numaload.replicas.mirror import MirrorOptions

    machine = topology()
    nodes = machine.select(options.nodes)
    if options.nodes == "all":
        for line in left_out(machine):
            note(line)
        if machine.copies_note and options.per == "node" and options.policy in (None, "mirror"):
            note(machine.copies_note)
    wanted = MirrorOptions.of(
        machine, nodes, options.per, options.policy or "mirror", options.weights, options.place,
        hold=options.hold, strict=options.strict, drop_source=options.drop_source,
        pool=options.pool, keep=options.keep,
    )  # fmt: skip
    return _models(options.files), machine, wanted


def show_plan(options: argparse.Namespace) -> int:
    from numaload.replicas.mirror import plan_shared

    models, machine, wanted = _plan(options)
    if not models:
        complain(TEACH)
        return 2
    todo = plan_shared(models, machine, wanted)
    found = None
    if options.policy is None and options.per == "node" and not options.place:
        found = _choices(options, models, machine)
    if options.json:
        print_json(todo.to_dict() | ({"choices": found} if found else {}))
    elif found:
        _tell_choices(found, options)
    else:
        _tell_plan(todo)
    return 0 if todo.fits or todo.goes or (found and found.best) else 1


def _tell_plan(todo: MirrorPlan) -> None:
    for line in _builds(todo):
        say(line)
    for need in todo.needs:
        say(_fits(need))
    for path in todo.goes:
        say(f"would go for room: {path}")
    if todo.why:
        say(todo.why)


def _choices(options: argparse.Namespace, models: list[Any], machine: Any) -> Choices:
    from numaload.replicas.choices import choices

    return choices(
        models, machine, machine.select(options.nodes), hold=options.hold, strict=options.strict,
        pool=options.pool,
    )  # fmt: skip


def _tell_choices(found: Choices, options: argparse.Namespace) -> None:
    """Compare all policies in one table: what each takes of every node, and what fits."""
    say(f"{', '.join(found.paths)}: {size(found.nbytes)}")
    for names, tensors, nbytes in found.families:
        share = 100 * nbytes / max(found.nbytes, 1)
        say(f"  {share:3.0f} %  {size(nbytes)} in {count(tensors, 'tensor')}: {names}")
    header = ["policy", *(f"node {node}" for node in found.free), "new", "fits"]
    free = ["free", *("?" if n is None else size(n) for n in found.free.values()), "", ""]
    rows = [[*_choice_row(row, found.free)] for row in found.rows]
    print_table(header, [free, *rows])
    for row in found.rows:
        reasons = [] if row.fits else [*map(_fits, row.lacks), row.why_not]
        for why in filter(None, reasons):
            say(f"{_named(row)}: {why}")
    if found.best is None and 0 < found.memory < found.nbytes:
        say(
            f"larger than the memory of these nodes ({size(found.memory)}): what is mapped of it is"
            " read from storage again and again while a model runs"
        )
    given = ["--nodes", options.nodes] if options.nodes != "all" else []
    given += ["--hold"] if options.hold else []
    given += ["--pool", options.pool] if options.pool else []
    best = found.best
    if best is not None and best.plan is not None and not any(best.nodes.values()):
        say("all of the best that fits is there already")
    else:
        fits = "best that fits" if best else "nothing fits; the page cache keeps what it can"
        say(f"{fits}: {found.command(given if best and '--nodes' not in best.words else ())}")


def _named(row: Choice) -> str:
    return " ".join(row.words).removeprefix("--policy ").replace("--nodes", "node") or "mirror"


def _choice_row(row: Choice, nodes: Iterable[int]) -> Iterator[str]:
    yield _named(row)
    for node in nodes:
        yield size(row.nodes[node]) if row.nodes.get(node) else "-"
    yield size(row.plan.nbytes) if row.plan else ""
    if not row.fits:
        yield "no"
    elif row.plan and row.plan.goes:
        yield f"yes, once these go for room: {', '.join(row.plan.goes)}"
    else:
        yield "yes" if row.plan and row.plan.nbytes else "yes, it is there"


def _announce(todo: MirrorPlan) -> None:
    for line in _plan_lines(todo):
        note(line)


def _plan_lines(todo: MirrorPlan) -> Iterator[str]:
    """Yield what will be built, and how near to a limit that is or what does not fit."""
    for line in _builds(todo):
        yield f"plan: {line}"
    for need in todo.needs:
        if not need.fits:
            yield f"plan: {_fits(need)}"
    known = [need for need in todo.needs if need.free is not None]
    if todo.fits and known:
        least = max(known, key=lambda need: need.needed / max(need.free or 0, 1))
        yield f"plan: fits: {_of(least)} (tightest limit: {least.name})"


def _builds(todo: MirrorPlan) -> Iterator[str]:
    for model, layouts in todo.builds:
        alone = [group[0] for group in layouts if len(group) == 1]
        on = [
            f"{_how(layout)} over {on_nodes(group)}"
            for group, layout in layouts.items()
            if len(group) > 1
        ]
        on += [f"on {on_nodes(alone)}"] if alone else []
        do = f"to build {'; '.join(on)}" if layouts else "already on every node asked for"
        yield f"{files_of(model.paths)}, {size(model.size)}: {do}"


def _how(layout: Any) -> str:
    if layout.only:
        return "once, what is not on each,"
    return "striped" if layout.stripes else "interleaved"


def _fits(need: Need) -> str:
    """Compare with one limit: "node 0: fits: 0.6 GiB of 1.7 GiB"."""
    if need.free is None:
        return f"{need.name}: needs {size(need.needed)}; the kernel does not say what is free"
    if need.fits:
        return f"{need.name}: fits: {_of(need)}"
    hint = f" ({need.hint})" if need.hint else ""
    more = size(need.needed - need.free)
    return f"{need.name}: does NOT fit: {_of(need)}, {more} too much{hint}"


def _of(need: Need) -> str:
    return f"{size(need.needed)} of {size(max(0, need.free or 0))}"


def mirror(options: argparse.Namespace) -> int:
    from numaload.replicas.mirror import mirror_shared

    if options.watch is not None:
        return _watch(options)
    models, machine, wanted = _plan(options)
    if not models:
        complain(TEACH)
        return 2
    with progress_bar("mirror", quiet=options.json) as progress:
        mirrors = mirror_shared(models, machine, wanted, progress, _announce)
    if options.json:
        print_json([m.report for m in mirrors])
    for one in () if options.json else mirrors:
        _tell(one.report)
    _tell_how_long(hold=options.hold)
    return 0 if all(m.report.placed for m in mirrors) else 1


def _watch(options: argparse.Namespace) -> int:
    """Keep models mirrored until a signal comes; their replicas are in use for so long.

    A file that is being written is waited for: it must look the same twice. Those that cannot be
    opened stop no others. Raises: at the start, what no waiting mends.
    """
    import time

    from numaload.errors import NumaloadError, NumaUnavailableError, StoreError, UsageError

    held: list[Any] = []
    plans = [""]  # what was said of the last one that did not fit
    told, seen, is_ready = "", dict[str, Any](), False
    options.files = options.files or [weights.paths[0] for weights in _models([])]
    if not options.files:
        complain(TEACH)
        return 2
    while True:
        now, failed = _as_they_are(options.files)
        try:
            if now and now == seen and not _all_there(now.values(), held):
                held = _mirrored_again(options, list(now), held, plans)
            if held and not (failed or is_ready):
                _tell_systemd("READY=1")
                is_ready = True
        except NumaloadError as error:
            if not is_ready and isinstance(error, (UsageError, StoreError, NumaUnavailableError)):
                raise
            failed.append(str(error))
        if _worded(failed) != told:  # said once, not every few seconds
            told = _worded(failed)
            for why in failed:
                complain(why)
        seen = now
        time.sleep(SETTLE_S if not held else options.watch)


def _as_they_are(files: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return {file: its model}, and why others cannot be opened."""
    from numaload.errors import NumaloadError
    from numaload.weights import open_weights

    found, failed = {}, []
    for file in files:
        try:
            with open_weights(file) as weights:
                found[file] = weights.model()
        except NumaloadError as error:  # noqa: PERF203 - the others are still to be mirrored
            failed.append(str(error))
    return found, failed


def _all_there(now: Iterable[Any], held: list[Any]) -> bool:
    """Return whether replicas of these models are in use and whole; note that they are in use."""
    from numaload.replicas.lease import damage

    wanted = {model.key for model in now}
    its = [one for one in held if one.model.key in wanted]
    leases = [lease for one in its for lease in one._leases]  # noqa: SLF001
    for lease in leases:
        lease.note_use()
    same = wanted == {one.model.key for one in its}
    return same and not any(damage(lease.entry) for lease in leases)


def _mirrored_again(
    options: argparse.Namespace, files: list[str], before: list[Any], plans: list[str]
) -> list[Any]:
    """Mirror these files; return what is in use then. Other files' replicas stay in use."""
    from numaload.errors import NodeMemoryError
    from numaload.replicas import reclaim
    from numaload.replicas.mirror import mirror_shared

    def announce(todo: MirrorPlan) -> None:
        before_that, plans[0] = plans[0], _worded(_plan_lines(todo))
        if plans[0] != before_that:  # what does not fit is tried again and again
            _announce(todo)

    models, machine, wanted = _plan(argparse.Namespace(**vars(options) | {"files": files}))
    paths = {weights.model().paths for weights in models}
    try:
        mirrors = mirror_shared(models, machine, wanted, None, announce)
    except NodeMemoryError:
        keys = {weights.model().key for weights in models}
        its = [one for one in before if one.model.paths in paths]
        replaced = [one for one in its if one.model.key not in keys]
        if not replaced:
            raise
        for one in replaced:  # where there is no room for both, the old one may go for the new one
            before.remove(one)
            one.close()
        mirrors = mirror_shared(models, machine, wanted, None, announce)
    plans[0] = ""
    others = [one for one in before if one.model.paths not in paths]
    for one in before:
        if one not in others:
            one.close()
    reclaim.sweep()  # what was replaced may go now
    for one in mirrors:
        one.owns_weights = True
    if options.json:
        print_json([one.report for one in mirrors], a_line=True)
    for one in () if options.json else mirrors:
        _tell(one.report)
    sys.stdout.flush()  # who reads a pipe waits for it
    return [*others, *mirrors]


def _worded(lines: Iterable[str]) -> str:
    """Return a message without its numbers, as bytes that are free: they change all the time."""
    return "".join(c for line in lines for c in line if not c.isdecimal())


def _tell_systemd(state: str) -> None:
    """Tell systemd, where it started this and wants to know. Source: sd_notify(3)."""
    import os
    import socket

    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
                one.sendto(state.encode(), address.replace("@", "\0", 1))
        except OSError as error:
            note(f"NOTIFY_SOCKET={address}: systemd cannot be told {state}: {error.strerror}")


def _tell_how_long(*, hold: bool) -> None:
    """Say where logging out ends what was made, while it can still be made otherwise."""
    from numaload.machine import logout, userdir

    ends = logout.killed_note() if hold else logout.emptied_note(userdir.path())
    if ends:
        note(ends)


def _tell(report: MirrorReport) -> None:
    model = files_of(report.paths)
    if report.copied:
        speed = rate(report.copied, report.seconds)
        how = PLACED if report.unbound else f"bound by {report.binding}"
        built = f"{size(report.copied)} of replicas built in {report.seconds:.2f} s ({speed})"
        say(f"{model}: {built}, {how}")
        if report.plan:
            say(f"read: {report.plan}")
    else:
        say(f"{model}: replicas were there already")
    for nodes, placement in by_replica(report.placements):
        say(f"{nodes}: {where(placement)}")
    if report.off_node:
        say(f"{size(report.off_node)} of rows are on a neighbour: stripes end at pages' borders")
    if report.unbound:
        note(f"{on_nodes(report.unbound)}: {PLACED}: {ALLOW}")
    for pid in report.holders:
        say(f"held by process {pid} until: numaload release {report.paths[0]}")


def by_replica(placements: Mapping[int, Placement]) -> list[tuple[str, Placement]]:
    """Return [(nodes, their placement)]: nodes that share a replica once."""
    nodes: dict[int, list[int]] = {}
    for node, placement in placements.items():
        nodes.setdefault(id(placement), []).append(node)
    return [(on_nodes(them), placements[them[0]]) for them in nodes.values()]


def where(placement: Placement) -> str:
    """Say how many pages the kernel counts where they belong, and what else it says of them."""
    share = 100 * placement.placed / max(placement.pages, 1)
    sample = sum(placement.sampled.values())
    witness = f"move_pages agrees on {sample} pages" if sample else "move_pages was not asked"
    others = {n: c for n, c in placement.on.items() if n not in placement.asked}
    text = f"{placement.placed} of {placement.pages} pages there ({share:.4g} %), {witness}"
    huge = f", {size(placement.huge_pages)} in huge pages"
    if len(placement.asked) > 1:
        huge += f", by node: {_shares(placement)}"
    if placement.misplaced:
        huge += f"; NOT where it was asked for: {placement.misplaced[0]}"
    elif placement.checked:
        huge += f"; each of {placement.checked} ranges is on its node, page by page"
    return text + huge + (f"; ELSEWHERE by node: {others}" if others else "")


def _shares(placement: Placement) -> str:
    return ", ".join(
        f"node {n} {100 * placement.on.get(n, 0) / max(placement.pages, 1):.3g} %"
        for n in placement.asked
    )
