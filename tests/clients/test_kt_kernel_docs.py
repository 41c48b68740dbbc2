"""Every block of docs/kt-kernel.md runs as it stands there, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import LIMIT_S
from moe_model import Shape, write_moe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kt-kernel.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SERVE = "# serve.py"
# What each block prints, by a word that only it has.
SAYS = {
    "nodes=0)": "no copies: kt-kernel computes from these pages",
    "handle.on(node)": "no copies: kt-kernel computes from these pages",
    "threadpool_count=2": "copies: this process's own memory grew by",
    "kt_kernel.tp": "range(0, 768)",
}
# sglang needs CUDA. What matters of it: it spawns processes, and these make the layers.
SGLANG = """
import multiprocessing
import sys

def scheduler(path):
    import kt_moe
    from moe_model import Shape
    from kt_kernel.utils.llamafile import LlamafileMoEWrapper as Wrapper
    made = kt_moe.wrapper(path, Shape())
    print("LOADER", type(made.gguf_loader).__module__, len(Wrapper._gguf_loaders_by_path))
    print("NODES", made.gguf_loader.handle.report.given[0].nodes)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(
        target=__import__("sglang.launch_server", fromlist=["scheduler"]).scheduler,
        args=(sys.argv[sys.argv.index("--kt-weight-path") + 1],),
    )
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_moe(tmp_path / "model.gguf", Shape())
    return tmp_path


def run(folder: Path, store: Path, *words: str) -> str:
    places = f"{ROOT / 'tests'}:{folder}"
    environment = os.environ | {"NUMALOAD_STORE": str(store), "PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, text=True, timeout=LIMIT_S,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_kind_of_block_is_there() -> None:
    assert len(BLOCKS) == len(SAYS) + 1
    assert all(sum(word in block for block in BLOCKS) == 1 for word in [*SAYS, SERVE])


@pytest.mark.parametrize("word", SAYS)
def test_a_block_does_what_the_page_says(folder: Path, store: Path, word: str) -> None:
    (block,) = (block for block in BLOCKS if word in block)
    (folder / "block.py").write_text("import kt_moe  # no GPU here\n" + block)
    assert SAYS[word] in run(folder, store, "block.py")


def test_the_server_reaches_the_processes_that_are_spawned(folder: Path, store: Path) -> None:
    (block,) = (block for block in BLOCKS if SERVE in block)
    (folder / "serve.py").write_text(block)
    (folder / "sglang").mkdir()
    (folder / "sglang/__init__.py").touch()
    (folder / "sglang/launch_server.py").write_text(SGLANG)
    said = run(folder, store, "serve.py", "--kt-weight-path", "model.gguf")
    assert "LOADER numaload.backends.kt_kernel.handle 1" in said
    assert "NODES [0]" in said
