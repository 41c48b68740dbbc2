"""Damage headers on purpose, by the thousand, and watch whether the parser keeps its word.

    scripts/fuzz-headers [--format gguf|safetensors] [--runs N] [--seconds S] [--plain] [--seed N]
        [--keep DIR]

Its word: nothing but FormatErrors, memory within a small multiple of the file, all arrays decode,
every tensor inside of the file, and no two in the same place. Steered by coverage where atheris is
installed (pip install 'numaload[fuzz]'), by mutation alone where it is not, or with --plain.
Either starts from the format's corpus in tests. An input that breaks the word is kept and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORPORA = {"gguf": ROOT / "tests/corpus", "safetensors": ROOT / "tests/corpus-safetensors"}
sys.path.insert(0, str(ROOT))

TIMES, SLACK = 32, 1 << 16  # the memory allowed, in multiples of the file, and bytes besides
MAX_LEN = 4096  # bytes of an input
SLOW_S = 10.0  # for one of them; a thousand times what the largest takes
POOL = 2000  # inputs that plain mutation remembers
EVERY = 500  # inputs between two reports of the child


class BrokenWordError(Exception):
    """What must never happen."""


def parser_of(kind: str) -> Any:
    return importlib.import_module(f"numaload.formats.{kind}").parse_header


def check(raw: bytes, parse_header: Any) -> str:
    """Parse and touch everything. Returns: "accepted", or what the refusal said."""
    from numaload.errors import FormatError

    def read_at(offset: int, nbytes: int) -> bytes:
        if not 0 <= offset <= offset + nbytes <= len(raw):
            raise BrokenWordError(f"read of {nbytes} bytes at {offset}, the file has {len(raw)}")
        return raw[offset : offset + nbytes]

    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        header = parse_header(read_at, len(raw), "fuzzed")
        outcome = "accepted"
        touch(header, len(raw))
    except FormatError as error:
        outcome = f"{type(error).__name__}: {error}"
    if tracemalloc.is_tracing():
        used = tracemalloc.get_traced_memory()[1] - before
        if used > TIMES * len(raw) + SLACK:
            raise BrokenWordError(f"{used} bytes of memory for a file of {len(raw)}")
    return outcome


def touch(header: Any, size: int) -> None:
    for key, value in header.metadata.items():
        header.metadata.type_name(key)
        if hasattr(value, "tolist") and len(value.tolist()) != len(value):
            raise BrokenWordError(f"array {key!r} does not have the length it says")
    end = header.data_start
    for tensor in sorted(header.tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if not header.data_start <= tensor.offset <= tensor.offset + tensor.nbytes <= size:
            raise BrokenWordError(f"{tensor} is not inside of {size} bytes")
        if tensor.nbytes and tensor.offset < end:
            raise BrokenWordError(f"{tensor} begins before byte {end}, where another one ends")
        end = max(end, tensor.offset + tensor.nbytes)
        if tensor.qtype is not None:
            measure(tensor)


def measure(tensor: Any) -> None:
    """Whole blocks in every row, and the bytes of these."""
    from numaload.formats.qtypes import BLOCKS

    block_size, type_size = BLOCKS[tensor.qtype]
    columns, *others = tensor.dims or (1,)
    if columns % block_size or tensor.nbytes != columns // block_size * type_size * prod(others):
        raise BrokenWordError(f"{tensor} has other bytes than its blocks")


class Tally:
    """What was tried and what came of it."""

    def __init__(self, kind: str) -> None:
        self.parse_header = parser_of(kind)
        self.outcomes = Counter[str]()
        self.slowest, self.slowest_input = 0.0, b""
        self.begin = time.monotonic()

    @property
    def tried(self) -> int:
        return self.outcomes.total()

    def run(self, raw: bytes) -> str:
        start = time.thread_time()  # what else this machine does shall not count
        outcome = check(raw, self.parse_header)
        took = time.thread_time() - start
        if took > self.slowest:
            self.slowest, self.slowest_input = took, raw
        if took > SLOW_S:
            raise BrokenWordError(f"{took:.1f} s for a file of {len(raw)} bytes")
        self.outcomes[outcome.split(":")[0]] += 1
        return outcome

    def to_dict(self) -> dict[str, Any]:
        return {
            "tried": self.tried, "outcomes": dict(self.outcomes.most_common()),
            "slowest_ms": self.slowest * 1e3, "slowest_bytes": len(self.slowest_input),
            "seconds": time.monotonic() - self.begin,
        }  # fmt: skip


INTERESTING = (0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 255, 65535, 65536, 2**31, 2**32 - 1)
HUGE = (*INTERESTING, 2**32, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1)


def flip(data: bytearray, rng: random.Random, _: bytes) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def number32(data: bytearray, rng: random.Random, _: bytes) -> None:
    at = rng.randrange(len(data))
    data[at : at + 4] = rng.choice(INTERESTING).to_bytes(4, rng.choice(("little", "big")))


def number64(data: bytearray, rng: random.Random, _: bytes) -> None:
    at = rng.randrange(len(data))
    data[at : at + 8] = rng.choice(HUGE).to_bytes(8, rng.choice(("little", "little", "big")))


def nudge(data: bytearray, rng: random.Random, _: bytes) -> None:
    at = rng.randrange(len(data))
    data[at] = (data[at] + rng.randint(-3, 3)) % 256


def truncate(data: bytearray, rng: random.Random, _: bytes) -> None:
    del data[rng.randrange(len(data)) :]


def lengthen(data: bytearray, rng: random.Random, _: bytes) -> None:
    data += bytes(rng.choice((1, 31, 32, 512)))


def cut_out(data: bytearray, rng: random.Random, _: bytes) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 40)]


def repeat(data: bytearray, rng: random.Random, _: bytes) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randint(1, 60)]
    at = rng.randrange(len(data))
    data[at:at] = piece * rng.choice((1, 1, 2, 20))


def splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    at, start = rng.randrange(len(data)), rng.randrange(len(other))
    data[at : at + rng.choice((0, 40))] = other[start : start + rng.randint(1, 80)]


PIECES = (b'"', b"\\", b"{", b"}", b"[", b",", b":", b"-1", b"1e9", b"null", b'"a":', b"\\ud800")


def piece(data: bytearray, rng: random.Random, _: bytes) -> None:
    """Make a piece that means something in JSON, and is noise elsewhere."""
    at = rng.randrange(len(data))
    data[at : at + rng.randint(0, 2)] = rng.choice(PIECES)


MUTATIONS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    flip, flip, number32, number64, number64, nudge, nudge, truncate, lengthen, cut_out, repeat,
    splice, piece,
)  # fmt: skip


def mutated(seeds: list[bytes], pool: list[bytes], rng: random.Random) -> bytes:
    # Whatever came of mutations is mostly refused early: half of the time begin with what is not.
    data = bytearray(rng.choice(rng.choice((seeds, pool))))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if data:
            rng.choice(MUTATIONS)(data, rng, rng.choice(pool))
    return bytes(data[:MAX_LEN])


def plain(options: argparse.Namespace, tally: Tally) -> None:
    """Mutations of the corpus, and of whatever made the parser say something new."""
    rng = random.Random(options.seed)
    seeds = [path.read_bytes() for path in sorted(CORPORA[options.format].iterdir())]
    pool = list(seeds)
    seen: set[str] = set()
    tracemalloc.start()
    while tally.tried < options.runs and time.monotonic() - tally.begin < options.seconds:
        raw = mutated(seeds, pool, rng)
        outcome = guarded(raw, tally, options.keep)
        kind = re.sub(r"'.*'|[0-9]+", "", outcome)
        if raw and len(pool) < POOL and kind not in seen:
            seen.add(kind)
            pool.append(raw)


def guarded(raw: bytes, tally: Tally, keep: str) -> str:
    try:
        return tally.run(raw)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            path = os.path.join(keep, f"broken-{abs(hash(raw)):x}.seed")
            Path(path).write_bytes(raw)
            print(f"kept {path}", file=sys.stderr)
        raise


def child(options: argparse.Namespace) -> None:
    """Under atheris, which ends the process when it is done: the tally goes out all along."""
    import atheris

    with atheris.instrument_imports(include=["numaload"]):
        tally = Tally(options.format)
    tracemalloc.start()

    def one(raw: bytes) -> None:
        guarded(raw, tally, options.keep)
        if tally.tried % EVERY == 0 or tally.tried >= options.runs:
            Path(options.child).write_text(json.dumps(tally.to_dict()))

    atheris.Setup([sys.argv[0], *options.libfuzzer], one)
    atheris.Fuzz()


def guided(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Run a child under atheris; return its tally with the coverage reached, and its status."""
    with tempfile.TemporaryDirectory() as folder:
        report, grown = os.path.join(folder, "tally.json"), os.path.join(folder, "corpus")
        os.mkdir(grown)
        arguments = [
            f"-runs={options.runs}", f"-max_len={MAX_LEN}", f"-seed={options.seed}",
            f"-artifact_prefix={options.keep}/", "-timeout=20", "-rss_limit_mb=2048",
            *([f"-max_total_time={int(options.seconds)}"] if options.seconds < 1e9 else []),
            grown, str(CORPORA[options.format]),
        ]  # fmt: skip
        command = [sys.executable, __file__, "--child", report, "--runs", str(options.runs)]
        command += ["--format", options.format, "--keep", options.keep, "--", *arguments]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        found = json.loads(Path(report).read_text()) if os.path.exists(report) else {"tried": 0}
    progress = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)
    if progress:
        found["edges"], found["features"] = map(int, progress[-1])
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
    return found, done.returncode


def has_atheris() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


def summary(by: str, found: dict[str, Any]) -> str:
    outcomes = dict(found.get("outcomes", {}))
    accepted = outcomes.pop("accepted", 0)
    refused = ", ".join(f"{name} {count}" for name, count in outcomes.items())
    edges = f"{found['edges']} edges" if "edges" in found else "coverage unknown"
    return (
        f"{found['tried']} headers by {by} in {found.get('seconds', 0):.0f} s: {accepted} accepted,"
        f" refused: {refused}; {edges}; slowest {found.get('slowest_ms', 0):.1f} ms"
        f" for {found.get('slowest_bytes', 0)} bytes"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers of headers.")
    parser.add_argument("--format", choices=CORPORA, default="gguf")
    parser.add_argument("--runs", type=int, default=100_000, help="headers to try")
    parser.add_argument("--seconds", type=float, default=1e9, help="at most")
    parser.add_argument("--plain", action="store_true", help="mutate without coverage")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    parser.add_argument("--keep", default=".", metavar="DIR", help="for inputs that break the word")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("libfuzzer", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.makedirs(options.keep, exist_ok=True)
    if options.child:
        child(options)
        return 0
    if options.plain or not has_atheris():
        if not options.plain:
            print("atheris is missing (pip install 'numaload[fuzz]'): mutation without coverage")
        tally = Tally(options.format)
        plain(options, tally)
        print(summary("mutation", tally.to_dict()))
        return 0
    found, status = guided(options)
    print(summary("atheris", found))
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
