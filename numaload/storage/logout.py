"""What takes shared memory away at logout, or keeps it small; and what can be done about it.

systemd-logind removes what a user owns in /dev/shm when the last session of that user ends
(RemoveIPC, on by default), and may end processes that the session left (KillUserProcesses, which
distributions build to be off). Root, system users and users that linger keep their files.
Sources: logind.conf(5), and of systemd logind-user.c, logind-session.c and clean-ipc.c.

``root``: where /etc, /proc and the others are looked for. Notes are sentences without a period,
empty where there is nothing to say.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from typing import NamedTuple

from numaload.numa.mounts import below, mount_of
from numaload.storage.userdir import SHARED_MEMORY

# Of configuration: a file in an earlier one replaces that of the same name in later ones.
FOLDERS = ("etc", "run", "usr/local/lib", "usr/lib", "lib")
UNITS = ("etc/systemd/system", "run/systemd/system")
SYSTEM_UID_MAX = 999
DOCKER_SIZE = 64 << 20  # podman's and containerd's too
YES, NO = {"1", "yes", "y", "true", "t", "on"}, {"0", "no", "n", "false", "f", "off"}
GIB = 1 << 30


class User(NamedTuple):
    id: int
    name: str  # empty where the id has none


def emptied_at_logout(path: str, root: str = "/", user: User | None = None) -> bool:
    """Whether what this user has at ``path`` is removed when the user's last session ends."""
    return bool(emptied_note(path, root, user))


def emptied_note(path: str, root: str = "/", user: User | None = None) -> str:
    """That the files at ``path`` will not survive the logout, and how they would."""
    user, real = user or _current(), os.path.realpath(path)
    if not _logind_runs(root) or _lingers(user, root):
        return ""
    if below(real, f"/run/user/{user.id}"):
        return (
            f"{path} is removed when your last session ends: set NUMALOAD_STORE to a folder in"
            " /dev/shm, or loginctl enable-linger"
        )
    shared = below(real, SHARED_MEMORY)
    system = user.id <= _system_uid_max(root)
    if not shared or system or not _setting("RemoveIPC", root, default=True):
        return ""
    return (
        f"{path} is emptied when your last session ends (systemd-logind, RemoveIPC):"
        " numaload mirror --hold FILE keeps replicas all the same; so does loginctl enable-linger,"
        " or RemoveIPC=no in /etc/systemd/logind.conf"
    )


def killed_note(
    root: str = "/", user: User | None = None, *, verb: str = "mirror --hold FILE"
) -> str:
    """That a process this one leaves behind will be ended at logout, and how it would not."""
    user = user or _current()
    if not _logind_runs(root):
        return ""
    groups = "\n".join(_lines(f"{root}/proc/self/cgroup"))
    if f"/user@{user.id}.service" in groups:
        if _lingers(user, root):
            return ""
        return (
            f"this terminal belongs to user@{user.id}.service, which ends with your last session,"
            " and what it has started with it: loginctl enable-linger keeps it"
        )
    if not re.search(r"/session-[^/]+\.scope", groups) or not _kills(user, root):
        return ""
    return (
        "what this session has started is ended with it (systemd-logind, KillUserProcesses):"
        f" loginctl enable-linger, then systemd-run --user --scope numaload {verb}"
    )


def tmpfs_limit_note(path: str, needed: int, root: str = "/") -> str:
    """Why the tmpfs that holds ``path`` has its size, and how to have ``needed`` bytes more."""
    mount = mount_of(path, f"{root}/proc")
    if mount is None or mount.kind != "tmpfs":
        return ""
    status = os.statvfs(path)
    used = (status.f_blocks - status.f_bfree) * status.f_frsize
    wanted = -(-(used + needed) // GIB)
    given = _option_bytes(mount.options)
    remount = f"sudo mount -o remount,size={wanted}G {mount.point}"
    if given is None:
        why, fix = "half of this machine's memory, the default", remount
    elif given == DOCKER_SIZE:
        why = "what containers get by default"
        fix = f"docker run --shm-size={wanted}g, in Kubernetes an emptyDir of medium Memory there"
    else:
        why, fix = "as it was mounted", remount
    total = given or status.f_blocks * status.f_frsize
    return (
        f"the size of {mount.point} is {total} bytes ({total / GIB:.2f} GiB), {why}: {fix}; or"
        " numaload mirror --hold, which it does not limit"
    )


def _current() -> User:
    uid = os.geteuid()
    try:
        return User(uid, pwd.getpwuid(uid).pw_name)
    except KeyError:
        return User(uid, "")


# --- the session manager ------------------------------------------------------------------------


def _logind_runs(root: str) -> bool:
    """systemd is the init system, and its logind was not switched off.

    Its folders below /run alone mean nothing: images of containers have them.
    """
    links = (f"{root}/{folder}/systemd-logind.service" for folder in UNITS)
    masked = any(os.path.realpath(link) == os.devnull for link in links)
    return all(os.path.isdir(f"{root}/run/systemd/{x}") for x in ("system", "users")) and not masked


def _lingers(user: User, root: str) -> bool:
    return bool(user.name) and os.path.exists(f"{root}/var/lib/systemd/linger/{user.name}")


def _system_uid_max(root: str) -> int:
    for line in _lines(f"{root}/etc/login.defs"):
        words = line.split()
        if words[:1] == ["SYS_UID_MAX"] and words[1:] and words[1].isdigit():
            return int(words[1])
    return SYSTEM_UID_MAX


def _kills(user: User, root: str) -> bool:
    if not _setting("KillUserProcesses", root, default=False):
        return False
    only, spared = _names("KillOnlyUsers", root, []), _names("KillExcludeUsers", root, ["root"])
    return user.name not in spared and (not only or user.name in only)


def _setting(key: str, root: str, *, default: bool) -> bool:
    """The last word on it; else what was compiled in, which the file that comes along shows."""
    values = [value.lower() for name, value in _assignments(root) if name == key]
    said = [value for value in (_compiled_in(key, root), *values) if value in YES | NO]
    return said[-1] in YES if said else default


def _compiled_in(key: str, root: str) -> str:
    for folder in reversed(FOLDERS):
        for line in _lines(f"{root}/{folder}/systemd/logind.conf"):
            if match := re.fullmatch(rf"#\s*{key}=(\w+)\s*", line):
                return match[1].lower()
    return ""


def _names(key: str, root: str, default: list[str]) -> list[str]:
    """Every assignment adds to them, an empty one takes all away."""
    names = default
    for name, value in _assignments(root):
        if name == key:
            names = [*names, *value.split()] if value else []
    return names


def _assignments(root: str) -> Iterator[tuple[str, str]]:
    """(key, value) in logind's own section, in the order in which they count."""
    for path in _config_files(root):
        section = ""
        text = re.sub(r"\\\n", " ", "\n".join(_lines(path)))
        for line in map(str.strip, text.splitlines()):
            if line.startswith("["):
                section = line
            elif section == "[Login]" and line[:1] not in ("#", ";"):
                key, equals, value = line.partition("=")
                if equals:
                    yield key.strip(), value.strip()


def _config_files(root: str) -> Iterator[str]:
    """The first main file there is, then drop-ins by name, wherever they are."""
    mains = (f"{root}/{folder}/systemd/logind.conf" for folder in FOLDERS)
    yield from [path for path in mains if os.path.exists(path)][:1]
    found: dict[str, str] = {}
    for folder in FOLDERS:
        where = f"{root}/{folder}/systemd/logind.conf.d"
        for name in os.listdir(where) if os.path.isdir(where) else ():
            if name.endswith(".conf"):
                found.setdefault(name, f"{where}/{name}")
    yield from (found[name] for name in sorted(found))


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


# --- the file system ----------------------------------------------------------------------------


def _option_bytes(options: str) -> int | None:
    """The size that was given to the mount; the kernel shows it in KiB, and not the default."""
    match = re.search(r"(?:^|,)size=(\d+)k", options)
    return int(match[1]) << 10 if match else None
