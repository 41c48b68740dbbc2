"""The tables and the plot of dequantization in README.md and docs/kernels.md, from measurements.

    dequant_figures.py [--measure] [--count] [--ggml [NAME=]PATH]... [--qtype LIST]

--measure writes docs/dequant.json, --count docs/instructions.json, with --qtype only these types in
them; from these the tables and docs/dequant.svg are made, again each time. The first --ggml is the
library as it is shipped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from numaload.bench import plot, table, wanted
from numaload.bench.contenders import ALLOCATING_TO_GGUF, GGUF, GGUF_WARM, PAST
from numaload.bench.dequant import DequantReport
from numaload.kernels import registry

ROOT = Path(__file__).parents[1]
FIGURES, COUNTS = ROOT / "docs/dequant.json", ROOT / "docs/instructions.json"
PICTURE, README, KERNELS = ROOT / "docs/dequant.svg", ROOT / "README.md", ROOT / "docs/kernels.md"
END = "<!-- end -->"
INSTRUCTIONS = 24  # of this processor in a nanosecond, from the two types that need most of them
COLUMNS = {
    "type", "bits", "float32 Gw/s", "x past caches", "x ggml", "x native", "x gguf-py",
    "float16 Gw/s", "bfloat16 Gw/s",
}  # fmt: skip


def measure(ggml: list[str], qtypes: list[str]) -> None:
    words = [word for path in ggml for word in ("--ggml", path)]
    command = [sys.executable, "-m", "numaload", "bench", "dequant", "--threads", "2", *words]
    done = subprocess.run(
        [*command, "--rounds", "11", *qtypes, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    data = json.loads(done.stdout)
    data["libraries"] = {name: Path(path).name for name, path in data["libraries"].items()}
    for row in data["rows"]:
        for kind in ("rates", "ratios"):
            row[kind] = {name: round(value, 3) for name, value in row[kind].items()}
    if qtypes:
        old = json.loads(FIGURES.read_text(encoding="utf-8"))
        new = {row["qtype"]: row for row in old["rows"]} | {r["qtype"]: r for r in data["rows"]}
        data = old | {"rows": list(new.values())}
    FIGURES.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def count(ggml: list[str], qtypes: list[str]) -> None:
    shipped = ["--ggml", ggml[0].rpartition("=")[2]] if ggml else []
    command = [sys.executable, str(ROOT / "scripts/count_instructions.py"), "--json", *shipped]
    done = subprocess.run([*command, *qtypes], stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(COUNTS.read_text(encoding="utf-8")) if qtypes else {}
    for name, row in json.loads(done.stdout).items():
        rows[name] = {k: round(v, 2) for k, v in row.items()}
    COUNTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def report() -> DequantReport:
    return DequantReport.from_dict(json.loads(FIGURES.read_text(encoding="utf-8")))


def readme_table() -> str:
    return table.markdown(report(), COLUMNS)


def kernels_table() -> str:
    """Rate and instructions of each type."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    lines = [
        "| type | limit | found | x past caches | x ggml | instructions | AVX2 | ggml |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    fill = report().baselines[PAST] / 4
    for row in report().rows:
        count = counts[row.qtype]
        moved = 4 / (4 + row.bits_per_weight / 8)  # it is read, too
        cells = [
            row.qtype,
            f"{min(fill * moved, INSTRUCTIONS / count['native float32']):.1f}",
            f"{row.rates['float32']:.1f}",
            f"{row.ratios[PAST]:.2f}",
            _number(row.ratios.get("ggml")),
            *(_three(count, way) for way in ("native", "avx2")),
            _number(count.get("ggml")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def findings_text() -> str:
    """How the figures stand to what was wanted, and what is said of gguf-py."""
    lines = [f"- {finding}" for finding in wanted.findings(report())]
    rows = [row for row in report().rows if GGUF in row.ratios]
    warm, both = (
        {row.qtype: row.ratios[name] for row in rows} for name in (GGUF_WARM, ALLOCATING_TO_GGUF)
    )
    lines.append(f"- `gguf-py warm`: {_ends(warm)}; `{ALLOCATING_TO_GGUF}`: {_ends(both)}")
    return "\n".join(lines)


def _ends(ratios: dict[str, float]) -> str:
    ranked = sorted(ratios, key=lambda name: ratios[name])
    few = ", ".join(f"{ratios[name]:.1f} ({name})" for name in ranked[:3])
    return f"{few} to {ratios[ranked[-1]]:.0f} ({ranked[-1]})"


def _three(count: dict[str, float], way: str) -> str:
    return ", ".join(f"{count[f'{way} {dtype}']:.1f}" for dtype in registry.DTYPES)


def layouts() -> str:
    """The diagrams above the kernels, family by family."""
    modules = dict.fromkeys(module for module, _ in registry.KERNELS.values())
    sources = {name: (ROOT / f"kernels/{name}.py").read_text(encoding="utf-8") for name in modules}
    parts = []
    for name, source in sources.items():
        diagrams = re.findall(r"((?:^#.*\n)+)def ", source, re.MULTILINE)
        plain = [re.sub("^# ?", "", text, flags=re.MULTILINE) for text in diagrams]
        parts.append(f"`kernels/{name}.py`\n\n```\n{chr(10).join(plain)}```")
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def renewed(path: Path) -> str:
    """What is in ``path``, with every part that is made here as the figures and sources are."""
    text = path.read_text(encoding="utf-8")
    for begin, make in PARTS[path].items():
        shown = f"<!-- {begin} -->\n{make()}\n{END}"
        text = re.sub(f"<!-- {begin} -->.*?{END}", lambda _, s=shown: s, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


PARTS = {
    README: {"table of scripts/dequant_figures.py": readme_table},
    KERNELS: {
        "table of scripts/dequant_figures.py": kernels_table,
        "findings of scripts/dequant_figures.py": findings_text,
        "layouts of scripts/dequant_figures.py": layouts,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--ggml", action="append", default=[])
    parser.add_argument("--qtype")
    options = parser.parse_args()
    qtypes = ["--qtype", options.qtype] if options.qtype else []
    if options.count:
        count(options.ggml, qtypes)
    if options.measure:
        measure(options.ggml, qtypes)
    for path in PARTS:
        path.write_text(renewed(path), encoding="utf-8")
    plot.draw(report(), str(PICTURE))


if __name__ == "__main__":
    main()
