"""docs/service.md: the unit as systemd reads it, what it is told, and containers of a pod."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from commands import LIMIT_S, Numaload, sparse_model
from pages import DOCS, blocks

MIB = 1 << 20
VERIFY = """
import json, sys, numaload
with numaload.attach(sys.argv[1]) as mirror:
    print(json.dumps(mirror.verify().right))
"""
# The namespaces of a pod: one tmpfs for both, processes of their own for each container.
POD = """
set -e
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$1"
export NUMALOAD_STORE=$1
unshare --pid --fork --mount-proc "$2" -m numaload mirror "$3" --nodes local > /dev/null 2>&1
unshare --pid --fork --mount-proc "$2" -c "$4" "$3"
"""


def test_the_unit_is_one(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: sudo apt-get install -y systemd")
    (unit,) = blocks("service.md", "ini")
    assert "/usr/local/bin/numaload" in unit
    assert "TimeoutStartSec=infinity" in unit  # mirroring takes as long as the disk does
    program = tmp_path / "numaload"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / "numaload.service"
    file.write_text(unit.replace("/usr/local/bin/numaload", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "numaload" in line] == []


def test_systemd_is_told_when_the_model_is_mirrored(numaload: Numaload, tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "m.gguf", MIB)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(LIMIT_S)
        environment = numaload.environment | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        command = numaload.command("mirror", path, "--watch", "0.1")
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as watching:
            assert told.recv(100) == b"READY=1"
            assert numaload("status", "--ready", path).stdout == "ready\n"
            watching.send_signal(signal.SIGTERM)
    numaload("release", path)


def test_what_patterns_placed_is_not_ready(numaload: Numaload, tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "m.gguf", MIB)
    numaload("mirror", path, "--place", ".*=mirror")
    assert "no file has all of it" in numaload("status", path).stdout
    assert "no whole replica" in numaload("status", "--ready", path, status=1).stdout
    numaload("mirror", path)
    assert numaload("status", "--ready", path).stdout == "ready\n"


def test_containers_of_a_pod_share_the_store(tmp_path: Path) -> None:
    (pod,) = blocks("service.md", "yaml")
    assert "NUMALOAD_STORE" in pod
    probe = subprocess.run(
        ["unshare", "-r", "-m", "--pid", "--fork", "true"], check=False, capture_output=True
    )
    if probe.returncode:
        pytest.skip("no namespaces may be made here")
    path = sparse_model(tmp_path / "m.gguf", MIB)
    (tmp_path / "store").mkdir()
    words = ["sh", "-c", POD, "sh", tmp_path / "store", sys.executable, path, VERIFY]
    done = subprocess.run(
        ["unshare", "-r", "-m", *map(str, words)], capture_output=True, text=True, check=False,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert done.stdout == "true\n", done.stderr


def test_the_page_names_what_there_is(numaload: Numaload) -> None:
    text = (DOCS / "service.md").read_text(encoding="utf-8")
    for word in ("--watch", "--ready"):
        assert word in text
    assert "--watch" in numaload("mirror", "--help").stdout
    assert "--ready" in numaload("status", "--help").stdout
