"""Run unmodified programs from replicas: one for each node, on its CPUs and beside its memory.

This process stays until all of them have ended: its lease keeps the replicas in use, and it passes
on signals, and output where several programs write. If it is killed, the kernel ends them.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from numaload.errors import NumaUnavailableError, ProgramError, UsageError, warn_once
from numaload.files.reader import Progress
from numaload.linux import syscalls
from numaload.machine.affinity import pinned_to
from numaload.machine.topology import topology
from numaload.replicas import store
from numaload.replicas.layout import MIRROR, MIXED
from numaload.replicas.mirror import attach, lacking, mirror
from numaload.replicas.views import Mirror
from numaload.weights import Weights, open_weights

# {policy: mode of set_mempolicy(2)}
MEMORY = {"prefer": syscalls.MPOL_PREFERRED, "bind": syscalls.MPOL_BIND, "none": None}
# Nothing else is replaced: JSON and templates stay as they are, {{model}} too.
FORM = re.compile(r"(?<!\{)\{(?:(model|folder|node|index)|port:([0-9]{1,5}))\}")
READS, DIFFERS = {"model", "folder"}, {"node", "index", "port"}
PORTS = 1 << 16
START = os.path.join(os.path.dirname(os.path.abspath(__file__)), "exec_start.py")
FORWARDED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
TYPED = (signal.SIGINT, signal.SIGQUIT)  # which a terminal sends to all whom it is in front of
CHUNK, MOST_CHUNKS = 1 << 16, 17  # bytes of a full pipe; more of them than a pipe can have
LOOK_MS, END_S, PAUSE_S = 200, 10.0, 0.01


@dataclass(frozen=True)
class Ended:
    """Tell how a program ended. code: its exit status, or -n where signal n ended it."""

    node: int
    pid: int
    code: int

    @property
    def status(self) -> int:
        """Return what a shell says of it: 128 + n where signal n ended it."""
        return self.code if self.code >= 0 else 128 - self.code


def exec_programs(
    model: Weights | str | os.PathLike[str],
    program: Sequence[str],
    nodes: str | int | Sequence[int] = "local",
    *,
    memory: str = "prefer",
    labelled: bool = False,
    forward: bool = False,
    building: Callable[[list[int]], AbstractContextManager[Progress | None]] | None = None,
    ended: Callable[[Ended], None] | None = None,
) -> list[Ended]:
    """Run a program from the replica on each of these nodes; return how they ended.

    program: it and its arguments. In all of them ``{model}`` is replaced by the replica's first
    file, ``{folder}`` by a folder with the replica and what lies beside the source, ``{node}``,
    ``{index}`` by 0, 1, ... of the nodes, and ``{port:8080}`` by 8080 + index. All else stays.
    nodes: where no replica is, it is built as by ``mirror(shared=True)``; those of other policies
    lie on several nodes and do not count.
    memory: "prefer" the node for what the program allocates, "bind" it there, or "none".
    labelled: each line that they write begins with ``[node N] ``, and they have nothing to read.
    forward: pass signals on to them meanwhile, in place of this process's handlers.
    building: called with the nodes that lack a replica; what it returns is entered while they are
    built, and gives the progress callback of ``mirror``.
    ended: called as each program ends.

    Whatever is raised meanwhile, as by Ctrl-C, ends the programs. They get SIGTERM if this thread
    ends without that.
    Raises: UsageError, also where patterns placed the model's tensors; ProgramError if it cannot be
    started; NumaError if ``memory="bind"`` is refused; what ``mirror`` raises.
    """
    machine = topology()
    chosen = machine.select(nodes)
    _check(program, memory, len(chosen))
    if forward and threading.current_thread() is not threading.main_thread():
        raise UsageError("forward: only the main thread handles signals")
    source = model.paths[0] if isinstance(model, Weights) else model
    if missing := lacking(source, chosen, MIRROR):
        _refuse_mixed(source)
        with building(missing) if building else nullcontext() as progress:
            mirror(model, missing, shared=True, progress=progress).close()
    with ExitStack() as undo:
        with open_weights(source) as weights:  # nothing of the source stays open
            found = undo.enter_context(attach(weights, chosen, MIRROR))
            commands = [_filled(program, found, *which) for which in enumerate(chosen)]
        programs = undo.enter_context(_Programs())
        if forward:
            undo.enter_context(_forwarding(programs.send))
        for node, command in zip(chosen, commands, strict=True):
            with _beside(node, machine.cpus_of([node]), memory):
                programs.start(node, command, labelled=labelled)
        return programs.wait(ended)


def _refuse_mixed(source: str | os.PathLike[str]) -> None:
    """Refuse a model of which only Weights see the replicas: more of it may not be wanted."""
    with open_weights(source) as weights:
        if store.find(weights.model(), MIXED):
            path = weights.paths[0]
            raise UsageError(
                f"{path}: its tensors were placed by patterns, no file has all of them: give other"
                f" programs a whole replica too (numaload mirror {path}), or release it"
            )


def _check(program: Sequence[str], memory: str, copies: int) -> None:
    is_list = isinstance(program, Sequence) and not isinstance(program, (str, bytes))
    if not is_list or not program or program[0] == "":
        raise UsageError(f"program {program!r}: expected a list of words, the first its name")
    for word in program:
        if not _is_word(word):
            raise UsageError(f"program: word {word!r}: expected a str that has no NUL")
    if memory not in MEMORY:
        raise UsageError(f"memory {memory!r}: expected {', '.join(MEMORY)}")
    forms = [form for word in program for form in FORM.finditer(word)]
    for form in forms:
        if form[2] and not 0 < int(form[2]) <= PORTS - copies:
            raise UsageError(f"{form[0]}: expected a port from 1 to {PORTS - copies}")
    names = {form[1] or "port" for form in forms}
    if not names & READS:
        raise UsageError(
            f"{program[0]}: no argument has {{model}} or {{folder}}, so it would not read a replica"
        )
    if copies > 1 and not names & DIFFERS:
        raise UsageError(
            f"{program[0]}: {copies} of it would do the same in each other's way, as on one port:"
            " let an argument have {port:8080}, {node} or {index}"
        )


def _is_word(word: object) -> bool:
    """Return whether a program can be given it as an argument."""
    with suppress(UnicodeEncodeError):
        return isinstance(word, str) and b"\0" not in os.fsencode(word)
    return False


def _filled(program: Sequence[str], found: Mirror, index: int, node: int) -> list[str]:
    values = {"model": found.paths(node)[0], "node": str(node), "index": str(index)}
    if any(form[1] == "folder" for word in program for form in FORM.finditer(word)):
        values["folder"] = found.folder(node)
    return [
        FORM.sub(lambda form: values[form[1]] if form[1] else str(int(form[2]) + index), word)
        for word in program
    ]


@contextmanager
def _beside(node: int, cpus: frozenset[int], memory: str) -> Iterator[None]:
    """Run this thread on the node's CPUs with its memory: what it starts meanwhile inherits both.

    Raises: NumaError.
    """
    mode = MEMORY[memory]
    with pinned_to(cpus), ExitStack() as undo:
        try:
            if mode is not None:
                before = syscalls.get_mempolicy()
                syscalls.set_mempolicy(mode, [node])
                undo.callback(syscalls.set_mempolicy, *before)
        except NumaUnavailableError as error:
            if memory == "bind":
                raise
            warn_once(
                "exec",
                f"{error}; programs run on their node's CPUs alone, and the kernel chooses where"
                " their own memory is",
            )
        yield


@contextmanager
def _forwarding(send: Callable[[int], None]) -> Iterator[None]:
    """Pass signals on instead of ending by them; what is ignored stays so, as below nohup."""

    def forward(number: int, _: object) -> None:
        if not (number in TYPED and _in_front()):
            send(number)

    handlers: dict[int, Any] = {
        n: forward for n in FORWARDED if signal.getsignal(n) is not signal.SIG_IGN
    }
    handlers[signal.SIGCHLD] = signal.SIG_DFL  # if that was ignored, no status would be known
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, how in handlers.items():
            signal.signal(number, how)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _in_front() -> bool:
    """Return whether a terminal sends what is typed to this process, and so to its programs."""
    with ExitStack() as undo, suppress(OSError):  # no terminal
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
        undo.callback(os.close, terminal)
        return os.tcgetpgrp(terminal) == os.getpgrp()
    return False


class _Programs:
    """Hold the programs that this thread starts, and end them with the block."""

    def __init__(self) -> None:
        self._all: list[_Program] = []
        self._asked, self._asking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._end = 0.0  # how long a reader is waited for when all have ended; 0: for ever

    def send(self, number: int) -> None:
        """Have ``wait`` send a signal to all programs, also to those that are still to start.

        For any thread, and for signal handlers.
        """
        with suppress(BlockingIOError):  # thousands of them wait already
            os.write(self._asking, bytes([number]))

    def start(self, node: int, command: Sequence[str], *, labelled: bool) -> None:
        self._all.append(_Program(node, self._wait_for_reader))
        self._all[-1].start(command, labelled=labelled)

    def wait(self, tell: Callable[[Ended], None] | None) -> list[Ended]:
        """Pass on signals and output until all have ended; return how, in the order of starts."""
        found: dict[int, Ended] = {}
        running = list(self._all)
        while running:
            handlers: dict[int, Callable[[], object]] = {self._asked: self._pass_on}
            for one in running:
                handlers |= one.handlers()
            poller = select.poll()
            for fd in handlers:
                poller.register(fd, select.POLLIN)
            all_seen = all(one.pidfd >= 0 for one in running)
            for fd, _ in poller.poll(None if all_seen else LOOK_MS):
                handlers[fd]()
            for one in [one for one in running if one.has_ended()]:
                running.remove(one)
                one.close(drain=True)
                found[one.node] = Ended(one.node, one.pid, one.code or 0)
                if tell:
                    tell(found[one.node])
        return [found[one.node] for one in self._all]

    def _pass_on(self) -> None:
        with suppress(BlockingIOError):  # it was done while a reader was waited for
            for number in os.read(self._asked, CHUNK):
                self._end = time.monotonic() + END_S
                for one in self._all:
                    one.send(number)

    def _wait_for_reader(self, target: int) -> None:
        """Wait until output can be written, and pass on signals meanwhile.

        Raises: BrokenPipeError if one came, all programs ended, and nobody reads for END_S.
        """
        poller = select.poll()
        poller.register(self._asked, select.POLLIN)
        poller.register(target, select.POLLOUT)
        ready: list[int] = []
        while target not in ready:
            ready = [fd for fd, _ in poller.poll(LOOK_MS if self._end else None)]
            if self._asked in ready:
                self._pass_on()
            elif not ready and time.monotonic() > self._end and self._have_ended():
                raise BrokenPipeError
        self._end = self._end and time.monotonic() + END_S

    def _have_ended(self) -> bool:
        return all(one.has_ended() for one in self._all)

    def __enter__(self) -> _Programs:
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, because something was raised, and wait for it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            running = [one for one in self._all if not one.has_ended()]
            for one in running:
                one.send(number)
                one.close()
            end = time.monotonic() + END_S
            while not self._have_ended() and time.monotonic() < end:
                time.sleep(PAUSE_S)
        for one in self._all:
            one.close()
        os.close(self._asked)
        os.close(self._asking)


class _Program:
    """Hold a program, from before its start until it was waited for."""

    def __init__(self, node: int, wait: Callable[[int], None]) -> None:
        self.node, self.wait, self.pid, self.pidfd = node, wait, 0, -1
        self.code: int | None = None
        self.lines: list[_Lines] = []

    def start(self, command: Sequence[str], *, labelled: bool) -> None:
        """Start it; return when it has replaced what starts it. Raises: ProgramError."""
        with ExitStack() as undo, ExitStack() as theirs:
            heard, report = os.pipe()
            undo.callback(os.close, heard)
            theirs.callback(os.close, report)
            # It has its end by the number of ours: no other child can inherit that.
            actions: list[Any] = [(os.POSIX_SPAWN_DUP2, report, heard)]
            if labelled:
                actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
            for target in (1, 2) if labelled else ():
                ours, its = os.pipe()
                theirs.callback(os.close, its)
                self.lines.append(_Lines(ours, target, b"[node %d] " % self.node, self.wait))
                actions.append((os.POSIX_SPAWN_DUP2, its, target))
            python = sys.executable or ""
            words = [python, "-I", "-S", START, str(heard), str(os.getpid()), *command]
            try:
                self.pid = os.posix_spawn(
                    python, words, os.environ, file_actions=actions, setsigmask=FORWARDED
                )
            except OSError as error:
                why = f"{command[0]}: cannot be started by {python!r}"
                raise ProgramError(why, error.errno or 0) from error
            with suppress(AttributeError, OSError):  # Linux before 5.3, or a seccomp filter
                self.pidfd = os.pidfd_open(self.pid)
            theirs.close()
            if said := os.read(heard, 16):
                raise ProgramError(f"{command[0]}: cannot be started", int(said))

    def handlers(self) -> dict[int, Callable[[], object]]:
        """Return {descriptor: what is to be done when it can be read}."""
        found = {one.source: one.pass_on for one in self.lines if one.source >= 0}
        return found | ({self.pidfd: self.has_ended} if self.pidfd >= 0 else {})

    def has_ended(self) -> bool:
        """Return whether it ended, or was never started."""
        if self.pid and self.code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # who ignores SIGCHLD is never told the status
                pid, status = self.pid, 0
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return not self.pid or self.code is not None

    def send(self, number: int) -> None:
        if not self.has_ended():
            with suppress(OSError):  # it is another user's by now
                os.kill(self.pid, number)

    def close(self, *, drain: bool = False) -> None:
        """Let go of its output; drain: of what it has written before, nothing is lost."""
        for lines in self.lines:
            lines.rest = lines.rest if drain else b""  # nobody may read it
            for _ in range(MOST_CHUNKS if drain else 0):  # others may have the pipe open for ever
                lines.pass_on()
            lines.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class _Lines:
    """Pass on whole lines from a pipe, each behind a label; their bytes stay as they are.

    A line of more than CHUNK bytes is written as several, so that none waits for its end.
    wait: returns when something can be written to a descriptor.
    """

    def __init__(self, source: int, target: int, label: bytes, wait: Callable[[int], None]) -> None:
        os.set_blocking(source, False)
        self.source, self.target, self.label, self.wait = source, target, label, wait
        self.rest = b""

    def pass_on(self) -> None:
        """Write the lines that have come. Close the pipe at its end, or if nobody wants them."""
        try:
            data = os.read(self.source, CHUNK) if self.source >= 0 else b""
        except BlockingIOError:
            return
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) >= CHUNK:
            lines, self.rest = [*lines, self.rest], b""
        self._write(lines)
        if not data:
            self.close()

    def _write(self, lines: Sequence[bytes]) -> None:
        data = memoryview(b"".join(b"%s%s\n" % (self.label, line) for line in lines))
        try:
            while data:
                self.wait(self.target)
                # More than that would block, and who shares it may have it not block.
                data = data[os.write(self.target, data[: select.PIPE_BUF]) :]
        except OSError:  # the program shall find that, too
            self.rest = b""
            self.close()

    def close(self) -> None:
        if self.source >= 0:
            os.close(self.source)
            self.source = -1
            if self.rest:
                self._write([self.rest])
