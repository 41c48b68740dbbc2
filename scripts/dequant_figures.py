"""Make the tables and the plot of dequantization in docs/types.md and docs/kernels.md.

    dequant_figures.py [--measure] [--count] [--ggml [NAME=]PATH]... [--qtype LIST]

--measure writes docs/dequant.json, --count docs/instructions.json, with --qtype only these types in
them; from these the tables and docs/dequant.svg are made, again each time. The first --ggml is the
library as it is shipped. How the figures stand to what kernels must reach is printed; exit status 1
if a must is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from numaload.bench import table
from numaload.bench.dequant import (
    ALLOCATING_TO_GGUF,
    GGUF,
    GGUF_WARM,
    PAST,
    DequantReport,
    Row,
)
from numaload.kernels import registry

ROOT = Path(__file__).parents[1]
FIGURES, COUNTS = ROOT / "docs/dequant.json", ROOT / "docs/instructions.json"
PICTURE, TYPES, KERNELS = (ROOT / f"docs/{n}" for n in ("dequant.svg", "types.md", "kernels.md"))
END = "<!-- end -->"
INSTRUCTIONS = 24  # of this processor in a nanosecond, from the two types that need most of them
SLOW_IN_GGML = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q1_0"}
COLUMNS = {
    "type", "bits", "float32 Gw/s", "x past caches", "x ggml", "x native", "x gguf-py",
    "float16 Gw/s", "bfloat16 Gw/s",
}  # fmt: skip


@dataclass(frozen=True)
class Level:
    """At least ``least`` of the ratio to ``baseline``, of each type that ``types`` takes, or of
    all of them by ``of``. level: must, or goal.
    """

    level: str
    what: str
    baseline: str
    least: float
    types: Callable[[str], bool] = lambda _: True
    of: Callable[[Iterable[float]], float] = min


LEVELS = (
    Level("must", "as fast as ggml as shipped", "ggml", 1.0),
    Level("must", "6 times ggml as shipped (IQ2, IQ3, Q1_0)", "ggml", 6.0,
          SLOW_IN_GGML.__contains__),
    Level("must", "10 times gguf-py (not F16)", "gguf-py", 10.0, lambda name: name != "F16"),
    Level("must", "float16: 0.8 of float32's weights", "float16", 0.8),
    Level("must", "bfloat16: 0.8 of float32's weights", "bfloat16", 0.8),
    Level("must", "several threads: 0.83 of what they could", "threads", 1 / 1.2),
    Level("must", "two callers at once: 0.7 of half each", "two callers", 0.7),
    Level("goal", "as fast as ggml built natively", "native", 1.0),
    Level("goal", "0.45 of filling past the caches", "past caches", 0.45),
    Level("goal", "median type: 0.75 of filling past the caches", "past caches", 0.75, of=median),
    Level("goal", "float16: more weights than float32", "float16", 1.0),
    Level("goal", "bfloat16: more weights than float32", "bfloat16", 1.0),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """How a report stands to a level. where: the type that has least; empty for a median."""

    level: Level
    found: float
    where: str

    @property
    def met(self) -> bool:
        return self.found >= self.level.least

    def __str__(self) -> str:
        level, where = self.level, f" ({self.where})" if self.where else ""
        verdict = "met" if self.met else "MISSED"
        return (
            f"{level.level}: {level.what}: {self.found:.2f}{where}, wanted {level.least:.2f}:"
            f" {verdict}"
        )


def judged(report: DequantReport) -> list[Finding]:
    """Judge every level whose baseline was measured."""
    found = []
    for level in LEVELS:
        rows = [row for row in report.rows if level.baseline in row.ratios]
        ratios = {row.qtype: row.ratios[level.baseline] for row in rows if level.types(row.qtype)}
        if ratios:
            worst = min(ratios, key=lambda name: ratios[name])
            where = worst if level.of is min else ""
            found.append(Finding(level, level.of(ratios.values()), where))
    return found


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
    known = {field.name for field in fields(DequantReport)} - {"series"}  # which has every round
    data = {name: found for name, found in data.items() if name in known}
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
    data = json.loads(FIGURES.read_text(encoding="utf-8"))
    return DequantReport(**data | {"rows": [Row(**row) for row in data["rows"]]})


def types_table() -> str:
    names, rows = table.dequant_table(report())
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    shown = [i for i, name in enumerate(names) if name in COLUMNS]
    return "\n".join(f"| {' | '.join(line[i] for i in shown)} |" for line in lines)


def kernels_table() -> str:
    """Show rate and instructions of each type."""
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


def ranges_text() -> str:
    """Say of each ratio which three types have least, and which one has most."""
    named = {
        "ggml as shipped": "ggml", "ggml built natively": "native", "gguf-py": GGUF,
        "gguf-py warm": GGUF_WARM, ALLOCATING_TO_GGUF: ALLOCATING_TO_GGUF,
        "filling past the caches": PAST, "float16 to float32": "float16",
        "bfloat16 to float32": "bfloat16", "two threads to what they could reach": "threads",
        "two callers to half of their threads each": "two callers",
    }  # fmt: skip
    rows = report().rows
    return "\n".join(
        f"- {what}: {_ends({row.qtype: row.ratios[name] for row in rows if name in row.ratios})}"
        for what, name in named.items()
    )


def _ends(ratios: dict[str, float]) -> str:
    ranked = sorted(ratios, key=lambda name: ratios[name])
    few = ", ".join(f"{ratios[name]:.2f} ({name})" for name in ranked[:3])
    return f"{few} to {ratios[ranked[-1]]:.1f} ({ranked[-1]})"


def _three(count: dict[str, float], way: str) -> str:
    return ", ".join(f"{count[f'{way} {dtype}']:.1f}" for dtype in registry.DTYPES)


def layouts() -> str:
    """Collect the diagrams above the kernels, family by family."""
    every = (*registry.KERNELS.values(), *registry.SCALED.values())
    modules = dict.fromkeys(module for module, *_ in every)
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
    """Return what is in ``path``, with every part that is made here made anew."""
    text = path.read_text(encoding="utf-8")
    for begin, make in PARTS[path].items():
        shown = f"<!-- {begin} -->\n{make()}\n{END}"
        text = re.sub(f"<!-- {begin} -->.*?{END}", lambda _, s=shown: s, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


PARTS = {
    TYPES: {"table of scripts/dequant_figures.py": types_table},
    KERNELS: {
        "table of scripts/dequant_figures.py": kernels_table,
        "ranges of scripts/dequant_figures.py": ranges_text,
        "layouts of scripts/dequant_figures.py": layouts,
    },
}


def main() -> int:
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
    table.plot(report(), str(PICTURE))
    found = judged(report())
    print(*found, sep="\n")
    return int(any(one.level.level == "must" and not one.met for one in found))


if __name__ == "__main__":
    sys.exit(main())
