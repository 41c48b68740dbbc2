"""What logind and small tmpfs do to replicas: from what loginctl tells, and constructed files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from numaload.machine import logout
from numaload.machine.logout import User, emptied_note, killed_note
from numaload.machine.userdir import SHARED_MEMORY

ANN = User(1000, "ann")
STORE = f"{SHARED_MEMORY}/numaload-1000"
SESSION = "0::/user.slice/user-1000.slice/session-3.scope\n"
OWN_MANAGER = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/vte.scope\n"
# What logind tells of itself as it is installed, among much else.
SHIPPED = {
    "EnableWallMessages": "no", "KillUserProcesses": "no", "KillExcludeUsers": "root",
    "KillOnlyUsers": "", "RemoveIPC": "yes",
}  # fmt: skip
Settings = Callable[..., None]
GIB = 1 << 30


def put(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Where logind runs, and this process is in a session."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    put(tmp_path, {"proc/self/cgroup": SESSION})
    return tmp_path


@pytest.fixture(autouse=True)
def logind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Has loginctl tell these settings, those of an installed logind first."""
    program = tmp_path / "bin" / "loginctl"

    def told(**settings: str) -> None:
        rows = [f"{key}={value}" for key, value in (SHIPPED | settings).items()]
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(rows) + "\nEND\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    told()
    return told


def is_emptied(machine: Path, path: str = STORE, user: User = ANN) -> bool:
    return bool(emptied_note(path, str(machine), user))


def test_where_logind_runs_shared_memory_is_emptied(machine: Path) -> None:
    said = emptied_note(STORE, str(machine), ANN)
    assert said.startswith(f"{STORE} is emptied")
    for fix in ("numaload mirror --hold", "loginctl enable-linger", "RemoveIPC=no"):
        assert fix in said


def test_a_file_system_of_one_s_own_is_not(machine: Path) -> None:
    assert not is_emptied(machine, "/mnt/tmpfs/store")
    assert not is_emptied(machine, f"{SHARED_MEMORY}em")


def test_the_user_s_runtime_folder_goes_too_and_no_holder_can_help(
    machine: Path, logind: Settings
) -> None:
    logind(RemoveIPC="no")
    said = emptied_note("/run/user/1000/numaload", str(machine), ANN)
    assert "NUMALOAD_STORE" in said
    assert "--hold" not in said
    assert not is_emptied(machine, "/run/user/1001/numaload")


def test_through_a_link(machine: Path) -> None:
    (machine / "link").symlink_to(SHARED_MEMORY)
    assert is_emptied(machine, f"{machine}/link/store")


def test_containers_without_logind(machine: Path) -> None:
    """Images have its files and folders all the same."""
    (machine / "run/systemd/system").rmdir()
    assert not is_emptied(machine)
    assert killed_note(str(machine), ANN) == ""


def test_logind_that_was_switched_off(machine: Path) -> None:
    (machine / "etc/systemd/system").mkdir(parents=True)
    (machine / "etc/systemd/system/systemd-logind.service").symlink_to("/dev/null")
    assert not is_emptied(machine)


@pytest.mark.parametrize(
    ("user", "emptied"),
    [
        (User(0, "root"), False),
        (User(999, "postgres"), False),
        (User(1000, "ann"), True),
        (User(60000, ""), True),
    ],
)
def test_system_users_are_spared(machine: Path, user: User, emptied: bool) -> None:
    assert is_emptied(machine, user=user) is emptied


def test_who_lingers_is_spared(machine: Path) -> None:
    put(machine, {"var/lib/systemd/linger/ann": ""})
    assert not is_emptied(machine)
    assert is_emptied(machine, user=User(1001, "bob"))
    assert is_emptied(machine, user=User(1002, ""))  # that folder is no user's


def test_logind_that_leaves_shared_memory_alone(machine: Path, logind: Settings) -> None:
    logind(RemoveIPC="no")
    assert not is_emptied(machine)


SILENT = {
    "not installed": None, "no bus": "echo no bus >&2; exit 1", "another program": "echo; echo x",
    "no answer": "exec sleep 600", "no text": r"printf '\377\n'",
}  # fmt: skip


@pytest.mark.parametrize("kind", SILENT)
def test_where_loginctl_does_not_tell_it_is_unknown(
    machine: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And said to be: of what nobody told it is not said that it is so, nor that it is not."""
    program, text = machine / "bin" / "loginctl", SILENT[kind]
    if text is None:
        program.unlink()
        monkeypatch.setenv("PATH", str(program.parent))
    else:
        program.write_text(f"#!/bin/sh\n{text}\n")
        monkeypatch.setattr(logout, "ANSWER_S", 0.5)
    said = emptied_note(STORE, str(machine), ANN)
    assert said.startswith(f"{STORE} may be emptied")
    assert "loginctl does not tell" in said
    assert killed_note(str(machine), ANN) == ""


KILLED: dict[str, tuple[dict[str, str], bool]] = {
    "as installed": ({}, False),
    "switched on": ({"KillUserProcesses": "yes"}, True),
    "this user is spared": ({"KillUserProcesses": "yes", "KillExcludeUsers": "bob ann"}, False),
    "only others": ({"KillUserProcesses": "yes", "KillOnlyUsers": "bob"}, False),
    "this user too": ({"KillUserProcesses": "yes", "KillOnlyUsers": "bob ann"}, True),
}


@pytest.mark.parametrize(("settings", "killed"), KILLED.values(), ids=KILLED)
def test_what_ends_with_the_session(
    machine: Path, logind: Settings, settings: dict[str, str], killed: bool
) -> None:
    logind(**settings)
    said = killed_note(str(machine), ANN)
    assert bool(said) is killed
    if killed:
        assert "loginctl enable-linger" in said
        assert "systemd-run --user --scope numaload mirror --hold" in said


def test_root_is_spared_unless_it_is_said(machine: Path, logind: Settings) -> None:
    logind(KillUserProcesses="yes")
    assert killed_note(str(machine), User(0, "root")) == ""
    logind(KillUserProcesses="yes", KillExcludeUsers="")
    assert killed_note(str(machine), User(0, "root")) != ""


@pytest.mark.parametrize(
    "group", ["0::/system.slice/cron.service\n", "0::/\n", ""], ids=["a service", "a root", "none"]
)
def test_what_no_session_has_started_stays(machine: Path, logind: Settings, group: str) -> None:
    logind(KillUserProcesses="yes")
    assert killed_note(put(machine, {"proc/self/cgroup": group}), ANN) == ""


def test_what_the_user_s_own_manager_has_started_ends_with_it(machine: Path) -> None:
    """As in terminals of a desktop, whatever KillUserProcesses says."""
    put(machine, {"proc/self/cgroup": OWN_MANAGER})
    assert "loginctl enable-linger" in killed_note(str(machine), ANN)
    put(machine, {"var/lib/systemd/linger/ann": ""})
    assert killed_note(str(machine), ANN) == ""


def test_version_1_of_cgroups(machine: Path, logind: Settings) -> None:
    logind(KillUserProcesses="yes")
    group = f"12:memory:/\n1:name=systemd:{SESSION[3:]}"
    assert killed_note(put(machine, {"proc/self/cgroup": group}), ANN) != ""


def mountinfo(root: Path, kind: str, options: str, point: str = SHARED_MEMORY) -> str:
    """The file system of ``root``, as if it were of that kind; and one that is not meant."""
    device = os.stat(root).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    text = (
        f"21 20 0:9999 / /proc rw - proc proc rw\n"
        f"22 20 {number} / {point} rw,nosuid shared:4 - {kind} tmpfs {options}\n"
    )
    return put(root, {"proc/self/mountinfo": text})


def test_the_default_size_is_half_of_the_memory(tmp_path: Path) -> None:
    root = mountinfo(tmp_path, "tmpfs", "rw,inode64")
    status = os.statvfs(tmp_path)
    total = status.f_blocks * status.f_frsize
    said = logout.tmpfs_limit_note(root, 3 * GIB, root)
    assert f"{total} bytes" in said
    assert "half of this machine's memory" in said
    used = (status.f_blocks - status.f_bfree) * status.f_frsize
    least = -(-(used + 3 * GIB - GIB // 2) // GIB)  # others write to it meanwhile
    size = int(said.partition("remount,size=")[2].partition("G /dev/shm")[0])
    assert least <= size <= least + 2
    assert "--hold" in said


def test_what_containers_get(tmp_path: Path) -> None:
    root = mountinfo(tmp_path, "tmpfs", "rw,size=65536k")
    said = logout.tmpfs_limit_note(root, GIB, root)
    assert "67108864 bytes (0.06 GiB)" in said
    assert "--shm-size=" in said
    assert "remount" not in said
    said = logout.tmpfs_limit_note(root, 300 << 10, root, held=True)
    assert said.endswith("; or free 300 KiB of it")


def test_a_size_that_was_given(tmp_path: Path) -> None:
    root = mountinfo(tmp_path, "tmpfs", "rw,nr_inodes=7,size=4096k", r"/mnt/my\040store")
    said = logout.tmpfs_limit_note(root, GIB, root)
    assert "4194304 bytes" in said
    assert "as it was mounted" in said
    assert "G '/mnt/my store'" in said


def test_other_file_systems_have_other_limits(tmp_path: Path) -> None:
    root = mountinfo(tmp_path, "ext4", "rw")
    assert logout.tmpfs_limit_note(root, GIB, root) == ""
    put(tmp_path, {"proc/self/mountinfo": ""})
    assert logout.tmpfs_limit_note(root, GIB, root) == ""
    (tmp_path / "proc/self/mountinfo").unlink()
    assert logout.tmpfs_limit_note(root, GIB, root) == ""


def test_of_several_mounts_the_one_that_is_meant(tmp_path: Path) -> None:
    device = os.stat(tmp_path).st_dev
    number, real = f"{os.major(device)}:{os.minor(device)}", os.path.realpath(tmp_path)
    rows = [
        f"{at} 20 {number} / {point} rw - tmpfs tmpfs rw,size=8k"
        for at, point in enumerate(("/elsewhere/very/long/as/it/is/" + "x" * 99, "/", real))
    ]
    root = put(tmp_path, {"proc/self/mountinfo": "\n".join(rows)})
    assert f"G {real};" in logout.tmpfs_limit_note(f"{root}/proc", GIB, root)


def test_this_machine() -> None:
    """Nothing is known of it but that it can be asked."""
    for said in (emptied_note(STORE), killed_note(), logout.tmpfs_limit_note(SHARED_MEMORY, GIB)):
        assert "\n" not in said
        assert not said.endswith(".")
