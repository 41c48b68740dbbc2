"""Instructions per weight of every kernel, by callgrind: no other load on the machine counts.

    count_instructions.py [--qtype LIST] [--dtype LIST] [--ggml PATH] [--json]

Kernels are compiled for AVX2, the widest that valgrind 3 knows. Needs a C compiler and valgrind:
sudo apt-get install -y gcc valgrind
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

AVX2 = {
    "NUMBA_CPU_NAME": "x86-64-v3",
    "NUMBA_CPU_FEATURES": "+ssse3,+sse4.2,+avx2,+bmi,+bmi2,+f16c,+fma,+popcnt",
}
BLOCKS = 4096  # of 256 weights, so that what is done once per call does not count
# Called with: a kernel's object file or a library, the function, bytes of input and output.
DRIVER = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
typedef int kernel(long *, void **, const void *, void *, long, long);
typedef void row(const void *, void *, long);
int main(int n, char **word) {
  void *library = dlopen(word[1], RTLD_NOW), *function = library ? dlsym(library, word[2]) : 0;
  long bytes = atol(word[4]), count = atol(word[5]), done = 0;
  if (!function) { fprintf(stderr, "%s\n", dlerror()); return 3; }
  unsigned char *in = aligned_alloc(4096, bytes), *out = aligned_alloc(4096, 4 * BLOCKS * 256);
  for (long i = 0; i < bytes; i++) in[i] = (i * 2654435761u >> 13) & 0x3b;
  void *exception = 0;
  if (word[3][0] == 'k') ((kernel *)function)(&done, &exception, in, out, count, 1);
  else ((row *)function)(in, out, count);
  return 0;
}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qtype", help="types, with commas; all unless given")
    parser.add_argument("--dtype", default="float32,float16,bfloat16")
    parser.add_argument("--ggml", help="a libggml-base.so, for the same of its functions")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for needed in ("cc", "valgrind"):
        if not shutil.which(needed):
            print(f"{needed} is missing: sudo apt-get install -y gcc valgrind", file=sys.stderr)
            return 1
    if os.environ.get("NUMBA_CPU_NAME") != AVX2["NUMBA_CPU_NAME"]:
        with tempfile.TemporaryDirectory() as cache:  # read at import, so in another process
            variables = os.environ | AVX2 | {"NUMALOAD_CACHE_DIR": cache}
            return subprocess.run(
                [sys.executable, *sys.argv], env=variables, check=False
            ).returncode
    counted = count(options)
    if options.json:
        print(json.dumps(counted, indent=1))
        return 0
    columns = list(dict.fromkeys(name for row in counted.values() for name in row))
    print(f"{'type':8}" + "".join(f"{name:>10}" for name in columns))
    for name, row in counted.items():
        print(f"{name:8}" + "".join(f"{row.get(c, float('nan')):10.2f}" for c in columns))
    return 0


def count(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{type: {dtype or "ggml": instructions per weight}}."""
    from numaload.bench.ggml import Ggml
    from numaload.formats.qtypes import QuantType
    from numaload.kernels import registry

    names = (options.qtype or ",".join(q.name for q in registry.KERNELS)).upper().split(",")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        driver = _driver(Path(folder))
        for name in names:
            qtype = QuantType[name]
            row = rows[name] = {}
            for dtype in options.dtype.split(","):
                library, symbol = _library(qtype, dtype, Path(folder))
                row[dtype] = _count(driver, library, symbol, "kernel", registry.step(qtype))
            if options.ggml and Ggml(options.ggml).convert(qtype) is not None:
                symbol = Ggml.function_name(qtype)
                row["ggml"] = _count(driver, options.ggml, symbol, "row", registry.step(qtype))
            if not options.json and sys.stderr.isatty():
                print(name, row, file=sys.stderr)
    return rows


def _driver(folder: Path) -> Path:
    source = folder / "driver.c"
    source.write_text(DRIVER)
    subprocess.run(
        ["cc", "-O1", f"-DBLOCKS={BLOCKS}", source, "-o", folder / "driver", "-ldl"], check=True
    )
    return folder / "driver"


def _library(qtype: object, dtype: str, folder: Path) -> tuple[str, str]:
    """The kernel as a shared library, and its function."""
    from numaload.kernels import registry

    name, code = registry.compiled(qtype, dtype)  # type: ignore[arg-type]
    (folder / f"{name}.o").write_bytes(code)
    path = folder / f"{name}.so"
    # Compiled with absolute addresses: fine where the loader may write to code, as here.
    subprocess.run(
        ["cc", "-shared", "-Wl,-z,notext", folder / f"{name}.o", "-o", path],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return str(path), name


def _count(driver: Path, library: str, symbol: str, kind: str, sizes: tuple[int, int]) -> float:
    weights, nbytes = sizes
    blocks = BLOCKS * 256 // weights
    amount = blocks if kind == "kernel" else BLOCKS * 256
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    command += [f"--toggle-collect={symbol}", str(driver), library, symbol, kind]
    command += [str(blocks * nbytes), str(amount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise RuntimeError(f"{symbol}: {done.stderr[-500:]}")
    return int(found[1]) / (BLOCKS * 256)


if __name__ == "__main__":
    sys.exit(main())
