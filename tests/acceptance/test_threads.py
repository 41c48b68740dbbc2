"""docs/threads.md: its blocks of code run as they stand there, and do what it says.

Where threads may run is asked of the kernel in the process itself, and ``numaload doctor --pid``
must say the same from outside.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from commands import LIMIT_S, Numaload
from numaload.doctor.findings import ThreadFinding
from numaload.doctor.process import CHECKS

PAGE = (Path(__file__).parents[2] / "docs/threads.md").read_text(encoding="utf-8")
HERE = sorted(os.sched_getaffinity(0))
FIRST, LAST = HERE[:1], HERE[-1:]
VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_NUM_THREADS")
BOUND = [{"OMP_PROC_BIND": "true"}, {"OMP_PLACES": "threads"}, {"GOMP_CPU_AFFINITY": str(LAST[0])}]
several = pytest.mark.skipif(len(HERE) < 2, reason="one CPU cannot be divided")

# Before a block: what the lines after it ask with.
HEAD = """
import json, os, subprocess, sys, threading, time, warnings
warnings.simplefilter("ignore")

def kernel():
    tids = map(int, os.listdir("/proc/self/task"))
    return {tid: sorted(os.sched_getaffinity(tid)) for tid in tids}

def seen():
    # what the doctor says, and that the kernel says so, too
    words = [sys.executable, "-m", "numaload", "doctor", "--pid", str(os.getpid()), "--json"]
    before = kernel()
    found = json.loads(subprocess.run(words, capture_output=True).stdout)["threads"]
    after = kernel()
    for thread in found["threads"]:
        tid = thread["tid"]
        assert thread["cpus"] in (before.get(tid), after.get(tid)), (thread, before, after)
    assert before.keys() & after.keys() <= {thread["tid"] for thread in found["threads"]}
    return found

def pool(found, name):
    return [thread for thread in found["threads"] if thread["name"] == name]

def others(found):
    named = [t for t in found["threads"] if t["name"].startswith("numaload")]
    return [t for t in found["threads"] if t not in named and not t["main"]]

def compute(torch):
    big = torch.ones(1500, 1500)
    return big @ big

"""


def blocks(heading: str) -> list[str]:
    """The blocks of code in a section, in their order."""
    (section,) = re.findall(
        rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    return re.findall(r"^```(?:python|sh)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


LOAD, ASIDE, OPENMP, LOADER, NODES, PAIR, SERVE = (
    "Load with all CPUs, then compute",
    "Load while something else computes",
    "OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY",
    "DataLoader workers, and other forked processes",
    "A process per node",
    "A pair of processes that share the work",
    "A thread per node, in one process",
)


def counts(cpus: Collection[int]) -> set[int]:
    """Of torch's threads: builds with MKL have one per core, others one per CPU."""
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {len({Path(siblings.format(cpu)).read_text() for cpu in cpus}), len(cpus)}


class Recipes:
    """Runs blocks of the page in a fresh process, in a folder where model.gguf is."""

    def __init__(self, numaload: Numaload, model_files: list[str], folder: Path) -> None:
        self.folder = folder
        for path in model_files:
            (folder / Path(path).name).symlink_to(path)
        self.model = Path(model_files[0]).name
        self.environment = {k: v for k, v in numaload.environment.items() if k not in VARIABLES}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def text(self, heading: str, which: int = 0) -> str:
        return blocks(heading)[which].replace("model.gguf", self.model)

    def run(self, *words: str, variables: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=self.folder, timeout=LIMIT_S, check=False,
            env=self.environment | (variables or {}),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def __call__(
        self, program: str, after: str, variables: dict[str, str] | None = None, head: str = HEAD
    ) -> Any:
        """The JSON that the last line of ``after`` prints."""
        (self.folder / "recipe.py").write_text(head + program + "\n" + after)
        text = self.run(sys.executable, "recipe.py", variables=variables)
        return json.loads(text.splitlines()[-1])


@pytest.fixture
def recipes(numaload: Numaload, model_files: list[str], tmp_path: Path) -> Recipes:
    pytest.importorskip("torch")
    return Recipes(numaload, model_files, tmp_path)


def test_every_block_is_run_here() -> None:
    sections = {
        heading: len(blocks(heading)) for heading in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    }
    run = {LOAD: 1, ASIDE: 1, OPENMP: 2, LOADER: 1, NODES: 2, PAIR: 1, SERVE: 1}
    assert {heading: count for heading, count in sections.items() if count} == run
    assert PAGE.count("\n```") == 2 * (sum(run.values()) + 1)  # and an output


# The recipes.


def test_load_then_compute(recipes: Recipes) -> None:
    after = """
def worked(found):
    return [thread["cpu_s"] for thread in pool(found, "numaload")]
loaded = seen()
compute(torch)
end = time.monotonic() + 60
computed = seen()
while any(thread["runnable"] for thread in others(computed)) and time.monotonic() < end:
    computed = seen()
print(json.dumps({
    "main": kernel()[os.getpid()], "pool": pool(computed, "numaload"), "torch": others(computed),
    "worked": [worked(loaded), worked(computed)], "threads": torch.get_num_threads(),
}))
"""
    found = recipes(recipes.text(LOAD), after)
    assert found["main"] == HERE  # never touched
    assert 1 <= len(found["pool"]) <= len(HERE)
    assert found["threads"] == max(1, len(HERE) // 2)
    assert all(thread["cpus"] == HERE for thread in found["pool"] + found["torch"])
    # While torch computes numaload's threads sleep, and torch's do soon after.
    assert found["worked"][0] == found["worked"][1]
    assert not any(thread["runnable"] for thread in found["pool"] + found["torch"])


@several
def test_load_beside_something_that_computes(recipes: Recipes) -> None:
    after = """
compute(torch)
found = seen()
print(json.dumps({
    "main": kernel()[os.getpid()], "pool": pool(found, "numaload"), "torch": others(found),
    "threads": torch.get_num_threads(),
}))
"""
    found = recipes(recipes.text(ASIDE), after)
    loading, computing = HERE[: max(1, len(HERE) // 4)], HERE[max(1, len(HERE) // 4) :]
    assert found["pool"]
    assert all(thread["cpus"] == loading for thread in found["pool"])
    assert found["main"] == computing
    assert found["threads"] in counts(computing)
    # numpy's threads began where numaload was imported.
    assert all(thread["cpus"] in (computing, loading) for thread in found["torch"])


@several
@pytest.mark.parametrize("variables", BOUND, ids=",".join)
def test_numaload_before_torch_under_openmp_s_variables(
    variables: dict[str, str], recipes: Recipes
) -> None:
    program = recipes.text(OPENMP)
    after = """
compute(torch)
print(json.dumps({
    "main": kernel()[os.getpid()], "found": seen(), "cpus": sorted(numaload.topology().cpus),
}))
"""
    found = recipes(program, after, variables)
    assert found["main"] == found["cpus"] == HERE
    assert [f for f in found["found"]["findings"] if f["kind"] == "main-pinned"] == []
    assert found["found"]["openmp"] == variables
    # Without the last line it is pinned, and that is found.
    pinned = recipes(program.replace("os.sched_setaffinity", "# "), after, variables)
    assert pinned["main"] == (LAST if "GOMP_CPU_AFFINITY" in variables else FIRST)
    assert pinned["cpus"] == HERE
    (finding,) = [f for f in pinned["found"]["findings"] if f["kind"] == "main-pinned"]
    assert finding["tids"] == [pinned["found"]["pid"]]
    assert all(f"{name}={value}" in finding["text"] for name, value in variables.items())


@several
@pytest.mark.parametrize("variables", BOUND, ids=",".join)
def test_torch_before_numaload_under_openmp_s_variables(
    variables: dict[str, str], recipes: Recipes
) -> None:
    # Only what the block itself is told counts: once.
    program = "said = warnings.catch_warnings(record=True).__enter__()\n" + recipes.text(OPENMP, 1)
    after = """
print(json.dumps({
    "main": kernel()[os.getpid()], "pool": pool(seen(), "numaload"),
    "said": [str(w.message) for w in said if w.category is numaload.errors.NumaloadWarning],
}))
"""
    head = HEAD.replace('"ignore"', '"always"')
    found = recipes(program, after, variables, head)
    assert len(found["main"]) == 1
    assert found["pool"]
    assert all(thread["cpus"] == HERE for thread in found["pool"])
    assert len([said for said in found["said"] if "count as allowed" in said]) == 1


@several
def test_forked_workers(recipes: Recipes) -> None:
    after = """
class Told(Rows):
    def __getitem__(self, row):
        super().__getitem__(row)
        found = seen()
        return {"main": kernel()[os.getpid()], "pool": pool(found, "numaload"), "row": row,
                "pid": os.getpid(), "threads": torch.get_num_threads()}

def told(**options):
    return list(DataLoader(Told(), None, num_workers=2, multiprocessing_context="fork", **options))

print(json.dumps({
    "shapes": [list(batch.shape) for batch in batches], "parent": pool(seen(), "numaload"),
    "given": told(worker_init_fn=on_all_cpus), "left": told(), "pid": os.getpid(),
}))
"""
    found = recipes(recipes.text(LOADER), after, BOUND[0])
    assert len(found["shapes"]) == 16
    assert found["parent"] == []  # the pools that loaded were the workers' own
    assert len({one["pid"] for one in found["given"]} - {found["pid"]}) == 2
    for one in found["given"] + found["left"]:
        assert one["pool"]
        assert all(thread["cpus"] == HERE for thread in one["pool"])
        assert one["threads"] == 1
    assert all(one["main"] == HERE for one in found["given"])
    assert all(one["main"] == FIRST for one in found["left"])  # what the recipe is there for


RANK = """
compute(torch)
found = seen()
name = f"told-{os.getpid()}.json"
with open(name + ".tmp", "w") as file:
    json.dump({"threads": found["threads"], "torch": torch.get_num_threads(),
               "argv": sys.argv, "nodes": numaload.topology().all}, file)
os.rename(name + ".tmp", name)
"""


def ranks(recipes: Recipes) -> list[dict[str, Any]]:
    """What each process of rank.py told."""
    return [json.loads(path.read_text()) for path in sorted(recipes.folder.glob("told-*.json"))]


def test_a_process_per_node(recipes: Recipes, numaload: Numaload) -> None:
    (recipes.folder / "rank.py").write_text(HEAD + recipes.text(NODES, 1) + RANK)
    recipes.run("sh", "-c", recipes.text(NODES))
    nodes = {row["id"]: row["usable_cpus"] for row in numaload.json("nodes")["nodes"]}
    expected = sorted(cpus for cpus in nodes.values() if cpus)
    told = ranks(recipes)
    assert sorted(rank["threads"][0]["cpus"] for rank in told) == expected
    for rank in told:
        cpus = rank["threads"][0]["cpus"]
        assert all(thread["cpus"] == cpus for thread in rank["threads"])
        assert any(thread["name"] == "numaload" for thread in rank["threads"])
        assert rank["torch"] in counts(cpus)
        assert all(len(thread["nodes"]) == 1 for thread in rank["threads"])


@several
def test_a_pair_of_processes(recipes: Recipes) -> None:
    (recipes.folder / "rank.py").write_text(HEAD + recipes.text(NODES, 1) + RANK)
    assert recipes(recipes.text(PAIR), "print(json.dumps(failed))") is False
    told = sorted(ranks(recipes), key=lambda rank: rank["argv"])
    assert [rank["argv"] for rank in told] == [["rank.py", "0"], ["rank.py", "1"]]
    shares = [{cpu for t in rank["threads"] for cpu in t["cpus"]} for rank in told]
    assert shares[0] | shares[1] == set(HERE)
    assert not shares[0] & shares[1]
    for rank, share in zip(told, shares, strict=True):
        assert rank["torch"] in counts(share)
        assert all(thread["cpus"] == sorted(share) for thread in rank["threads"])


def test_a_thread_per_node(recipes: Recipes) -> None:
    """``print`` of the block is where its thread has computed."""
    program = (
        "told = {}\ndef print(node, result, print=print):\n"
        "    told[node] = {'me': threading.get_native_id(), 'found': seen(), 'now': kernel()}\n"
    ) + recipes.text(SERVE)
    after = """
import builtins
builtins.print(json.dumps({"told": told, "nodes": {
    node.id: sorted(node.usable_cpus) for node in numaload.topology().nodes.values()}}))
"""
    found = recipes(program, after)
    assert found["told"]
    for node, told in found["told"].items():
        (me,) = [t for t in told["found"]["threads"] if t["tid"] == told["me"]]
        assert me["cpus"] == found["nodes"][node]
        assert me["nodes"] == [int(node)]


# What the page says of OpenMP, torch and numpy.


@several
def test_each_thread_that_computes_has_a_team_where_it_was_itself(recipes: Recipes) -> None:
    program = """
import torch
compute(torch)
def work():
    before = set(kernel())
    os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(3)
    compute(torch)
    team = set(kernel()) - before
    os.sched_setaffinity(0, cpus)  # too late for the team
    compute(torch)
    told.update(team=[kernel()[tid] for tid in team], me=kernel()[threading.get_native_id()])
    told["inner"] = torch.get_num_threads()
told, cpus = {}, os.sched_getaffinity(0)
cpu = max(cpus)
def run(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
run(work)
run(lambda: told.update(later=torch.get_num_threads()))
told["outer"] = torch.get_num_threads()
"""
    told = recipes(program, "print(json.dumps(told))")
    assert len(told["team"]) >= 2
    assert all(cpus == LAST for cpus in told["team"])
    assert told["me"] == HERE
    assert (told["inner"], told["later"]) == (3, 3)
    assert told["outer"] in counts(HERE)


@several
@pytest.mark.parametrize(
    ("variables", "first"), [(BOUND[0], FIRST), ({"OMP_PROC_BIND": "false"}, None)]
)
def test_libgomp_moves_threads_that_were_pinned_elsewhere(
    variables: dict[str, str], first: list[int] | None, recipes: Recipes
) -> None:
    program = """
import numaload, torch
told = []
def work(cpu):
    os.sched_setaffinity(0, {cpu})
    compute(torch)
    told.append([cpu, kernel()[threading.get_native_id()]])
for cpu in sorted(numaload.topology().cpus):
    thread = threading.Thread(target=work, args=(cpu,))
    thread.start()
    thread.join()
"""
    told = recipes(program, "print(json.dumps(told))", variables)
    assert told == [[cpu, first or [cpu]] for cpu in HERE]


def test_other_pools(recipes: Recipes) -> None:
    """numpy's, which is there when it is imported, and torch's between operations."""
    program = """
import numpy
numpy_s = others(seen())
import torch
@torch.jit.script
def forks(x):
    return torch.jit.wait(torch.jit.fork(torch.relu, x))
forks(torch.ones(3))
between = [t for t in others(seen()) if t["name"].startswith("PTThreadPool")]
"""
    after = "print(json.dumps([numpy_s, between, torch.get_num_interop_threads()]))"
    numpy_s, between, count = recipes(program, after)
    assert len(numpy_s) < len(HERE)
    assert len(between) == count
    assert all(thread["cpus"] == HERE for thread in numpy_s + between)


def test_the_findings_are_explained() -> None:
    (kinds,) = re.findall(r"``kind``: (.+)\.", ThreadFinding.__doc__ or "")
    explained = re.findall(r"^\| (NL\d{3}) \| `([a-z-]+)` \|", PAGE, re.MULTILINE)
    assert [kind for _, kind in explained] == kinds.replace(" or ", ", ").split(", ")
    checks = {kind: check.id for check in CHECKS if (kind := getattr(check, "kind", ""))}
    assert {kind: number for number, kind in explained} == checks
