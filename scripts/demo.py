"""Run the main job, end to end, on a demo model: inspect, prewarm, mirror, verify, dequantize.

Every step is the command that a user would type, or a few lines of the Python API.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numaload
from numaload.demo import parse_size, write_model


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def type_command(*words: str) -> None:
    """Run numaload as a user would, showing what was typed."""
    print(f"$ numaload {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "numaload", *words]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(f"demo: numaload {words[0]} ended with {status}")


def give_back_page_cache(paths: list[str]) -> None:
    """Drop files from RAM, so that prewarming has something to read. Needs no root."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dequantize_a_layer(path: str) -> None:
    """Attach to the replica that another process made, and dequantize a layer from it."""
    with numaload.attach(path) as mirror:
        node = mirror.nodes[0]
        with mirror.pinned(node) as view:
            layer = [t for name, t in view.items() if name.startswith("blk.0.")]
            layer[0].dequantize("bfloat16")  # compiles the kernel on its first use
            begin, weights = time.perf_counter(), 0
            for tensor in layer:
                values = tensor.dequantize("bfloat16")
                weights += values.size
                print(f"{tensor.name}: {tensor.type_name} {tensor.shape} -> {values.dtype}")
            seconds = time.perf_counter() - begin
        print(
            f"{weights / 1e6:.1f} million weights in {seconds * 1e3:.0f} ms on node {node}, compile"
            " time of the types after the first included"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default="300M")
    options = parser.parse_args()
    folder = Path(
        tempfile.mkdtemp(prefix="numaload-demo-", dir=os.environ.get("TMPDIR", "/var/tmp"))
    )
    try:
        say(f"A demo model of {options.size >> 20} MiB in three split files, in {folder}")
        paths = write_model(str(folder / "demo.gguf"), options.size, splits=3)
        give_back_page_cache(paths)
        run(paths)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(paths: list[str]) -> None:
    model = paths[1]  # any one of the split files will do
    say("1. What is in it")
    with numaload.open(model) as weights:
        kinds = sorted({t.type_name for t in weights.values()})
        print(f"{len(weights.paths)} files, {len(weights)} tensors of {', '.join(kinds)}")
    say("2. The machine")
    type_command("nodes")
    say("3. Read it into the page cache")
    type_command("prewarm", model)
    say("4. A replica in every node's own memory, proven by the kernel and by checksums")
    type_command("mirror", model, "--nodes", "all")
    type_command("verify", model)
    try:
        say("5. From another process: dequantize a layer beside its weights")
        dequantize_a_layer(model)
        say("6. What is where")
        type_command("status", model)
    finally:
        say("7. Give the memory back")
        type_command("release", model)


if __name__ == "__main__":
    main()
