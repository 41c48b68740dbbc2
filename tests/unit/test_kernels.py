"""Every kernel, bit for bit, against gguf-py and a naive twin, and what memory it touches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import naive
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import lanes, registry

Bytes = NDArray[np.uint8]
Halves = NDArray[np.uint16]
Floats = NDArray[np.float32]

ROOT = Path(__file__).parents[2]
QTYPES = list(registry.KERNELS)
KNOWN_TO_GGUF = [q for q in QTYPES if q not in {QuantType.Q1_0, QuantType.Q2_0}]
ITEMS = {"float32": np.float32, "float16": np.uint16, "bfloat16": np.uint16}
WITH_JIT = not registry.interpreted()
MANY = 262_144 if WITH_JIT else 8_192  # weights
ANY_NAN = 0x7FC00000

pytestmark = pytest.mark.slow  # every kernel is compiled, for several processors

each_type = pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
each_known = pytest.mark.parametrize("qtype", KNOWN_TO_GGUF, ids=lambda q: q.name)
each_dtype = pytest.mark.parametrize("dtype", registry.DTYPES)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


# blocks ----------------------------------------------------------------------------------------

Place = tuple[tuple[int, int], ...]


def f16_at(byte: int) -> Place:
    return ((byte, 0), (byte, 4), (byte + 1, 0), (byte + 1, 4))


BEGIN_WITH_IT = (
    "F16 Q1_0 Q2_0 Q4_0 Q5_0 Q8_0 IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS"
)
# {qtype: of each f16 scale, (byte, lowest bit) of its four nibbles, the lowest first}
SCALES: dict[QuantType, tuple[Place, ...]] = {
    **{QuantType[name]: (f16_at(0),) for name in BEGIN_WITH_IT.split()},
    QuantType.Q4_1: (f16_at(0), f16_at(2)),
    QuantType.Q5_1: (f16_at(0), f16_at(2)),
    QuantType.Q2_K: (f16_at(80), f16_at(82)),
    QuantType.Q3_K: (f16_at(108),),
    QuantType.Q4_K: (f16_at(0), f16_at(2)),
    QuantType.Q5_K: (f16_at(0), f16_at(2)),
    QuantType.Q6_K: (f16_at(208),),
    QuantType.IQ1_M: (((49, 4), (51, 4), (53, 4), (55, 4)),),
    QuantType.TQ1_0: (f16_at(52),),
    QuantType.TQ2_0: (f16_at(64),),
}
# {qtype: how many scales of one byte each its blocks begin with}
BYTE_SCALES = {QuantType.MXFP4: 1, QuantType.NVFP4: 4}
SPECIAL = {
    "zero": 0x0000,
    "negative-zero": 0x8000,
    "smallest-subnormal": 0x0001,
    "negative-subnormal": 0x83FF,
    "smallest-normal": 0x0400,
    "negative": 0xBC01,
    "huge": 0x7BFF,
    "negative-huge": 0xFBFF,
    "infinity": 0x7C00,
    "negative-infinity": 0xFC00,
    "signaling-nan": 0x7C01,
    "negative-quiet-nan": 0xFE55,
}
WITH_A_SUM = (QuantType.Q4_1, QuantType.Q5_1)


def random_blocks(rng: np.random.Generator, qtype: QuantType, n_steps: int) -> Bytes:
    """Steps of a kernel, some with special scales."""
    src = rng.integers(0, 256, (n_steps, registry.step(qtype)[1]), dtype=np.uint8)
    for i, place in enumerate(SCALES.get(qtype, ())):
        for block, bits in zip(src[i::2], SPECIAL.values(), strict=False):
            set_scale(block, place, bits)
    return settled(qtype, src)


def set_scale(block: Bytes, place: Place, bits: int) -> None:
    for i, (byte, bit) in enumerate(place):
        block[byte] = int(block[byte]) & ~(15 << bit) | (bits >> 4 * i & 15) << bit


def settled(qtype: QuantType, src: Bytes) -> Bytes:
    """Blocks of w = d * q + m without two NaN: which one comes out is the compiler's choice."""
    if qtype in WITH_A_SUM:
        both = (src[:, [1, 3]] & 0x7C == 0x7C).all(axis=1)
        src[both, 3] = 0
    return src


# running ---------------------------------------------------------------------------------------


def load(qtype: QuantType, dtype: str = "float32") -> registry.Kernel:
    kernel = registry.load(qtype, dtype)
    assert kernel is not None
    return kernel


def run(
    qtype: QuantType, src: Bytes, dtype: str = "float32", past_caches: bool = False
) -> NDArray[Any]:
    step, nbytes = registry.step(qtype)
    out = np.full(src.size // nbytes * step, 7, ITEMS[dtype])
    load(qtype, dtype)(src, out, past_caches)
    return out


def reference(qtype: QuantType, src: Bytes) -> Floats:
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(src.reshape(-1), gguf.GGMLQuantizationType(qtype))
    return np.asarray(weights, np.float32).reshape(-1)


def narrowed(dtype: str, weights: Floats) -> Halves:
    """By numpy and ml_dtypes, and NaN by the naive twin."""
    library = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    nan_to = {"float16": naive.narrow_float16, "bfloat16": naive.narrow_bfloat16}[dtype]
    with np.errstate(all="ignore"):
        halves = np.asarray(weights.astype(library)).view(np.uint16)
    nan = np.isnan(weights)
    halves[nan] = [nan_to(bits) for bits in weights[nan].view(np.uint32).tolist()]
    return halves


def bits_of(weights: NDArray[Any]) -> NDArray[Any]:
    return weights.view(np.uint32 if weights.dtype == np.float32 else np.uint16)


def assert_same_bits(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_array_equal(bits_of(actual), bits_of(expected))


def assert_same_but_nan(actual: Floats, expected: Floats) -> None:
    """gguf-py computes in an order of its own, and its NaN have other payloads."""
    one, other = (np.where(np.isnan(w), np.uint32(ANY_NAN), bits_of(w)) for w in (actual, expected))
    np.testing.assert_array_equal(one, other)


# float32 ---------------------------------------------------------------------------------------


@each_known
def test_random_bytes_as_gguf_py(qtype: QuantType, rng: np.random.Generator) -> None:
    src = random_blocks(rng, qtype, MANY // registry.step(qtype)[0])
    expected = reference(qtype, src)
    assert np.isfinite(expected).any()
    assert_same_but_nan(run(qtype, src), expected)


@each_type
def test_random_bytes_as_naive_twin(qtype: QuantType, rng: np.random.Generator) -> None:
    src = random_blocks(rng, qtype, max(48, 4_096 // registry.step(qtype)[0]))
    assert_same_bits(run(qtype, src), naive.dequantize(qtype, src))


@pytest.mark.parametrize("scale", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("qtype", SCALES, ids=lambda q: q.name)
def test_special_scales(qtype: QuantType, scale: int, rng: np.random.Generator) -> None:
    src = rng.integers(0, 256, (8, registry.step(qtype)[1]), dtype=np.uint8)
    for i, place in enumerate(SCALES[qtype]):
        for row in (2 * i, 2 * i + 1, *range(4, 8)):  # each alone, then all
            set_scale(src[row], place, scale)
    actual = run(qtype, settled(qtype, src))
    assert_same_bits(actual, naive.dequantize(qtype, src))
    if qtype in KNOWN_TO_GGUF:
        assert_same_but_nan(actual, reference(qtype, src))


@pytest.mark.parametrize("qtype", WITH_A_SUM, ids=lambda q: q.name)
def test_two_nan_make_a_nan(qtype: QuantType, rng: np.random.Generator) -> None:
    src = rng.integers(0, 256, (9, registry.step(qtype)[1]), dtype=np.uint8)
    src[:, :4] = np.frombuffer(bytes.fromhex("017c55fe"), np.uint8)
    assert np.isnan(run(qtype, src)).all()


@pytest.mark.parametrize("qtype", BYTE_SCALES, ids=lambda q: q.name)
def test_every_scale_of_one_byte(qtype: QuantType) -> None:
    n_scales, nbytes = BYTE_SCALES[qtype], BLOCKS[qtype][1]
    src = np.empty((256, nbytes), np.uint8)
    # Each code of four bits, low and high.
    src[:, n_scales:] = np.resize(0x11 * np.arange(16), nbytes - n_scales)
    for i in range(n_scales):
        src[:, i] = np.roll(np.arange(256), 64 * i)
    assert_same_bits(run(qtype, src), naive.dequantize(qtype, src))
    assert_same_bits(run(qtype, src), reference(qtype, src))


def test_every_type_has_its_scales_tried() -> None:
    assert {*SCALES, *BYTE_SCALES} == set(QTYPES) - {QuantType.F32, QuantType.BF16}


@pytest.mark.parametrize("qtype", sorted(set(registry.KERNELS) - registry.SUBNORMAL))
def test_others_give_no_subnormal(qtype: QuantType, rng: np.random.Generator) -> None:
    """The least scales there are, and anything: the instruction to bfloat16 would flush them."""
    step, nbytes = registry.step(qtype)
    for most in (2, 256):
        src = rng.integers(0, most, (1 << 18) // step * nbytes, dtype=np.uint8)
        weights = np.abs(run(qtype, src))
        assert not ((weights > 0) & (weights < np.finfo(np.float32).tiny)).any()


def test_every_float16() -> None:
    src = np.arange(65_536, dtype=np.uint16).view(np.uint8)
    weights = run(QuantType.F16, src)
    assert_same_bits(weights, naive.dequantize(QuantType.F16, src))
    assert_same_but_nan(weights, reference(QuantType.F16, src))
    assert weights.view(np.uint32)[0x7C01] == 0x7FC02000  # quiet, the payload stays


def test_every_bfloat16() -> None:
    halves = np.arange(65_536, dtype=np.uint16)
    bits = bits_of(run(QuantType.BF16, halves.view(np.uint8)))
    np.testing.assert_array_equal(bits, halves.astype(np.uint32) << np.uint32(16))


def test_float32_is_copied(rng: np.random.Generator) -> None:
    src = rng.integers(0, 1 << 32, 65_536, dtype=np.uint32)
    src[:2] = [0x7F800001, 0xFF800001]  # NaN that any computation would change
    assert_same_bits(run(QuantType.F32, src.view(np.uint8)), src.view(np.float32))


# dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_type
def test_dtype_is_float32_narrowed(qtype: QuantType, dtype: str, rng: np.random.Generator) -> None:
    src = random_blocks(rng, qtype, max(48, 8_192 // registry.step(qtype)[0]))
    wide = run(qtype, src)
    expected = narrowed(dtype, wide)
    actual = run(qtype, src, dtype)
    if (qtype, dtype) in registry.COPIES:  # NaN stay as they are: see the next test
        expected, actual = expected[~np.isnan(wide)], actual[~np.isnan(wide)]
    assert_same_bits(actual, expected)


@pytest.mark.parametrize(("name", "dtype"), [("F16", "float16"), ("BF16", "bfloat16")])
def test_what_is_in_the_file_stays(name: str, dtype: str) -> None:
    every = np.arange(65_536, dtype=np.uint16)
    assert_same_bits(run(QuantType[name], every.view(np.uint8), dtype), every)


# memory ----------------------------------------------------------------------------------------

COUNTS = (*range(10), 17, 33) if WITH_JIT else (0, 1, 2, 9)
OFFSETS = (0, 1, 15, 31)
EVERY_OFFSET = {QuantType.F32, QuantType.F16, QuantType.Q4_0, QuantType.Q4_K} if WITH_JIT else set()
LEAD = 64  # items before the output: whole cache lines


def aligned(n_items: int, dtype: Any) -> NDArray[Any]:
    """Items from a cache line on."""
    area = np.empty(n_items + 64, dtype)
    first = -area.ctypes.data % 64 // area.itemsize
    return area[first : first + n_items]


@each_dtype
@each_type
def test_writes_exactly_its_output(qtype: QuantType, dtype: str, rng: np.random.Generator) -> None:
    step, kernel = registry.step(qtype)[0], load(qtype, dtype)
    src = random_blocks(rng, qtype, max(COUNTS))
    expected = bits_of(run(qtype, src, dtype))
    area = aligned(2 * LEAD + 32 + expected.size, expected.dtype)
    offsets = range(32) if qtype in EVERY_OFFSET else OFFSETS
    for count, offset, past_caches in product(COUNTS, offsets, (False, True)):
        first, last = LEAD + offset, LEAD + offset + count * step
        area[:] = 0x5555
        kernel(src[:count], area[first:last].view(ITEMS[dtype]), past_caches)
        where = f"{count} steps, {offset} items behind a cache line, {past_caches=}"
        np.testing.assert_array_equal(area[first:last], expected[: count * step], where)
        assert (area[:first] == 0x5555).all(), where
        assert (area[last:] == 0x5555).all(), where


@pytest.mark.parametrize("offset", [1, 2, 3, 17])
@each_type
def test_read_only_at_any_address(qtype: QuantType, offset: int, rng: np.random.Generator) -> None:
    blocks = random_blocks(rng, qtype, 64)
    file = np.frombuffer(bytes(offset) + blocks.tobytes(), np.uint8)  # bytes: read-only, as mmap
    src = file[offset:]
    assert not src.flags.writeable
    assert_same_bits(run(qtype, src), run(qtype, blocks))
    assert_same_bits(run(qtype, src, past_caches=True), run(qtype, blocks))


BETWEEN_FORBIDDEN_PAGES = """
import ctypes, mmap
from itertools import product
import numpy as np
from numaload.kernels import registry

libc = ctypes.CDLL(None)

def between(nbytes, at_end):
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = np.frombuffer(mmap.mmap(-1, size + 2 * mmap.PAGESIZE), np.uint8)
    for page in (0, mmap.PAGESIZE + size):
        address = ctypes.c_void_p(area.ctypes.data + page)
        assert libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    first = mmap.PAGESIZE + (size - nbytes if at_end else 0)
    return area[first : first + nbytes]

for case in product(registry.KERNELS, registry.DTYPES, (1, 2, 3), (False, True), (False, True)):
    qtype, dtype, count, at_end, past_caches = case
    print(qtype.name, dtype, count, at_end, past_caches, flush=True)
    item = np.dtype(np.float32 if dtype == "float32" else np.uint16)
    step, nbytes = registry.step(qtype)
    src = between(count * nbytes, at_end)
    out = between(count * step * item.itemsize, at_end).view(item)
    registry.load(qtype, dtype)(src, out, past_caches)
print("done")
"""


def test_touches_nothing_else() -> None:
    # Both arrays begin and end where touching a byte more ends the process.
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN_FORBIDDEN_PAGES],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert (done.returncode, last) == (0, "done"), done.stderr


def test_threads_do_not_meet(rng: np.random.Generator) -> None:
    src = {qtype: random_blocks(rng, qtype, 500) for qtype in (QuantType.Q4_K, QuantType.IQ1_M)}
    expected = {qtype: run(qtype, blocks) for qtype, blocks in src.items()}
    jobs = list(src) * 20
    with ThreadPoolExecutor(4) as pool:
        for qtype, weights in zip(jobs, pool.map(lambda q: run(q, src[q]), jobs), strict=True):
            assert_same_bits(weights, expected[qtype])


# other processors, and none --------------------------------------------------------------------

V3 = {"avx2", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# {name: (processor, features, what this one must have)}. Without a list of features the kernels use
# no instruction of their own choice, the compiler any that the name stands for.
PROCESSORS: dict[str, tuple[str, str, set[str]]] = {
    "x86-64": ("x86-64", "", {"sse2"}),
    "x86-64-v2": ("x86-64-v2", "", {"popcnt", "sse4.2", "ssse3"}),
    "x86-64-v3": ("x86-64-v3", "", V3),
    "x86-64-v3-listed": ("x86-64-v3", "+ssse3,+sse2,+f16c,+avx2", V3),
    "x86-64-v4": ("x86-64-v4", "", V4),
}
VARIANTS: dict[str, tuple[dict[str, str], set[str]]] = {
    "interpreted": ({"NUMBA_DISABLE_JIT": "1"}, set()),
    **{
        name: ({"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}, needs)
        for name, (cpu, features, needs) in PROCESSORS.items()
    },
}
HERE = {name for name, has in llvm.get_host_cpu_features().items() if has}
HALVES = ("float16", "bfloat16")
INTERPRETED_JOBS = [
    *((qtype, "float32") for qtype in QTYPES),
    *product((QuantType.F32, QuantType.F16, QuantType.Q4_K), HALVES),
]
# With and without instructions of the kernels' choice every word of the vocabulary is compiled, and
# each way of storing. That the types put the words together rightly is shown on this processor, and
# without JIT. The others are compiled from the same as x86-64, so a type of each family will do.
WORDY = [
    QuantType[name]
    for name in ["F16", "BF16", "Q5_0", "Q3_K", "IQ1_M", "IQ3_S", "IQ4_XS", "Q1_0", "Q2_0", "TQ1_0"]
]
COMPILED_JOBS = [
    *((qtype, "float32") for qtype in WORDY),
    *product((QuantType.F32,), HALVES),
    (QuantType.Q3_K, "bfloat16"),
]
FAMILY_JOBS = [
    (QuantType[name], "float32") for name in ["F16", "Q5_0", "Q3_K", "IQ3_S", "IQ4_XS", "TQ1_0"]
]


def jobs_of(variant: str) -> list[tuple[QuantType, str]]:
    every = {"x86-64": COMPILED_JOBS, "x86-64-v3-listed": COMPILED_JOBS}
    return INTERPRETED_JOBS if variant == "interpreted" else every.get(variant, FAMILY_JOBS)


def words_of(function: Callable[..., Any]) -> set[str]:
    """The words of the vocabulary that a decode function and its helpers use."""
    names, helpers = set(function.__code__.co_names), {f.__name__: f for f in lanes.HELPERS}
    words = {name for name in names if hasattr(lanes, name) and name.islower()}
    return words.union(*(words_of(helpers[name]) for name in names & helpers.keys()))


def test_other_processors_compile_every_word() -> None:
    wordy, every = (
        set().union(*(words_of(registry.decoder(qtype)) for qtype in qtypes))
        for qtypes in (WORDY, QTYPES)
    )
    assert len(every) > 15
    assert wordy == every - {"load_f32"}  # F32 is narrowed below
    assert (QuantType.F32, "float16") in COMPILED_JOBS
    families = {registry.KERNELS[qtype][0] for qtype, _ in FAMILY_JOBS}
    assert families == {family for family, _ in registry.KERNELS.values()}


RUN_JOBS = """
import sys
import numpy as np
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry

src, out = np.load(sys.argv[1]), {}
for job in sys.argv[3:]:
    name, dtype = job.split()
    step, nbytes = registry.step(QuantType[name])
    item = np.float32 if dtype == "float32" else np.uint16
    out[job] = np.zeros(src[job].size // nbytes * step, item)
    registry.load(QuantType[name], dtype)(src[job], out[job], False)
np.savez(sys.argv[2], **out)
"""
Runs = dict[str, "Future[Path]"]


def job_names(variant: str) -> list[str]:
    return [f"{qtype.name} {dtype}" for qtype, dtype in jobs_of(variant)]


def run_jobs(src: Path, folder: Path, variant: str) -> Path:
    variables, _ = VARIANTS[variant]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "0"} | variables
    subprocess.run(
        [sys.executable, "-c", RUN_JOBS, str(src), str(folder / "out.npz"), *job_names(variant)],
        check=True, cwd=ROOT, env=environment | {"NUMALOAD_CACHE_DIR": str(folder)},
    )  # fmt: skip
    return folder / "out.npz"


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("jobs") / "src.npz", np.random.default_rng(21)
    jobs = {*INTERPRETED_JOBS, *COMPILED_JOBS}
    blocks: dict[str, Any] = {f"{q.name} {dtype}": random_blocks(rng, q, 40) for q, dtype in jobs}
    np.savez(path, **blocks)
    return path


@pytest.fixture(scope="module")
def runs(job_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """{variant: where its results will be}: each compiles for seconds, so they run side by side."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {
            name: pool.submit(run_jobs, job_file, tmp_path_factory.mktemp(name), name)
            for name, (_, needs) in VARIANTS.items()
            if needs <= HERE
        }


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits(variant: str, runs: Runs, job_file: Path) -> None:
    if variant not in runs:
        pytest.skip(f"this processor lacks {', '.join(sorted(VARIANTS[variant][1] - HERE))}")
    with np.load(job_file) as src, np.load(runs[variant].result()) as out:
        for qtype, dtype in jobs_of(variant):
            job = f"{qtype.name} {dtype}"
            np.testing.assert_array_equal(
                bits_of(out[job]), bits_of(run(qtype, src[job], dtype)), job
            )


# registry --------------------------------------------------------------------------------------


def test_no_kernel_is_none() -> None:
    assert registry.load(QuantType.Q8_K, "float32") is None
    assert registry.load(QuantType.Q4_K, "float64") is None


def test_registry_imports_nothing_heavy() -> None:
    heavy = "{'llvmlite', 'numba', 'numpy'}"
    code = f"import sys, numaload.kernels.registry; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


LOAD = """
import sys
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry
assert registry.load(QuantType.Q4_K, "float32")
print(registry.problem() or "numba" in sys.modules)
"""


def test_cached_kernel_needs_no_numba(tmp_path: Path) -> None:
    environment = os.environ | {"NUMALOAD_CACHE_DIR": str(tmp_path), "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, "-c", LOAD]
    found = [
        subprocess.check_output(command, cwd=ROOT, env=environment, text=True) for _ in range(2)
    ]
    assert found == ["True\n", "False\n"]


@each_type
def test_diagram_has_the_sizes_of_blocks(qtype: QuantType) -> None:
    text = (ROOT / "kernels" / f"{registry.KERNELS[qtype][0]}.py").read_text(encoding="utf-8")
    title = re.search(
        rf"^# {qtype.name}, (\d+) bytes -> (\d+) weights? .*\n((?:#.*\n)+)", text, re.MULTILINE
    )
    assert title is not None
    assert (int(title[2]), int(title[1])) == BLOCKS[qtype]
    end = 0
    for first, last in re.findall(r"^#   byte (\d+)-(\d+) ", title[3], re.MULTILINE):
        assert int(first) == end
        end = int(last) + 1
    assert end == BLOCKS[qtype][1]


def test_blocks_as_gguf_py() -> None:
    theirs = {q.name: sizes for q, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {q.name: sizes for q, sizes in BLOCKS.items() if q.name in theirs}
    assert len(ours) >= 30
    assert {name for name in ours if theirs[name] != ours[name]} <= {"Q8_1"}
    assert all(int(gguf.GGMLQuantizationType[name]) == int(QuantType[name]) for name in ours)
