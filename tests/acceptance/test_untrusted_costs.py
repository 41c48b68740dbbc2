"""What a file announces costs no more than what it holds: counts, numbers, names and patterns.

Costs are counted in calls of functions and in bytes of memory: a busy machine changes neither.
"""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gguf_builder as gb
import lora_files as lf
import numaload as api
import safetensors_builder as sb
from numaload import errors
from numaload.backends.kt_kernel import Loader
from numaload.backends.lora import open_adapter
from numaload.cli.adapters import describe
from numaload.errors import AdapterError, MetadataError, SplitError, TensorNotFoundError, UsageError
from numaload.linux.lists import MAX_ID

MIB = 1 << 20
TIMES = 32  # what parsing may take of the file's size, as promised
SPARE = 4 * MIB  # what opening any file takes, once
MAP = '"weight_map": {"t": "a.safetensors"}'
DIGITS = "9" * 5000


def peak(function: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        function()
    finally:
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return found


def calls(function: Callable[[], Any]) -> int:
    """How many functions it calls, those in C included."""
    count = 0

    def seen(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


VALUE, FILE = "expected a value of", "inside of the folder"
INDEXES = {
    "members": (
        f"{{{MAP}, " + ", ".join(f'"{i:x}": null' for i in range(50_000)) + "}",
        "1 of 1 shards missing",
    ),
    "digits": (f'{{{MAP}, "metadata": {{"total_size": {DIGITS}}}}}', VALUE),
    "large-number": (f'{{{MAP}, "metadata": {{"total_size": 1{"0" * 400}}}}}', VALUE),
    "large-float": (f'{{{MAP}, "metadata": {{"total_size": 1e999}}}}', VALUE),
    "infinity": (f'{{{MAP}, "metadata": Infinity}}', VALUE),
    "deep": (f'{{{MAP}, "metadata": {"[" * 200_000}}}', VALUE),
    "twice": (f"{{{MAP}, {MAP}}}", "appears twice"),
    "nul": ('{"weight_map": {"t": "a\\u0000.safetensors"}}', FILE),
    "surrogate": ('{"weight_map": {"t": "\\ud800.safetensors"}}', "expected a string"),
    "surrogate-name": ('{"weight_map": {"\\udc80": "a.safetensors"}}', "expected a name"),
    "long-file": (f'{{"weight_map": {{"t": "{"a" * MIB}.safetensors"}}}}', FILE),
    "files": (
        json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(20_000)}}),
        "at least 1000 of 20000",
    ),
    "no-text": ('{"weight_map": {"t": 1}}', "expected a string"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_is_refused_in_proportion_to_its_size(tmp_path: Path, kind: str) -> None:
    text, why = INDEXES[kind]
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)

    def refused() -> None:
        with pytest.raises(SplitError, match=why) as caught:
            api.open(path)
        assert caught.value.path == str(path)

    assert peak(refused) < TIMES * len(text) + SPARE
    assert calls(refused) < len(text) + 50_000


def test_an_index_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.touch()
    os.truncate(path, 1 << 30)

    def refused() -> None:
        with pytest.raises(errors.ReadError, match="expected at most"):
            api.open(path)

    assert peak(refused) < SPARE


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_files_that_a_name_announces_are_looked_for_until_a_thousand_are_missing(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"m-00001-of-99999.{suffix}"
    split = gb.build([gb.u32("split.count", 99_999), gb.u32("split.no", 0)])
    path.write_bytes(split if suffix == "gguf" else sb.model({"t": ("F32", (2,))}))

    def refused() -> None:
        with pytest.raises(SplitError, match="at least 1000 of 99999"):
            api.open(path)

    assert peak(refused) < SPARE
    assert calls(refused) < 50_000


def test_split_files_are_compared_in_proportion_to_what_they_say(tmp_path: Path) -> None:
    files, keys = 40, 2000
    for number in range(files):
        entries = [gb.u32("split.count", files), gb.u32("split.no", number)]
        if number == 0:
            entries += [gb.u32(f"general.{i}", i) for i in range(keys)]
        path = tmp_path / f"m-{number + 1:05d}-of-{files:05d}.gguf"
        path.write_bytes(gb.build(entries))
    assert calls(lambda: api.open(path).close()) < 50 * (keys + files * 20)


def test_long_names_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rows = [gb.tensor(f"{i}{'t' * 60_000}", (0,)) for i in range(50)]
    path.write_bytes(gb.build([], [*rows, gb.tensor("blk.1", (0,))]))

    def missed(name: str, hint: str) -> None:
        with pytest.raises(TensorNotFoundError) as caught:
            weights[name]
        assert str(caught.value).endswith(hint)

    with api.open(path) as weights:
        assert calls(lambda: missed("t" * 60_000, "tt'")) < 100
        assert calls(lambda: missed("blk.2", "close: blk.1")) < 1000


@pytest.mark.parametrize("layer", ["1" * 5000, "9" * 60_000])
def test_numbers_in_names_are_no_layers_beyond_all_layers(tmp_path: Path, layer: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([], [gb.tensor(f"blk.{layer}.w", (0,))]))
    with pytest.raises(TensorNotFoundError, match="of layers 1"):
        api.prewarm(path, layers="1")


def test_lists_have_no_more_ids_than_there_can_be(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([], [gb.tensor("blk.0.w", (0,))]))

    def refused() -> None:
        with pytest.raises(UsageError, match="expected a list"):
            api.prewarm(path, layers=f"0-{MAX_ID - 1}," * 10_000)

    assert calls(refused) < 50_000


def test_layers_that_an_adapter_names_are_not_counted_up_to(tmp_path: Path) -> None:
    ends = (".weight.lora_a", ".weight.lora_b")
    path = lf.write_gguf(tmp_path / "m.gguf", lf.halves(["blk.49999.attn_q"], ends))
    torch_modules = pytest.importorskip("torch_modules", exc_type=ImportError)
    module = torch_modules.module_of({"model.norm.weight": (32,)})

    def refused() -> None:
        with open_adapter(path) as adapter, pytest.raises(AdapterError, match="layer 49999"):
            adapter.lora_config(module)

    refused()
    assert peak(refused) < SPARE


CONFIGS = {
    "digits": f'{{"peft_type": "LORA", "r": {DIGITS}}}',
    "deep": "[" * 200_000,
    "names": json.dumps(lf.CONFIG | {"rank_pattern": {f"m{i}": 1 for i in range(50_000)}}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_s_configuration_costs_in_proportion_to_its_size(
    tmp_path: Path, kind: str
) -> None:
    path = lf.write_peft(tmp_path / "a")
    (path / "adapter_config.json").write_text(CONFIGS[kind])

    def described() -> None:
        with api.open(path) as weights:
            assert describe(weights)

    assert peak(described) < TIMES * len(CONFIGS[kind]) + SPARE


@pytest.mark.parametrize(
    "value",
    [
        gb.entry("k.expert_count", gb.STRING, gb.string("9" * 5000)),
        gb.entry("k.expert_count", gb.STRING, gb.string("many")),
        gb.entry("k.expert_count", gb.F32, gb.scalar(gb.F32, float("inf"))),
        gb.entry("k.expert_count", gb.ARRAY, gb.array(gb.U32)),
    ],
    ids=["digits", "text", "infinity", "nothing"],
)
def test_a_number_that_is_none_is_refused_by_kt_kernel_s_loader(
    tmp_path: Path, value: bytes
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([gb.entry("general.architecture", gb.STRING, gb.string("k")), value]))
    with api.open(path) as weights, pytest.raises(MetadataError, match=r"k\.expert_count is"):
        Loader([weights]).get_model_config()
