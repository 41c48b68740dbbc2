"""What logind and small tmpfs do to replicas, recognized from constructed files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from numaload.storage import logout
from numaload.storage.logout import User, emptied_at_logout, emptied_note, killed_note
from numaload.storage.userdir import SHARED_MEMORY

ANN = User(1000, "ann")
STORE = f"{SHARED_MEMORY}/numaload-1000"
SESSION = "0::/user.slice/user-1000.slice/session-3.scope\n"
OWN_MANAGER = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/vte.scope\n"
# As systemd installs it: its comments show what was compiled in.
SHIPPED = "# defaults\n[Login]\n#KillUserProcesses=no\n#KillExcludeUsers=root\n#RemoveIPC=yes\n"
GIB = 1 << 30


def put(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Where logind runs, as it is installed, and this process is in a session."""
    for folder in ("system", "users"):
        (tmp_path / "run/systemd" / folder).mkdir(parents=True)
    put(tmp_path, {"etc/systemd/logind.conf": SHIPPED, "proc/self/cgroup": SESSION})
    return tmp_path


def test_where_logind_runs_shared_memory_is_emptied(machine: Path) -> None:
    said = emptied_note(STORE, str(machine), ANN)
    assert emptied_at_logout(STORE, str(machine), ANN)
    assert said.startswith(f"{STORE} is emptied")
    for fix in ("numaload mirror --hold", "loginctl enable-linger", "RemoveIPC=no"):
        assert fix in said


def test_a_file_system_of_one_s_own_is_not(machine: Path) -> None:
    assert not emptied_at_logout("/mnt/tmpfs/store", str(machine), ANN)
    assert not emptied_at_logout(f"{SHARED_MEMORY}em", str(machine), ANN)


def test_the_user_s_runtime_folder_goes_too_and_no_holder_can_help(machine: Path) -> None:
    put(machine, {"etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\n"})
    said = emptied_note("/run/user/1000/numaload", str(machine), ANN)
    assert "NUMALOAD_STORE" in said
    assert "--hold" not in said
    assert not emptied_at_logout("/run/user/1001/numaload", str(machine), ANN)


def test_through_a_link(machine: Path) -> None:
    (machine / "link").symlink_to(SHARED_MEMORY)
    assert emptied_at_logout(f"{machine}/link/store", str(machine), ANN)


def test_containers_without_logind(machine: Path) -> None:
    """Images have its files and folders all the same."""
    (machine / "run/systemd/system").rmdir()
    assert not emptied_at_logout(STORE, str(machine), ANN)
    assert killed_note(str(machine), ANN) == ""


def test_logind_that_was_switched_off(machine: Path) -> None:
    (machine / "etc/systemd/system").mkdir()
    (machine / "etc/systemd/system/systemd-logind.service").symlink_to("/dev/null")
    assert not emptied_at_logout(STORE, str(machine), ANN)


@pytest.mark.parametrize(
    ("user", "login_defs", "emptied"),
    [
        (User(0, "root"), "", False),
        (User(999, "postgres"), "", False),
        (User(1000, "ann"), "", True),
        (User(60000, ""), "", True),
        (User(700, "bob"), "UID_MIN 500\nSYS_UID_MAX\t\t499\n", True),
        (User(1000, "ann"), "#SYS_UID_MAX 2000\n", True),
        (User(1000, "ann"), "SYS_UID_MAX 2000 # ours\n", False),
        (User(1000, "ann"), "SYS_UID_MAX many\n", True),
    ],
)
def test_system_users_are_spared(machine: Path, user: User, login_defs: str, emptied: bool) -> None:
    put(machine, {"etc/login.defs": login_defs})
    assert emptied_at_logout(STORE, str(machine), user) is emptied


def test_who_lingers_is_spared(machine: Path) -> None:
    put(machine, {"var/lib/systemd/linger/ann": ""})
    assert not emptied_at_logout(STORE, str(machine), ANN)
    assert emptied_at_logout(STORE, str(machine), User(1001, "bob"))
    assert emptied_at_logout(STORE, str(machine), User(1002, ""))  # that folder is no user's


CONFIGURED: dict[str, tuple[dict[str, str], bool]] = {
    "nothing at all": ({}, True),
    "as installed": ({"etc/systemd/logind.conf": SHIPPED}, True),
    "built the other way": ({"usr/lib/systemd/logind.conf": "[Login]\n#RemoveIPC=no\n"}, False),
    "switched off": ({"etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\n"}, False),
    "other words": ({"etc/systemd/logind.conf": "[Login]\n  RemoveIPC =  Off \n"}, False),
    "commented out": ({"etc/systemd/logind.conf": "[Login]\n;RemoveIPC=no\n # RemoveIPC=no\n"},
                      True),
    "another section": ({"etc/systemd/logind.conf": "[Other]\nRemoveIPC=no\n"}, True),
    "before any section": ({"etc/systemd/logind.conf": "RemoveIPC=no\n[Login]\n"}, True),
    "another key": ({"etc/systemd/logind.conf": "[Login]\nRemoveIPCs=no\nno\n"}, True),
    "no value": ({"etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\nRemoveIPC=perhaps\n"}, False),
    "the last one": ({"etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\nRemoveIPC=1\n"}, True),
    "continued": ({"etc/systemd/logind.conf": "[Login]\nRemoveIPC=\\\nno\n"}, False),
    "only the first main file counts": ({
        "etc/systemd/logind.conf": "[Login]\n",
        "usr/lib/systemd/logind.conf": "[Login]\nRemoveIPC=no\n",
    }, True),
    "the vendor's main file": (
        {"usr/lib/systemd/logind.conf": "[Login]\nRemoveIPC=no\n"}, False),
    "a drop-in": ({
        "etc/systemd/logind.conf": "[Login]\nRemoveIPC=yes\n",
        "usr/lib/systemd/logind.conf.d/10-hpc.conf": "[Login]\nRemoveIPC=no\n",
    }, False),
    "drop-ins by name, not by folder": ({
        "etc/systemd/logind.conf.d/10.conf": "[Login]\nRemoveIPC=yes\n",
        "run/systemd/logind.conf.d/20.conf": "[Login]\nRemoveIPC=no\n",
    }, False),
    "of one name the first folder's": ({
        "etc/systemd/logind.conf.d/10.conf": "",
        "usr/lib/systemd/logind.conf.d/10.conf": "[Login]\nRemoveIPC=no\n",
    }, True),
    "no drop-in": ({"etc/systemd/logind.conf.d/10.conf.bak": "[Login]\nRemoveIPC=no\n"}, True),
}  # fmt: skip


@pytest.mark.parametrize(("files", "emptied"), CONFIGURED.values(), ids=CONFIGURED)
def test_its_configuration(machine: Path, files: dict[str, str], emptied: bool) -> None:
    (machine / "etc/systemd/logind.conf").unlink()
    assert emptied_at_logout(STORE, put(machine, files), ANN) is emptied


def test_a_drop_in_that_is_masked(machine: Path) -> None:
    put(machine, {"usr/lib/systemd/logind.conf.d/10.conf": "[Login]\nRemoveIPC=no\n"})
    (machine / "etc/systemd/logind.conf.d").mkdir()
    (machine / "etc/systemd/logind.conf.d/10.conf").symlink_to("/dev/null")
    assert emptied_at_logout(STORE, str(machine), ANN)


KILLED: dict[str, tuple[str, bool]] = {
    "as installed": ("", False),
    "switched on": ("KillUserProcesses=yes\n", True),
    "built so": ("#KillUserProcesses=yes\n", True),
    "this user is spared": ("KillUserProcesses=yes\nKillExcludeUsers=bob ann\n", False),
    "nobody is spared": ("KillUserProcesses=yes\nKillExcludeUsers=ann\nKillExcludeUsers=\n", True),
    "only others": ("KillUserProcesses=yes\nKillOnlyUsers=bob\n", False),
    "this user too": ("KillUserProcesses=yes\nKillOnlyUsers=bob\nKillOnlyUsers=ann\n", True),
}


@pytest.mark.parametrize(("lines", "killed"), KILLED.values(), ids=KILLED)
def test_what_ends_with_the_session(machine: Path, lines: str, killed: bool) -> None:
    said = killed_note(put(machine, {"etc/systemd/logind.conf": f"[Login]\n{lines}"}), ANN)
    assert bool(said) is killed
    if killed:
        assert "loginctl enable-linger" in said
        assert "systemd-run --user --scope numaload mirror --hold" in said


def test_root_is_spared_unless_it_is_said(machine: Path) -> None:
    put(machine, {"etc/systemd/logind.conf": "[Login]\nKillUserProcesses=yes\n"})
    assert killed_note(str(machine), User(0, "root")) == ""
    put(machine, {"etc/systemd/logind.conf.d/1.conf": "[Login]\nKillExcludeUsers=\n"})
    assert killed_note(str(machine), User(0, "root")) != ""


@pytest.mark.parametrize(
    "group", ["0::/system.slice/cron.service\n", "0::/\n", ""], ids=["a service", "a root", "none"]
)
def test_what_no_session_has_started_stays(machine: Path, group: str) -> None:
    files = {"etc/systemd/logind.conf": "[Login]\nKillUserProcesses=yes\n"}
    assert killed_note(put(machine, files | {"proc/self/cgroup": group}), ANN) == ""


def test_what_the_user_s_own_manager_has_started_ends_with_it(machine: Path) -> None:
    """As in terminals of a desktop, whatever KillUserProcesses says."""
    put(machine, {"proc/self/cgroup": OWN_MANAGER})
    assert "loginctl enable-linger" in killed_note(str(machine), ANN)
    put(machine, {"var/lib/systemd/linger/ann": ""})
    assert killed_note(str(machine), ANN) == ""


def test_version_1_of_cgroups(machine: Path) -> None:
    group = f"12:memory:/\n1:name=systemd:{SESSION[3:]}"
    files = {"etc/systemd/logind.conf": "[Login]\nKillUserProcesses=on\n"}
    assert killed_note(put(machine, files | {"proc/self/cgroup": group}), ANN) != ""


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


def test_a_size_that_was_given(tmp_path: Path) -> None:
    root = mountinfo(tmp_path, "tmpfs", "rw,nr_inodes=7,size=4096k", r"/mnt/my\040store")
    said = logout.tmpfs_limit_note(root, GIB, root)
    assert "4194304 bytes" in said
    assert "as it was mounted" in said
    assert "G /mnt/my store" in said


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
