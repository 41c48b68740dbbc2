"""``numaload doctor``: why a model is slow to load, what that costs, and what mends it."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import textwrap
from typing import TYPE_CHECKING, Any

from numaload.cli.output import complain, count, print_json, say, size
from numaload.errors import printable

if TYPE_CHECKING:
    from numaload.doctor.check import Finding
    from numaload.doctor.diagnosis import Diagnosis
    from numaload.doctor.findings import ThreadReport

CLEAN, FINDINGS, COULD_NOT_LOOK = 0, 1, 3  # exit status
DOCS = "docs/findings.md"
NARROWEST, WIDEST = 40, 100  # columns of text
LABEL = 8  # columns of "   seen "
SHELL = re.compile(r"[|&;<>]")  # in commands that one sudo does not reach to the end of
CONTINUED = " \\"  # ends a line of a command that goes on
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")  # in a command: no line may end inside
# A name in a remedy, as shlex.quote writes it; an apostrophe inside a word begins none.
NAME = re.compile(r"(?<!\w)'(?:[^']|'\"'\"')*'")
NOT_PRINTED = "a command that cannot be printed, for a name in it or its length: --json has it"
INSIDE = "\N{NO-BREAK SPACE}"  # stands for a space there, until lines are cut
# Remedies are commands from the first of these words on: at their beginning, or after ": ".
COMMANDS = {
    "apk", "apt-get", "cat", "cp", "cpupower", "cryptsetup", "dmesg", "dnf", "docker", "echo",
    "export", "for", "hf", "losetup", "loginctl", "mdadm", "migratepages", "mkdir", "modprobe",
    "mount", "mv", "numactl", "numaload", "nvidia-smi", "pacman", "prlimit", "ps", "rm",
    "sha256sum", "swapoff", "swapon", "sysctl", "taskset", "ulimit", "umount", "unset", "yum",
    "zypper",
}  # fmt: skip


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="why a model is slow to load: what costs how many seconds, and what mends it",
        description="Find what makes a model slow to load. Nothing is changed, and nothing stays in"
        " RAM that was not there before. Exit status: 0 nothing found, 1 findings, 3 could not"
        " look.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="any file of the model")
    parser.add_argument(
        "--pid",
        metavar="PID",
        type=int,
        help="a process that uses the model: where its memory and its threads are",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also check every tensor, split and checksum, and measure bandwidths: reads all",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print one block to paste into an issue, without names of people and machines",
    )
    parser.set_defaults(run=doctor)


def doctor(options: argparse.Namespace) -> int:
    from numaload.doctor.diagnosis import diagnose
    from numaload.errors import NumaloadError, UsageError

    try:
        found = diagnose(options.file, pid=options.pid, deep=options.deep)
    except UsageError:
        raise
    except NumaloadError as error:
        complain(error)
        return COULD_NOT_LOOK
    if options.json:
        print_json(found)
    elif options.report:
        from numaload.doctor.paste import block

        print(block(found))
    else:
        show(found)
    return FINDINGS if found.findings else CLEAN


def show(found: Diagnosis) -> None:
    """Print what was found for a terminal: the most expensive first."""
    columns = _columns()
    if found.threads is not None:
        from numaload.cli.machine import print_threads

        say(title(found.threads))
        print_threads(found.threads)
        say("")
    for line in heading(found):
        _wrap(line, columns)
    for number, finding in enumerate(found.findings, 1):
        say("")
        _show_finding(number, finding, columns)
    if found.unknown:
        say("")
        _wrap("could not look at:", columns)
        for one in found.unknown:
            _wrap(f"{one.id} {one.title}: {one.why}", columns, "  ", "    ")
    if found.findings:
        say("")
        _wrap(f"More about each of these, by its NL number: {DOCS}", columns)


def title(seen: ThreadReport) -> str:
    """Name a process, by its main thread if that is still there: it has the program's name."""
    return f"process {seen.pid}: {seen.main.name}" if seen.main else f"process {seen.pid}"


def heading(found: Diagnosis) -> list[str]:
    """Say how long the file takes to load, and how much of that can be saved."""
    lines = []
    if found.path is not None:
        resident = "" if found.resident is None else f", {size(found.resident)} of it in RAM"
        name = os.path.basename(found.path)
        lines.append(f"{name}: {size(found.size)} on {found.storage}{resident}")
    if found.speeds.why_not:
        lines.append(f"its speed could not be measured: {found.speeds.why_not}")
    if not found.findings:
        return [*lines, _all_well(found)]
    if found.load_s and found.best_s:
        lines.append(
            f"loading it takes {seconds(found.load_s)} now, by a program that maps it;"
            f" {seconds(found.best_s)} at the full speed of this storage"
        )
    elif found.load_s == 0 and found.size:
        lines.append("loading it needs no disk now: all of it is in RAM")
    number = len(found.findings)
    order = ": first what costs most, each token of an answer counted" if number > 1 else ""
    lines.append(f"{count(number, 'thing')} to mend{order}")
    return lines


def _all_well(found: Diagnosis) -> str:
    if found.load_s is None:
        return "nothing to mend"
    if not found.load_s:
        return "nothing to mend; this file is in RAM"
    if not found.best_s:
        return f"nothing to mend; this file loads in {seconds(found.load_s)}"
    share = min(1.0, found.best_s / found.load_s)
    return (
        f"nothing to mend; this file loads in {seconds(found.load_s)}, {share:.0%} of what the"
        " storage gives"
    )


def _show_finding(number: int, finding: Finding, columns: int) -> None:
    _wrap(f"{number}. {finding.id} {finding.title}", columns, "", "   ")
    _wrap(cost(finding), columns, f"   {'cost':<5}", " " * LABEL)
    for label, text in (("seen", finding.seen), ("why", finding.why)):
        _wrap(text, columns, f"   {label:<5}", " " * LABEL)
    for label, text in (("fix", finding.fix), ("undo", finding.undo)):
        if text:
            _show_remedy(label, text, columns, root=finding.root)


def _show_remedy(label: str, text: str, columns: int, *, root: bool) -> None:
    """Print what to do. A command is continued so that it can be pasted as it stands."""
    first, rest = f"   {label:<5}", " " * LABEL
    sentence, command, remark = remedy(text, root=root)
    if sentence:
        _wrap(sentence, columns, first, rest)
        first = rest
    if command:
        whole = QUOTED.sub(lambda its: its[0].replace(" ", INSIDE), command)
        lines = _wrapped(whole, columns - len(CONTINUED), first, rest)
        for line in [*(f"{line}{CONTINUED}" for line in lines[:-1]), lines[-1]]:
            say(line.replace(INSIDE, " "))
    if remark:
        _wrap(f"# {remark}", columns, rest, f"{rest}# ")


def remedy(text: str, *, root: bool) -> tuple[str, str, str]:
    """Divide what to do into a sentence, a command that this user can run, and a remark.

    One of the first two may be empty, and the third.
    """
    plain = NAME.sub(lambda its: "_" * len(its[0]), text)  # names may have ": " and "  # " in them
    sentence, mark, _ = plain.rpartition(": ")
    start = 0 if plain.partition(" ")[0] in COMMANDS else len(sentence + mark)
    if plain[start:].partition(" ")[0] not in COMMANDS:
        return f"{text} (as root)" if root else text, "", ""
    stop = start + len(plain[start:].partition("  # ")[0])
    sentence, command, remark = text[:start].rstrip(), text[start:stop], text[stop + len("  # ") :]
    if root and os.geteuid():
        simple = not SHELL.search(command)
        command = f"sudo {command if simple else f'sh -c {shlex.quote(command)}'}"
    if printable(command) != command:
        return f"{sentence} {NOT_PRINTED}{' (as root)' * root}".lstrip(), "", remark
    return sentence, command, remark


def cost(finding: Finding) -> str:
    if finding.price is None:
        return "not known in seconds"
    how = {"measured": "by speeds measured now"}.get(finding.price.how, finding.price.how)
    return f"{seconds(finding.price.seconds)} for {finding.price.on} ({how})"


def seconds(number: float) -> str:
    """Write seconds for people, with two digits that count."""
    if number >= 7200:
        return f"{number / 3600:.1f} h"
    if number >= 600:
        return f"{number / 60:.0f} min"
    if 0 < number < 0.1:
        return f"{number * 1e3:.2g} ms"
    return f"{number:.0f} s" if number >= 10 else f"{number:.1f} s"


def _wrap(text: str, columns: int, first: str = "", rest: str = "") -> None:
    """Print a paragraph."""
    for line in _wrapped(printable(text), columns, first, rest):
        say(line)


def _wrapped(text: str, columns: int, first: str, rest: str) -> list[str]:
    """Cut a paragraph into lines, between words only: a path is not broken."""
    return textwrap.wrap(
        text,
        columns,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _columns() -> int:
    try:
        columns = os.get_terminal_size().columns
    except OSError:
        columns = 80
    return max(NARROWEST, min(WIDEST, columns))
