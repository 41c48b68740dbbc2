"""The threads of a process, this one or another: where each may run, and where it ran last.

Source: proc_pid_task(5), proc_pid_stat(5), proc_pid_status(5), proc_pid_environ(5).
"""

from __future__ import annotations

import os
from errno import EACCES, EAGAIN, EINVAL, EPERM, ESRCH
from typing import Any, NamedTuple

from numaload.errors import NumaError, UsageError, check_limits
from numaload.linux.lists import parse_list
from numaload.linux.sysfs import SysFiles
from numaload.machine.topology import Topology

MORE = "raise ulimit -u, or the cgroup's pids.max"
LARGEST_PID = (1 << 31) - 1  # of pid_t; kernels stop at 2^22
ENDED = "ZXx"  # states of threads that never run again
# What follows the name in /proc/PID/stat, counted from 0.
STATE, UTIME, STIME, PROCESSOR = 0, 11, 12, 36


class Thread(NamedTuple):
    """One thread. ``name`` is the kernel's: at most 15 bytes, its creator's if it was given none.

    Bytes of a name that are no UTF-8 are surrogates, as in file names.
    """

    tid: int
    name: str
    main: bool  # the one that the process began with
    state: str  # R runs or could run, S sleeps, D waits for a device, T stopped...
    cpus: frozenset[int]  # it may run on, of those online; empty where the kernel does not say
    mems: frozenset[int]  # nodes it may allocate on (cpuset); empty where the kernel does not say
    cpu: int  # that it ran on last, or runs on; -1 where the kernel does not say
    cpu_s: float  # seconds it has run, in user space and in the kernel
    waited_s: float = 0.0  # seconds it could have run and had no CPU; 0 where nobody counts

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"cpus": sorted(self.cpus), "mems": sorted(self.mems)}


def nodes_of(cpus: frozenset[int], machine: Topology) -> list[int]:
    """Return the nodes that these CPUs belong to, in ascending order."""
    return sorted(node.id for node in machine.nodes.values() if node.cpus & cpus)


def threads(
    pid: int | None = None, *, proc_root: str = "/proc", sys_root: str = "/sys"
) -> list[Thread]:
    """List the threads of a process, by default this one, by thread id; not those that ended.

    pid: the id of any thread of it. Raises: UsageError where it can be no process's; NumaError with
    ``errno`` ESRCH where there is no such process, or nothing but its exit status, EACCES where it
    is another user's and not shown.
    """
    if pid is not None and not (type(pid) is int and 0 < pid <= LARGEST_PID):
        raise UsageError(f"process {pid!r}: expected a process id, 1 to {LARGEST_PID}")
    path = f"{proc_root}/{'self' if pid is None else pid}/task"
    online = frozenset(SysFiles().ids(f"{sys_root}/devices/system/cpu/online") or ())
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        check_limits(error, path)
        raise _refusal(pid, path, error) from error
    try:  # ids are used again: what is reached through the folder is this process's
        found = [_thread(folder, tid, online) for tid in _listed(folder)]
    except OSError as error:
        check_limits(error, path)
        raise _refusal(pid, path, error) from error
    finally:
        os.close(folder)
    alive = [thread for thread in found if thread is not None]
    if not alive:
        what = "it has ended, and its parent has not looked at its exit status" if found else "gone"
        raise NumaError(f"process {pid}: {what}", call="open", errno=ESRCH)
    return alive


def environment(pid: int | None = None, *, proc_root: str = "/proc") -> dict[str, str] | None:
    """Read what the process was started with, not what it set since; None where that is hidden."""
    path = f"{proc_root}/{'self' if pid is None else pid}/environ"
    try:
        with open(path, "rb") as file:
            text = file.read().decode(errors="surrogateescape")
    except OSError as error:
        check_limits(error, path)
        return None
    return {name: value for name, _, value in (row.partition("=") for row in text.split("\0"))}


def no_thread(error: RuntimeError) -> NumaError:
    """Make an error of threading's own, which keeps no errno: the kernel starts no thread."""
    return NumaError(f"no thread can be started ({error}): {MORE}", call="clone", errno=EAGAIN)


def _listed(folder: int) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder) if name.isascii() and name.isdecimal())


def _thread(folder: int, tid: int, online: frozenset[int]) -> Thread | None:
    """Read one thread; None if it has ended."""
    try:
        stat = _read(folder, f"{tid}/stat")
        status = _read(folder, f"{tid}/status").decode(errors="surrogateescape")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A name may contain whatever stands around it: nothing after it has a parenthesis.
    before, _, rest = stat.rpartition(b")")
    name = before.partition(b"(")[2]
    numbers = rest.split()
    state = numbers[STATE].decode(errors="replace") if numbers else "?"
    if state in ENDED:
        return None
    # The name is escaped here, so that each row is a line.
    rows = {key: value.strip() for key, _, value in (r.partition(":") for r in status.split("\n"))}
    ticks = _number(numbers, UTIME, 0) + _number(numbers, STIME, 0)
    return Thread(
        tid=tid,
        name=name.decode(errors="surrogateescape"),
        main=rows.get("Tgid") == str(tid),
        state=state,
        cpus=_cpus(tid, rows, online),
        mems=_ids(rows.get("Mems_allowed_list", "")),
        cpu=_number(numbers, PROCESSOR, -1),
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
        waited_s=_waited(folder, tid),
    )


def _waited(folder: int, tid: int) -> float:
    """Read seconds without a CPU (sched-stats.rst); 0 on kernels without CONFIG_SCHED_INFO."""
    try:
        return _number(_read(folder, f"{tid}/schedstat").split(), 1, 0) / 1e9
    except OSError:
        return 0.0


def _read(folder: int, name: str) -> bytes:
    with open(name, "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=folder)) as file:
        return file.read()


def _number(words: list[bytes], index: int, default: int) -> int:
    word = words[index] if index < len(words) else b""
    return int(word) if word.isdigit() else default


def _cpus(tid: int, rows: dict[str, str], online: frozenset[int]) -> frozenset[int]:
    """Leave out CPUs that are offline: the kernel lists all that there could ever be."""
    listed = _ids(rows.get("Cpus_allowed_list", ""))
    if listed:
        return listed & online or listed
    try:
        return frozenset(os.sched_getaffinity(tid))
    except OSError:
        return frozenset()


def _ids(text: str) -> frozenset[int]:
    try:
        return frozenset(parse_list(text))
    except ValueError:
        return frozenset()


def _refusal(pid: int | None, path: str, error: OSError) -> NumaError:
    what, number = f"{path}: {error.strerror}", error.errno or EINVAL
    if number in (EACCES, EPERM) or (pid is not None and _hidden(pid)):
        what = f"{path}: another user's, and not shown to this one: run as that user, or as root"
        number = EACCES
    elif pid is None:
        what += ": /proc must be mounted, for this process's own namespace of ids"
    elif isinstance(error, (FileNotFoundError, ProcessLookupError)):
        what, number = f"no process {pid}", ESRCH
    return NumaError(what, call="open", errno=number)


def _hidden(pid: int) -> bool:
    """Return whether there is such a process though /proc shows none (mounted with hidepid=2)."""
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except OSError as error:
        return isinstance(error, PermissionError)
    return False
