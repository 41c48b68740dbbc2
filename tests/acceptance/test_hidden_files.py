"""Files of /proc and /sys that are hidden, really, in a mount namespace: unknown, not "none"."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from commands import LIMIT_S, Numaload

EMPTY = "mount --bind /dev/null"  # as containers hide single files
NODE = "/sys/devices/system/node"
HIDDEN = {
    "proc-of-processes-only": "mount -t proc -o subset=pid proc /proc",
    "sys": "mount -t tmpfs none /sys",
    "both": "mount -t proc -o subset=pid proc /proc; mount -t tmpfs none /sys",
    "nodes": f"mount -t tmpfs none {NODE}",
    "cpus": f"for f in {NODE}/node*/cpu[lm]*; do {EMPTY} $f; done",
    "free-memory": f"for f in {NODE}/node*/meminfo /proc/meminfo; do {EMPTY} $f; done",
    "mounts-and-cgroup": f"{EMPTY} /proc/$$/mountinfo; {EMPTY} /proc/$$/cgroup",
    "page-counts": f"{EMPTY} /proc/$$/numa_maps; {EMPTY} /proc/$$/smaps",
}

OF_THE_MOMENT = {"NL101", "NL108", "NL507"}  # others read the disk, or keep the machine busy


@pytest.fixture(autouse=True)
def needs_root() -> None:
    if os.geteuid():
        pytest.skip("needs root, who may mount")


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_a_replica_is_made_without_what_is_hidden(
    numaload: Numaload, model: str, hidden: str
) -> None:
    said = []
    for words in (["prewarm", model], ["mirror", model], ["nodes"]):
        line = f'set -e; {hidden}; exec "$@"'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", line, "sh", *numaload.command(*words)],
            capture_output=True, text=True, env=numaload.environment, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "does NOT fit" not in done.stderr
        said.append(done.stdout)
    assert "pages there (100 %)" in said[1]
    assert len([line for line in said[2].splitlines() if line.startswith("all: ")]) == 1
    assert "all checksums right" in numaload("verify", model).stdout


@pytest.mark.parametrize(
    "hidden", [*HIDDEN.values(), "mount -t tmpfs none /proc", "mount -t tmpfs none /dev"],
    ids=[*HIDDEN, "all-of-proc", "all-of-dev"],
)  # fmt: skip
def test_the_doctor_finds_nothing_more_where_less_is_shown(
    numaload: Numaload, model: str, hidden: str
) -> None:
    """Nor does it end with anything but its own exit statuses."""
    ids = []
    for line in ("", hidden):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", f'set -e; {line or ":"}; exec "$@"', "sh",
             *numaload.command("doctor", model, "--json")],
            capture_output=True, text=True, env=numaload.environment, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        assert "Traceback" not in done.stderr
        ids.append({finding["id"] for finding in json.loads(done.stdout)["findings"]})
    assert ids[1] <= ids[0] | OF_THE_MOMENT


def test_huge_page_files_are_in_memory(numaload: Numaload, model: str, tmp_path: Path) -> None:
    """No call tells of their pages, and all of a file is there."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before, size = int(setting.read_text()), os.path.getsize(model)
    pages = -(-size // (2 << 20))
    copy = (
        "import mmap, os, sys; data = open(sys.argv[1], 'rb').read();"
        f"fd = os.open('m.gguf', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, {pages} << 21);"
        f"mmap.mmap(fd, {pages} << 21)[:len(data)] = data"
    )
    try:
        setting.write_text(str(before + pages))
        if int(setting.read_text()) < before + pages:
            pytest.skip("no huge pages to be had")
        line = 'mount -t hugetlbfs none "$0" && cd "$0" && python3 -c "$1" "$2" && shift 2 && "$@"'
        line += "; s=$?; umount -l .; exit $s"
        words = numaload.command("prewarm", "m.gguf", "--json")
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", line, tmp_path, copy, model, *words],
            capture_output=True, text=True, env=numaload.environment, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    finally:
        setting.write_text(str(before))
    assert done.returncode == 0, done.stderr
    assert '"done": true' in done.stdout
    assert '"read": 0' in done.stdout
