"""How long programs wait for a reader of a GGUF file: numaload's gguf-py face beside gguf-py's own.

    python scripts/bench_gguf_reader.py [--tokens N] [--tensors N] [--rounds N]

Both are measured in this run, in turns, on the same resident file; medians. Three things that
programs do: open and look at the tensors, read one value as well, read the vocabulary as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from bench_header import seconds, write

from numaload.backends import gguf_reader

TOKENS = "tokenizer.ggml.tokens"


def opened(reader: Any) -> None:
    assert reader.tensors[-1].data.nbytes


def one_value(reader: Any) -> None:
    opened(reader)
    assert reader.get_field("general.architecture").contents() == "llama"


def vocabulary(reader: Any) -> None:
    opened(reader)
    field = reader.get_field(TOKENS)
    assert str(field.parts[field.data[-1]], "utf-8") == field.contents()[-1]
    for name in ("scores", "token_type", "merges"):
        reader.get_field(f"tokenizer.ggml.{name}").contents()


def every_part(reader: Any) -> None:
    opened(reader)
    for field in reader.fields.values():
        assert sum(part.nbytes for part in field.parts)


def measure(path: str, use: Callable[[Any], None], rounds: int) -> tuple[float, float]:
    """Medians in seconds, ours and theirs, of opening and use."""
    times: tuple[list[float], list[float]] = ([], [])
    kinds = (gguf_reader.GGUFReader, gguf_reader.THEIRS)
    use(kinds[0](path))  # imports and page cache
    for _ in range(rounds):
        for kind, found in zip(kinds, times, strict=True):
            found.append(seconds(lambda kind=kind: use(kind(path))))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.gguf")
        write(path, options.tokens, options.tensors)
        print(f"{options.tokens} tokens, {options.tensors} tensors, medians of {options.rounds}")
        for use in (opened, one_value, vocabulary, every_part):
            ours, theirs = measure(path, use, options.rounds)
            times = f"numaload {ours * 1e3:8.1f} ms, gguf-py {theirs * 1e3:8.1f} ms"
            print(f"{use.__name__.replace('_', ' '):12} {times}: {theirs / ours:6.1f} times")


if __name__ == "__main__":
    main()
