"""Points 1 and 2 of storage: one reader with a printed plan, everything can be forced; prewarming
what is absent, some tensors, at a rate, as far as memory goes.

What a stalled network, failing disks and several nodes make of it is tested in tests/numa.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import numaload as api
from commands import KEPT, Numaload, evict, resident
from numaload.files.copy import copy_files
from numaload.files.residency import residency
from numaload.files.source import SourceFile

MIB = 1 << 20


@pytest.fixture
def cold(tmp_path: Path) -> str:
    """48 MiB and a bit that no read size divides, on the disk, not in RAM."""
    path = tmp_path / "file.bin"
    path.write_bytes(os.urandom(48 * MIB + 12345))
    evict([str(path)])
    return str(path)


def test_the_plan_is_printed_before_anything_is_read(numaload: Numaload, cold: str) -> None:
    done = numaload("prewarm", cold)
    (line,) = [text for text in done.stderr.splitlines() if "plan:" in text]
    report = numaload.json("evict", cold)
    assert report["done"]
    plan = numaload.json("prewarm", cold)["plan"]
    assert line.startswith(f"numaload: plan: {plan['way']}, {plan['threads']} thread")
    assert f"({plan['why']})" in line
    assert plan["device"]["file_system"] in line
    assert plan["sink"] == "page cache"


def test_nothing_is_planned_for_what_is_there(numaload: Numaload, cold: str) -> None:
    numaload("prewarm", cold)
    report = numaload.json("prewarm", cold)
    if not report["read"]:  # else some was paged out since
        assert report["plan"] is None
        assert numaload("prewarm", cold).stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ("--way", "mapped"),
        ("--way", "mapped", "--threads", "3"),
        ("--way", "mapped", "--threads", "2", "--chunk", "1M", "--order", "stripes"),
        ("--way", "buffered"),
        ("--way", "buffered", "--threads", "4", "--chunk", "64K", "--order", "stripes"),
        ("--chunk", "12K"),
    ],
    ids=" ".join,
)
def test_everything_can_be_forced(numaload: Numaload, cold: str, words: tuple[str, ...]) -> None:
    report = numaload.json("prewarm", cold, *words)
    asked = dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2], strict=True))
    sizes = {"1M": MIB, "64K": 64 << 10, "12K": 12 << 10}
    plan = report["plan"]
    assert plan["way"] == asked.get("way", plan["way"])
    assert plan["order"] == asked.get("order", "file")
    assert plan["threads"] == report["threads"] == int(asked.get("threads", plan["threads"]))
    assert plan["chunk"] == sizes.get(asked.get("chunk", ""), plan["chunk"])
    assert report["done"]
    assert report["read"] == report["size"] - report["resident_before"]
    assert resident(cold) > KEPT * os.path.getsize(cold)


@pytest.mark.parametrize(
    "words",
    [
        ("--way", "direct"), ("--order", "random"), ("--threads", "0"), ("--chunk", "1000"),
        ("--chunk", "much"), ("--max-rate", "0"), ("--move",), ("--layers", "x"),
        ("--tensors", "("),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_be_is_refused(numaload: Numaload, model: str, words: tuple[str, ...]) -> None:
    done = numaload("prewarm", model, *words, status=2)
    assert words[0].strip("-").replace("-", "_") in done.stderr.replace("-", "_")
    assert "Traceback" not in done.stderr


def test_only_what_is_absent_is_read(numaload: Numaload, cold: str) -> None:
    numaload("prewarm", cold)
    with SourceFile(cold) as file:
        file.drop_cache(16 * MIB, 8 * MIB)
        gone = file.size - residency(file).resident
    report = numaload.json("prewarm", cold)
    assert report["read"] >= gone > 4 * MIB
    assert report["resident_before"] == report["size"] - report["read"]
    assert report["done"]


@pytest.fixture
def layers(tmp_path: Path) -> str:
    """Six layers of two tensors, 24 MiB each, of zeros that take no room on disk."""
    path, rows = tmp_path / "layers.gguf", 24 * MIB // 4096
    writer = gguf.GGUFWriter(str(path), "llama")
    names = [f"blk.{i}.{what}.weight" for i in range(6) for what in ("attn_q", "ffn_down")]
    for name in names:
        writer.add_tensor_info(name, [rows, 1024], np.dtype(np.float32), rows * 4096)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 64 + len(names) * 24 * MIB)
    evict([str(path)])
    return str(path)


def shares(path: str) -> dict[str, float]:
    """Of each tensor, how much is in RAM."""
    found = api.residency(path).tensors
    return {name: tensor.resident / tensor.nbytes for name, tensor in found.items()}


@pytest.mark.parametrize("way", ["mapped", "buffered"])
def test_only_some_tensors(numaload: Numaload, layers: str, way: str) -> None:
    report = numaload.json("prewarm", layers, "--tensors", r"blk\.[024]\.ffn_down", "--way", way)
    assert report["tensors"] == 3
    assert 72 * MIB <= report["size"] < 73 * MIB
    there = shares(layers)
    chosen = {f"blk.{i}.ffn_down.weight" for i in (0, 2, 4)}
    assert all(there.pop(name) > KEPT for name in chosen)
    # Buffered reads reach as far ahead as the device is set to: here it may be 16 MiB.
    assert max(there.values()) < {"mapped": 0.2, "buffered": 0.8}[way]
    said = numaload("prewarm", layers, "--tensors", "[024].ffn_d").stdout
    assert said.startswith(f"3 tensors of {layers}: ")


def test_only_some_layers(numaload: Numaload, layers: str) -> None:
    report = numaload.json("prewarm", layers, "--layers", "0-1,4")
    assert report["tensors"] == 6
    there = shares(layers)
    for name, share in there.items():
        assert (share > KEPT) == (name.split(".")[1] in "014"), name
    assert api.prewarm(layers, layers=5, tensors="attn").tensors == 1
    done = numaload("prewarm", layers, "--layers", "500", status=1)
    assert "of layers 500" in done.stderr


def test_the_rate_is_not_exceeded(numaload: Numaload, cold: str) -> None:
    begin = time.monotonic()
    report = numaload.json("prewarm", cold, "--max-rate", "48M")
    assert report["done"]
    if report["read"] > 40 * MIB:  # else others had read it
        assert time.monotonic() - begin > 0.6  # a second, less its last reads


@pytest.mark.parametrize("state", ["cold", "half", "warm"])
def test_reading_into_memory_gives_the_same_bytes(cold: str, state: str) -> None:
    """Past the page cache where it is cold, from it where it is warm, and the odd end both ways."""
    size = os.path.getsize(cold)
    with open(cold, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # and nothing is read ahead
        file.read({"cold": 0, "half": size // 2 + 777, "warm": size}[state])
    with SourceFile(cold) as source:
        before = residency(source).resident
        (copy,) = copy_files([source])
        after = residency(source).resident
        with copy, copy.view() as view:
            assert bytes(view) == Path(cold).read_bytes()
    assert after <= before + MIB  # nothing was left behind
    assert after >= KEPT * before


MIRROR_READS = """
import json, sys, numaload
def read():
    text = open("/proc/self/io").read()
    return int(text.partition("read_bytes:")[2].split()[0])
before = read()
with numaload.mirror(sys.argv[1], shared=True) as mirror:
    plan = mirror.report.plan.to_dict()
    right = mirror.verify().right
print(json.dumps([read() - before, plan, right]))
"""


def test_mirror_reads_each_byte_once(
    numaload: Numaload, tmp_path: Path, model_files: list[str]
) -> None:
    """From storage: it was twice, once more for the checksum."""
    size = sum(map(os.path.getsize, model_files))
    evict(model_files)
    nbytes, plan, right = numaload.python(MIRROR_READS, model_files[0])
    assert right
    if plan["device"]["kind"] != "memory":
        assert 0.9 * size < nbytes < 1.2 * size
        assert plan["sink"] == "memory"
    numaload("release")


def test_mirror_tells_its_plan_and_drops_its_source(
    numaload: Numaload, model_files: list[str]
) -> None:
    numaload("prewarm", model_files[0])
    before = sum(map(resident, model_files))
    done = numaload("mirror", model_files[0])
    assert "\nread: " in done.stdout
    assert sum(map(resident, model_files)) > KEPT * before
    numaload("release")
    numaload("mirror", model_files[0], "--drop-source")
    assert sum(map(resident, model_files)) < before / 4
    numaload("release")


def test_streams_of_cold_and_warm_files_are_equal(tmp_path: Path, model_files: list[str]) -> None:
    def values() -> dict[str, Any]:
        with api.open(model_files[0]) as weights:
            return {name: array.copy() for name, array in api.stream(weights, "bfloat16")}

    evict(model_files)
    cold = values()
    api.prewarm(model_files[0])
    warm = values()
    assert cold.keys() == warm.keys()
    for name, array in cold.items():
        assert np.array_equal(array.view(np.uint16), warm[name].view(np.uint16))
