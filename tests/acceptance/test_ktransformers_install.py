"""numaload's loaders in place of classic ktransformers' own; docs/ktransformers.md as it stands.

The ktransformers of these tests is a stand-in with the real one's modules and names, each doing
nothing: the real one builds CUDA extensions and cannot be installed here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gguf_builder as gb
from commands import LIMIT_S
from numaload.formats.qtypes import QuantType

pytest.importorskip("torch")

PAGE = (Path(__file__).parents[2] / "docs/ktransformers.md").read_text(encoding="utf-8")
OLD = "class GGUFLoader:\n    pass\n\ndef translate_name_to_gguf(name):\n    return name\n"
NEW = """
from ktransformers.util.custom_gguf import *

class ModelLoader:
    pass

class SafeTensorLoader(ModelLoader):
    pass

class GGUFLoader(ModelLoader):
    pass

class ModelLoaderFactory:
    @staticmethod
    def create_loader(path):
        return GGUFLoader()
"""
OPERATORS = """
from ktransformers.util.custom_loader import GGUFLoader, SafeTensorLoader, ModelLoader

def load_weights(loader, key):
    if isinstance(loader, SafeTensorLoader):
        return loader.load_experts(key)
    names = [f"{key}.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
    return [(loader.get_mmap_tensor(name), loader.get_ggml_type(name)) for name in names]
"""
OPTIMIZE = """
from ktransformers.util.custom_loader import GGUFLoader, ModelLoaderFactory

def optimize_and_load_gguf(module, rule_file, gguf_path, model_config, default_device="cuda:0"):
    loader = ModelLoaderFactory.create_loader(gguf_path)
    loader.tensor_device_map["blk.0"] = {"generate_device": "cpu"}
    return loader
"""
CHAT = """
import sys
from ktransformers.optimize.optimize import optimize_and_load_gguf

def local_chat(model_path, gguf_path):
    loader = optimize_and_load_gguf(None, "rules.yaml", gguf_path, None)
    print(type(loader).__module__, loader.get_mmap_tensor("blk.0.ffn_up_exps.weight").size)

if __name__ == "__main__":
    words = sys.argv[1:]
    local_chat(**dict(zip((word[2:] for word in words[::2]), words[1::2])))
"""
MODULES = {
    "0.3.2": {
        "local_chat.py": CHAT,
        "util/custom_gguf.py": "def translate_name_to_gguf(name):\n    return name\n",
        "util/custom_loader.py": NEW, "operators/experts.py": OPERATORS,
        "optimize/optimize.py": OPTIMIZE,
    },
    "0.3.1": {"util/custom_gguf.py": OLD},
}  # fmt: skip


def write_stand_in(folder: Path, version: str) -> Path:
    for name, code in MODULES[version].items():
        path = folder / "python/ktransformers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in (path.parent, path.parent.parent):
            (package / "__init__.py").touch()
        path.write_text(code)
    return folder / "python"


def run(code: str, python_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(python_path)}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, text=True, capture_output=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip


def moe(folder: Path) -> Path:
    """Experts of one layer in a GGUF file."""
    shape = (2, 256, 256)
    names = [f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
    blocks = {name: (QuantType.Q4_K, gb.random_blocks(QuantType.Q4_K, shape)) for name in names}
    gb.write_good(folder / "model.gguf", blocks)
    return folder / "model.gguf"


INSTALLED = """
from numaload.backends import ktransformers as ours
from ktransformers.operators import experts  # before: it has the name already
installed = ours.install()
print(*installed.places)
from ktransformers.optimize.optimize import optimize_and_load_gguf  # after

loader = optimize_and_load_gguf(None, "", MODEL, None)
assert type(loader) is ours.GGUFLoader is experts.GGUFLoader
gate, up, down = experts.load_weights(loader, "blk.0")
assert gate[0].size == 2 * 256 * 144 and gate[1] == 12
installed.undo()
from ktransformers.util import custom_loader
assert custom_loader.GGUFLoader is experts.GGUFLoader is not ours.GGUFLoader
assert custom_loader.ModelLoaderFactory is not ours.ModelLoaderFactory
"""


def test_install_since_0_3_2(tmp_path: Path) -> None:
    model = moe(tmp_path)
    code = INSTALLED.replace("MODEL", repr(str(model)))
    done = run(code, write_stand_in(tmp_path, "0.3.2"))
    assert done.returncode == 0, done.stderr
    places = [
        "operators.experts.GGUFLoader", "operators.experts.SafeTensorLoader",
        "util.custom_loader.GGUFLoader", "util.custom_loader.ModelLoaderFactory",
        "util.custom_loader.SafeTensorLoader",
    ]  # fmt: skip
    assert done.stdout.split() == [f"ktransformers.{place}" for place in places]


def test_install_before_0_3_2(tmp_path: Path) -> None:
    code = (
        "from numaload.backends import ktransformers as ours\n"
        "print(ours.install())\n"
        "from ktransformers.util.custom_gguf import GGUFLoader\n"
        "assert GGUFLoader is ours.GGUFLoader\n"
    )
    done = run(code, write_stand_in(tmp_path, "0.3.1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "numaload's are now ktransformers.util.custom_gguf.GGUFLoader\n"


def test_install_with_a_replica(own_store: None, tmp_path: Path) -> None:
    """Loaders that ktransformers makes hand out addresses in the replica, until it is undone."""
    model = moe(tmp_path)
    code = f"""
import numaload
from numaload.backends import ktransformers as ours
from ktransformers.optimize.optimize import optimize_and_load_gguf

with numaload.mirror({str(model)!r}, shared=True) as mirror, ours.install(replica=mirror):
    loader = optimize_and_load_gguf(None, "", {str(tmp_path)!r}, None)
    name = "blk.0.ffn_up_exps.weight"
    assert loader.get_mmap_tensor(name).ctypes.data == mirror.local()[name].address
assert ours.GGUFLoader.replica is ours.SafeTensorLoader.replica is None
"""
    done = run(code, write_stand_in(tmp_path, "0.3.2"))
    assert done.returncode == 0, done.stderr


def test_without_ktransformers(tmp_path: Path) -> None:
    code = "from numaload.backends import ktransformers; ktransformers.install()"
    done = run(code, tmp_path)
    assert "BackendError: classic ktransformers is not installed" in done.stderr
    python = write_stand_in(tmp_path, "0.3.2")
    (python / "ktransformers/util/custom_loader.py").write_text("import KTransformersOps\n")
    done = run(code, python)
    assert "BackendError: ktransformers.util.custom_loader cannot be imported" in done.stderr
    assert "KTransformersOps" in done.stderr
    (python / "ktransformers/util/custom_loader.py").write_text("")
    assert "has no GGUFLoader: it is not classic ktransformers" in run(code, python).stderr


# docs/ktransformers.md


def blocks_of_page() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks_of_page())))
def test_the_page_runs_as_it_stands(own_store: None, tmp_path: Path, number: int) -> None:
    model = moe(tmp_path)
    code = blocks_of_page()[number].replace("/models/deepseek", str(model.parent))
    words = ("--model_path", "org/base", "--gguf_path", str(model.parent))
    done = run(code, write_stand_in(tmp_path, "0.3.2"), *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "local_chat" in code:
        size = 2 * 256 * 144
        assert f"numaload.backends.ktransformers.gguf {size}\n" in done.stdout


@pytest.fixture
def own_store(store: Path) -> None:
    """Replicas of this test are in a store of its own."""
