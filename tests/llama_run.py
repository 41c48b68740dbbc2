"""llama.cpp in a process of its own, as xllamacpp brings it, and where the kernel has its weights.

It knows nothing of numaload: it gets the path of a model file and its own options.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numaload

LIMIT_S = 120
PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14  # linux/prctl.h, linux/capability.h
# It says the tokens and how sure it was of each, so that equal means equal weights; then it waits.
ENGINE = """
import json, sys
import xllamacpp

def enums(value):
    return getattr(getattr(xllamacpp, value[0]), value[1]) if isinstance(value, list) else value

def own_bytes():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

path, options = sys.argv[1], json.loads(sys.argv[2])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 64, 1, False
params.n_batch = params.n_ubatch = 64
params.cpuparams.n_threads = options.pop("n_threads", 1)
for name, value in options.items():
    setattr(params, name, enums(value))
before = own_bytes()
server = xllamacpp.Server(params)
asked = {"prompt": "hello", "n_predict": 16, "temperature": 0, "n_probs": 1, "ignore_eos": True}
(choice,) = server.handle_completions(asked)["choices"]
tokens = [(one["id"], one["logprob"]) for one in choice["logprobs"]["content"]]
print("GENERATED", json.dumps({"tokens": tokens, "own": own_bytes() - before}), flush=True)
sys.stdin.read()
"""
# Run by root, a process may lock any amount of memory: not this one.
UNPRIVILEGED = f"""
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_IPC_LOCK}, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (int(sys.argv[1]),) * 2)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Run:
    """What it generated, and its memory thereafter. All sizes are bytes."""

    tokens: list[list[float]]
    own: int  # grown by loading: copies, context and buffers
    smaps: dict[str, int]  # sums of the model files' mappings: Rss, Anonymous, Locked, ...
    nodes: dict[int, int]  # of the same mappings, by node
    own_nodes: dict[int, int]  # anonymous memory of the whole process, by node
    locked: int  # of the whole process
    threads: list[str]  # CPUs that each may run on
    users: list[str]  # of the replica, as the store sees them while it runs
    said: str


def run(path: str, options: Mapping[str, Any] | None = None, *, locks: int | None = None) -> Run:
    """Load, generate, look. ``locks``: bytes that an unprivileged process may lock.

    ``options`` are CommonParams' attributes; a list is the name of an enum and of its member.
    """
    words = [sys.executable, "-c", ENGINE, path, json.dumps(dict(options or {}))]
    if locks is not None:
        words[1:1] = ["-c", UNPRIVILEGED, str(locks)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        watchdog = threading.Timer(LIMIT_S, process.kill)
        watchdog.start()
        generated = ""
        for line in process.stdout:  # llama.cpp may say something there as well, without an end
            _, found, generated = line.partition("GENERATED ")
            if found:
                break
        seen = _look(process.pid, os.path.dirname(os.path.realpath(path)))
        users = [user for row in numaload.store.table().rows for user in row.users]
        process.communicate("")
        watchdog.cancel()
        errors.seek(0)
        said = errors.read()
    assert process.returncode == 0, said
    return Run(**json.loads(generated), **seen, users=users, said=said)


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8") as file:
            return file.read()
    except OSError:  # it ended early: what it said explains it
        return ""


def _look(pid: int, folder: str) -> dict[str, Any]:
    """Of kernels before 6.5, smaps leaves out huge pages that NUMA balancing watches."""
    smaps: dict[str, int] = {}
    ours, locked = False, 0
    for line in _read(pid, "smaps").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = f" {folder}/" in line
            continue
        key, _, value = line.partition(":")
        if not value.endswith(" kB"):
            continue
        nbytes = int(value.split()[0]) * 1024
        locked += nbytes * (key == "Locked")
        if ours:
            smaps[key] = smaps.get(key, 0) + nbytes
    nodes: dict[int, int] = {}
    own_nodes: dict[int, int] = {}
    for line in _read(pid, "numa_maps").splitlines():
        counts = nodes if f"file={folder}/" in line else own_nodes if " anon=" in line else {}
        found = re.search(r"kernelpagesize_kB=(\d+)", line)
        page_size = int(found[1]) * 1024 if found else 0
        for node, pages in re.findall(r" N(\d+)=(\d+)", line):
            counts[int(node)] = counts.get(int(node), 0) + int(pages) * page_size
    threads = [
        line.split()[1]
        for thread in os.listdir(f"/proc/{pid}/task")
        for line in _read(pid, f"task/{thread}/status").splitlines()
        if line.startswith("Cpus_allowed_list:")
    ]
    sums = {"smaps": smaps, "nodes": nodes, "own_nodes": own_nodes, "locked": locked}
    return sums | {"threads": threads}
