"""The tables and the plot of dequantization in README.md and docs/kernels.md, from measurements.

    dequant_figures.py [--measure] [--count] [--ggml [NAME=]PATH]...

--measure writes docs/dequant.json, --count docs/instructions.json; from these the tables and
docs/dequant.svg are made, again each time. The first --ggml is the library as it is shipped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from numaload.bench import plot, table
from numaload.bench.dequant import DequantReport
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry

ROOT = Path(__file__).parents[1]
FIGURES, COUNTS = ROOT / "docs/dequant.json", ROOT / "docs/instructions.json"
PICTURE, README, KERNELS = ROOT / "docs/dequant.svg", ROOT / "README.md", ROOT / "docs/kernels.md"
BEGIN, END = "<!-- table of scripts/dequant_figures.py -->", "<!-- end of the table -->"
COLUMNS = {
    "type", "bits", "float32 Gw/s", "x past caches", "x ggml", "x native", "x gguf-py",
    "float16 Gw/s", "bfloat16 Gw/s",
}  # fmt: skip


def measure(ggml: list[str]) -> None:
    words = [word for path in ggml for word in ("--ggml", path)]
    command = [sys.executable, "-m", "numaload", "bench", "dequant", "--threads", "2", *words]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    data = json.loads(done.stdout)
    data["libraries"] = {name: Path(path).name for name, path in data["libraries"].items()}
    for row in data["rows"]:
        for kind in ("rates", "ratios"):
            row[kind] = {name: round(value, 3) for name, value in row[kind].items()}
    FIGURES.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def count(ggml: list[str]) -> None:
    shipped = ["--ggml", ggml[0].rpartition("=")[2]] if ggml else []
    command = [sys.executable, str(ROOT / "scripts/count_instructions.py"), "--json", *shipped]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout)
    rounded = {name: {k: round(v, 2) for k, v in row.items()} for name, row in rows.items()}
    COUNTS.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


def report() -> DequantReport:
    return DequantReport.from_dict(json.loads(FIGURES.read_text(encoding="utf-8")))


def readme_table() -> str:
    return table.markdown(report(), COLUMNS)


def kernels_table() -> str:
    """Layout, rate and instructions of each type."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    lines = [
        "| type | weights | bytes | in | found | x fill | x ggml | instructions | of ggml |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report().rows:
        qtype, instructions = QuantType[row.qtype], counts[row.qtype]
        weights, nbytes = BLOCKS[qtype]
        per_weight = ", ".join(f"{instructions[name]:.1f}" for name in registry.DTYPES)
        cells = [
            row.qtype, weights, nbytes, f"`{registry.KERNELS[qtype][0]}.py`",
            f"{row.rates['float32']:.1f}", f"{row.ratios['past caches']:.2f}",
            _number(row.ratios.get("ggml")), per_weight, _number(instructions.get("ggml")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def renewed(path: Path, text: str) -> str:
    """What is in ``path``, with ``text`` for the table."""
    shown = f"{BEGIN}\n{text}\n{END}"
    old = path.read_text(encoding="utf-8")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: shown, old, flags=re.DOTALL)


TABLES = {README: readme_table, KERNELS: kernels_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--ggml", action="append", default=[])
    options = parser.parse_args()
    if options.count:
        count(options.ggml)
    if options.measure:
        measure(options.ggml)
    for path, make in TABLES.items():
        path.write_text(renewed(path, make()), encoding="utf-8")
    plot.draw(report(), str(PICTURE))


if __name__ == "__main__":
    main()
