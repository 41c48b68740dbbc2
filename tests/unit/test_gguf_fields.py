"""Fields of damaged files through the gguf-py face: all of their parts, or a named error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import seeds
from numaload.backends.gguf_reader import GGUFReader
from numaload.errors import FormatError

SEEDS = seeds.seeds()
WORDS = [0, 1, 8, 1 << 40, 1 << 63, 2**64 - 1]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    found = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found))
        change = rng.randrange(4)
        if change == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            found[at : at + 8] = rng.choice(WORDS).to_bytes(8, "little")
        elif change == 2:
            del found[at + 1 : at + 20]
        else:
            found[at:at] = bytes(rng.randint(1, 20))
    return bytes(found)


def look_at_everything(path: Path) -> int:
    """How many parts there are."""
    reader, parts = GGUFReader(path), 0
    for field in reader.fields.values():
        parts += len([part.nbytes for part in field.parts])
        assert all(0 <= index < len(field.parts) for index in field.data)
        try:
            field.contents()
        except UnicodeDecodeError:
            continue
    return parts + sum(len(list(tensor.field.parts)) for tensor in reader.tensors)


@pytest.mark.parametrize("name", SEEDS)
def test_damage_is_survived(tmp_path: Path, name: str) -> None:
    rng, path, survived = random.Random(name), tmp_path / "m.gguf", 0
    for _ in range(150):
        path.write_bytes(damaged(SEEDS[name], rng))
        try:
            survived += look_at_everything(path) > 0
        except FormatError as error:
            assert str(path) in str(error)  # noqa: PT017 - one in hundreds
    assert survived or name == "foreign-types.seed"
