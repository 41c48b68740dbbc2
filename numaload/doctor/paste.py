"""One block to paste into an issue: the machine, the file and the findings, without names."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
from contextlib import suppress
from ipaddress import ip_address

from numaload._version import __version__
from numaload.doctor.diagnosis import Diagnosis
from numaload.errors import printable

ADDRESS = re.compile(r"[0-9a-fA-F]*[:.][0-9a-fA-F:.]+[0-9a-fA-F]")  # and others, as of PCI
# A path, quoted where it has spaces: those of the kernel's own files stay.
PATH = re.compile(r"(?<![\w:/~.])(?:'/[^']*'|/(?!(?:sys|proc|dev)/)[^\s,;()'\"]+)")
SERVER = re.compile(r"[\w.:@\[\]-]+:/[^\s,;()]*")  # server:/export


def block(found: Diagnosis) -> str:
    """Return the block in Markdown; names of people, machines, servers and folders are left out."""
    rows = [
        f"numaload {__version__}, Linux {platform.release()}, Python {platform.python_version()}",
        *found.machine,
    ]
    if found.path is not None:
        resident = "unknown" if found.resident is None else str(found.resident)
        rows.append(f"model: {found.size} bytes on {found.storage}, resident: {resident}")
        speeds = found.speeds._asdict()
        rates = [f"{k} {speeds[k] / 1e9:.2f} GB/s" for k in ("disk", "mapped", "warm") if speeds[k]]
        rows.append(f"read: {', '.join(rates) or found.speeds.why_not or 'nothing was measured'}")
    for one in found.findings:
        price = f"{one.price.seconds:.1f} s, {one.price.how}" if one.price else "price unknown"
        rows.append(f"{one.id} {one.title} ({price}): {one.seen}")
    rows += [f"{one.id} {one.title}: could not look: {one.why}" for one in found.unknown]
    if not found.findings:
        rows.append("nothing to mend")
    text = "\n".join(
        PATH.sub("PATH", redacted(printable(row), found.path, found.source)) for row in rows
    )
    return f"```\n{text}\n```"


def redacted(text: str, path: str | None, source: str = "") -> str:
    """Replace what tells who and where somebody is. source: what a file system was mounted of."""
    names = [(printable(source), "SOURCE"), (os.path.expanduser("~"), "~")]
    if path is not None:
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", os.path.splitext(os.path.basename(path))[0])
        names = [names[0], (os.path.dirname(path), "FOLDER"), (stem, "MODEL"), *names[1:]]
    names += [(socket.gethostname(), "HOST"), (_user(), "USER")]
    for name, word in names:
        if len(name) > 2 and name != "root":
            text = text.replace(name, word)
    return ADDRESS.sub(_address, SERVER.sub("SERVER:/EXPORT", text))


def _address(match: re.Match[str]) -> str:
    """Replace what is an address of a network; 6.1.0.5 may be a version, and goes too."""
    for text in (match[0], match[0].rpartition(":")[0]):  # with a port
        with suppress(ValueError):
            ip_address(text)
            return "ADDRESS"
    return match[0]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an id without a name
        return ""
