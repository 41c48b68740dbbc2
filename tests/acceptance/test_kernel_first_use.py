"""Compiling on first use: while others fork, interrupt, or configure numba in odd ways."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import os, signal, sys, threading, time, warnings
import numpy as np
from numaload.dequantize import DTYPES, dequantize_blocks
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.machine.topology import topology
from numaload.machine.workers import pool
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
def use(name):
    block_size, type_size = BLOCKS[QuantType[name]]
    out = np.empty(64 * block_size, np.float32)
    dequantize_blocks(np.full((64, type_size), 0x21, "u1"), QuantType[name], out.dtype, out,
                      pool(topology()))
    return float(out.astype(float).sum())
"""


def run(
    program: str, cache: Path, status: int = 0, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NUMALOAD_CACHE_DIR": str(cache)} | (variables or {})
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=300,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done


FORKING = """
expected = use("Q8_0")
from numaload.kernels.jit import compile as compiler
entered = threading.Event()
real = compiler.compile_kernel
def compile_kernel(*arguments):
    entered.set()
    return real(*arguments)
compiler.compile_kernel = compile_kernel
other = threading.Thread(target=use, args=("IQ3_S",))
other.start()
entered.wait()
if (child := os.fork()) == 0:
    os._exit(0 if use("Q8_0") == expected and use("Q4_0") and use("IQ3_S") else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
other.join()
"""


def test_a_child_forked_while_another_thread_compiles(tmp_path: Path) -> None:
    """It uses kernels that are there, and compiles its own: it does not wait for ever."""
    assert run(FORKING, tmp_path).stdout == "0\n"


FREEING = """
import llvmlite.binding as llvm
entered, over = threading.Event(), threading.Event()
def pause():
    if threading.current_thread() is other and not entered.is_set():
        entered.set()
        over.wait(60)
llvm.ffi.register_lock_callback(pause, lambda: None)  # called with LLVM's lock held
other = threading.Thread(target=llvm.get_host_cpu_name)
expected = use("Q8_0")
other.start()
entered.wait()
threading.Timer(0.3, over.set).start()
if (child := os.fork()) == 0:
    signal.alarm(60)
    os._exit(0 if use("Q4_0") and use("Q8_0") == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
other.join()
use("Q5_0")
"""


def test_a_child_forked_while_another_thread_is_in_llvm(tmp_path: Path) -> None:
    """Any thread may be: it frees what LLVM made and nobody needs any more."""
    assert run(FREEING, tmp_path).stdout == "0\n"


IMPORTING = """
import os, sys, threading, warnings
import numaload
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
topology = numaload.topology  # the first use: from now on forks wait
importing, forking = threading.Event(), threading.Event()
class Pause:
    def find_spec(self, name, *_):
        if name == sys.argv[1] and not importing.is_set():
            importing.set()
            forking.wait()
def use():
    import numpy as np
    from numaload.dequantize import dequantize_blocks
    from numaload.formats.qtypes import QuantType
    from numaload.machine.workers import pool
    out = np.zeros(256, np.float32)
    blocks = np.full((1, 144), 0x21, "u1")
    dequantize_blocks(blocks, QuantType.Q4_K, out.dtype, out, pool(topology()))
    return float(out.sum())
sys.meta_path.insert(0, Pause())
os.register_at_fork(before=forking.set)
found = []
other = threading.Thread(target=lambda: found.append(use()))
other.start()
importing.wait()
if (child := os.fork()) == 0:
    os._exit(0 if use() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
other.join()
assert found == [use()]
"""


@pytest.mark.parametrize(
    "module",
    ["numpy", "numaload.kernels.registry", "numba.core.types.functions"],  # the last one logs
)
def test_a_child_forked_while_another_thread_imports(tmp_path: Path, module: str) -> None:
    """It finds no half of a module, nor does the parent wait for itself."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, module], capture_output=True, text=True, timeout=300,
        env=os.environ | {"NUMALOAD_CACHE_DIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


WAITING = """
from numaload.kernels.jit import compile as compiler
use("Q8_0")
entered, go = threading.Event(), threading.Event()
real = compiler.compile_kernel
def compile_kernel(*arguments):
    entered.set()
    go.wait()
    return real(*arguments)
compiler.compile_kernel = compile_kernel
other = threading.Thread(target=use, args=("IQ3_S",))
other.start()
entered.wait()
print(use("Q8_0") != 0)
go.set()
other.join()
"""


def test_a_kernel_that_is_there_does_not_wait_for_another(tmp_path: Path) -> None:
    assert run(WAITING, tmp_path).stdout == "True\n"


INTERRUPTED = """
print("ready", flush=True)
came = 0
while True:
    try:
        found = use("Q4_K")
        break
    except KeyboardInterrupt:
        came += 1
print(came, found, use("F16") != 0)
"""


def test_ctrl_c_while_compiling(tmp_path: Path) -> None:
    """At several moments, importing numba among them: asked again, it works."""
    expected = run('print(use("Q4_K"))', tmp_path / "expected").stdout.strip()
    for i, delay_s in enumerate((0.02, 0.1, 0.2, 0.3, 0.45)):
        variables = os.environ | {"NUMALOAD_CACHE_DIR": str(tmp_path / str(i))}
        with subprocess.Popen(
            [sys.executable, "-c", BEGIN + INTERRUPTED], stdout=subprocess.PIPE, text=True,
            env=variables,
        ) as child:  # fmt: skip
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
            try:
                child.wait(delay_s)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)
            came, found, again = child.stdout.read().split()
        assert (child.returncode, found, again) == (0, expected, "True"), came


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "features": ({"NUMBA_CPU_FEATURES": "avx2"}, "NUMBA_CPU_FEATURES=avx2: expected +feature"),
    "more-features": ({"NUMBA_CPU_FEATURES": "+avx2, +fma"}, "expected +feature,-feature"),
}


@pytest.mark.parametrize(("variables", "said"), REFUSED.values(), ids=REFUSED)
def test_processors_that_are_none(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    """LLVM would end the process."""
    done = run('use("Q4_K")', tmp_path, 1, variables)
    assert "numaload.errors.UsageError: Q4_K cannot be turned to float" in done.stderr
    assert said in done.stderr


TWO = 'print(*map(use, ("IQ4_NL", "F16")))'


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(TWO, tmp_path_factory.mktemp("expected")).stdout


@pytest.mark.parametrize(
    "variables",
    [
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_CPU_NAME": "nobody-knows"},
        {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
        {"NUMBA_ENABLE_AVX": "0"},
        {"NUMBA_OPT": "0"},
        {"NUMBA_DEBUGINFO": "1"},
        {"NUMBA_BOUNDSCHECK": "1"},
    ],
    ids=lambda variables: "-".join(variables.values()) or "none",
)
def test_numbas_variables(tmp_path: Path, expected: str, variables: dict[str, str]) -> None:
    assert run(TWO, tmp_path, variables=variables).stdout == expected


def test_jit_that_is_off_by_numbas_configuration(tmp_path: Path) -> None:
    done = run('import numba; numba.config.DISABLE_JIT = True; use("Q4_K")', tmp_path, 1)
    assert "numaload.errors.UsageError" in done.stderr
    assert "with NUMBA_DISABLE_JIT=1 kernels run without" in done.stderr
