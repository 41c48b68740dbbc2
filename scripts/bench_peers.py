"""Loading a safetensors file into private memory: numaload beside other loaders, cold and warm.

    python3 scripts/bench_peers.py --setup       makes .venv-peers; about 1 GB of packages
    .venv-peers/bin/python scripts/bench_peers.py [--rounds N] [--size BYTES] [--only NAME,...]

In turns, in shuffled order, each in a fresh process whose imports are not timed; cold: the file's
page cache is given back before, and that is checked. As much memory as a load needs is touched and
freed before each: hosts of virtual machines take idle memory back. All end with every tensor as a
torch tensor in memory of the process, and what they hold is compared. tensorizer reads a file of
its own format with the same tensors. Ratios: numaload's fastest to each, pair by pair, with the
95 % interval of their median. The exit status is 1 if somebody is faster, safetensors' mapped file
left aside: its pages are those of the page cache, and warm nothing is read or copied.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv-peers"
STATES = ("cold", "warm")
PAGE = 4096
EVICTED = 100  # at most one part in so many may stay
TIMES, LEAST = 3, 8 << 30  # as often as the file is large, or so many bytes, are touched and freed
MAPPED = "safetensors mapped"

Load = Callable[[str], Any]  # (path) -> {name: tensor} and what keeps those


def setup() -> None:
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin/pip"), "install", "-q", "-c", "scripts/constraints.txt"]
    subprocess.run([*pip, "torch"], check=True, cwd=ROOT)  # first: others would pull CUDA's
    wanted = ["-r", "scripts/bench-peers-requirements.txt", "-e", "."]
    subprocess.run([*pip, *wanted], check=True, cwd=ROOT)


def write(path: str, size: int) -> None:
    """Matrices and norms as models have them, bfloat16; for tensorizer the same beside it."""
    import torch
    from safetensors.torch import save_file
    from tensorizer import TensorSerializer

    torch.manual_seed(0)
    rows, tensors, index = 4096, {}, 0
    while sum(t.nbytes for t in tensors.values()) < size:
        name = f"model.layers.{index // 4}.part_{index % 4}.weight"
        shape = (rows, 4096) if index % 4 else (4096,)
        tensors[name] = torch.randn(shape, dtype=torch.bfloat16)
        index += 1
    save_file(tensors, path)
    serializer = TensorSerializer(tensorized(path))
    serializer.write_state_dict(tensors)
    serializer.close()


def tensorized(path: str) -> str:
    return f"{path}.tensors"


def by_stream(path: str) -> Any:
    import numaload

    with numaload.open(path) as weights:
        return dict(numaload.stream(weights, "torch")), None


def by_copy(path: str) -> Any:
    import numaload

    with numaload.open(path, copy=True) as weights:
        return {name: tensor.torch() for name, tensor in weights.items()}, weights


def by_state_dict(path: str) -> Any:
    import numaload

    with numaload.open(path) as weights:
        module = _module({name: tensor.shape for name, tensor in weights.items()})
        numaload.load_state_dict(module, weights)
    return module.state_dict(), module


def _module(shapes: dict[str, tuple[int, ...]]) -> Any:
    """Make a module on the meta device, with a parameter for every name."""
    import torch

    root = torch.nn.Module()
    for name, shape in shapes.items():
        *folders, last = name.split(".")
        place = root
        for folder in folders:
            if folder not in dict(place.named_children()):
                place.add_module(folder, torch.nn.Module())
            place = place.get_submodule(folder)
        empty = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        place.register_parameter(last, torch.nn.Parameter(empty))
    return root


def by_safetensors(path: str) -> Any:
    """Load with safetensors and touch the tensors, which are the mapped file, into memory."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8)[::PAGE].sum()
    return tensors, None


def by_safetensors_clone(path: str) -> Any:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}, None


def by_runai(path: str) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        return dict(streamer.get_tensors()), None


def by_fastsafetensors(path: str) -> Any:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [path]})
    buffers = loader.copy_files_to_device()
    return {name: buffers.get_tensor(name) for name in loader.get_keys()}, (loader, buffers)


def by_tensorizer(path: str) -> Any:
    from tensorizer import TensorDeserializer

    found = TensorDeserializer(tensorized(path), device="cpu")
    return {name: found[name] for name in found.keys()}, found  # noqa: SIM118 - their own


# {name: (load, what is imported before the clock starts)}
LOADS: dict[str, tuple[Load, tuple[str, ...]]] = {
    "numaload stream": (by_stream, ("torch", "numaload.pipeline.stream", "numaload.weights")),
    "numaload copy": (by_copy, ("torch", "numaload.weights", "numaload.torch_memory")),
    "numaload load_state_dict": (by_state_dict, ("torch", "numaload.backends.state_dict")),
    MAPPED: (by_safetensors, ("safetensors.torch",)),
    "safetensors cloned": (by_safetensors_clone, ("safetensors.torch",)),
    "runai": (by_runai, ("torch", "runai_model_streamer")),
    "fastsafetensors": (by_fastsafetensors, ("torch", "fastsafetensors")),
    "tensorizer": (by_tensorizer, ("torch", "tensorizer")),
}


def one(name: str, path: str) -> None:
    """Load once, in this process; print how long it took."""
    from importlib import import_module

    import torch

    load, modules = LOADS[name]
    for module in modules:
        import_module(module)
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    tensors, kept = load(path)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    nbytes, found = 0, 0
    for key in sorted(tensors):
        raw = tensors[key].detach().contiguous().view(-1).view(torch.uint8)
        nbytes += raw.numel()
        found = zlib.crc32(raw[::PAGE].numpy().tobytes(), found)
    del kept
    print(json.dumps({"seconds": seconds, "cpu": cpu, "nbytes": nbytes, "crc": found}), flush=True)


def prepare(state: str, path: str) -> None:
    from numaload.bench.machine import prefaulted
    from numaload.files.residency import residency
    from numaload.files.source import SourceFile

    with SourceFile(path) as file:
        if state == "cold":
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if residency(file).resident > file.size // EVICTED:
                raise SystemExit(f"{path}: it stays in the page cache")
        else:
            for offset in range(0, file.size, 8 << 20):
                os.pread(file.fd, 8 << 20, offset)
        prefaulted(min(max(LEAST, TIMES * file.size), _room(file.size)))


def _room(nbytes: int) -> int:
    from numaload.machine.memory import available

    return max(PAGE, available().free * 7 // 8 - nbytes)


def measure(names: list[str], path: str, rounds: int) -> dict[tuple[str, str], list[Any]]:
    found: dict[tuple[str, str], list[Any]] = {}
    for turn in range(rounds):
        for state in STATES:
            for name in random.sample(names, len(names)):
                prepare(state, tensorized(path) if name == "tensorizer" else path)
                words = [sys.executable, __file__, "--one", name, path]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr.strip()[-500:]}")
                got = json.loads(done.stdout.strip().splitlines()[-1])
                found.setdefault((name, state), []).append(got)
                print(f"\r\x1b[K{turn + 1} of {rounds}: {state}, {name}", end="", file=sys.stderr)
    print("\r\x1b[K", end="", file=sys.stderr)
    held = {(got["nbytes"], got["crc"]) for rows in found.values() for got in rows}
    if len(held) != 1:
        raise SystemExit(f"they do not hold the same tensors: {held}")
    return found


def tell(state: str, found: dict[tuple[str, str], list[Any]]) -> bool:
    """Return whether nobody is faster than numaload's fastest."""
    from numaload.bench.machine import median_interval

    rates = {
        name: [got["nbytes"] / got["seconds"] / 1e9 for got in rows]
        for (name, its), rows in found.items()
        if its == state
    }
    ours = [name for name in rates if name.startswith("numaload")]
    best = max(ours, key=lambda name: statistics.median(rates[name]), default=None)
    first = True
    print(f"{state:26}   GB/s  [least, most]   CPU s/GiB  {best} to it")
    for name, its in rates.items():
        cpu = statistics.median(g["cpu"] * 2**30 / g["nbytes"] for g in found[name, state])
        line = f"{name:26} {statistics.median(its):6.2f}  [{min(its):5.2f}, {max(its):5.2f}]"
        print(f"{line} {cpu:8.2f}", end="")
        if best is not None and name not in ours:
            ratios = [a / b for a, b in zip(rates[best], its, strict=True)]
            ratio, interval = statistics.median(ratios), median_interval(ratios)
            shown = "" if interval is None else "[{:.2f}, {:.2f}]".format(*interval)
            beaten = ratio < 1 and (interval is None or interval[1] < 1)
            first = first and (name == MAPPED or not beaten)
            print(f"   {ratio:8.2f} {shown}", end="")
        print()
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description="numaload beside other loaders.")
    parser.add_argument("--setup", action="store_true", help="make .venv-peers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=3 << 29)
    parser.add_argument("--only", help=f"of {', '.join(LOADS)}")
    parser.add_argument("--folder", help="where the files are written; not on a tmpfs")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setup:
        setup()
        return
    if options.one:
        one(*options.one)
        return
    names = options.only.split(",") if options.only else list(LOADS)
    unknown = [name for name in names if name not in LOADS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(LOADS)}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = os.path.join(folder, "model.safetensors")
        write(path, options.size)
        for name in (path, tensorized(path)):
            with open(name, "rb") as file:
                os.fsync(file.fileno())
        found = measure(names, path, options.rounds)
    print(f"{found[names[0], 'cold'][0]['nbytes']} bytes of tensors, {options.rounds} rounds")
    first = [tell(state, found) for state in STATES]
    sys.exit(not all(first))


if __name__ == "__main__":
    main()
