"""Compiling on first use, and the cache of compiled kernels on disk: it cannot serve another
version's code, survives processes that start at once, damage, read-only installs and no home.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from numaload.kernels import cache as kernels

ROOT = Path(__file__).parents[2]
USER = 12345  # nobody that exists

# Dequantizes the demo's block; says what was imported and what was warned of.
PROGRAM = """
import sys, warnings
import numpy as np
from numaload.dequantize import DTYPES, dequantize_blocks
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.numa.topology import topology
from numaload.numa.workers import pool
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for name in sys.argv[2:] or ["Q4_K"]:
        block_size, type_size = BLOCKS[QuantType[name]]
        out = np.empty(64 * block_size, DTYPES["bfloat16"])
        blocks = np.full((64, type_size), 0x21, np.uint8)
        for _ in range(2):
            dequantize_blocks(blocks, QuantType[name], out.dtype, out, pool(topology()))
        print(name, out.view(np.uint16)[:64].sum(), end=" ")
print("numba" in sys.modules, len(said), *[w.message for w in said][:1])
"""
COMPILED, LINKED = "True 0", "False 0"  # numba was imported or not; no warning


@pytest.fixture(scope="module")
def expected() -> str:
    """Without JIT, which is said."""
    said = say({"NUMBA_DISABLE_JIT": "1"})
    assert "False 1 kernels run as Python, a thousand times slower: unset NUMBA_DISABLE_JIT" in said
    return said.partition(" False ")[0]


def command(*types: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "", *types]


def say(variables: dict[str, str], *types: str, **options: object) -> str:
    done = subprocess.run(
        command(*types), env=os.environ | variables, capture_output=True, text=True,
        timeout=300, check=False, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(done.stdout).strip()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def run(cache: Path) -> Callable[..., str]:
    return lambda *types, **options: say({"NUMALOAD_CACHE_DIR": str(cache)}, *types, **options)


def test_the_second_process_neither_compiles_nor_imports_numba(
    run: Callable[..., str], cache: Path, expected: str
) -> None:
    assert run() == f"{expected} {COMPILED}"
    assert run() == f"{expected} {LINKED}"
    (folder,) = cache.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.name for p in folder.iterdir()] == ["q4_k_to_bfloat16"]


def test_only_what_is_used_is_compiled(run: Callable[..., str], cache: Path) -> None:
    run("Q4_K", "Q6_K", "F32")
    (folder,) = cache.iterdir()
    kernels = {"q4_k_to_bfloat16", "q6_k_to_bfloat16", "f32_to_bfloat16"}
    assert {p.name for p in folder.iterdir()} == kernels


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """An installation of its own."""
    shutil.copytree(ROOT / "numaload", tmp_path / "install" / "numaload", symlinks=False)
    return tmp_path / "install"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kquants.py", "low = floats(q & 15) *", "low = floats(q & 14) *"),
        ("lanes.py", "CHUNK = 256", "CHUNK = 512"),
        ("lowering.py", '"fsub"', '"fadd"'),
        ("../formats/qtypes.py", "QuantType.Q8_K: (256, 292)", "QuantType.Q8_K: (256, 293)"),
    ],
    ids=["the-kernel", "a-constant-elsewhere", "the-compiler", "sizes-of-blocks"],
)
def test_code_of_another_version_is_not_served(
    copied: Path, cache: Path, file: str, old: str, new: str
) -> None:
    """Also where only a file changed that the kernel itself is not in."""
    variables = {"NUMALOAD_CACHE_DIR": str(cache)}
    before = say(variables, cwd=copied)
    source = copied / "numaload" / "kernels" / file
    text = source.read_text(encoding="utf-8")
    assert old in text
    source.write_text(text.replace(old, new), encoding="utf-8")
    after = say(variables, cwd=copied)
    assert after.endswith(COMPILED)
    assert (after == before) == (file in {"lanes.py", "../formats/qtypes.py"})
    assert len(list(cache.iterdir())) == 2
    source.write_text(text, encoding="utf-8")
    assert say(variables, cwd=copied) == before.replace(COMPILED, LINKED)


def test_two_archives_do_not_share_code(copied: Path, cache: Path, tmp_path: Path) -> None:
    """Python imports from zip files too: their sources are hashed as well."""
    source, said = copied / "numaload/kernels/kquants.py", []
    for i in range(2):
        archive = shutil.make_archive(str(tmp_path / f"a{i}"), "zip", copied)
        variables = {"NUMALOAD_CACHE_DIR": str(cache), "PYTHONPATH": archive}
        said.append(say(variables, cwd=tmp_path))
        source.write_text(source.read_text().replace("floats(q & 15)", "floats(q & 14)"))
    assert said[0] != said[1]
    assert all(text.endswith(COMPILED) for text in said)


def test_without_sources_nothing_is_kept(copied: Path, cache: Path, expected: str) -> None:
    subprocess.run([sys.executable, "-m", "compileall", "-qb", str(copied)], check=True)
    for path in copied.rglob("*.py"):
        path.unlink()
    said = say({"NUMALOAD_CACHE_DIR": str(cache)}, cwd=copied)
    assert said.startswith(f"{expected} True 1 compiled kernels are not kept")
    assert "sources of numaload.kernels are not there" in said


@pytest.mark.parametrize("name", ["NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS"])
def test_variables_that_change_no_code(cache: Path, expected: str, name: str) -> None:
    variables = {"NUMALOAD_CACHE_DIR": str(cache)}
    say(variables)
    assert say(variables | {name: "1"}) == f"{expected} {LINKED}"
    assert say(variables | {"NUMBA_OPT": "1"}) == f"{expected} {COMPILED}"


def test_code_for_another_processor_is_not_served(cache: Path, expected: str) -> None:
    variables = {"NUMALOAD_CACHE_DIR": str(cache)}
    assert say(variables) == f"{expected} {COMPILED}"
    if platform.machine() != "x86_64":
        pytest.skip("the other processor is an x86-64")
    assert say(variables | {"NUMBA_CPU_NAME": "x86-64"}) == f"{expected} {COMPILED}"
    assert len(list(cache.iterdir())) == 2


def test_processes_that_start_at_once(cache: Path, expected: str) -> None:
    variables = os.environ | {"NUMALOAD_CACHE_DIR": str(cache)}
    children = [
        subprocess.Popen(command(), env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    said = [child.communicate(timeout=300)[0].strip() for child in children]
    assert {text.removesuffix(COMPILED).removesuffix(LINKED).strip() for text in said} == {expected}
    (folder,) = cache.iterdir()
    assert [p.name for p in folder.iterdir()] == ["q4_k_to_bfloat16"]
    assert say({"NUMALOAD_CACHE_DIR": str(cache)}) == f"{expected} {LINKED}"


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "change",
    [pipe, lambda path: path.chmod(0o620), lambda path: path.chmod(0o602)],
    ids=["named-pipe", "group", "others"],
)
def test_code_from_a_file_that_others_may_write_to_is_not_run(
    run: Callable[..., str], cache: Path, expected: str, change: Callable[[Path], None]
) -> None:
    """It neither hangs nor is it replaced without a word."""
    run()
    (folder,) = cache.iterdir()
    kernel = folder / "q4_k_to_bfloat16"
    change(kernel)
    said = run()
    assert said.startswith(f"{expected} True 1 {kernel} was not a file that only this user may")
    assert "compiled again" in said
    assert run() == f"{expected} {LINKED}"


@pytest.fixture
def kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a file that this process keeps as a kernel, in a cache that has no problem."""
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", str(cache))
    monkeypatch.setattr("numaload.kernels.cache._problem", "")
    kernels.save("q4_k_to_float32", b"code")
    return cache / f"kernels-{kernels.version()}" / "q4_k_to_float32"


def test_a_folder_in_place_of_a_kernel_leaves_no_descriptor_open(kept: Path) -> None:
    kept.unlink()
    kept.mkdir()
    kernels.load(kept.name)
    before = os.listdir("/proc/self/fd")
    assert kernels.load(kept.name) is None
    assert os.listdir("/proc/self/fd") == before


def bound_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to("/dev/zero"),
    "socket": bound_socket,
    "named-pipe": os.mkfifo,
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_in_place_of_a_kernel_is_named(
    kept: Path, make: Callable[[Path], object]
) -> None:
    kept.unlink()
    make(kept)
    assert kernels.load(kept.name) is None
    assert kernels.problem() == (
        f"{kept} was not a file that only this user may write to: it was not run, but compiled"
        " again"
    )


def test_a_kernel_that_cannot_be_kept_is_named(kept: Path) -> None:
    kept.unlink()
    kept.mkdir()
    kernels.save(kept.name, b"code")
    assert f"not kept, each process compiles: {kept}: Is a directory; set" in kernels.problem()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:500] + b"\xff" * 64),
    "another-kernel": lambda path: shutil.copy(path.with_name("q6_k_to_bfloat16"), path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_compiled_again(
    run: Callable[..., str], cache: Path, expected: str, damage: Callable[[Path], object]
) -> None:
    run("Q4_K", "Q6_K")
    (folder,) = cache.iterdir()
    damage(folder / "q4_k_to_bfloat16")
    assert run() == f"{expected} {COMPILED}"
    assert run() == f"{expected} {LINKED}"


def test_a_read_only_install_is_no_matter(copied: Path, cache: Path, expected: str) -> None:
    """Nothing is ever written beside the sources."""
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(copied)], check=True)
    before = sorted(copied.rglob("*"))
    variables = {"NUMALOAD_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        assert say(variables, cwd=copied) == f"{expected} {COMPILED}"
        assert say(variables, cwd=copied) == f"{expected} {LINKED}"
        assert sorted(copied.rglob("*")) == before
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(copied)], check=True)


def unusable(tmp_path: Path) -> dict[str, tuple[dict[str, str], str]]:
    """{id: (variables, what is said)} of places where nothing can be kept."""
    file = tmp_path / "file"
    file.write_text("")
    nowhere = {"HOME": str(file), "XDG_CACHE_HOME": "", "NUMALOAD_CACHE_DIR": ""}
    return {
        "no-home": (nowhere, "Not a directory"),
        "empty-home": (nowhere | {"HOME": ""}, "there is no home folder"),
        "not-a-folder": ({"NUMALOAD_CACHE_DIR": str(file)}, "Not a directory"),
        "no-full-path": ({"NUMALOAD_CACHE_DIR": "~/kernels"}, "'~/kernels', which is no full path"),
        "proc": ({"NUMALOAD_CACHE_DIR": "/proc/numaload"}, "No such file or directory"),
    }


@pytest.mark.parametrize("place", ["no-home", "empty-home", "not-a-folder", "no-full-path", "proc"])
def test_nowhere_to_keep_it_is_said_once(tmp_path: Path, expected: str, place: str) -> None:
    variables, why = unusable(tmp_path)[place]
    for _ in range(2):
        said = say(variables)
        assert said.startswith(f"{expected} True 1 compiled kernels are not kept, each process")
        assert why in said
        assert "set NUMALOAD_CACHE_DIR to the full path of a folder of your own" in said


def test_a_relative_xdg_cache_is_ignored(tmp_path: Path, expected: str) -> None:
    variables = {"NUMALOAD_CACHE_DIR": "", "XDG_CACHE_HOME": "here", "HOME": str(tmp_path)}
    assert say(variables, cwd=tmp_path) == f"{expected} {COMPILED}"
    assert (tmp_path / ".cache/numaload").is_dir()
    assert not (tmp_path / "here").exists()


def test_a_full_disk(tmp_path: Path, expected: str) -> None:
    """A file size limit of 0 stands for it: nothing half-written stays."""
    cache = tmp_path / "cache"
    limited = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (0, 0)){PROGRAM}"
    limited = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limited}"
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"NUMALOAD_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{expected} True 1 compiled kernels are not kept")
    assert "File too large" in done.stdout
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_code_from_a_folder_that_others_may_write_to_is_not_run(
    run: Callable[..., str], cache: Path, expected: str, mode: int
) -> None:
    run()
    (folder,) = cache.iterdir()
    folder.chmod(mode)
    said = run()
    assert said.startswith(f"{expected} True 1 ")
    assert "is not a folder that only this user may write to" in said


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_code_below_a_folder_that_others_may_write_to_is_not_run(
    run: Callable[..., str], cache: Path, expected: str, mode: int
) -> None:
    """They could put another folder of this user in its place, but for the sticky bit."""
    run()
    cache.parent.chmod(mode)
    said = run()
    if mode & stat.S_ISVTX:
        assert said == f"{expected} {LINKED}"
    else:
        assert said.startswith(f"{expected} True 1 compiled kernels are not kept")
        assert f"others than this user may rename what is in {cache.parent}" in said


def test_code_from_somebody_elses_folder_is_not_run(
    run: Callable[..., str], cache: Path, expected: str
) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder to somebody else")
    run()
    (folder,) = cache.iterdir()
    os.chown(folder, USER, USER)
    assert "is not a folder that only this user may write to" in run()
    os.chown(cache, USER, USER)
    os.chown(folder, 0, 0)
    assert f"others than this user may rename what is in {cache}" in run()
    os.chown(cache, 0, 0)
    folder.rename(cache / "elsewhere")
    folder.symlink_to(cache / "elsewhere")
    said = run()
    assert said.startswith(f"{expected} True 1 compiled kernels are not kept")
    assert folder.name in said


def test_folders_of_old_versions_go_and_nothing_else(run: Callable[..., str], cache: Path) -> None:
    run()
    (ours,) = cache.iterdir()
    old = [cache / f"kernels-{i:032x}" for i in range(12)]
    foreign = [cache / name for name in ("mine", "kernels-5.15-src", f"kernels-{0:031x}")]
    for path in [*old, *foreign]:
        shutil.copytree(ours, path)
    (old[1] / "notes.txt").write_text("not ours")
    for i, path in enumerate([*foreign, *old]):
        os.utime(path, (1e9 + i, 1e9 + i))
    run("Q6_K")
    assert all((path / "q4_k_to_bfloat16").exists() for path in foreign)
    assert (old[1] / "notes.txt").exists()
    assert {path for path in old if path.exists()} == {old[1], *old[4:]}


def test_files_of_others_stay_in_a_folder_named_as_an_old_version(kept: Path) -> None:
    for i in range(kernels.KEPT + 1):
        shutil.copytree(kept.parent, kept.parents[1] / f"kernels-{i:032x}")
    old = kept.parents[1] / f"kernels-{0:032x}"
    (old / "notes").write_text("not ours")
    (old / "a_link").symlink_to(kept)
    os.mkfifo(old / "a_pipe")
    os.utime(old, (1e9, 1e9))
    kernels.save("q6_k_to_float32", b"code")
    assert {path.name for path in old.iterdir()} == {"notes", "a_link", "a_pipe"}


def test_a_version_in_use_is_not_an_old_one(run: Callable[..., str], cache: Path) -> None:
    run()
    (ours,) = cache.iterdir()
    os.utime(ours, (1e9, 1e9))
    run()
    assert ours.stat().st_mtime > 1e9


def test_one_compiler_lock_for_all_threads(cache: Path) -> None:
    """Threads that ask for the same kernels first: each is compiled once."""
    program = """
import threading
from numaload.formats.qtypes import QuantType
from numaload.kernels import compile, registry
compiled, real = [], compile.compile_kernel
def counted(name, *rest):
    compiled.append(name)
    return real(name, *rest)
compile.compile_kernel = counted
def ask():
    for name in ("Q4_0", "Q8_0"):
        registry.load(QuantType[name], "float32")
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*sorted(compiled))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True,
        env=os.environ | {"NUMALOAD_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.stdout.split() == ["q4_0_to_float32", "q8_0_to_float32"]
