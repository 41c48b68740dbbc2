"""scripts/numa-vm up to the start of QEMU; that guests boot is shown by using them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "numa-vm"


def load_script() -> Any:
    loader = importlib.machinery.SourceFileLoader("numa_vm", str(SCRIPT))
    spec = importlib.util.spec_from_loader("numa_vm", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


vm = load_script()


def qemu(*options: str) -> list[str]:
    """QEMU's arguments for these options."""
    _, guest, _ = vm.parse([*options, "--", "true"])
    arguments: list[str] = vm.qemu_arguments(
        guest, vm.Boot(Path("/k/vmlinux"), Path("/k/initrd")), Path("/job"), [7, 8]
    )
    return arguments


def values(arguments: Sequence[str], option: str) -> list[str]:
    return [value for key, value in itertools.pairwise(arguments) if key == option]


# --- options


@pytest.mark.parametrize(
    ("text", "node"),
    [("2c1536M", (2, 1536)), ("1c2G", (1, 2048)), ("0c512M", (0, 512)), ("2c0M", (2, 0))],
)
def test_node(text: str, node: tuple[int, int]) -> None:
    assert vm.parse_node(text) == node


@pytest.mark.parametrize("text", ["", "2", "2c", "c1G", "2c1", "2c1K", "-1c1G", "2c1G ", "0c0M"])
def test_bad_node_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"bad node '{text}'"):
        vm.parse_node(text)


@pytest.mark.parametrize("text", ["0c1G", "0c1G,0c1G", "2c0M", "1c64M,1c64M", "2c1G,", ""])
def test_bad_nodes(text: str) -> None:
    with pytest.raises(ValueError, match="bad node"):
        vm.parse_nodes(text)


def test_one_distance_is_for_all_pairs() -> None:
    assert vm.parse_distances("17", 3) == {(0, 1): 17, (0, 2): 17, (1, 2): 17}


def test_distances_with_exceptions_in_either_direction() -> None:
    distances = vm.parse_distances("32,0-1=12,3-2=13", 4)
    assert distances[0, 1] == 12
    assert distances[2, 3] == 13
    assert {distances[pair] for pair in [(0, 2), (0, 3), (1, 2), (1, 3)]} == {32}


def test_distances_default_where_only_exceptions_are_given() -> None:
    assert vm.parse_distances("0-1=12", 3) == {(0, 1): 12, (0, 2): 21, (1, 2): 21}


@pytest.mark.parametrize("text", ["", "10", "255", "x", "0-1", "0-3=12", "1-1=12", "0-1=9", "21,"])
def test_bad_distances(text: str) -> None:
    with pytest.raises(ValueError, match="bad distance"):
        vm.parse_distances(text, 3)


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("512M", (512, "virtio", None)),
        ("2G:nvme", (2048, "nvme", None)),
        ("1M:virtio:node=0", (1, "virtio", 0)),
        ("1G:node=1", (1024, "virtio", 1)),
        ("1G:nvme:node=1", (1024, "nvme", 1)),
    ],
)
def test_disk(text: str, disk: tuple[int, str, int | None]) -> None:
    assert vm.parse_disk(text, 2) == disk


@pytest.mark.parametrize(
    "text", ["", "512", "0M", "1K", "1G:", "1G:scsi", "1G:node=2", "1G:node=", "1G:node=0:nvme"]
)
def test_bad_disk_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"bad disk '{text}'"):
        vm.parse_disk(text, 2)


def test_modules_are_named_as_the_kernel_does() -> None:
    assert vm.parse_modules("dm-mod,dm_delay,ext4") == ["dm_mod", "dm_delay", "ext4"]
    assert vm.parse_modules("") == []


@pytest.mark.parametrize("text", [",", "a,,b", "a,", "a b", "../a"])
def test_bad_module_names(text: str) -> None:
    with pytest.raises(ValueError, match="bad module"):
        vm.parse_modules(text)


def test_command_is_all_after_the_first_dashes() -> None:
    options, _, command = vm.parse(["--timeout", "3", "--", "a", "--", "--user", "5"])
    assert command == ["a", "--", "--user", "5"]
    assert options.timeout == 3
    assert options.user is None


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--"],
        ["true"],
        ["--nodes", "nonsense", "--", "true"],
        ["--dist", "5", "--", "true"],
        ["--disk", "big", "--", "true"],
        ["--disk", "1G:node=3", "--", "true"],
        ["--modules", "a,,b", "--", "true"],
        ["--user", "0", "--", "true"],
        ["--user", "root", "--", "true"],
        ["--time", "5", "--", "true"],
    ],
)
def test_bad_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        vm.parse(argv)
    assert caught.value.code == 2
    assert "numa-vm: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "ids"),
    [
        ("1c1G,1c1G,0c1G", [0, 1, 2]),
        ("1c1G,0c1G,1c1G", [0, 2, 1]),
        ("0c1G,0c1G,1c0M", [1, 2, 0]),
    ],
)
def test_nodes_without_cpus_come_last_in_the_guest(nodes: str, ids: list[int]) -> None:
    assert vm.guest_ids(vm.parse_nodes(nodes)) == ids


# --- QEMU


def test_default_guest() -> None:
    arguments = qemu()
    assert values(arguments, "-m") == ["3584M"]
    assert values(arguments, "-smp") == ["4,sockets=2,cores=2,threads=1"]
    assert values(arguments, "-numa") == [
        "node,nodeid=0,cpus=0-1,memdev=memory0",
        "node,nodeid=1,cpus=2-3,memdev=memory1",
        "node,nodeid=2,memdev=memory2",
        "dist,src=0,dst=1,val=21",
        "dist,src=0,dst=2,val=21",
        "dist,src=1,dst=2,val=21",
    ]
    assert values(arguments, "-object") == [
        "memory-backend-ram,size=1536M,id=memory0",
        "memory-backend-ram,size=1536M,id=memory1",
        "memory-backend-ram,size=512M,id=memory2",
    ]


def test_node_without_memory_has_no_memory_device() -> None:
    arguments = qemu("--nodes", "2c1G,2c0M")
    assert values(arguments, "-numa")[1] == "node,nodeid=1,cpus=2-3"
    assert len(values(arguments, "-object")) == 1


def test_unlike_nodes_share_no_socket() -> None:
    assert values(qemu("--nodes", "1c1G,3c1G"), "-smp") == ["4,sockets=4,cores=1,threads=1"]
    four = ("--nodes", "1c1G,1c1G,1c1G,1c1G")
    assert values(qemu(*four), "-smp") == ["4,sockets=4,cores=1,threads=1"]
    assert values(qemu(*four, "--sockets", "2"), "-smp") == ["4,sockets=2,cores=2,threads=1"]


def test_emulated_always() -> None:
    arguments = qemu()
    assert values(arguments, "-accel") == ["tcg,thread=multi"]
    assert values(arguments, "-cpu") == ["max"]
    assert not any("kvm" in argument for argument in arguments)


def test_kernel_arguments_given_come_last_and_win() -> None:
    (line,) = values(qemu("--append", "loglevel=7 nokaslr"), "-append")
    assert line.startswith("console=ttyS0 ")
    assert line.endswith(" loglevel=7 nokaslr")


def test_only_what_the_guest_leaves_is_writable() -> None:
    shares = values(qemu(), "-fsdev")
    assert len(shares) == 3
    assert [share for share in shares if "readonly=on" not in share] == [
        "local,id=out,path=/job/out,security_model=none"
    ]


def test_commas_in_paths_are_doubled() -> None:
    assert "path=/a,,b," in list(vm.share_arguments("job", Path("/a,b")))[1]


def devices(arguments: Sequence[str], name: str) -> list[str]:
    return [device for device in values(arguments, "-device") if device.split(",")[0] == name]


def test_disks_have_serial_numbers_in_order() -> None:
    arguments = qemu("--disk", "64M", "--disk", "1G:nvme")
    assert values(arguments, "-drive") == [
        "if=none,id=disk0,format=raw,cache=unsafe,file=/job/disk0",
        "if=none,id=disk1,format=raw,cache=unsafe,file=/job/disk1",
    ]
    (virtio,), (nvme,) = devices(arguments, "virtio-blk-pci"), devices(arguments, "nvme")
    assert "drive=disk0,serial=disk0,bus=pcie.0,vectors=0" in virtio
    assert "drive=disk1,serial=disk1,bus=pcie.0" in nvme
    assert not devices(arguments, "pxb-pcie")


def test_disk_on_a_node_is_behind_a_bridge_that_is_there() -> None:
    arguments = qemu("--disk", "64M:nvme:node=1", "--disk", "64M:node=2")
    first, second = devices(arguments, "pxb-pcie")
    assert first.endswith("numa_node=1")
    assert second.endswith("numa_node=2")
    assert first.split("bus_nr=")[1].split(",")[0] != second.split("bus_nr=")[1].split(",")[0]
    assert "bus=root1" in devices(arguments, "pcie-root-port")[1]
    (virtio,) = devices(arguments, "virtio-blk-pci")
    assert virtio.endswith("bus=port1")


def test_disk_files_are_sparse_and_empty(tmp_path: Path) -> None:
    options, guest, command = vm.parse(["--disk", "1G", "--", "true"])
    vm.prepare(tmp_path, options, guest, command, "mark")
    status = (tmp_path / "disk0").stat()
    assert (status.st_size, status.st_blocks) == (1 << 30, 0)
    assert "/dev/vd*" in (tmp_path / "in/start").read_text()


def test_guest_loads_what_its_disks_need() -> None:
    _, guest, _ = vm.parse(
        ["--disk", "1G", "--disk", "1G:nvme", "--modules", "ext4,nvme", "--", "true"]
    )
    assert vm.guest_modules(guest)[len(vm.MODULES) :] == ["virtio_blk", "nvme", "ext4"]
    assert vm.guest_modules(vm.parse(["--", "true"])[1]) == list(vm.MODULES)


# --- what the guest is told


def test_environment_is_carried_over() -> None:
    carried = vm.guest_environment(
        {"A": "b c", "XDG_RUNTIME_DIR": "/x", "_": "x", "PWD": "/"}, None
    )
    assert carried == {"A": "b c", "XDG_RUNTIME_DIR": "/x", "PWD": os.getcwd(), "NUMA_VM": "1"}


def test_user_has_a_home_of_its_own() -> None:
    mine = {
        "A": "b",
        "HOME": "/root",
        "XDG_CACHE_HOME": "/root/.c",
        "TMPDIR": "/root/t",
        "PWD": "/",
    }
    carried = vm.guest_environment(mine, 54321)
    assert carried == {
        "A": "b",
        "HOME": "/numa-vm/home",
        "USER": "numa-vm",
        "LOGNAME": "numa-vm",
        "PWD": os.getcwd(),
        "NUMA_VM": "1",
    }


def test_command_script_passes_words_and_variables_unchanged() -> None:
    words = ["printf", "%s|", "a b", "$HOME", "'", "", 'new\nline "x"']
    script = vm.command_script(words, {"PATH": os.environ["PATH"], "ODD": "$(false) 'q'"}, None)
    done = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"{word}|" for word in words[2:])
    show = vm.command_script(["sh", "-c", 'pwd; echo "$ODD"'], {"ODD": "$(false) 'q'"}, None)
    done = subprocess.run(["/bin/sh"], input=show, capture_output=True, text=True, check=True)
    assert done.stdout == f"{os.getcwd()}\n$(false) 'q'\n"


def test_user_loses_groups_and_capabilities() -> None:
    line = vm.command_script(["true"], {}, 1000).splitlines()[1]
    assert {"--reuid=1000", "--regid=1000", "--clear-groups"} <= set(shlex.split(line))


def test_start_script_is_valid_shell() -> None:
    disks = vm.disk_setup([vm.Disk(64, bus, None) for bus in vm.BUSES])
    script = vm.start_script([*disks, "echo setup"], "mark")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    subprocess.run(["sh", "-n"], input=vm.INIT, text=True, check=True)
    assert script.index("mount") < script.index("echo setup") < script.index("/numa-vm/job/command")


def test_closed_paths_follow_links(tmp_path: Path) -> None:
    """A way leads through the folders of a link, and through those of what it points to."""
    target = tmp_path / "closed" / "bin"
    target.mkdir(parents=True)
    (target / "python").write_text("")
    (target / "python").chmod(0o755)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "python").symlink_to(target / "python")
    for folder in (tmp_path, tmp_path / "open", target):
        folder.chmod(0o755)
    (tmp_path / "closed").chmod(0o700)
    closed = vm.closed_paths([str(tmp_path / "open" / "python"), str(tmp_path / "none")])
    assert str(tmp_path / "closed") in closed
    assert not {str(target), str(tmp_path), str(target / "python")} & set(closed)


def test_interpreter_of_a_virtual_environment(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /opt/python/bin\nversion = 3.11\n")
    python = str(tmp_path / "bin" / "python")
    assert list(vm.interpreter_paths(python)) == [python, "/opt/python/lib"]
    assert list(vm.interpreter_paths("/nowhere/bin/tool")) == ["/nowhere/bin/tool"]


def test_loader_cache_keeps_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "ld.so.cache"
    monkeypatch.setattr(vm, "LOADER_CACHE", str(cache))
    assert vm.loader_cache_without_libnuma() == b""
    cache.write_bytes(b"libnuma.so.1\0/lib/libnuma.so.1\0libnvme.so.1\0")
    changed = vm.loader_cache_without_libnuma()
    assert changed == b"libnuma_so.1\0/lib/libnuma_so.1\0libnvme.so.1\0"


# --- kernel modules


def test_modules_load_after_what_they_need() -> None:
    needs = {"9p": ["9pnet", "netfs"], "9pnet_virtio": ["virtio", "9pnet"], "overlay": []}
    order = vm.load_order(["9p", "9pnet_virtio", "overlay"], lambda name: needs.get(name, []))
    assert order == ["9pnet", "netfs", "9p", "virtio", "9pnet_virtio", "overlay"]


def module(*needs: str, wishes: str = "") -> bytes:
    depends = b"\x7fELF...\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0retpoline=Y\0"
    return depends + (f"softdep=pre: {wishes}\0".encode() if wishes else b"")


def test_modules_are_found_with_what_they_need(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "modules" / "6.1"
    (folder / "kernel" / "fs").mkdir(parents=True)
    (folder / "modules.builtin").write_text("kernel/lib/crc-16.ko\n")
    (folder / "kernel" / "fs" / "top.ko").write_bytes(module("low-part", "crc-16"))
    (folder / "kernel" / "low-part.ko").write_bytes(module())
    assert [name for name, _ in vm.collect_modules(tmp_path, ["top"])] == ["low_part", "top"]
    assert vm.collect_modules(tmp_path, ["crc_16"]) == []
    with pytest.raises(vm.UnknownModuleError, match=r"no module lowpart; close: low_part$"):
        vm.collect_modules(tmp_path, ["top", "lowpart"])


def test_modules_come_with_what_they_load_at_run_time(tmp_path: Path) -> None:
    """As far as the kernel has it: modprobe would not mind either."""
    folder = tmp_path / "lib" / "modules" / "6.1"
    (folder / "kernel").mkdir(parents=True)
    (folder / "modules.builtin").write_text("")
    (folder / "kernel" / "ext4.ko").write_bytes(module(wishes="crypto-crc32c md5 absent"))
    for name in ("crc32c_generic", "md5"):
        (folder / "kernel" / f"{name}.ko").write_bytes(module())
    names = [name for name, _ in vm.collect_modules(tmp_path, ["ext4"])]
    assert names == ["crc32c_generic", "md5", "ext4"]


def test_unknown_module_is_misuse_and_nothing_is_booted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object) -> None:
        raise vm.UnknownModuleError("the guest's kernel has no module exto4; close: ext4")

    monkeypatch.setattr(vm, "require_pieces", lambda: None)
    monkeypatch.setattr(vm, "boot_files", unknown)
    assert vm.main(["--modules", "exto4", "--", "true"]) == 2
    assert capsys.readouterr().err == (
        "numa-vm: the guest's kernel has no module exto4; close: ext4\n"
    )


def test_initrd_key_depends_on_all_that_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"one")
    keys = {vm.initrd_key(("a",), busybox), vm.initrd_key(("a", "b"), busybox)}
    busybox.write_bytes(b"two")
    keys.add(vm.initrd_key(("a",), busybox))
    monkeypatch.setattr(vm, "INIT", vm.INIT + "# changed\n")
    keys.add(vm.initrd_key(("a",), busybox))
    assert len(keys) == 4


def test_kernel_that_cannot_be_unpacked_is_used_as_it_is() -> None:
    assert vm.unpacked_kernel(b"MZ no kernel") == b"MZ no kernel"


# --- output and exit status


def fed(*chunks: bytes) -> tuple[bytes, int | None]:
    sink = io.BytesIO()
    stream = vm.Stream(b"<mark>", sink)
    for chunk in chunks:
        stream.feed(chunk)
    return sink.getvalue(), stream.status


def test_output_is_passed_on_at_once() -> None:
    assert fed(b"one\ntw") == (b"one\ntw", None)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_marker_ends_output_however_it_is_cut(size: int) -> None:
    text = b"a < b <mar <<mark> 42\n"
    chunks = [text[at : at + size] for at in range(0, len(text), size)]
    assert fed(*chunks) == (b"a < b <mar <", 42)


def test_output_without_a_marker_has_no_status() -> None:
    assert fed(b"text\n", b"<mark> 4")[1] is None


# --- what is left


def test_collect_leaves_special_files_and_modes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder").mkdir(parents=True)
    (source / "folder" / "file").write_text("text")
    (source / "folder" / "file").chmod(0o4755)
    (source / "link").symlink_to("/nowhere")
    os.mkfifo(source / "pipe")
    target.mkdir()
    (target / "kept").write_text("")
    vm.collect(source, target)
    assert sorted(os.listdir(target)) == ["folder", "kept", "link"]
    assert (target / "folder" / "file").stat().st_mode & 0o7777 == 0o755
    assert os.readlink(target / "link") == "/nowhere"


def test_last_words_leave_out_a_start_that_went_well(tmp_path: Path) -> None:
    (tmp_path / "qemu").write_text("qemu: odd\n")
    (tmp_path / "console").write_text("+ mount\r\n+ set +ex\r\n[ 1.0] Kernel panic\r\n")
    assert vm.last_words(tmp_path).splitlines() == [
        "qemu: odd",
        "last lines of its console:",
        "[ 1.0] Kernel panic",
    ]
    (tmp_path / "console").write_text("+ mount\nmount: no such device\n")
    assert vm.last_words(tmp_path).splitlines()[2:] == ["+ mount", "mount: no such device"]


def test_check_says_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--check"],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 77
    lines = done.stderr.splitlines()
    assert "numa-vm: missing: cpio (Debian package cpio)" in lines
    assert lines[-1] == vm.INSTALL
    assert sum("apt-get install" in line for line in lines) == 1


def test_help() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    assert "--nodes" in done.stdout


@pytest.mark.parametrize(
    ("console", "code", "tries"),
    [("panic", vm.GUEST_DIED, 2), ("+ set +ex\n", vm.GUEST_DIED, 1), ("panic", vm.TIMED_OUT, 1)],
    ids=["died-booting", "died-later", "timeout"],
)
def test_only_a_guest_that_died_booting_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: str, code: int, tries: int
) -> None:
    runs = []

    def dies(*_: object) -> int:
        runs.append(1)
        (tmp_path / "console").write_text(console)
        raise vm.GuestError("gone", code)

    monkeypatch.setattr(vm, "run_guest", dies)
    with pytest.raises(vm.GuestError):
        vm.boot_and_run(None, None, tmp_path, "marker", 1.0)
    assert len(runs) == tries
