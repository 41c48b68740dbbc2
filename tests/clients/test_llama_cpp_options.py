"""The table of docs/llama-cpp.md: what llama.cpp's options do to a replica, as the kernel counts.

In shares of the model's size. "Own" memory has the context and buffers as well, at most a quarter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import numaload
from llama_model import Shape, write_llama
from llama_run import Run, run
from numaload.formats.qtypes import QuantType

pytest.importorskip("xllamacpp")

WHOLE, SMALL = 0.95, 0.25
REPACKED, PLAIN = QuantType.Q4_K, QuantType.Q8_0  # by llama.cpp on a processor with AVX2, no AMX
FLAGS = (
    Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].split("\n")[0].split()
)
CAN_REPACK = "avx2" in FLAGS and "amx_tile" not in FLAGS
IN_PLACE = {"no_extra_bufts": True}


def mode(name: str) -> dict[str, Any]:
    return {"load_mode": ["llama_load_mode", f"LLAMA_LOAD_MODE_{name}"]}


@dataclass(frozen=True)
class Case:
    """What options do: whether the replica stays mapped, what is copied, what is locked."""

    options: dict[str, Any] = field(default_factory=dict)
    mapped: bool = True
    copies: bool = False
    locked: bool = False
    at_most: float = 1 + SMALL  # never two copies
    qtype: QuantType = REPACKED


CASES = {
    "--no-repack": Case(IN_PLACE),
    "--load-mode mmap": Case(IN_PLACE | mode("MMAP")),
    "--load-mode none": Case(IN_PLACE | mode("NONE"), mapped=False, copies=True),
    # What it read into before it copied may stay in its heap.
    "--load-mode dio": Case(IN_PLACE | mode("DIRECT_IO"), mapped=False, copies=True, at_most=1.9),
    "--load-mode mlock": Case(IN_PLACE | mode("MLOCK"), mapped=False, copies=True, locked=True),
    "--load-mode mmap+mlock": Case(IN_PLACE | mode("MMAP_MLOCK"), locked=True),
    "--numa distribute": Case(
        IN_PLACE | {"numa": ["ggml_numa_strategy", "GGML_NUMA_STRATEGY_DISTRIBUTE"]}
    ),
    "--lazy-mode on": Case(IN_PLACE | {"lazy_mode": ["llama_lazy_mode", "LLAMA_LAZY_MODE_ON"]}),
    "nothing, Q4_K": Case(copies=True),
    "nothing, Q8_0": Case(qtype=PLAIN),
    # It locks what it does not read, and not what it reads.
    "--load-mode mmap+mlock, repacked": Case(mode("MMAP_MLOCK"), copies=True, locked=True),
    "--load-mode none, repacked": Case(mode("NONE"), mapped=False, copies=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[QuantType], str]:
    """Models of some 70 MB, large beside context and buffers."""
    folder = tmp_path_factory.mktemp("models")

    def model(qtype: QuantType) -> str:
        path = folder / f"{qtype.name}.gguf"
        if not path.exists():
            layers = 4 if qtype is REPACKED else 2
            write_llama(path, Shape(width=1024, inner=8192, layers=layers, heads=8, qtype=qtype))
        return str(path)

    return model


def replica(source: str) -> str:
    numaload.mirror(source, nodes="local", shared=True).close()
    return os.path.join(numaload.store.folder(source), os.path.basename(source))


def shares(ran: Run, size: int) -> dict[str, float]:
    anonymous = ran.smaps.get("Anonymous", 0)
    found = {"mapped": ran.smaps.get("Rss", 0), "changed": anonymous, "own": ran.own}
    return {name: nbytes / size for name, nbytes in (found | {"locked": ran.locked}).items()}


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", CASES)
def test_an_option_does_to_a_replica_what_the_page_says(
    models: Callable[[QuantType], str], name: str
) -> None:
    case = CASES[name]
    if case.options.get("no_extra_bufts") is None and not CAN_REPACK:
        pytest.skip("the wheel repacks for AVX2")
    source = models(case.qtype)
    size = os.path.getsize(source)
    ran = run(replica(source), case.options)
    share = shares(ran, size)
    assert share["mapped"] > WHOLE if case.mapped else share["mapped"] == 0, share
    assert share["changed"] == 0, share  # no page of the replica was copied on write
    assert share["own"] > WHOLE if case.copies else share["own"] < SMALL, share
    assert share["own"] < case.at_most, share
    assert share["locked"] > WHOLE if case.locked else share["locked"] == 0, share
    # Who has copied it no longer uses it, and it may go for room.
    assert len(ran.users) == (1 if case.mapped else 0), ran.users
    assert run(source, case.options).tokens == ran.tokens


@pytest.mark.usefixtures("store")
def test_two_engines_have_the_pages_of_a_replica_in_common(
    models: Callable[[QuantType], str],
) -> None:
    path = replica(models(REPACKED))
    size = os.path.getsize(path)
    with numaload.open(path) as held:  # the other one: it touches all pages
        pages = sum(int(tensor.blocks.sum(dtype="u8") >= 0) for tensor in held.values())
        ran = run(path, IN_PLACE)
    assert pages == len(held)
    assert ran.smaps["Pss"] < 0.6 * size


@pytest.mark.usefixtures("store")
def test_beyond_the_limit_of_locked_memory_it_warns_and_goes_on(
    models: Callable[[QuantType], str],
) -> None:
    source = models(REPACKED)
    path, size, options = replica(source), os.path.getsize(source), IN_PLACE | mode("MMAP_MLOCK")
    ran = run(path, options, locks=1 << 20)
    assert "failed to mlock" in ran.said
    assert ran.locked <= 1 << 20
    assert shares(ran, size)["mapped"] > WHOLE
    assert ran.tokens == run(path, IN_PLACE).tokens
