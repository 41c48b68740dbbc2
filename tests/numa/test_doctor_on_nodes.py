"""``numaload doctor`` on several nodes: memory that is far from a process's threads.

Also page cache on one node, and what keeps engines from placing memory: no libnuma, no mbind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import Numaload, evict
from confined import DOCKER
from witness import cpus_of

MEMORY = ("NL708", "NL709")
CACHE = ("NL308", "NL312")
BINDING = ("NL301", "NL307")
# Touches memory on some CPUs and goes to others; or stays, while a thread of it works on these.
HOLDS = """
import os, sys, threading
first, then = (set(map(int, word.split(","))) for word in sys.argv[1:3])
everywhere = os.sched_getaffinity(0)
os.sched_setaffinity(0, first)
memory = bytearray(b"x") * (150 << 20)
def work():
    os.sched_setaffinity(0, then)
    print("ready", flush=True)
    while working:
        pass
working = sys.argv[3] == "thread"
os.sched_setaffinity(0, everywhere if working else then)
thread = threading.Thread(target=work)
thread.start()
sys.stdin.read()
working = False
"""


@contextmanager
def process(first: Collection[int], then: Collection[int], who: str = "all") -> Iterator[int]:
    """A process that touched its memory on the CPUs ``first``. who goes on on others: its id."""
    cpus = [",".join(map(str, sorted(its))) for its in (first, then)]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, *cpus, who], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as running:  # fmt: skip
        assert running.stdout
        assert running.stdout.readline() == "ready\n"
        yield running.pid
        running.kill()


def test_a_process_that_was_bound_late(numaload: Numaload, nodes: list[int]) -> None:
    first, then = nodes[:2]
    with process(cpus_of(first), cpus_of(then)) as pid:
        told = numaload.doctor("--pid", pid)
    (finding,) = [f for f in told["findings"] if f["id"] in MEMORY]
    assert finding["id"] == "NL709"
    assert f"is bound to node {then} now" in finding["seen"]
    assert f" of its anonymous memory lie on node {first}; " in finding["seen"]
    assert finding["fix"].startswith(f"migratepages {pid} {first} {then}  # ")
    assert f"numaload exec --node {then} " in finding["fix"]
    assert finding["undo"] == f"migratepages {pid} {then} {first}"
    assert finding["price"]["seconds"] > 0


def test_a_process_that_was_bound_before(numaload: Numaload, nodes: list[int]) -> None:
    for node in nodes[:2]:
        with process(cpus_of(node), cpus_of(node)) as pid:
            told = numaload.doctor("--pid", pid)
        assert [f for f in told["findings"] if f["id"] in MEMORY] == []
        assert [f for f in told["unknown"] if f["id"] in MEMORY] == []


def test_a_thread_that_works_far_from_the_memory(numaload: Numaload, nodes: list[int]) -> None:
    first, then = nodes[:2]
    with process(cpus_of(first), cpus_of(then), "thread") as pid:
        told = numaload.doctor("--pid", pid)
    (finding,) = [f for f in told["findings"] if f["id"] in MEMORY]
    assert finding["id"] == "NL708"
    assert f"its threads work on node {then}, " in finding["seen"]
    assert f" lie on node {first}; " in finding["seen"]


def of(told: Any, ids: Collection[str]) -> list[dict[str, Any]]:
    """What was found of these checks, all of which could look."""
    assert [one for one in told["unknown"] if one["id"] in ids] == []
    return [one for one in told["findings"] if one["id"] in ids]


def on_cpus_of(node: int, work: Callable[[], object]) -> None:
    """As a program does that was started there: it says nothing of memory."""

    def there() -> None:
        os.sched_setaffinity(0, cpus_of(node))  # this thread's
        work()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(there).result()


def test_page_cache_on_one_node(
    numaload: Numaload, model: str, model_files: list[str], nodes: list[int]
) -> None:
    evict(model_files)
    on_cpus_of(nodes[-1], lambda: [Path(path).read_bytes() for path in model_files])
    (finding,) = of(numaload.doctor(model), CACHE)
    assert finding["id"] == "NL308"
    assert finding["seen"].endswith(f" in RAM are on node {nodes[-1]}")
    assert finding["price"]["seconds"] > 0
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", finding["fix"]], check=True, env=os.environ | {"PATH": path})
    told = numaload.doctor(model)
    assert of(told, CACHE) == []
    assert told["resident"] == told["size"]
    evict(model_files)


def test_a_container_that_refuses_mbind(numaload: Numaload, model: str) -> None:
    (finding,) = of(numaload.within(deny=DOCKER).doctor(model), BINDING)
    assert finding["id"] == "NL307"
    assert "mbind" in finding["seen"]
    assert finding["fix"].startswith("start the container with --cap-add SYS_NICE ")
    assert finding["price"]["seconds"] > 0
    assert finding["undo"] == ""


def test_with_and_without_libnuma(numaload: Numaload, model: str, guest: str) -> None:
    found = of(numaload.doctor(model), BINDING)
    if guest != "no-libnuma":
        assert found == []
        return
    (finding,) = found
    assert finding["id"] == "NL301"
    assert finding["seen"].startswith("libnuma.so.1 does not load; ")
    assert finding["fix"].startswith("apt-get install -y libnuma1")
    assert finding["undo"] == "apt-get remove libnuma1"


def test_what_an_ordinary_user_is_told(
    numaload: Numaload, model: str, model_files: list[str], nodes: list[int]
) -> None:
    """What is hidden is no finding. The guest moves pages between nodes indeed."""
    if os.geteuid() not in (0, os.stat(model).st_uid):
        told = numaload.doctor(model)
        assert told["resident"] is None
        assert told["speeds"]["why_not"]
        assert [one["id"] for one in told["findings"]] == ["NL304"]
        assert "NL308" in {one["id"] for one in told["unknown"]}
    own = [str(numaload.store.parent / os.path.basename(path)) for path in model_files]
    on_cpus_of(nodes[-1], lambda: list(map(shutil.copyfile, model_files, own)))
    told = numaload.doctor(own[0])
    assert told["unknown"] == []
    assert told["resident"] == told["size"]
    assert [one["id"] for one in told["findings"]] == ["NL308", "NL304"]
    assert told["findings"][0]["seen"].endswith(f" in RAM are on node {nodes[-1]}")
    assert told["findings"][0]["fix"].startswith("numactl --interleave=all cp ")
