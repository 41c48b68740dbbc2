"""``exec`` on real nodes: each program's CPUs, memory and the file that it reads are its node's.

The programs know nothing of numaload; what they say of themselves they ask the kernel.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import LIMIT_S, Numaload, evict, resident, running
from numaload.linux.lists import parse_list
from witness import PAGE, cpus_of

OWN = 16 << 20
TESTS = Path(__file__).parents[1]
REPORT = """
import ctypes, json, mmap, os, re, sys
tests, own, path, node, index, port, *sources = sys.argv[1:]
sys.path.insert(0, tests)
from commands import evict
from witness import by_move_pages, by_numa_maps
memory = bytearray(int(own))
for page in range(0, len(memory), mmap.PAGESIZE):
    memory[page] = 1
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
evict(sources)
replica = {}
for source in sources:
    name = os.path.join(os.path.dirname(path), os.path.basename(source))
    with open(name, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(mapped[::mmap.PAGESIZE])
    replica[name] = by_numa_maps("self", name)
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "path": path, "words": [node, index, port], "replica": replica,
    "cpus": status["Cpus_allowed_list"], "own": by_move_pages(address, len(memory)),
    "policy": [line.split()[1] for line in open("/proc/self/numa_maps") if " heap " in line],
}))
"""


def reports(numaload: Numaload, model: str, sources: list[str], *options: str) -> dict[int, Any]:
    """{node: what its program says}; without labels one program's, as of node -1."""
    done = numaload(
        "exec", *options, model, "--", sys.executable, "-c", REPORT, TESTS, OWN,
        "{model}", "{node}", "{index}", "{port:8080}", *sources,
    )  # fmt: skip
    lines = [re.fullmatch(r"(?:\[node (\d+)\] )?(\{.*)", line) for line in done.stdout.splitlines()]
    return {int(line[1] or -1): json.loads(line[2]) for line in lines if line}


def check(found: Any, node: int, sources: list[str]) -> None:
    """Check that all of it is its node's."""
    folder = Path(found["path"]).parent
    assert folder.name == f"node{node}"
    assert found["path"] == str(folder / Path(sources[0]).name)
    assert set(parse_list(found["cpus"])) == cpus_of(node)
    assert found["own"].keys() == {str(node)}
    for source in sources:
        pages = -(-os.path.getsize(source) // PAGE)
        assert found["replica"][str(folder / Path(source).name)] == {str(node): pages}


@pytest.fixture
def two(nodes: list[int]) -> list[int]:
    assert len(nodes) >= 2
    return nodes


def test_each_program_has_its_nodes_cpus_memory_and_replica(
    numaload: Numaload, model: str, model_files: list[str], two: list[int]
) -> None:
    numaload("mirror", model)
    evict(model_files)
    found = reports(numaload, model, model_files, "--all-nodes")
    assert sorted(found) == two
    for index, node in enumerate(two):
        check(found[node], node, model_files)
        assert found[node]["words"] == [str(node), str(index), str(8080 + index)]
        assert found[node]["policy"] == [f"prefer:{node}"]
    assert resident(model_files) == 0


def test_a_node_that_lacks_the_replica_gets_it_and_the_program(
    numaload: Numaload, model: str, model_files: list[str], two: list[int]
) -> None:
    numaload("mirror", model, "--policy", "interleave")  # which is not its own
    found = reports(numaload, model, model_files, "--node", str(two[1]), "--memory", "bind")[-1]
    check(found, two[1], model_files)
    assert found["words"] == [str(two[1]), "0", "8080"]
    assert found["policy"] == [f"bind:{two[1]}"]
    built = [list(row["nodes"]) for row in numaload.json("store")["rows"]]
    assert sorted(built, key=len) == [[str(two[1])], [str(node) for node in two]]


def start(numaload: Numaload, model: str, script: str) -> subprocess.Popen[str]:
    return numaload.start("exec", "--all-nodes", model, "--", "sh", "-c", script, "sh", "{model}")


def test_signals_reach_all_programs_and_the_worst_status_counts(
    numaload: Numaload, model: str, two: list[int]
) -> None:
    numaload("mirror", model)
    script = "trap 'exit $((30 + {index}))' TERM; echo ready; while :; do sleep 0.1; done"
    with start(numaload, model, script) as job:
        assert job.stdout
        ready = sorted(job.stdout.readline() for _ in two)
        assert ready == [f"[node {node}] ready\n" for node in two]
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 30 + len(two) - 1
    assert sorted(line for line in said.splitlines() if "ended" in line) == [
        f"numaload: node {node}: sh ended with status {30 + index}"
        for index, node in enumerate(two)
    ]


def test_if_one_program_ends_the_others_go_on(
    numaload: Numaload, model: str, two: list[int], tmp_path: Path
) -> None:
    numaload("mirror", model)
    flag = tmp_path / "flag"
    script = f"until [ -e {flag} ]; do sleep 0.1; done; echo done"
    script = "[ {index} = 0 ] && kill -9 $$; " + script
    with start(numaload, model, script) as job:
        assert job.stderr
        ended = f"numaload: node {two[0]}: sh ended by signal 9 (Killed)\n"
        assert ended in iter(job.stderr.readline, "")
        flag.touch()
        out, _ = job.communicate(timeout=LIMIT_S)
    assert sorted(out.splitlines()) == [f"[node {node}] done" for node in two[1:]]
    assert job.returncode == 128 + signal.SIGKILL


def test_if_one_cannot_be_started_the_others_are_ended(
    numaload: Numaload, model: str, two: list[int], tmp_path: Path
) -> None:
    first, pid = tmp_path / f"program{two[0]}", tmp_path / "pid"
    first.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 1000\n")
    first.chmod(0o755)
    words = (f"{tmp_path}/program{{node}}", "{model}")
    said = numaload("exec", "--all-nodes", model, "--", *words, status=127).stderr
    assert f"program{two[1]}: cannot be started: No such file or directory" in said
    assert not pid.exists() or not running(int(pid.read_text()))


def test_programs_that_would_all_do_the_same_are_refused(numaload: Numaload, model: str) -> None:
    said = numaload("exec", "--all-nodes", model, "--", "cat", "{model}", status=2).stderr
    assert "let an argument have {port:8080}, {node} or {index}" in said
    assert numaload.json("store")["rows"] == []
