"""What ``numaload bench --compare`` calls a difference: nothing on purpose, and 20 % on purpose.

    python scripts/bench_compare.py [--pairs N] [--slow N] [--only BENCH]

Runs each bench N + 1 times and compares each run with the one before: every difference that is
called is an error. Then, N times, with 20 % more work in each call of numaload's compiled code, but
for the baselines: that must be called slower (of dequant and bandwidth; mirror and read have no
compiled code to slow down). All runs are processes of their own, of all benches in turns, as a user
would start them, beside whatever else this machine does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from numaload.demo import write_model

MODEL = "model.gguf"  # in the folder of the reports
BENCHES = {
    "dequant": ["--qtype", "Q4_K,Q8_0"],
    "bandwidth": ["--size", "160M"],
    "mirror": [MODEL],
    "read": [MODEL, "--cold", "--ways", "dd,pread-x4,prewarm", "--rounds", "9"],
}
SLOWDOWN = 0.2
MAIN = "import sys; from numaload.cli.main import main; sys.exit(main(sys.argv[1:]))"
# More work of a kind that leaves caches and memory alone: an address that is its own next one.
SLOW = f"""
import time
import numpy as np
from numaload.kernels import registry
from numaload.kernels.jit import objects

word = np.zeros(1, np.uint64)
word[0] = word.ctypes.data
spin = objects.Loop("chase")
STEPS = 1 << 22
begin = time.thread_time()
spin(word.ctypes.data, STEPS)
each = (time.thread_time() - begin) / STEPS
plain = objects.Loop.__call__


def slower(call):
    def run(*arguments):
        begin = time.thread_time()
        result = call(*arguments)
        more = {SLOWDOWN} * (time.thread_time() - begin)
        plain(spin, word.ctypes.data, 1 + int(more / each))
        return result

    return run


WHAT
{MAIN}
"""
WHAT = {
    "dequant": "registry.Compiled.__call__ = slower(registry.Compiled.__call__)",
    "bandwidth": """
load_fill = registry.load_fill
registry.load_fill = lambda: slower(load_fill())
objects.Loop.__call__ = slower(plain)
""",
}


def run(bench: str, folder: Path, name: str, old: str = "", *, slow: bool = False) -> Any:
    """Run a bench, keep its report as ``name``, and return it."""
    program = SLOW.replace("WHAT", WHAT[bench]) if slow else MAIN
    compare = ["--compare", str(folder / f"{bench}-{old}.json")] if old else []
    words = [str(folder / word) if word == MODEL else word for word in BENCHES[bench]]
    command = [sys.executable, "-c", program, "bench", bench, *words, *compare, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(done.stderr)
    (folder / f"{bench}-{name}.json").write_text(done.stdout, encoding="utf-8")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", metavar="N", type=int, default=20)
    parser.add_argument("--slow", metavar="N", type=int, default=10)
    parser.add_argument("--only", choices=BENCHES)
    parser.add_argument("--keep", metavar="DIR", help="keep all reports there")
    options = parser.parse_args()
    benches = [options.only] if options.only else list(BENCHES)
    called: dict[tuple[str, bool], list[list[dict[str, Any]]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_model(str(folder / MODEL), 300 << 20)
        for number in range(options.pairs + 1):
            for bench in benches:
                old = str(number - 1) if number else ""
                report = run(bench, folder, str(number), old)
                if number:
                    called[bench, False].append(report["comparison"]["rows"])
                if bench in WHAT and number < options.slow:
                    report = run(bench, folder, f"slow-{number}", str(number), slow=True)
                    called[bench, True].append(report["comparison"]["rows"])
                load = report["machine"]["load after"]
                print(f"{bench}, run {number}, load {load}", file=sys.stderr, flush=True)
    for (bench, slow), runs in sorted(called.items()):
        tell(f"{bench}, {'20 % slower' if slow else 'the same'}", runs)


def tell(title: str, runs: list[list[dict[str, Any]]]) -> None:
    rows = [row for run in runs for row in run]
    any_of = {
        verdict: sum(any(row["verdict"] == verdict for row in run) for run in runs)
        for verdict in ("slower", "faster")
    }
    seen = sorted(row["seen"] for row in rows if row["seen"] is not None)
    few = sum(row["verdict"] == "too few rounds" for row in rows)
    slower = sum(row["verdict"] == "slower" for row in rows)
    print(
        f"{title:24} pairs {len(runs)}, with a row called slower {any_of['slower']}, faster"
        f" {any_of['faster']}; rows {len(rows)}, slower {slower}, too few rounds {few}; seen from"
        f" {seen[0]:.0%} to {seen[-1]:.0%}, median {seen[len(seen) // 2]:.0%}"
    )


if __name__ == "__main__":
    main()
