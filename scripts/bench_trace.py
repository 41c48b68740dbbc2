"""Measure what spans cost: this code beside a checkout without them, in turns.

    git worktree add /tmp/before 4a0a164
    scripts/bench_trace.py --before /tmp/before

A process for each turn and state, in alternating order; medians of all turns, and of the ratios
within a turn. States: see ``STATES``; "api" and "sdk" need opentelemetry-sdk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

STATES = {
    "before": "the other checkout",
    "off": "nobody takes spans",
    "recorded": "into a list",
    "file": "NUMALOAD_TRACE",
    "api": "the program has imported opentelemetry, without an SDK",
    "sdk": "an SDK that exports nothing",
}
MEASURE = """
import json, sys, time

state, model, small = sys.argv[1:]
if state in ("api", "sdk"):
    from opentelemetry import metrics, trace as telemetry
if state == "sdk":
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    telemetry.set_tracer_provider(TracerProvider())
    metrics.set_meter_provider(MeterProvider())
import numaload, numpy as np

if state != "before":
    from numaload import trace
if state == "recorded":
    trace._takers = ([].append,)

def timed(work, count):
    # Microseconds of a call: the least of 20 series, which others disturbed least.
    series = []
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(count):
            work()
        series.append((time.perf_counter() - begin) / count * 1e6)
    return min(series)

def one_span():
    with trace.span("read", 5, (), "m.gguf"):
        pass

def opened():
    numaload.open(model).close()

weights = numaload.open(small)
tensor = next(one for one in weights.values() if one.qtype.name == "Q8_0")
rows = (0, 65536 // tensor.blocks.shape[1])
out = np.empty((rows[1], tensor.shape[1]), np.float32)

def made():
    tensor.dequantize(out=out, rows=rows)

works = {"open": opened, "dequantize": made}
if state != "before":
    works["span"] = one_span
found = {name: timed(work, 2000 if name == "span" else 50) for name, work in works.items()}
counts = dict.fromkeys(works, 0)
for asked in ("span", "importing", "current", "under") if state != "before" else ():
    def counted(*words, inner=getattr(trace, asked), **more):
        counts[name] += 1
        return inner(*words, **more)
    setattr(trace, asked, counted)
for name, work in works.items():
    work()
print(json.dumps([found, counts]))
"""


def measured(state: str, before: str, model: str, small: str) -> list[dict[str, float]]:
    """Return {work: microseconds of a call} and {work: calls of functions of numaload.trace}."""
    environment = os.environ | {"PYTHONPATH": before if state == "before" else str(ROOT)}
    if state == "file":
        environment["NUMALOAD_TRACE"] = f"{small}.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, state, model, small],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--states", default="off,recorded,file", help=", ".join(STATES))
    options = parser.parse_args()
    from commands import sparse_model  # of the tests
    from numaload.demo import write_model

    states = ["before", *options.states.split(",")]
    rows: dict[str, list[dict[str, float]]] = {state: [] for state in states}
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        model = sparse_model(Path(folder) / "sparse.gguf", 1 << 30)
        (small,) = write_model(f"{folder}/small.gguf", 8 << 20)
        for turn in range(options.rounds):
            for state in states if turn % 2 else states[::-1]:
                found, counts[state] = measured(state, options.before, model, small)
                rows[state].append(found)
    print("calls:", counts["off"])
    for state in states[1:]:
        print(f"a span, {state}: {median(row['span'] for row in rows[state]) * 1e3:.0f} ns")
    for work in ("open", "dequantize"):
        base = [row[work] for row in rows["before"]]
        for state in states:
            times = [row[work] for row in rows[state]]
            low, middle, high = quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)
            print(
                f"{work:11}{state:9}{median(times):9.2f} us  {middle:6.3f} times before"
                f" (quartiles {low:.3f} to {high:.3f})"
            )


if __name__ == "__main__":
    main()
