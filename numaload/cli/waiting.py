"""How long verbs wait for a network file system: ``--io-timeout``."""

from __future__ import annotations

import argparse
import os
from typing import Any

VARIABLE = "NUMALOAD_IO_TIMEOUT"  # for this process and those that it starts
VERBS = ("inspect", "prewarm", "evict", "plan", "mirror", "status", "verify", "release")


def add_option(verbs: Any) -> None:
    """To all verbs that read files, or look at them."""
    for name in VERBS:
        verbs.choices[name].add_argument(
            "--io-timeout",
            metavar="SECONDS",
            type=seconds_of,
            help="fail when a network file system does not answer for so long (default: wait)",
        )


def obey(options: argparse.Namespace) -> None:
    seconds = getattr(options, "io_timeout", None)
    if seconds is not None:
        os.environ[VARIABLE] = f"{seconds:g}"


def seconds_of(text: str) -> float:
    """An option's value. Raises: ArgumentTypeError."""
    try:
        found = float(text)
    except ValueError:
        found = -1
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, found {text!r}")
    return found
