"""How to get each error: through the public API where a test can, else which test does.

``PROVOKED`` and ``ELSEWHERE`` together have every class of the tree that has no subclass, and those
that are raised themselves though they have; tests/unit/test_errors.py sees to it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_builder as gb
import numaload as api
from commands import evict, sparse_model
from numaload import errors
from numaload.backends.gguf_reader import GGUFReader
from numaload.backends.lora import open_adapter
from numaload.formats.qtypes import QuantType

Provoke = Callable[[Path], Any]  # given an empty folder; the store is this test's own


def opening(raw: bytes) -> Provoke:
    def provoke(folder: Path) -> None:
        path = folder / "m.gguf"
        path.write_bytes(raw)
        api.open(path)

    return provoke


def good(folder: Path, type_id: int = QuantType.F32) -> api.Weights:
    path = folder / "m.gguf"
    path.write_bytes(gb.build([gb.u32("answer", 42)], [gb.tensor("t", (256,), type_id)]))
    return api.open(path)


def no_safetensors(folder: Path) -> None:
    path = folder / "m.safetensors"
    path.write_bytes(b"PK\3\4" * 100)
    api.open(path)


def a_missing_split(folder: Path) -> None:
    path = folder / "m-00001-of-00002.gguf"
    path.write_bytes(gb.build([gb.entry("split.count", gb.U16, gb.scalar(gb.U16, 2))]))
    api.open(path)


def a_rewritten_file(folder: Path) -> None:
    weights = good(folder)
    os.truncate(folder / "m.gguf", 100)
    weights["t"].dequantize()


def a_file_larger_than_memory(folder: Path) -> None:
    path = folder / "m.gguf"
    path.touch()
    os.truncate(path, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + (1 << 30))
    api.prewarm(path)


def a_flipped_bit(folder: Path) -> None:
    good(folder).close()
    path = folder / "m.gguf"
    with api.mirror(path, shared=True):
        pass
    for replica in (folder / "store").rglob("*.gguf"):
        replica.chmod(0o600)
        with replica.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
    with api.attach(path) as mirror:
        mirror.verify().check()


def a_callback_that_says_no(folder: Path) -> None:
    path = sparse_model(folder / "m.gguf", 16 << 20)
    evict([path])
    api.prewarm(path, progress=lambda *_: False)


def closed_weights(folder: Path) -> None:
    weights = good(folder)
    weights.close()
    weights["t"].dequantize()


def a_store_of_somebody_else(folder: Path) -> None:
    os.chmod(Path(os.environ["NUMALOAD_STORE"]).parent, 0o700)
    store = Path(os.environ["NUMALOAD_STORE"])
    store.mkdir()
    store.chmod(0o777)
    good(folder).close()
    api.mirror(folder / "m.gguf", shared=True)


TYPES_TWICE = [gb.entry("k", gb.U8, b"\1")] * 2
PROVOKED: dict[type[errors.NumaloadError], Provoke] = {
    errors.FormatError: opening(gb.build(n_tensors=1 << 20, data=bytes(32 << 20))),
    errors.NotGGUFError: opening(b"PK\3\4" * 100),
    errors.NotSafetensorsError: no_safetensors,
    errors.UnsupportedVersionError: opening(gb.build(version=1)),
    errors.TruncatedError: opening(gb.build([], [gb.tensor("t")], b"")),
    errors.MetadataError: opening(gb.build(TYPES_TWICE)),
    errors.TensorInfoError: opening(gb.build([], [gb.tensor("a"), gb.tensor("b")])),
    errors.UnknownQuantTypeError: lambda folder: good(folder, 133)["t"].blocks,
    errors.SplitError: a_missing_split,
    errors.AdapterError: lambda folder: open_adapter(good(folder).paths[0]),
    errors.UnsupportedTypeError: lambda folder: good(folder, QuantType.Q8_K)["t"].dequantize(),
    errors.TensorNotFoundError: lambda folder: good(folder)["tt"],
    errors.MetadataKeyError: lambda folder: good(folder).metadata["answers"],
    errors.ReadError: lambda _: api.open("/dev/null"),
    errors.FileChangedError: a_rewritten_file,
    errors.ModelNotFoundError: lambda folder: GGUFReader(folder / "absent.gguf"),
    errors.NodeMemoryError: a_file_larger_than_memory,
    errors.ChecksumError: a_flipped_bit,
    errors.StoreError: a_store_of_somebody_else,
    errors.ReplicaNotFoundError: lambda folder: api.attach(good(folder)),
    errors.ProgramError: lambda folder: api.exec(good(folder), ["no-such-program", "{model}"]),
    errors.CancelledError: a_callback_that_says_no,
    errors.ClosedError: closed_weights,
    errors.NotCopyableError: lambda folder: copy.deepcopy(good(folder)),
    errors.UsageError: lambda folder: good(folder)["t"].dequantize("int8"),
}
# These need a machine that refuses, or that places memory elsewhere than it was told.
ELSEWHERE: dict[type[errors.NumaloadError], str] = {
    errors.NumaError: "tests/unit/test_syscalls.py",
    errors.NumaUnavailableError: "tests/unit/test_syscalls.py",
    errors.PlacementError: "tests/unit/test_placement.py",
    errors.StalledError: "tests/unit/test_network.py",
    errors.StateDictError: "tests/acceptance/test_load_state_dict.py",
    errors.BackendError: "tests/unit/test_kt_kernel_parts.py",
}
