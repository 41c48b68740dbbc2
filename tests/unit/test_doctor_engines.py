"""Checks of other engines, on processes that are constructed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from doctor_systems import FAST, constructed, looked
from machines import ONE, Machine
from numaload.doctor import engines
from numaload.doctor.check import ESTIMATED, LOAD, Check, Finding, Unknown
from numaload.doctor.system import System
from numaload.files.source import SourceFile
from numaload.machine.topology import topology
from numaload.replicas.entry import Entry
from numaload.replicas.layout import INTERLEAVE, MIRROR

PID = 42
TWO = Machine({0: ("0-3", 64_000), 1: ("4-7", 64_000)}, ["10 21", "21 10"], {0: 0, 1: 1})
# What the checks read of a process with nothing to mend.
HEALTHY: dict[str, str] = {
    f"/proc/{PID}/cmdline": "llama-server\0-m\0/models/model.gguf\0--no-repack\0",
    f"/proc/{PID}/maps": "7f00-7f01 r--p 00000000 08:01 42   /usr/lib/libc.so.6\n",
    f"/proc/{PID}/numa_maps": "7f00 default file=/usr/lib/libc.so.6 mapped=5 N0=5\n",
    f"/proc/{PID}/status": "Name:\tllama-server\nRssAnon:\t 1048576 kB\n",
}
LARGE = {f"/proc/{PID}/status": "RssAnon:\t 41943040 kB\n"}
EVERY_CPU = SimpleNamespace(cpus=frozenset(range(8)))


def process(root: Path, *words: str, files: dict[str, str] | None = None, **said: Any) -> System:
    """A process started by these words, healthy but for these files."""
    machine = said.pop("on", TWO)
    told = {"pid": PID, "threads": EVERY_CPU} | said
    if words:
        told["cmdline"] = list(words)
    return constructed(root, machine, HEALTHY | (files or {}), **told)


def found(check: type[Check], system: System) -> Finding:
    finding = looked(check, system)
    assert finding is not None
    return finding


@pytest.mark.parametrize("check", engines.CHECKS)
def test_check_finds_nothing_in_a_healthy_process_or_without_one(
    tmp_path: Path, check: type[Check]
) -> None:
    assert looked(check, process(tmp_path / "process", size=40 << 30)) is None
    assert looked(check, constructed(tmp_path / "none", TWO, size=40 << 30)) is None


@pytest.mark.filterwarnings("ignore:.*shows no node")
@pytest.mark.parametrize("pid", [None, PID])
@pytest.mark.parametrize("check", engines.CHECKS)
def test_check_raises_only_unknown_where_nothing_is_shown(
    tmp_path: Path, check: type[Check], pid: int | None
) -> None:
    system = System(root=str(tmp_path), pid=pid)
    system.environment = {"OMP_PROC_BIND": "true", "LLAMA_ARG_NUMA": "isolate"}
    roots = TWO.write(tmp_path / "other")
    system.machine = topology(**roots, allowed=frozenset(range(8)))
    try:
        looked(check, system)
    except Unknown:
        pass
    finally:
        system.close()


@pytest.mark.parametrize(
    ("check", "words", "path"),
    [
        (engines.RandomAdvice, (), "cmdline"),
        (engines.OneNode, ("llama-cli", "--no-mmap"), "maps"),
        (engines.OneNode, ("llama-cli", "--no-mmap"), "numa_maps"),
        (engines.OneNode, ("llama-cli", "--no-mmap"), "status"),
        (engines.UnusedReplica, ("llama-cli",), "maps"),
        (engines.NoNumactl, ("vllm", "serve", "--numa-bind"), "root"),
    ],
)
def test_check_says_what_of_a_process_is_hidden(
    tmp_path: Path, check: type[Check], words: tuple[str, ...], path: str
) -> None:
    system = process(tmp_path, *words)
    (tmp_path / f"proc/{PID}/{path}").unlink(missing_ok=True)
    with pytest.raises(Unknown, match=f"/proc/{PID}/{path}"):
        looked(check, system)


# ktransformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "fault"), [("\0libnuma.so.1\0", False), ("\0libgomp\0", True)])
def test_extension_of_a_process_is_searched_for_libnuma(
    tmp_path: Path, content: str, fault: bool
) -> None:
    path = "/venv/cpuinfer_ext.so"
    files = {
        f"/proc/{PID}/maps": f"7f00-7f01 r-xp 00000000 08:01 42    {path}\n",
        f"/proc/{PID}/root{path}": content,
    }
    finding = looked(engines.NoLibnuma, process(tmp_path, "python", files=files))
    assert (finding is not None) == fault
    if finding:
        assert finding.seen.endswith(f"root{path} does not use libnuma")
        assert finding.fix.endswith("USE_NUMA=1 bash install.sh")
        assert finding.root


def test_extension_is_found_without_a_process_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "ktransformers-0.3.2.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: ktransformers\nVersion: 0.3.2\n")
    (package / "RECORD").write_text("cpuinfer_ext.so,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    system = constructed(tmp_path / "machine", TWO)
    with suppress(Unknown):  # from Python 3.12 on a file that is gone is not listed
        assert looked(engines.NoLibnuma, system) is None
    (tmp_path / "cpuinfer_ext.so").write_bytes(b"\x7fELF libgomp.so.1")
    assert "cpuinfer_ext.so does not use" in found(engines.NoLibnuma, system).seen
    assert looked(engines.NoLibnuma, constructed(tmp_path / "one", ONE)) is None


# llama.cpp --------------------------------------------------------------------------------------


def test_numa_option_costs_reading_by_single_pages(tmp_path: Path) -> None:
    words = ("/opt/llama-server", "-m", "/models/model.gguf", "--numa", "distribute")
    speeds = FAST._replace(mapped=2.0e9)
    system = process(tmp_path, *words, size=50 * 10**9, absent=40 * 10**9, speeds=speeds)
    finding = found(engines.RandomAdvice, system)
    assert finding.seen.startswith("--numa distribute: 37.3 GiB are not in RAM")
    assert finding.price == (28 * 20.0, ESTIMATED, LOAD)
    assert finding.fix == "numaload prewarm /models/model.gguf"


def test_numa_option_may_be_a_variable_and_the_file_is_the_process_own(tmp_path: Path) -> None:
    told = {"LLAMA_ARG_NUMA": "isolate"}
    system = process(tmp_path, "llama-cli", "-m", "/a model.gguf", environment=told)
    finding = found(engines.RandomAdvice, system)
    assert finding.seen.startswith("LLAMA_ARG_NUMA=isolate")
    assert finding.price is None
    assert finding.fix == "numaload prewarm '/a model.gguf'"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("llama-cli", "--numa", "isolate"), {"size": 1 << 30, "absent": 0}),
        (("llama-cli", "--numa", "isolate"), {"on": ONE}),
        (("llama-cli", "--numa", "isolate", "--no-mmap"), {}),
        (("python", "--numa", "isolate"), {}),
    ],
)
def test_numa_option_costs_nothing_where_nothing_is_mapped_cold(
    tmp_path: Path, words: tuple[str, ...], said: dict[str, Any]
) -> None:
    assert looked(engines.RandomAdvice, process(tmp_path, *words, **said)) is None


@pytest.mark.parametrize(
    ("words", "told", "option"),
    [
        (("--no-mmap",), {}, "--no-mmap"),
        (("-lm", "mmap", "-lm", "dio"), {}, "-lm dio"),
        (("--mlock",), {}, "--mlock"),
        ((), {"LLAMA_ARG_LOAD_MODE": "none"}, "LLAMA_ARG_LOAD_MODE=none"),
    ],
)
def test_copies_without_a_policy_lie_on_one_node(
    tmp_path: Path, words: tuple[str, ...], told: dict[str, str], option: str
) -> None:
    words = ("llama-server", "-m", "m.gguf", *words)
    system = process(tmp_path, *words, files=LARGE, environment=told)
    finding = found(engines.OneNode, system)
    assert finding.seen.startswith(f"{option}: 42.9 GB of its own")
    assert finding.seen.endswith("nodes 0-1")
    assert finding.price is None
    assert finding.fix.startswith("numaload exec --all-nodes m.gguf -- llama-server -m {model}")
    assert finding.fix.endswith(f"but {option}")
    assert finding.undo == f"start it with {option} again"


@pytest.mark.parametrize(
    ("words", "files", "said"),
    [
        (("--load-mode", "mmap+mlock"), LARGE, {}),
        (("--no-mmap",), {}, {"size": 40 << 30}),  # its weights are on a GPU
        (("--no-mmap",), LARGE | {f"/proc/{PID}/numa_maps": "7f00 interleave:0-1 heap\n"}, {}),
        (("--no-mmap",), LARGE, {"threads": SimpleNamespace(cpus=frozenset(range(4)))}),
        (("--mlock",), LARGE | {f"/proc/{PID}/maps": "1-2 r--s 0 08:01 42 /m.gguf\n"}, {}),
    ],
)
def test_copies_are_no_fault_where_they_are_placed_or_are_none(
    tmp_path: Path, words: tuple[str, ...], files: dict[str, str], said: dict[str, Any]
) -> None:
    system = process(tmp_path, "llama-server", *words, files=files, **said)
    assert looked(engines.OneNode, system) is None


@pytest.mark.parametrize(
    ("stored", "changes", "node"),
    [
        ([0, 1], {}, 0),
        ([1], {}, 1),
        ([], {}, None),
        ([0, 1], {"policy": INTERLEAVE}, None),
        ([0, 1], {"identities": [(1, 2, 3, 4, 5, "")]}, None),  # of the file as it was before
    ],
)
def test_replicas_that_a_process_does_not_use_are_found(
    tmp_path: Path,
    stored: list[int],
    changes: dict[str, Any],
    node: int | None,
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    mapped = {f"/proc/{PID}/maps": f"7f00-7f01 r--s 00000000 08:01 42   {path}\n"}
    with SourceFile(str(path)) as file:
        its = [file.identity()]
        entry = _Entry(changes.get("policy", MIRROR), stored, changes.get("identities", its))
        system = process(tmp_path / "machine", "llama-cli", files=mapped, path=str(path))
        system.files = [file]
        system.stored = cast("list[Entry]", [entry] if stored else [])
        finding = looked(engines.UnusedReplica, system)
    assert (finding is None) == (node is None)
    if finding:
        assert finding.seen.startswith(f"it maps {path}, and the store has replicas")
        assert finding.fix.startswith(
            f"numaload exec --node {node} {path} -- llama-cli -m {{model}}"
        )
        assert finding.undo == f"start it with -m {path} again"


class _Entry:
    def __init__(self, policy: str, nodes: list[int], identities: list[Any]) -> None:
        self.policy, self.nodes = policy, nodes
        self.model = SimpleNamespace(identities=identities)


# others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "said", "fix"),
    [
        ({"OMP_PROC_BIND": "close"}, {}, "unset OMP_PROC_BIND"),
        ({"GOMP_CPU_AFFINITY": "0 3"}, {}, "unset GOMP_CPU_AFFINITY"),
        ({"OMP_PROC_BIND": "false", "OMP_PLACES": "cores"}, {}, ""),
        ({"OMP_PROC_BIND": "close"}, {"pid": PID}, ""),
    ],
)
def test_variables_that_pin_are_found_where_torch_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, str],
    said: dict[str, Any],
    fix: str,
) -> None:
    system = constructed(tmp_path, TWO, environment=told, **said)
    monkeypatch.setattr(engines, "_installed", {"torch": object()}.get)
    finding = looked(engines.Pinning, system)
    assert (finding.fix if finding else "") == fix
    if finding:
        ((name, value),) = told.items()
        assert finding.seen == f"{name}={value}"
        assert finding.undo in (f"export {name}={value}", f"export {name}='{value}'")
    monkeypatch.setattr(engines, "_installed", {}.get)
    assert looked(engines.Pinning, system) is None


@pytest.mark.parametrize(
    ("words", "there", "fault"),
    [
        (("python3", "-m", "vllm.entrypoints.openai.api_server", "--numa-bind"), "bin/bash", True),
        (("vllm", "serve", "m", "--numa-bind-nodes", "0"), "opt/numactl", True),
        (("vllm", "serve", "m", "--numa-bind"), "usr/bin/numactl", False),
        (("vllm", "serve", "m"), "bin/bash", False),
    ],
)
def test_vllm_binds_by_numactl_alone(
    tmp_path: Path, words: tuple[str, ...], there: str, fault: bool
) -> None:
    files = {f"/proc/{PID}/root/{there}": ""}
    finding = looked(engines.NoNumactl, process(tmp_path, *words, files=files))
    assert (finding is not None) == fault
    if finding:
        assert finding.seen == "--numa-bind was given, and numactl is not on its PATH"
        assert finding.root


def test_tables_that_stay_on_the_disk(tmp_path: Path) -> None:
    table = SimpleNamespace(name="per_layer_token_embd.weight", nbytes=5 << 30)
    other = SimpleNamespace(name="blk.0.ffn_up.weight", nbytes=6 << 30)
    weights = SimpleNamespace(values=lambda: [table, other])
    said: dict[str, Any] = {
        "size": 20 * 10**9,
        "_opened": (weights, ""),
        "weights": weights,
        "on": ONE,
    }
    finding = found(engines.LazyTables, process(tmp_path, "llama-server", **said))
    assert finding.seen == (
        "--lazy-mode is auto: per_layer_token_embd.weight (5.0 GiB) stay mapped"
    )
    assert finding.fix == "numaload prewarm /models/model.gguf"
    table.nbytes = 1 << 30
    assert looked(engines.LazyTables, process(tmp_path, "llama-server", **said)) is None
    words = ("llama-server", "--lazy-mode", "on")
    assert looked(engines.LazyTables, process(tmp_path, *words, **said)) is not None
    words = ("llama-server", "--lazy-mode", "off")
    assert looked(engines.LazyTables, process(tmp_path, *words, **said)) is None
    words = ("llama-server", "--lazy-mode", "on")
    assert looked(engines.LazyTables, process(tmp_path, *words, **said | {"absent": 0})) is None


def test_a_limit_of_locked_memory(tmp_path: Path) -> None:
    def looked_at(limit: str, *words: str, hard: str = "") -> Finding | None:
        row = f"Max locked memory         {limit}   {hard or limit}   bytes\n"
        files = {f"/proc/{PID}/limits": row}
        system = process(tmp_path, "llama-server", *words, files=files, size=10**10, on=ONE)
        return looked(engines.LockLimit, system)

    finding = looked_at("8388608", "--mlock")
    assert finding is not None
    assert "8.0 MiB may be locked, of a model of 9.3 GiB" in finding.seen
    assert finding.fix.startswith("prlimit --pid $$ --memlock=unlimited  # ")
    assert finding.undo == "prlimit --pid $$ --memlock=8388608:8388608"
    assert finding.root
    for hard, most in (("unlimited", "unlimited"), ("20000000000", "19531250")):
        finding = looked_at("8388608", "--mlock", hard=hard)
        assert finding is not None
        assert finding.fix.startswith(f"ulimit -S -l {most}  # ")
        assert finding.undo == "ulimit -S -l 8192"
        assert not finding.root
    assert looked_at("8388608", "--load-mode", "mmap+mlock") is not None
    assert looked_at("8388608") is None
    assert looked_at("unlimited", "--mlock") is None
    with pytest.raises(Unknown):
        looked_at("?", "--mlock")
