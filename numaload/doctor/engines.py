"""Other engines: options, variables and builds that quietly undo NUMA."""

from __future__ import annotations

import os
import re
import shlex
from importlib import metadata

from numaload.doctor.check import ESTIMATED, Check, Price, Unknown
from numaload.doctor.storage import size_of
from numaload.doctor.system import System
from numaload.errors import check_limits, reason
from numaload.files.source import Identity
from numaload.linux.lists import format_list
from numaload.machine.affinity import BINDING, binding_variables, binds_threads
from numaload.machine.threads import nodes_of
from numaload.replicas.layout import MIRROR

LARGEST = 64 << 20  # bytes of an extension that are searched
FIRST_ROWS = 4096  # bytes of numa_maps, which takes long for all of a large process


class NoLibnuma(Check):
    id, title = "NL601", "ktransformers was built without NUMA"
    source = "ktransformers doc/en/install.md (V0.2) and its issues 634, 796, 896, 2026-08"
    root = True
    EXTENSION = "cpuinfer_ext"
    LIBRARY = b"libnuma.so"
    path = ""

    def available(self) -> bool:
        if not _several_nodes(self.system):
            return False
        self.path = self._mapped() if self.system.pid else self._installed()
        return bool(self.path)

    def _mapped(self) -> str:
        found = (path for path in _mapped(self.system) if self.EXTENSION in os.path.basename(path))
        path = next(found, "")
        # As the process sees it: it may be in a container.
        return path and f"{self.system.proc}/{self.system.pid}/root{path}"

    def _installed(self) -> str:
        found = _installed("ktransformers")
        files = (found and found.files) or ()
        return next((str(one.locate()) for one in files if self.EXTENSION in one.name), "")

    def measure(self) -> str:
        try:
            with open(self.path, "rb") as file:
                content = file.read(LARGEST + 1)
        except OSError as error:
            check_limits(error, self.path)
            raise Unknown(f"{self.path}: {reason(error)}") from error
        if len(content) > LARGEST:
            raise Unknown(f"{self.path}: larger than {LARGEST >> 20} MiB")
        return "" if self.LIBRARY in content else f"{self.path} does not use libnuma"

    def explain(self) -> str:
        return (
            "Weights are copied to each node only where USE_NUMA=1 was set and libnuma was there"
            " when it was compiled. Else there is one copy, and nothing says so."
        )

    def fix(self) -> str:
        return "apt-get install libnuma-dev  # then in its sources: USE_NUMA=1 bash install.sh"

    def undo(self) -> str:
        return (
            "apt-get remove libnuma-dev  # if it was not there before; then in its sources: bash"
            " install.sh"
        )


class _Llama(Check):
    """A process of llama.cpp's programs. ``several``: only on several nodes."""

    several = True

    def available(self) -> bool:
        if self.system.pid is None or (self.several and not _several_nodes(self.system)):
            return False
        return os.path.basename(self.system.cmdline[0]).startswith("llama")

    def _value(self, names: tuple[str, ...], variable: str) -> tuple[str, str]:
        """Return (value, how it was said) of the last of these options, or else of the variable."""
        words, found = self.system.cmdline, ("", "")
        for word, value in zip(words, [*words[1:], ""], strict=True):
            if word in names:
                found = value, f"{word} {value}"
        told = self.system.environment.get(variable, "") if not found[0] else ""
        return (told, f"{variable}={told}") if told else found

    def _copying(self) -> str:
        """Return the option by which it reads the weights to memory of its own, or ""."""
        mode, option = self._value(("-lm", "--load-mode"), "LLAMA_ARG_LOAD_MODE")
        if mode in ("none", "dio", "mlock"):
            return option
        flags = ("--no-mmap", "--mlock", "--direct-io", "-dio")
        return next((word for word in self.system.cmdline if word in flags), "")

    @property
    def _path(self) -> str:
        given, _ = self._value(("-m", "--model"), "LLAMA_ARG_MODEL")
        return shlex.quote(self.system.path or given or "MODEL")

    def _exec(self, nodes: str) -> str:
        program = shlex.quote(self.system.cmdline[0])
        return f"numaload exec {nodes} {self._path} -- {program} -m {{model}}"


class RandomAdvice(_Llama):
    id, title = "NL602", "llama.cpp reads the file by single pages"
    source = "llama.cpp src/llama-mmap.cpp (4df29be), 2026-08; measured in docs/findings.md"
    # As fast is touching a cold mapping by default (2.03 GB/s) as with MADV_RANDOM (0.07 GB/s).
    TIMES = 29

    def measure(self) -> str:
        numa, option = self._value(("--numa",), "LLAMA_ARG_NUMA")
        if not numa or self._copying():
            return ""
        if not self.system.size:
            return f"{option}: its mapping is read without read-ahead"
        absent = self.system.absent
        if not absent:
            return ""
        return f"{option}: {size_of(absent)} are not in RAM, and come without read-ahead"

    def explain(self) -> str:
        return (
            "With --numa llama.cpp advises the kernel that it reads at random (MADV_RANDOM): each"
            " 4 KiB page is waited for alone."
        )

    def price(self) -> Price | None:
        if not self.system.size or not self.system.speeds.mapped:
            return None
        seconds = self.system.absent / self.system.speeds.mapped
        return Price((self.TIMES - 1) * seconds, ESTIMATED)

    def fix(self) -> str:
        return f"numaload prewarm {self._path}"


class OneNode(_Llama):
    id, title = "NL603", "llama.cpp copied the weights to one node"
    source = "llama.cpp src/llama-model-loader.cpp (4df29be), 2026-08"
    DEFAULT = "default"  # the memory policy of who asked for none
    LEAST = 1 << 30  # bytes of its own memory: with less, the weights are elsewhere, as on a GPU
    option = ""

    def measure(self) -> str:
        self.option = self._copying()
        if not self.option:
            return ""
        nodes = nodes_of(self.system.threads.cpus, self.system.machine)
        if len(nodes) < 2 or _policy(self.system) != self.DEFAULT:
            return ""  # it was bound, or interleaved
        if any(path.endswith(".gguf") for path in _mapped(self.system)):
            return ""  # earlier versions map the file in spite of --mlock
        own = self.system.fields(f"/proc/{self.system.pid}/status").get("RssAnon", 0)
        if own < max(self.LEAST, self.system.size // 2):
            return ""
        return (
            f"{self.option}: {own / 1e9:.1f} GB of its own, without a memory policy, and CPUs of"
            f" nodes {format_list(nodes)}"
        )

    def explain(self) -> str:
        return (
            "One thread reads all weights to its own memory, so they lie on the node where it ran:"
            " CPUs of the other nodes fetch all of them from there."
        )

    def fix(self) -> str:
        how = self._exec("--all-nodes")
        return f"{how} --port {{port:8080}}  # with its other options but {self.option}"

    def undo(self) -> str:
        return f"start it with {self.option} again"


class LazyTables(_Llama):
    id, title, several = (
        "NL604",
        "llama.cpp reads large tables from the disk row by row",
        False,
    )
    source = "llama.cpp --lazy-mode, src/llama-model-loader.cpp: above 4 GiB, 2026-09"
    TABLE = re.compile(r"per_layer_token_embd|engram")  # of which only single rows are read
    LARGE = 4 << 30  # bytes of a tensor

    def measure(self) -> str:
        mode, option = self._value(("--lazy-mode",), "LLAMA_ARG_LAZY_MODE")
        weights = self.system.weights
        if mode in ("off", "none") or weights is None or not self.system.absent:
            return ""
        tables = [t for t in weights.values() if self.TABLE.search(t.name)]
        large = [t for t in tables if mode == "on" or t.nbytes > self.LARGE]
        if not large:
            return ""
        nbytes = sum(table.nbytes for table in large)
        said = option or "--lazy-mode is auto"
        return f"{said}: {', '.join(t.name for t in large)} ({size_of(nbytes)}) stay mapped"

    def explain(self) -> str:
        return (
            "Whatever the load mode and mlock say, each token reads its rows from the mapped file:"
            " from the disk, where they are not in RAM. Do not mirror such tables to every node."
        )

    def fix(self) -> str:
        return f"numaload prewarm {self._path}"

    def undo(self) -> str:
        return f"numaload evict {self._path}"


class LockLimit(_Llama):
    id, title, several = "NL607", "llama.cpp may not lock the model in RAM", False
    source = "proc_pid_limits(5), Max locked memory; llama.cpp --mlock warns once, 2026-08"
    LIMIT = re.compile(r"Max locked memory +(\d+|unlimited) +(\d+|unlimited)")

    def measure(self) -> str:
        mode, option = self._value(("-lm", "--load-mode"), "LLAMA_ARG_LOAD_MODE")
        asked = "--mlock" if "--mlock" in self.system.cmdline else option * ("mlock" in mode)
        if not asked or not self.system.size:
            return ""
        match = self.LIMIT.search(self.system.text(f"/proc/{self.system.pid}/limits"))
        if match is None:
            raise Unknown(f"/proc/{self.system.pid}/limits does not tell what may be locked")
        self.old, self.most = match[1], match[2]
        if self.old == "unlimited" or int(self.old) >= self.system.size:
            return ""
        self.root = self.most != "unlimited" and int(self.most) < self.system.size
        return (
            f"{asked}, but {size_of(int(self.old))} may be locked, of a model of"
            f" {size_of(self.system.size)}"
        )

    def explain(self) -> str:
        return "It warns once and goes on: the kernel may drop weights, or swap them out."

    def fix(self) -> str:
        where = "in the shell that starts it; of a service LimitMEMLOCK=infinity"
        if self.root:
            return (
                f"prlimit --pid $$ --memlock=unlimited  # {where}; its hard limit is too low, which"
                " memlock in /etc/security/limits.conf raises for good"
            )
        most = self.most if self.most == "unlimited" else int(self.most) >> 10
        return f"ulimit -S -l {most}  # {where}"

    def undo(self) -> str:
        if self.root:
            return f"prlimit --pid $$ --memlock={self.old}:{self.most}"
        return f"ulimit -S -l {int(self.old) >> 10}"


class Pinning(Check):
    id, title = "NL605", "OpenMP variables pin whatever imports torch"
    source = "measured in docs/threads.md, 2026-10"

    def available(self) -> bool:
        # What they did to a process: NL701.
        return self.system.pid is None and binds_threads(self.system.environment)

    def measure(self) -> str:
        return binding_variables(self.system.environment) if _installed("torch") else ""

    def explain(self) -> str:
        return (
            "With these variables an OpenMP library pins the main thread to one core while torch"
            " is imported; threads and processes that it starts inherit that."
        )

    def fix(self) -> str:
        return f"unset {' '.join(self._set())}"

    def undo(self) -> str:
        told = self.system.environment
        return f"export {' '.join(f'{name}={shlex.quote(told[name])}' for name in self._set())}"

    def _set(self) -> list[str]:
        return [name for name in BINDING if self.system.environment.get(name)]


class NoNumactl(Check):
    id, title = "NL606", "vLLM was told to bind, and cannot"
    source = "vllm-project/vllm#55416, 2026-09"
    root = True
    OPTION = "--numa-bind"
    PATH = "/usr/local/bin:/usr/bin:/bin"

    def available(self) -> bool:
        words = self.system.cmdline
        named = any("vllm" in os.path.basename(word) for word in words[:4])  # python -m vllm...
        return named and any(word.startswith(self.OPTION) for word in words)

    def measure(self) -> str:
        root = f"/proc/{self.system.pid}/root"
        if not self.system.exists(f"{root}/"):
            raise Unknown(f"{root}: not shown")
        folders = self.system.environment.get("PATH", self.PATH).split(":")
        if any(self.system.exists(f"{root}{folder}/numactl") for folder in folders):
            return ""
        return f"{self.OPTION} was given, and numactl is not on its PATH"

    def explain(self) -> str:
        return "vLLM binds its workers by the program numactl; without it they run anywhere."

    def fix(self) -> str:
        return "apt-get install numactl  # where it runs, as in its container; then start it again"

    def undo(self) -> str:
        return "apt-get remove numactl"


class UnusedReplica(_Llama):
    id, title = "NL608", "llama.cpp maps the file, and replicas are unused"
    source = "docs/llama-cpp.md, 2026-10"
    nodes: tuple[int, ...] = ()

    def measure(self) -> str:
        paths = {os.path.realpath(file.path) for file in self.system.files}
        if not paths.intersection(_mapped(self.system)):
            return ""
        self.nodes = replica_nodes(self.system)
        there = f"the store has replicas of it on nodes {format_list(self.nodes)}"
        return f"it maps {self._path}, and {there}" if self.nodes else ""

    def explain(self) -> str:
        return (
            "The file is in RAM once, on whichever nodes first read it. A replica lies whole on"
            " the node of who uses it."
        )

    def fix(self) -> str:
        here = nodes_of(self.system.threads.cpus, self.system.machine)
        node = next((node for node in here if node in self.nodes), self.nodes[0])
        return f"{self._exec(f'--node {node}')}  # with its other options"

    def undo(self) -> str:
        return f"start it with -m {self._path} again"


CHECKS: tuple[type[Check], ...] = (
    NoLibnuma,
    RandomAdvice,
    OneNode,
    LazyTables,
    LockLimit,
    Pinning,
    NoNumactl,
    UnusedReplica,
)


def replica_nodes(system: System) -> tuple[int, ...]:
    """Return the nodes that have a replica of these very files. Raises: StoreError."""
    wanted = sorted(Identity.of(os.fstat(file.fd))[:-1] for file in system.files)
    nodes: set[int] = set()
    for entry in system.stored:
        its = sorted(one[:-1] for one in entry.model.identities)
        if entry.policy == MIRROR and its == wanted:
            nodes.update(entry.nodes)
    return tuple(sorted(nodes))


def _several_nodes(system: System) -> bool:
    return len(system.machine.usable) > 1


def _installed(name: str) -> metadata.Distribution | None:
    """Return a package that is installed beside numaload; it is not imported."""
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _mapped(system: System) -> set[str]:
    """Return the paths of the files that the process maps. Raises: Unknown."""
    path = f"/proc/{system.pid}/maps"
    rows = [row.split(maxsplit=5) for row in system.text(path).splitlines()]
    if not rows:
        raise Unknown(f"{path}: is empty")
    return {row[5] for row in rows if len(row) > 5}


def _policy(system: System) -> str:
    """Return the memory policy of the process's first mapping, such as default. Raises: Unknown."""
    path = f"{system.proc}/{system.pid}/numa_maps"
    try:
        with open(path, "rb", buffering=0) as file:
            words = file.read(FIRST_ROWS).split()
    except OSError as error:
        check_limits(error, path)
        raise Unknown(f"{path}: {reason(error)}") from error
    if len(words) < 2:
        raise Unknown(f"{path}: is empty")
    return words[1].decode(errors="replace")
