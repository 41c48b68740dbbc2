"""Running things as a container would: system calls refused, in a cgroup, as another user.

``python tests/confined.py [--deny mbind=EPERM,move_pages=EPERM] [--cgroup FOLDER] [--user UID]
[--membind NODE] -- COMMAND...``; in this process: ``confine(...)``.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path

NUMBERS = {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "move_pages": 279}
NUMBERS |= {"cachestat": 451, "pidfd_open": 434}
DOCKER = "mbind=EPERM,set_mempolicy=EPERM,get_mempolicy=EPERM,move_pages=EPERM"
NO_NUMA = "mbind=ENOSYS,set_mempolicy=ENOSYS,get_mempolicy=ENOSYS,move_pages=ENOSYS"

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2
AUDIT_ARCH_X86_64 = 0xC000003E
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
ALLOW, ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
MPOL_BIND = 2


@dataclass(frozen=True)
class Confined:
    """What is to hold in a process. It cannot be taken back there."""

    deny: str = ""  # "mbind=EPERM,move_pages=ENOSYS"
    cgroup: str = ""  # a folder under /sys/fs/cgroup
    user: int = 0
    membind: int | None = None  # as under numactl --membind

    def words(self) -> list[str]:
        """The same for the command line of this file."""
        given = {"deny": self.deny, "cgroup": self.cgroup, "user": self.user or ""}
        given["membind"] = "" if self.membind is None else str(self.membind)
        return [w for key, value in given.items() if value for w in (f"--{key}", str(value))]

    def enter(self) -> None:
        if self.cgroup:
            Path(self.cgroup, "cgroup.procs").write_text(str(os.getpid()))
        if self.membind is not None:
            _membind(self.membind)
        if self.user:
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
        if self.deny:
            _deny(dict(rule.split("=") for rule in self.deny.split(",")))


def _membind(node: int) -> None:
    mask = (ctypes.c_ulong * 16)()
    mask[node // 64] = 1 << node % 64
    number, bits = ctypes.c_long(NUMBERS["set_mempolicy"]), ctypes.c_ulong(1025)
    assert ctypes.CDLL(None).syscall(number, ctypes.c_int(MPOL_BIND), mask, bits) == 0


def _deny(rules: dict[str, str]) -> None:
    """A seccomp filter, as a container's runtime installs one."""
    last = 3 + 2 * len(rules)
    program = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 0, last - 2, AUDIT_ARCH_X86_64), (LOAD, 0, 0, 0)]
    for call, error in rules.items():
        program.append((JUMP_IF_EQUAL, 0, 1, NUMBERS[call]))
        program.append((RETURN, 0, 0, ERRNO | getattr(errno, error)))
    program.append((RETURN, 0, 0, ALLOW))
    raw = b"".join(struct.pack("=HBBI", *step) for step in program)
    code = ctypes.create_string_buffer(raw)
    head = ctypes.create_string_buffer(
        struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(code))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) == 0
    done = libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(MODE_FILTER), head, zero, zero)
    assert done == 0, os.strerror(ctypes.get_errno())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deny", default="")
    parser.add_argument("--cgroup", default="")
    parser.add_argument("--user", type=int, default=0)
    parser.add_argument("--membind", type=int)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    Confined(options.deny, options.cgroup, options.user, options.membind).enter()
    os.execvp(options.command[0], options.command)  # noqa: S606 - as it is given


if __name__ == "__main__":
    main()
