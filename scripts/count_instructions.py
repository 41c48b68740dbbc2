"""Instructions per weight of every kernel: no other load on the machine counts.

    count_instructions.py [--qtype LIST] [--dtype LIST] [--ggml PATH] [--json]

As AVX2 by callgrind, and for this processor by single steps (valgrind 3 does not know AVX-512).
Needs a C compiler and valgrind: sudo apt-get install -y gcc valgrind
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from numaload.bench.baselines import Ggml
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry

AVX2 = {
    "NUMBA_CPU_NAME": "x86-64-v3",
    "NUMBA_CPU_FEATURES": "+ssse3,+sse4.2,+avx2,+bmi,+bmi2,+f16c,+fma,+popcnt",
}
BLOCKS = {"callgrind": 4096, "steps": 64}  # of 256 weights: what is done once hardly counts
# Called with: an object file or library, the function, kernel or row, bytes of input, how many
# blocks or weights, steps to be counted or not. A child calls the function between two stops.
DRIVER = r"""
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>
typedef int kernel(long *, void **, const void *, void *, long, long, const float *);
typedef void row(const void *, void *, long);
static long steps(pid_t child) {
  int status;
  long count = 0;
  waitpid(child, &status, 0);
  for (ptrace(PTRACE_SINGLESTEP, child, 0, 0); ; ptrace(PTRACE_SINGLESTEP, child, 0, 0)) {
    waitpid(child, &status, 0);
    if (WIFEXITED(status) || WIFSIGNALED(status)) return -1;
    if (WSTOPSIG(status) == SIGUSR1) { kill(child, SIGKILL); return count; }
    if (WSTOPSIG(status) != SIGTRAP) { kill(child, SIGKILL); return -1; }
    count++;
  }
}
int main(int n, char **word) {
  void *library = dlopen(word[1], RTLD_NOW), *function = library ? dlsym(library, word[2]) : 0;
  long bytes = atol(word[4]), count = atol(word[5]), done = 0;
  if (!function) { fprintf(stderr, "%s\n", dlerror()); return 3; }
  unsigned char *in = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  unsigned char *out = aligned_alloc(4096, 4096 * 256 * 4);
  for (long i = 0; i < bytes; i++) in[i] = (i * 2654435761u >> 13) & 0x3b;
  float *scales = aligned_alloc(4096, 4096 * 16 * 4);
  for (long i = 0; i < 4096 * 16; i++) scales[i] = 1;
  void *exception = 0;
  if (word[6][0] == 's') {
    pid_t child = fork();
    if (child) { printf("Collected : %ld\n", steps(child)); return 0; }
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
  }
  if (word[3][0] == 'k') ((kernel *)function)(&done, &exception, in, out, count, 1, scales);
  else ((row *)function)(in, out, count);
  if (word[6][0] == 's') raise(SIGUSR1);
  return 0;
}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qtype", help="types, with commas, those of SCALED too; all of GGUF's")
    parser.add_argument("--dtype", default="float32,float16,bfloat16")
    parser.add_argument("--ggml", help="a libggml-base.so, for the same of its functions")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for needed in ("cc", "valgrind"):
        if not shutil.which(needed):
            print(f"{needed} is missing: sudo apt-get install -y gcc valgrind", file=sys.stderr)
            return 1
    counted = counts(options)
    if options.json:
        print(json.dumps(counted, indent=1))
        return 0
    columns = list(dict.fromkeys(name for row in counted.values() for name in row))
    print(f"{'type':8}" + "".join(f"{name:>18}" for name in columns))
    for name, row in counted.items():
        print(f"{name:8}" + "".join(f"{row.get(c, float('nan')):18.2f}" for c in columns))
    return 0


def counts(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return {type: {"avx2 float32", "native float32", ..., "ggml": instructions per weight}}."""
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        driver = _driver(Path(folder))
        for label, variables in (("avx2", AVX2), ("native", {})):
            (Path(folder) / label).mkdir()
            for name, dtype, library in _libraries(options, Path(folder) / label, variables):
                way = "callgrind" if label == "avx2" else "steps"
                sizes = registry.step(code_of(name))
                found = _count(driver, str(library), library.stem, "kernel", sizes, way)
                rows.setdefault(name, {})[f"{label} {dtype}"] = found
        for name, row in rows.items():
            qtype = code_of(name)
            if not options.ggml or isinstance(qtype, str):
                continue
            if Ggml(options.ggml).convert(qtype) is not None:
                symbol, sizes = Ggml.function_name(qtype), registry.step(qtype)
                row["ggml"] = _count(driver, options.ggml, symbol, "row", sizes, "callgrind")
    return rows


COMPILE = """
import sys
from pathlib import Path
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry
for name in sys.argv[2].split(","):
    for dtype in sys.argv[3].split(","):
        what = name if name in registry.SCALED else QuantType[name]
        function, code = registry.compiled(what, dtype)
        (Path(sys.argv[1]) / f"{function}.o").write_bytes(code)
        print(name, dtype, function)
"""


def code_of(name: str) -> registry.Code:
    return name if name in registry.SCALED else QuantType[name]


def _libraries(
    options: argparse.Namespace, folder: Path, variables: dict[str, str]
) -> list[tuple[str, str, Path]]:
    """Compile all kernels with these variables, in another process: (type, dtype, library)."""
    known = [one.name for one in registry.KERNELS]
    names = options.qtype or ",".join(known)
    for name in names.split(","):
        if name not in (*known, *registry.SCALED):
            raise SystemExit(f"type {name}: expected of {', '.join((*known, *registry.SCALED))}")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder), names, options.dtype], text=True, check=True,
        stdout=subprocess.PIPE,
        env=os.environ | variables | {"NUMALOAD_CACHE_DIR": str(folder / "cache")},
    )  # fmt: skip
    found = []
    for line in done.stdout.splitlines():
        name, dtype, function = line.split()
        found.append((name, dtype, _link(folder / f"{function}.o")))
    return found


def _driver(folder: Path) -> Path:
    source = folder / "driver.c"
    source.write_text(DRIVER)
    command = ["cc", "-O1", str(source), "-o", str(folder / "driver"), "-ldl"]
    subprocess.run(command, check=True)
    return folder / "driver"


def _link(compiled: Path) -> Path:
    """Link a library. Absolute addresses are fine where the loader may write to code, as here."""
    path = compiled.with_suffix(".so")
    command = ["cc", "-shared", "-Wl,-z,notext", str(compiled), "-o", str(path)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return path


def _count(
    driver: Path, library: str, symbol: str, kind: str, sizes: tuple[int, int], way: str
) -> float:
    weights, nbytes = sizes
    total = BLOCKS[way] * 256
    amount = total // weights if kind == "kernel" else total
    command = [str(driver), library, symbol, kind, str(total // weights * nbytes), str(amount), way]
    if way == "callgrind":
        options = ["--tool=callgrind", "--callgrind-out-file=/dev/null"]
        command = ["valgrind", *options, f"--toggle-collect={symbol}", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Collected : (\d+)", done.stdout + done.stderr)  # -1 is none
    if done.returncode or not found:
        raise RuntimeError(f"{symbol}: {done.stderr[-500:]}")
    return int(found[1]) / total


if __name__ == "__main__":
    sys.exit(main())
