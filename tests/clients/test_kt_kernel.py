"""The real kt-kernel over numaload's weights: scripts/clients runs this."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kt_checks
from commands import LIMIT_S
from moe_model import SHAPES, Shape, write_moe
from numaload import weights as package
from numaload.backends.kt_kernel import Loader, translate_name_to_gguf
from numaload.demo import write_model

MOST = {"mixed": 0.03, "plain": 0.02}  # relative to float32; kt-kernel rounds activations to 8 bits
KINDS = ("files", "one-node", "shared", "attached", "private")
OLDER = os.environ.get("NUMALOAD_OLDER_KT_KERNEL", "")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("moe")
    return {name: write_moe(folder / f"{name}.gguf", shape) for name, shape in SHAPES.items()}


class Checks:
    """Runs a function of kt_checks.py in a new process; what it returns."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.result = folder / "result.json"
        self.environment = os.environ | {"NUMALOAD_STORE": str(store)}

    def __call__(self, check: str, *arguments: object, path: str = "") -> Any:
        words = [sys.executable, kt_checks.__file__, str(self.result), check, *map(str, arguments)]
        places = [path, str(Path(kt_checks.__file__).parent), self.environment.get("PYTHONPATH")]
        environment = self.environment | {"PYTHONPATH": ":".join(p for p in places if p)}
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
        return json.loads(self.result.read_text())


@pytest.fixture
def run(tmp_path: Path, store: Path) -> Checks:
    return Checks(tmp_path, store)


# --- one subpool: straight from the replica -------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["files", "shared"])
def test_output_is_that_of_its_own_loader(
    run: Checks, models: dict[str, str], name: str, kind: str
) -> None:
    found = run("same_output", models[name], name, kind)
    assert found["equal"]
    assert found["lowest"]
    assert max(found["errors"]) < MOST[name.partition("-")[0]]
    assert found["copied"] == {}
    assert found["inside"]
    assert found["kept"] == SHAPES[name].nbytes()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_memory(run: Checks, models: dict[str, str], kind: str) -> None:
    found = run("same_output", models["mixed-8"], "mixed-8", kind)
    assert found["equal"]
    assert found["inside"]
    assert found["right"]
    assert "no copies" in found["text"]
    in_files = kind in ("files", "one-node")
    assert all(bool(nodes) is not in_files for nodes in found["nodes"])
    assert all(set(pages) <= {"0"} for pages in found["pages"])


@pytest.mark.parametrize("name", ["mixed-8", "plain-5"])
def test_addresses_are_good_until_release(run: Checks, models: dict[str, str], name: str) -> None:
    found = run("later_use", models[name], name)
    assert found["equal"]
    assert found["kept"] == SHAPES[name].nbytes()
    assert found["refused"]


@pytest.mark.parametrize("kind", ["files", "shared"])
def test_a_hundred_rounds_leak_nothing(run: Checks, models: dict[str, str], kind: str) -> None:
    found = run("rounds", models["plain-5"], "plain-5", kind)
    assert found["same"]
    early, late = found["after"][kt_checks.ROUNDS // 5], found["after"][-1]
    assert len(found["after"]) == kt_checks.ROUNDS
    assert late["files"] == early["files"]
    assert late["threads"] == early["threads"]
    assert late["maps"] <= early["maps"] + 8  # glibc's arenas come and go
    assert late["anonymous"] - early["anonymous"] < 4 << 20  # 80 rounds of 15 MiB of weights


def test_two_moes_in_one_process(run: Checks, models: dict[str, str]) -> None:
    found = run("two_in_one", models["mixed-8"], "mixed-8")
    assert all(found["equal"])
    assert found["apart"]
    assert found["again"]
    assert found["back"]


# --- several subpools: kt-kernel copies -----------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("mixed-8", 2), ("plain-5", 2), ("mixed-thirds", 3)])
def test_its_copies_are_counted_where_they_are(
    run: Checks, models: dict[str, str], name: str, count: int
) -> None:
    found = run("subpools", models[name], name, count)
    assert list(found["copied"]) == ["0"]
    assert found["nbytes"] <= found["copied"]["0"] < 2 * found["nbytes"]
    assert max(found["errors"]) < MOST[name.partition("-")[0]]
    assert "copies: this process's own memory grew by" in found["text"]


@pytest.mark.parametrize(("name", "count"), [("mixed-8", 1), ("mixed-8", 2), ("mixed-thirds", 3)])
def test_parts_of_tp_add_up_bit_for_bit(
    run: Checks, models: dict[str, str], name: str, count: int
) -> None:
    assert run("parts_add_up", models[name], name, count)["equal"]


# --- folders, versions, refusals ------------------------------------------------------------------


def test_a_folder_of_files_with_a_layer_each(run: Checks, tmp_path: Path) -> None:
    folder = tmp_path / "layers"
    folder.mkdir()
    for layer in range(2):
        shape = Shape(experts=5, used=3, first=layer)
        write_moe(folder / f"layer-{layer}.gguf", shape, seed=layer)
    found = run("folder", folder, "mixed-5")
    assert found["equal"] == [True, True]
    assert found["models"] == 2


@pytest.mark.skipif(not OLDER, reason="scripts/clients installs it")
def test_the_older_version(run: Checks, models: dict[str, str]) -> None:
    found = run("older", models["mixed-8"], "mixed-8", path=OLDER)
    assert found == {
        "equal": True,
        "version": "0.7.0",
        "hook": "_gguf_loader_instance",
        "ours": True,
        "copied": True,
        "left": True,
    }


def test_refusals_have_names(run: Checks, models: dict[str, str]) -> None:
    found = run("refusals", models["plain-5"])
    assert re.match(r"UsageError: .*is in place: close\(\) it first", found["twice"])
    assert re.match(r"UsageError: no replica on node 5", found["node"])
    assert found["both"].startswith("UsageError: give nodes or mirrors")
    assert "nodes= asks for" in found["shared"]
    assert found["absent"].startswith("FileNotFoundError")
    assert "no .gguf files" in found["folder"]
    assert found["tensor"].startswith("TensorNotFoundError")
    assert found["closed"].startswith("ClosedError")
    assert found["on"] == "UsageError"
    assert found["left"] == "[]"
    assert found["before"] == "of before"


def test_a_node_that_is_not_there_is_named(run: Checks, models: dict[str, str]) -> None:
    found = run("absent_node", models["plain-5"], "plain-5")
    if 3 in found["nodes"]:
        pytest.skip("this machine has a node 3")
    assert not found["right"]
    assert "node 3, which it is for, is not on this machine" in found["text"]
    assert "kt-kernel has workers for node 3, but replicas are on node 0" in found["text"]


# --- the loader's face, row by row ----------------------------------------------------------------


def theirs(path: str) -> Any:
    from kt_kernel.utils.loader import GGUFLoader

    return GGUFLoader(path)


@pytest.fixture(params=["mixed-5", "split"])
def both(request: pytest.FixtureRequest, models: dict[str, str], tmp_path: Path) -> Any:
    """kt-kernel's loader and ours, of a file, and of a folder of split files."""
    path = models["mixed-5"]
    if request.param == "split":
        write_model(str(tmp_path / "demo.gguf"), 8 << 20, splits=3)
        path = str(tmp_path)
    first = path if os.path.isfile(path) else str(next(iter(sorted(tmp_path.glob("*.gguf")))))
    with package.open_weights(first) as weights:
        yield theirs(path), Loader([weights])


def test_tensor_info(both: Any) -> None:
    own, ours = both
    assert ours.tensor_info == own.tensor_info
    assert list(ours.tensor_info) == list(own.tensor_info)
    for name, info in own.tensor_info.items():
        found = ours.tensor_info[name]
        assert found["dtype"].name == info["dtype"].name
        assert [type(size) for size in found["shape"]] == [np.uint64] * len(info["shape"])
        assert isinstance(found["offset"], int)


def test_metadata(both: Any) -> None:
    own, ours = both
    assert list(ours.metadata) == list(own.metadata)
    for key, value in own.metadata.items():
        found = ours.metadata[key]
        if isinstance(value, str):
            assert found == value
        else:
            assert found.dtype == value.dtype
            assert found.tolist() == value.tolist()


def test_files(both: Any) -> None:
    own, ours = both
    assert ours.tensor_file_map == own.tensor_file_map
    assert list(ours.file_data_map) == list(own.file_data_map)
    for path, data in own.file_data_map.items():
        found = ours.file_data_map[path]
        assert found.dtype == data.dtype
        assert found.shape == data.shape
        assert np.array_equal(found, data)
        assert not found.flags.writeable


# Of kt-kernel's own loader; torch says it once in a process.
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_data_and_types(both: Any) -> None:
    own, ours = both
    for name in own.tensor_info:
        assert ours.has_tensor(name)
        assert ours.get_ggml_type(name) is own.get_ggml_type(name)
        data, ggml_type = ours.get_undequanted_tensor_and_ggml_type(name)
        wanted, wanted_type = own.get_undequanted_tensor_and_ggml_type(name)
        assert (data.dtype, data.shape, ggml_type) == (wanted.dtype, wanted.shape, wanted_type)
        assert bool((data == wanted).all())
    for loader in both:
        assert not loader.has_tensor("blk.99.ffn_up_exps.weight")
        with pytest.raises(KeyError, match=r"blk\.99"):
            loader.get_ggml_type("blk.99.ffn_up_exps.weight")
        with pytest.raises(KeyError, match=r"blk\.99"):
            loader.get_undequanted_tensor_and_ggml_type("model.layers.99.mlp.up_proj.weight")


@pytest.mark.parametrize("layer", [0, 7])
def test_model_config(both: Any, layer: int) -> None:
    own, ours = both
    assert ours.get_model_config(layer) == own.get_model_config(layer)


@pytest.mark.parametrize("words", [None, ["expert", "ARCH"], []])
def test_printed_metadata(both: Any, words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own, ours = both
    own.print_metadata(words)
    wanted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  general")]
    ours.print_metadata(words)
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  general")]
    assert found == wanted


def hugging_face_names() -> list[str]:
    """Names of every kind that the table has a word for, and of some that it has none for."""
    inner = [
        "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_up_proj",
        "mlp.gate", "mlp.gate.e_score_correction_bias", "mlp.shared_experts_gate",
        "block_sparse_moe.gate", "feed_forward.router", "mlp.experts.ffn_down_exps",
        "ffn_gate_exps", "mlp.shared_expert_gate", "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_a_layernorm", "self_attn.q_a_layernorm", "self_attn.rotary_emb",
    ]  # fmt: skip
    inner += [f"self_attn.{x}_proj" for x in ("q", "k", "v", "o", "qkv", "kv_b", "q_a", "q_b")]
    inner += [f"self_attn.{x}_norm" for x in "qk"]
    for x in ("gate_proj", "up_proj", "down_proj", "w1"):
        inner += [f"mlp.{x}", f"mlp.experts.3.{x}", f"mlp.shared_experts.{x}"]
        inner += [f"mlp.shared_expert.{x}", f"block_sparse_moe.experts.3.{x}"]
        inner += [f"feed_forward.experts.3.{x}", f"feed_forward.shared_experts.{x}"]
    outer = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "output.weight"]
    return outer + [f"model.layers.11.{name}.{end}" for name in inner for end in ("weight", "bias")]


def test_names_are_translated_as_there() -> None:
    from kt_kernel.utils.loader import translate_name_to_gguf as wanted

    names = hugging_face_names()
    assert {name: translate_name_to_gguf(name) for name in names} == {n: wanted(n) for n in names}


def test_the_wheel_is_the_one_that_the_docs_speak_of() -> None:
    import kt_kernel

    assert kt_kernel.__version__ == "0.7.2"
