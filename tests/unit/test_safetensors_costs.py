"""What parsing headers of safetensors costs: memory and time in proportion to them."""

from __future__ import annotations

import time
import timeit
import tracemalloc
from collections.abc import Callable
from functools import cache

import pytest

import safetensors_builder as sb
from headers import Source
from numaload.errors import FormatError
from numaload.formats.jsontext import MAX_TEXT
from numaload.formats.safetensors import parse_header

pytestmark = pytest.mark.slow  # large headers, read again and again

TIMES = 32  # what parsing may take of the header's bytes, as promised
GOOD = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@cache
def bulky() -> dict[str, bytes]:
    """Headers of what takes the most memory for its bytes."""
    many = range(10_000)
    wide = {f"t{i}": ("I8", (1,) * 32) for i in many}
    return {
        "tensors": sb.model({f"{i:x}": ("I8", ()) for i in many}),
        "wide": sb.model(wide),
        "metadata": sb.model({}, {f"{i:x}": "ā" for i in many}),
        "wide-letters": sb.model({"😀": ("I8", ())}, {f"{i:x}": "" for i in many}),
        "one-string": sb.model({}, {"k": "a" * 400_000 + "😀"}),
        "escapes": sb.frame('{"__metadata__":{"k":"' + "\\n" * 200_000 + '"}}'),
    }


BOMBS: dict[str, Callable[[int], str]] = {
    "lists": lambda n: '{"a":' + "[[[]]]," * n,
    "nested": lambda n: '{"a":' + "[" * n,
    "objects": lambda n: '{"a":' + '{"":' * n,
    "shape": lambda n: '{"a":{"dtype":"F32","shape":[' + "1," * n,
    "digits": lambda n: '{"a":{"dtype":"F32","shape":[' + "1" * n,
    "spaces": lambda n: '{"a":{"dtype":"F32","shape":[' + " " * n + "x",
    "spaces-first": lambda n: "{" + " " * n + "x",
    "string": lambda n: '{"' + "a" * n,
    "escapes": lambda n: '{"' + "\\n" * n,
    "long-type": lambda n: '{"a":{"dtype":"' + "F" * n,
    "the-end": lambda n: "{}" + " " * n + "x",
    "same-name": lambda n: "{" + f'"a":{GOOD},' * (n // 20) + "}",
}


def peak(raw: bytes) -> tuple[int, bool]:
    source = Source(raw)
    tracemalloc.start()
    try:
        parse_header(source.read_at, source.size)
        read = True
    except FormatError:
        read = False
    finally:
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return found, read


@pytest.mark.parametrize("kind", bulky())
def test_memory_is_a_multiple_of_the_header(kind: str) -> None:
    raw = bulky()[kind]
    used, read = peak(raw)
    assert read
    assert used < TIMES * int.from_bytes(raw[:8], "little")


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_costs_a_few_times_its_text(kind: str) -> None:
    raw = sb.frame(BOMBS[kind](300_000))
    used, read = peak(raw)
    assert not read
    assert used < 8 * len(raw)


GROWING: dict[str, Callable[[int], bytes]] = {
    kind: lambda n, make=make: sb.frame(make(200 * n)) for kind, make in BOMBS.items()
} | {
    "tensors": lambda n: sb.model({f"t{i}": ("I8", ()) for i in range(n)}),
    "backwards": lambda n: sb.build(dict(reversed(
        sb.table({f"t{i}": ("I8", ()) for i in range(n)}).items())), bytes(n)),
    "empty": lambda n: sb.model({f"t{i}": ("I8", (0,)) for i in range(n)}),
    "unknown": lambda n: sb.build({f"t{i}": sb.row("X", [1], [0, 0]) for i in range(n)}, b""),
    "metadata": lambda n: sb.model({}, {f"t{i}": "\n" for i in range(n)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROWING)
def test_time_grows_with_the_header(kind: str) -> None:
    """Four times as much takes about four times as long, not sixteen."""
    small, large = (GROWING[kind](n) for n in (4_000, 16_000))
    assert any(seconds(large) / seconds(small) < 9 for _ in range(5))


def seconds(raw: bytes) -> float:
    """The best of some runs: what else this machine does shall not count."""

    def once() -> None:
        try:
            source = Source(raw)
            parse_header(source.read_at, source.size)
        except FormatError:
            return

    return min(timeit.repeat(once, timer=time.thread_time, number=1, repeat=3))


def test_a_sparse_file_is_not_read_for_its_size() -> None:
    source = Source(sb.frame("{", length=MAX_TEXT + 1), size=1 << 40)
    with pytest.raises(FormatError, match="at most"):
        parse_header(source.read_at, source.size)
    assert source.reads == 9
