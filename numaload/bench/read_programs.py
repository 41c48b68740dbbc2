"""Ways of reading that are other processes: cat, dd, vmtouch, and mappings in one of our own.

Programs are timed with their start, mappings without.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from numaload.bench import read_child
from numaload.bench.read_turn import Done, Run, Subject, Turn, Unavailable
from numaload.errors import ReadError

MIB = 1 << 20
DD_BYTES = re.compile(rb"^(\d+) bytes", re.MULTILINE)
SAID = 200  # bytes of what a program complained of


def cat(turn: Turn, _: int) -> Run:
    if not turn.subject.whole:
        raise Unavailable("cat reads whole files only")
    return _program(turn, ["cat", turn.subject.path])


def dd(turn: Turn, _: int) -> Run:
    part = [] if turn.subject.whole else [f"count={turn.nbytes // MIB}"]
    words = ["dd", f"if={turn.subject.path}", "of=/dev/null", "bs=1M", *part]
    return _program(turn, words, _dd_bytes)


def vmtouch(turn: Turn, _: int) -> Run:
    part = [] if turn.subject.whole else ["-p", f"0-{turn.nbytes // MIB}M"]
    return _program(turn, ["vmtouch", "-q", "-f", "-t", *part, turn.subject.path])


def mapped(turn: Turn, _: int, *, flags: int = 0, advice: int | None = None, copy: bool) -> Run:
    """A byte of every page of a mapping, by MAP_POPULATE in ``flags``, or copied to huge pages."""
    subject, fd = turn.subject, turn.open()
    wanted = {"fd": fd, "nbytes": turn.nbytes, "flags": flags, "advice": advice, "copy": copy}
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", read_child.__file__, json.dumps(wanted)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(fd,),
    )  # fmt: skip
    turn.enter_context(child)
    turn.callback(child.kill)
    _answer(child, subject)

    def run() -> Done:
        return Done(turn.nbytes, float(_answer(child, subject, b"\n")))

    return run


def _answer(child: subprocess.Popen[bytes], subject: Subject, said: bytes = b"") -> bytes:
    """Its next line. Raises: ReadError where it ended instead."""
    assert child.stdin is not None  # noqa: S101 - a pipe was asked for
    assert child.stdout is not None  # noqa: S101
    assert child.stderr is not None  # noqa: S101
    with suppress(BrokenPipeError):  # it says below why it ended
        child.stdin.write(said)
        child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        why = child.stderr.read().strip().splitlines()[-1:]
        raise _ended(child.wait(), why[0] if why else b"", subject)
    return line


def _ended(status: int, said: bytes, subject: Subject) -> ReadError:
    if said:
        return ReadError(said[-SAID:].decode(errors="replace"), path=subject.path)
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return ReadError(
        f"the process that read its mapping ended ({how}): was the file cut short?",
        path=subject.path,
    )


def _program(turn: Turn, words: Sequence[str], count: Callable[[bytes], int] | None = None) -> Run:
    """count: bytes that were read, of what it says on stderr; others say nothing of it."""
    if shutil.which(words[0]) is None:
        raise Unavailable(f"not installed: apt-get install {words[0]}")

    def run() -> Done:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {"LC_ALL": "C"}, check=False,
        )  # fmt: skip
        if done.returncode:
            why = done.stderr.strip()[-SAID:] or b"no message, status %d" % done.returncode
            raise ReadError(f"{words[0]}: {why.decode(errors='replace')}", path=turn.subject.path)
        return Done(turn.nbytes if count is None else count(done.stderr))

    return run


def _dd_bytes(said: bytes) -> int:
    found = DD_BYTES.search(said)
    return int(found[1]) if found else -1
