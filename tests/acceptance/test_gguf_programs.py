"""Programs that use gguf-py, run unmodified on numaload's reader: gguf-py's own scripts, on both
readers, and the ways of ComfyUI-GGUF and of vLLM's GGUF plugin; docs/gguf-py.md as it stands.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import gguf.gguf_reader
import numpy as np
import pytest

import gguf_builder as gb
import numaload
from commands import LIMIT_S
from numaload.backends import gguf_reader
from numaload.formats.qtypes import QuantType

Ours, Theirs = gguf_reader.GGUFReader, gguf_reader.THEIRS
PAGE = (Path(__file__).parents[2] / "docs/gguf-py.md").read_text(encoding="utf-8")

RUN = """
import runpy, sys
if sys.argv[1] == "ours":
    from numaload.backends import gguf_reader
    print(gguf_reader.install(), file=sys.stderr)
sys.argv[:] = sys.argv[2:]
runpy.run_module(f"gguf.scripts.{sys.argv[0]}", run_name="__main__")
"""


def script(whose: str, *words: object, answer: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, whose, *map(str, words)], input=answer, text=True,
        capture_output=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "numaload's are now gguf.GGUFReader, gguf.gguf_reader.GGUFReader"
    assert (said in done.stderr) is (whose == "ours")
    return done


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A model as converters write it."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("a model")
    writer.add_block_count(1)
    writer.add_uint32("general.alignment", 64)
    writer.data_alignment = 64
    writer.add_token_list([f"token {number}" for number in range(100)])
    writer.add_token_scores([-0.5 * number for number in range(100)])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    rng = np.random.default_rng(0)
    for name in ("Q8_0", "Q4_K", "Q6_K", "BF16"):  # what gguf-convert-endian can turn round
        kind = gguf.GGMLQuantizationType[name]
        block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (4, 256 // block_size * type_size), np.uint8)
        writer.add_tensor(f"blk.0.ffn_{name}.weight", blocks, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_q.weight", rng.random((3, 5), np.float32))
    writer.add_tensor("output.weight", rng.random((2, 7), np.float32).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["gguf_dump"],
        ["gguf_dump", "--no-tensors"],
        ["gguf_dump", "--json", "--json-array"],
        ["gguf_dump", "--markdown"],
        ["gguf_dump", "--data-offset"],
        ["gguf_dump", "--data-alignment"],
        ["gguf_hash"],
        ["gguf_hash", "--no-layer"],
        ["gguf_convert_endian", "--dry-run", "big"],
    ],
    ids=" ".join,
)
def test_scripts_that_read(written: Path, words: list[str]) -> None:
    before = written.read_bytes()
    options = [word for word in words[1:] if word.startswith("--")]
    rest = [word for word in words[1:] if not word.startswith("--")]
    results = [script(whose, words[0], *options, written, *rest) for whose in ("theirs", "ours")]
    assert results[0].stdout == results[1].stdout
    assert results[0].stdout or words[0] == "gguf_convert_endian"
    assert written.read_bytes() == before


def test_script_that_copies_with_new_metadata(written: Path) -> None:
    copies = [written.with_name(f"{whose}.gguf") for whose in ("theirs", "ours")]
    for copy in copies:
        script(
            copy.stem, "gguf_new_metadata", "--general-name", "another",
            "--special-token", "bos", "token 7", "--remove-metadata", "llama.block_count",
            "--force", written, copy,
        )  # fmt: skip
    assert copies[0].read_bytes() == copies[1].read_bytes()
    assert Theirs(copies[1]).fields["general.name"].contents() == "another"
    assert Theirs(copies[1]).fields["tokenizer.ggml.bos_token_id"].contents() == 7


def test_script_that_sets_metadata_in_place(written: Path) -> None:
    before = written.read_bytes()
    copies = [written.with_name(f"{whose}.gguf") for whose in ("theirs", "ours")]
    for copy in copies:
        shutil.copy(written, copy)
        key = "tokenizer.ggml.bos_token_id"
        script(copy.stem, "gguf_set_metadata", copy, key, "9", answer="YES\n")
    assert copies[0].read_bytes() == copies[1].read_bytes() != before
    assert Theirs(copies[1]).fields["tokenizer.ggml.bos_token_id"].contents() == 9


def test_script_that_turns_the_byte_order_round(written: Path) -> None:
    before = written.read_bytes()
    copies = [written.with_name(f"{whose}.gguf") for whose in ("theirs", "ours")]
    for copy in copies:
        shutil.copy(written, copy)
        script(copy.stem, "gguf_convert_endian", copy, "big", answer="YES\n")
    assert copies[0].read_bytes() == copies[1].read_bytes() != before
    script("ours", "gguf_convert_endian", copies[1], "little", answer="YES\n")
    assert copies[1].read_bytes() == before


def test_install_is_everywhere_and_goes_back() -> None:
    program = ModuleType("a_program")
    exec("from gguf import GGUFReader", vars(program))  # noqa: S102
    sys.modules["a_program"] = program
    try:
        with gguf_reader.install() as replaced:
            places = ["a_program", "gguf", "gguf.gguf_reader"]
            assert set(replaced.places) >= {f"{place}.GGUFReader" for place in places}
            assert vars(program)["GGUFReader"] is gguf.GGUFReader is Ours
            assert gguf_reader.install().places == []  # it is there already
            program.__dict__["GGUFReader"] = dict  # somebody else's wish stays
        assert gguf.GGUFReader is gguf.gguf_reader.GGUFReader is Theirs
        assert vars(program)["GGUFReader"] is dict
    finally:
        del sys.modules["a_program"]


def test_install_replaces_only_the_class_s_own_name_in_modules() -> None:
    """As docs/gguf-py.md says; what is made afterwards is numaload's."""
    module = ModuleType("somebody_s")
    sys.modules[module.__name__] = module
    code = "from gguf import GGUFReader as Reader\nclass Own(Reader): pass\n"
    try:
        exec(code, vars(module))  # noqa: S102
        with gguf_reader.install():
            assert not issubclass(module.Own, Ours)
            assert module.Reader is not Ours
            exec(code, vars(module))  # noqa: S102
            assert issubclass(module.Own, Ours)
            assert module.Reader is Ours
    finally:
        del sys.modules[module.__name__]


@pytest.fixture
def installed() -> Iterator[None]:
    with gguf_reader.install():
        yield


@pytest.fixture
def pipeline(tmp_path: Path) -> str:
    """An image model as ComfyUI-GGUF's converter writes it: shapes of before flattening."""
    path = tmp_path / "flux.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    writer.add_add_space_prefix(True)
    writer.add_token_list(["<pad>", "größer", "c"])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_token_types([3, 1, 1])
    writer.add_eos_token_id(1)
    prefix = "model.diffusion_model."
    writer.add_array(f"comfy.gguf.orig_shape.{prefix}conv.weight", [4, 2, 2, 2])
    blocks = gb.random_blocks(QuantType.Q8_0, (1, 32))
    writer.add_tensor(prefix + "conv.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(prefix + "norm.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    half = np.arange(4, dtype=np.uint16).view(np.uint8)
    writer.add_tensor(prefix + "bias", half, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def of_type(reader: Any, key: str, kind: type) -> Any:
    """One value: its last part that is data."""
    field = reader.get_field(key)
    if field is None:
        return None
    part = field.parts[field.data[-1]]
    return str(part, encoding="utf-8") if kind is str else kind(part[0])


def list_of(reader: Any, key: str, kind: type) -> tuple[Any, ...]:
    field = reader.get_field(key)
    parts = [field.parts[index] for index in field.data]
    return tuple(str(p, encoding="utf-8") if kind is str else kind(p[0]) for p in parts)


def test_as_comfyui_gguf_reads_it(pipeline: str, installed: None) -> None:
    torch = pytest.importorskip("torch")
    reader = gguf.GGUFReader(pipeline)
    assert type(reader) is Ours
    assert of_type(reader, "general.architecture", str) == "flux"
    assert of_type(reader, "general.type", str) is None
    assert of_type(reader, "tokenizer.ggml.eos_token_id", int) == 1
    assert of_type(reader, "tokenizer.ggml.add_space_prefix", bool) is True
    assert list_of(reader, "tokenizer.ggml.tokens", str) == ("<pad>", "größer", "c")
    assert list_of(reader, "tokenizer.ggml.scores", float) == (0.0, -1.5, 2.0)
    assert list_of(reader, "tokenizer.ggml.token_type", int) == (3, 1, 1)
    prefix = "model.diffusion_model."
    names = {tensor.name for tensor in reader.tensors}
    assert names == {prefix + name for name in ("conv.weight", "norm.weight", "bias")}
    shape = reader.get_field(f"comfy.gguf.orig_shape.{prefix}conv.weight")
    assert shape.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert [int(shape.parts[index][0]) for index in shape.data] == [4, 2, 2, 2]
    state: dict[str, Any] = {}
    for tensor in reader.tensors:
        with pytest.warns(UserWarning, match="not writable") if not state else nullcontext():
            state[tensor.name] = torch.from_numpy(tensor.data)
        assert state[tensor.name].data_ptr() == tensor.data.ctypes.data
    plain = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
    norm = next(tensor for tensor in reader.tensors if tensor.tensor_type in plain)
    wanted = torch.Size(tuple(int(size) for size in reversed(norm.shape)))
    assert state[norm.name].view(*wanted).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """A language model in two files, with experts and types of every kind."""
    kinds = {"Q4_K": (2, 4, 256), "Q8_0": (3, 64), "F32": (3, 4), "BF16": (2, 6), "F16": (5,)}
    tensors = {}
    for number, (name, shape) in enumerate(kinds.items()):
        qtype = QuantType[name]
        tensors[f"blk.0.part_{number}.weight"] = qtype, gb.random_blocks(qtype, shape, number)
    return gb.write_good(tmp_path / "m.gguf", tensors, per_file=3)


def weights_of(torch: Any, files: list[str], names: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Each file opened anew, a type before the blocks of each quantized tensor, all copied."""
    for file in files:
        reader = gguf.GGUFReader(file)
        for tensor in reader.tensors:
            name, data = names[tensor.name], tensor.data
            if tensor.tensor_type.name in {"F32", "F16"}:
                yield name, torch.tensor(data)
            elif tensor.tensor_type.name == "BF16":
                assert (data.dtype, reader.byte_order) == (np.uint8, "I")
                yield name, torch.tensor(data.view(np.uint16)).view(torch.bfloat16)
            else:
                yield name.replace("weight", "qweight_type"), torch.tensor(tensor.tensor_type)
                yield name.replace("weight", "qweight"), torch.tensor(data)


def test_as_vllms_plugin_reads_it(shards: list[str], installed: None) -> None:
    torch = pytest.importorskip("torch")
    types = {t.name: t.tensor_type.name for file in shards for t in gguf.GGUFReader(file).tensors}
    assert sorted(types.values()) == ["BF16", "F16", "F32", "Q4_K", "Q8_0"]
    names = {name: f"model.layers.0.{number}.weight" for number, name in enumerate(types)}
    found = dict(weights_of(torch, shards, names))
    with numaload.open(shards[0]) as weights:
        for name, renamed in names.items():
            tensor = weights[name]
            if tensor.in_blocks:
                assert found[renamed.replace("weight", "qweight_type")].item() == tensor.qtype
                renamed = renamed.replace("weight", "qweight")  # noqa: PLW2901
            same = found[renamed]
            assert same.view(torch.uint8).numpy().tobytes() == bytes(tensor.buffer)
            assert tuple(same.shape) == (*tensor.shape[:-1], same.shape[-1])
    (experts,) = (v for k, v in found.items() if k.endswith("qweight") and v.ndim == 3)
    assert [one.shape for one in experts.unbind()] == [(4, 144), (4, 144)]


def blocks_of_page() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks_of_page())))
def test_the_page_runs_as_it_stands(numaload_store: None, shards: list[str], number: int) -> None:
    code = blocks_of_page()[number].replace("model.gguf", shards[0])
    assert shards[0] in code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], text=True, capture_output=True, check=False,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_pages_command_runs(written: Path) -> None:
    (command,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    words = command.replace("python ", f"{sys.executable} ", 1).replace("model.gguf", str(written))
    done = subprocess.run(words, shell=True, text=True, capture_output=True, check=False)  # noqa: S602
    assert done.returncode == 0, done.stderr
    assert "token 0" in done.stdout


@pytest.fixture
def numaload_store(store: Path) -> None:
    """Replicas of this test are in a store of its own."""
