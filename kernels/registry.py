"""Which function decodes which type. Importing this table imports neither numpy, numba nor LLVM."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from numaload.forks import compiling
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import jit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from numaload.kernels.loops import Decode, Parts, Read

# {qtype: (module in this package, function)}
KERNELS: dict[QuantType, tuple[str, str]] = {
    QuantType.F32: ("floats", "f32"),
    QuantType.F16: ("floats", "f16"),
    QuantType.BF16: ("floats", "bf16"),
    QuantType.Q4_0: ("legacy", "q4_0"),
    QuantType.Q4_1: ("legacy", "q4_1"),
    QuantType.Q5_0: ("legacy", "q5_0"),
    QuantType.Q5_1: ("legacy", "q5_1"),
    QuantType.Q8_0: ("legacy", "q8_0"),
    QuantType.Q2_K: ("kquants", "q2_k"),
    QuantType.Q3_K: ("kquants", "q3_k"),
    QuantType.Q4_K: ("kquants", "q4_k"),
    QuantType.Q5_K: ("kquants", "q5_k"),
    QuantType.Q6_K: ("kquants", "q6_k"),
    QuantType.IQ1_S: ("iquants", "iq1_s"),
    QuantType.IQ1_M: ("iquants", "iq1_m"),
    QuantType.IQ2_XXS: ("iquants", "iq2_xxs"),
    QuantType.IQ2_XS: ("iquants", "iq2_xs"),
    QuantType.IQ2_S: ("iquants", "iq2_s"),
    QuantType.IQ3_XXS: ("iquants", "iq3_xxs"),
    QuantType.IQ3_S: ("iquants", "iq3_s"),
    QuantType.IQ4_NL: ("codebooks", "iq4_nl"),
    QuantType.IQ4_XS: ("codebooks", "iq4_xs"),
    QuantType.MXFP4: ("codebooks", "mxfp4"),
    QuantType.NVFP4: ("codebooks", "nvfp4"),
    QuantType.Q1_0: ("ternary", "q1_0"),
    QuantType.Q2_0: ("ternary", "q2_0"),
    QuantType.TQ1_0: ("ternary", "tq1_0"),
    QuantType.TQ2_0: ("ternary", "tq2_0"),
}


class Scaled(NamedTuple):
    """A kernel that multiplies what it decodes by float32 that it is given."""

    module: str
    function: str
    weights: int  # of a step
    nbytes: int
    group: int  # weights that share a scale


# {name: what it is}. What are numbers without scales here has no id in GGUF.
SCALED: dict[str, Scaled] = {
    "e4m3_by_32": Scaled("scaled", "e4m3", 32, 32, 32),
    "e2m1_by_16": Scaled("scaled", "e2m1", 32, 16, 16),
    "e2m1_doubled_by_32": Scaled("scaled", "e2m1_doubled", 32, 16, 32),
    "nvfp4_by_64": Scaled("codebooks", "nvfp4", *BLOCKS[QuantType.NVFP4], 64),
}
Code = QuantType | str  # of a kernel: a type of GGUF, or a name of SCALED
DTYPES = ("float32", "float16", "bfloat16")
# Types of which float32 can be subnormal: all others have scales of float16 or float8.
SUBNORMAL = {QuantType.F32, QuantType.BF16, QuantType.MXFP4}
# What is in the file as it is asked for, and stays bit for bit; F32 to float32 does by itself.
COPIES = {(QuantType.F16, "float16"), (QuantType.BF16, "bfloat16")}


class Kernel(Protocol):
    """Convert blocks to floats, or their bits: C-contiguous arrays, of one size in steps.

    scales: of kernels of SCALED alone, one for each group of weights. Compiled code checks no
    bounds: that is the caller's duty.
    """

    def __call__(
        self,
        blocks: NDArray[np.uint8],
        floats: NDArray[Any],
        past_caches: bool,
        scales: NDArray[np.float32] | None = None,
    ) -> None: ...


SettingError = jit.SettingError  # what ``load`` raises
_loaded: dict[tuple[Code, str], Kernel] = {}


def step(code: Code) -> tuple[int, int]:
    """Return (weights, bytes) that a kernel works on at once: a block, or STEP floats."""
    from numaload.kernels.loops import STEP

    if isinstance(code, str):
        return SCALED[code].weights, SCALED[code].nbytes
    block_size, type_size = BLOCKS[code]
    return (block_size, type_size) if block_size > 1 else (STEP, STEP * type_size)


def load(code: Code, dtype: str) -> Kernel | None:
    """Return the kernel from a type to one of DTYPES, None if there is none.

    The first time it is linked from the cache on disk, or compiled; any thread may ask.
    Raises: SettingError if a variable of numba's makes it impossible.
    """
    if code not in (SCALED if isinstance(code, str) else KERNELS) or dtype not in DTYPES:
        return None
    if (code, dtype) in _loaded:  # not to wait while another one compiles
        return _loaded[code, dtype]
    with compiling:
        if (code, dtype) not in _loaded:
            make = _interpreted if interpreted() else Compiled
            _loaded[code, dtype] = _in_thread(lambda: make(code, dtype))
        return _loaded[code, dtype]


def decoder(code: Code) -> Decode | Read:
    """Return the function of the table: Read for floats, else Decode."""
    module, name = SCALED[code][:2] if isinstance(code, str) else KERNELS[code]
    found: Decode | Read = getattr(import_module(f"{__package__}.{module}"), name)
    return found


def interpreted() -> bool:
    """Return whether kernels run as Python, for debugging and coverage: NUMBA_DISABLE_JIT=1."""
    return os.environ.get("NUMBA_DISABLE_JIT", "0") not in {"", "0"}


def problem() -> str:
    """Return why kernels are slower, or sooner compiled again, than need be; empty if not."""
    if interpreted():
        return "kernels run as Python, a thousand times slower: unset NUMBA_DISABLE_JIT"
    from numaload.kernels.jit import cache

    return cache.problem()


def _parts(code: Code, dtype: str) -> Parts:
    from numaload.kernels import lanes, loops

    if isinstance(code, str):  # scales may be as small as they like
        narrow = loops.NARROW[dtype]
        return loops.Parts(decoder(code), narrow, *step(code), False, SCALED[code].group)
    floats = BLOCKS[code][0] == 1
    if (code, dtype) in COPIES:
        return loops.Parts(lanes.load_u16, lanes.join, *step(code), floats)
    narrow = (loops.NARROW if code in SUBNORMAL else loops.NARROW_NORMAL)[dtype]
    return loops.Parts(decoder(code), narrow, *step(code), floats)


def _in_thread(function: Callable[[], Kernel]) -> Kernel:
    """Run where no Ctrl-C comes: half an import of numba or LLVM cannot be repaired.

    It is raised when that is over, within a second or so.
    """
    results: list[Kernel] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised where it was asked for
            errors.append(error)

    thread = threading.Thread(target=run, name="numaload compiles")
    try:
        thread.start()
    except RuntimeError:  # no more threads may be started: better here than not at all
        run()
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt as error:  # noqa: PERF203
            errors.append(error)
    if errors:
        raise errors[0]
    return results[0]


def compiled(code: Code, dtype: str) -> tuple[str, bytes]:
    """Return (function, object file) of a kernel."""
    from numaload.kernels.jit.objects import object_code

    name = f"{code if isinstance(code, str) else KERNELS[code][1]}_to_{dtype}"
    return name, object_code(name, dtype, _parts(code, dtype))


def load_fill() -> Callable[[int, int, int, int], None]:
    """Load a loop that writes float32 as kernels do and computes nothing.

    It takes (address of 16 floats, address of the output, how many times STEP, past the caches).
    """
    from numaload.kernels import lanes, loops
    from numaload.kernels.jit.objects import Function, object_code

    parts = loops.Parts(loops.fill, lanes.join, loops.STEP, 0, floats=True)
    with compiling:
        return Function(object_code("fill", "float32", parts), "fill")


class Compiled:
    """A kernel that can read its blocks itself."""

    def __init__(self, code: Code, dtype: str) -> None:
        from numaload.kernels.jit.objects import Function

        name, machine_code = compiled(code, dtype)
        self._function = Function(machine_code, name)
        _, self.step_bytes = step(code)

    def __call__(
        self,
        blocks: NDArray[np.uint8],
        floats: NDArray[Any],
        past_caches: bool,
        scales: NDArray[np.float32] | None = None,
    ) -> None:
        n_blocks = blocks.nbytes // self.step_bytes
        address = 0 if scales is None else scales.ctypes.data
        self._function(blocks.ctypes.data, floats.ctypes.data, n_blocks, past_caches, address)

    def from_file(
        self,
        fd: int,
        offset: int,
        floats: NDArray[Any],
        steps: int,
        scratch: NDArray[np.uint8],
        past_caches: bool,
        scales: NDArray[np.float32] | None = None,
    ) -> int:
        """Read and convert ``steps`` at ``offset``; return how many: fewer at an error.

        scratch: memory for what is read at a time.
        """
        part = scratch.nbytes // self.step_bytes * self.step_bytes
        address, each = (0, 0) if scales is None else (scales.ctypes.data, scales.size // steps)
        done = self._function.from_file(
            fd, offset, steps * self.step_bytes, self.step_bytes, floats.nbytes // steps, part,
            scratch.ctypes.data, floats.ctypes.data, past_caches, address, each,
        )  # fmt: skip
        return done // self.step_bytes


def _interpreted(code: Code, dtype: str) -> Kernel:
    import numpy as np

    from numaload.kernels.loops import build_loop

    _, nbytes = step(code)
    loop = build_loop(_parts(code, dtype), lambda function: function)

    def kernel(
        blocks: NDArray[np.uint8],
        floats: NDArray[Any],
        past_caches: bool,
        scales: NDArray[np.float32] | None = None,
    ) -> None:
        with np.errstate(all="ignore"):  # numpy warns where a kernel may overflow
            loop(blocks.reshape(-1), floats, blocks.nbytes // nbytes, past_caches, scales)

    return kernel
