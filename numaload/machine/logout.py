"""Say what takes shared memory away at logout, or keeps it small, and what can be done about it.

systemd-logind removes what a user owns in /dev/shm when the last session of that user ends
(RemoveIPC, on by default), and may end processes that the session left (KillUserProcesses, which
distributions build to be off). Root, system users and users that linger keep their files. Which of
these it does, logind is asked by loginctl; where that does not answer, it is unknown.
Sources: logind.conf(5), and of systemd logind-user.c, logind-session.c and clean-ipc.c.

``root``: where /run, /proc and the others are looked for. Notes are sentences without a period,
empty where there is nothing to say.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import subprocess
from typing import NamedTuple

from numaload.linux.mounts import below, mount_of
from numaload.linux.sysfs import SysFiles
from numaload.machine.userdir import SHARED_MEMORY

UNITS = ("etc/systemd/system", "run/systemd/system")
SYSTEM_UID_MAX = 999
DOCKER_SIZE = 64 << 20  # podman's and containerd's too
ASK = ("loginctl", "show-session")  # without a session: what logind itself is set to
ANSWER_S = 3.0
GIB = 1 << 30


class User(NamedTuple):
    id: int
    name: str  # empty where the id has none

    def lingers(self, root: str) -> bool:
        """Return whether this user's processes and files outlive the last session."""
        return bool(self.name) and os.path.exists(f"{root}/var/lib/systemd/linger/{self.name}")


def emptied_note(path: str, root: str = "/", user: User | None = None) -> str:
    """Say that the files at ``path`` will not survive the logout, and how they would."""
    user, real = user or _current(), os.path.realpath(path)
    if not _logind_runs(root) or user.lingers(root):
        return ""
    if below(real, f"/run/user/{user.id}"):
        return (
            f"{path} is removed when your last session ends: set NUMALOAD_STORE to a folder in"
            " /dev/shm, or loginctl enable-linger"
        )
    if not below(real, SHARED_MEMORY) or user.id <= SYSTEM_UID_MAX:
        return ""
    settings = _settings()
    if settings.get("RemoveIPC") == "no":
        return ""
    known = "RemoveIPC" in settings
    why = "RemoveIPC" if known else "RemoveIPC is its default; loginctl does not tell"
    return (
        f"{path} {'is' if known else 'may be'} emptied when your last session ends"
        f" (systemd-logind, {why}): numaload mirror --hold FILE keeps replicas all the same; so"
        " does loginctl enable-linger, or RemoveIPC=no in /etc/systemd/logind.conf"
    )


def killed_note(
    root: str = "/", user: User | None = None, *, verb: str = "mirror --hold FILE"
) -> str:
    """Say that a process this one leaves behind will be ended at logout, and how it would not."""
    user = user or _current()
    if not _logind_runs(root):
        return ""
    groups = SysFiles().text(f"{root}/proc/self/cgroup") or ""
    if f"/user@{user.id}.service" in groups:
        if user.lingers(root):
            return ""
        return (
            f"this terminal belongs to user@{user.id}.service, which ends with your last session,"
            " and what it has started with it: loginctl enable-linger keeps it"
        )
    if not re.search(r"/session-[^/]+\.scope", groups) or not _kills(user, _settings()):
        return ""
    return (
        "what this session has started is ended with it (systemd-logind, KillUserProcesses):"
        f" loginctl enable-linger, then systemd-run --user --scope numaload {verb}"
    )


def tmpfs_limit_note(path: str, needed: int, root: str = "/", *, held: bool = False) -> str:
    """Say why the tmpfs that holds ``path`` has its size, and how to have ``needed`` bytes more.

    held: for replicas of ``mirror --hold``, which take little there.
    """
    mount = mount_of(path, f"{root}/proc")
    if mount is None or mount.kind != "tmpfs":
        return ""
    status = os.statvfs(path)
    used = (status.f_blocks - status.f_bfree) * status.f_frsize
    wanted = -(-(used + needed) // GIB)
    # The kernel shows a size that was given to the mount, in KiB, and not the default.
    match = re.search(r"(?:^|,)size=(\d+)k", mount.options)
    given = int(match[1]) << 10 if match else None
    fix = f"sudo mount -o remount,size={wanted}G {shlex.quote(mount.point)}"
    why = "as it was mounted"
    if given is None:
        why = "half of this machine's memory, the default"
    elif given == DOCKER_SIZE:
        why = "what containers get by default"
        fix = (
            f"start it with --shm-size={wanted}g, in Kubernetes an emptyDir of medium Memory there"
        )
    total = given or status.f_blocks * status.f_frsize
    instead = "numaload mirror --hold, which it does not limit"
    if held:
        instead = f"free {needed >> 10} KiB of it"
    size = f"{total} bytes ({total / GIB:.2f} GiB)"
    return f"the size of {mount.point} is {size}, {why}: {fix}; or {instead}"


def _current() -> User:
    uid = os.geteuid()
    try:
        return User(uid, pwd.getpwuid(uid).pw_name)
    except KeyError:
        return User(uid, "")


def _logind_runs(root: str) -> bool:
    """Return whether systemd is the init system, and its logind was not switched off."""
    links = (f"{root}/{folder}/systemd-logind.service" for folder in UNITS)
    masked = any(os.path.realpath(link) == os.devnull for link in links)
    return os.path.isdir(f"{root}/run/systemd/system") and not masked


def _settings() -> dict[str, str]:
    """Return what logind is set to, as loginctl tells it: "yes", "no", names. Empty if unknown."""
    try:
        done = subprocess.run(
            ASK, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S, check=True
        )
    except (OSError, subprocess.SubprocessError):  # not installed, no bus, no answer
        return {}
    rows = (line.partition("=") for line in done.stdout.decode(errors="replace").splitlines())
    return {key: value.strip() for key, _, value in rows}


def _kills(user: User, settings: dict[str, str]) -> bool:
    if settings.get("KillUserProcesses") != "yes":
        return False
    only = settings.get("KillOnlyUsers", "").split()
    spared = settings.get("KillExcludeUsers", "").split()
    return user.name not in spared and (not only or user.name in only)
