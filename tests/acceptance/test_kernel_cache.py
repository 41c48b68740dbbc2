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

from numaload.kernels.jit import cache as kernels

ROOT = Path(__file__).parents[2]
USER = 12345  # nobody that exists

# Dequantizes blocks twice; says what was imported and what was warned of.
PROGRAM = """
import sys, warnings
import numpy as np
from numaload.dequantize import DTYPES, dequantize_blocks
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.machine.topology import topology
from numaload.machine.workers import pool
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for name in sys.argv[1:] or ["Q4_K"]:
        block_size, type_size = BLOCKS[QuantType[name]]
        out = np.empty(64 * block_size, DTYPES["bfloat16"])
        blocks = np.full((64, type_size), 0x21, np.uint8)
        for _ in range(2):
            dequantize_blocks(blocks, QuantType[name], out.dtype, out, pool(topology()))
        print(name, out.view(np.uint16)[:64].sum(), end=" ")
print("numba" in sys.modules, len(said), *[w.message for w in said][:1])
"""
COMPILED, LINKED = "True 0", "False 0"  # numba was imported or not; no warning
VERSION = "from numaload.kernels.jit import cache; print(cache.version())"
Change = Callable[[Path], object]


def python(program: str, *words: str, cwd: Path = ROOT, **variables: object) -> str:
    """Run a program; what it prints."""
    done = subprocess.run(
        # Without bytecode: of a source that was changed twice within a second Python takes the old.
        [sys.executable, "-B", "-c", program, *words], capture_output=True, text=True, timeout=300,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        check=False, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def say(cache: Path, *types: str, **options: object) -> str:
    return python(PROGRAM, *types, NUMALOAD_CACHE_DIR=cache, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected() -> str:
    """Without JIT, which is said."""
    said = python(PROGRAM, NUMBA_DISABLE_JIT="1")
    assert "False 1 kernels run as Python, a thousand times slower: unset NUMBA_DISABLE_JIT" in said
    return said.partition(" False ")[0]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, expected: str) -> Path:
    """A cache in which a process has left two kernels."""
    cache = tmp_path_factory.mktemp("compiled") / "cache"
    said = say(cache, "Q4_K", "Q6_K")
    assert said.startswith(f"{expected} ")
    assert said.endswith(COMPILED)
    return cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The path of a cache that is empty."""
    return tmp_path / "cache"


@pytest.fixture
def filled(compiled: Path, cache: Path) -> Path:
    """A cache with compiled kernels."""
    shutil.copytree(compiled, cache)
    return cache


@pytest.fixture
def kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a file that this process keeps as a kernel, in a cache that has no problem."""
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", str(cache))
    monkeypatch.setattr("numaload.kernels.jit.cache._problem", "")
    kernels.save("q4_k_to_float32", b"code")
    path = cache / f"kernels-{kernels.version()}" / "q4_k_to_float32"
    assert kernels.load(path.name) == b"code"
    return path


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """An installation of its own."""
    shutil.copytree(ROOT / "numaload", tmp_path / "install" / "numaload", symlinks=False)
    return tmp_path / "install"


# use -------------------------------------------------------------------------------------------


def test_only_what_is_used_is_compiled_and_for_this_user_alone(compiled: Path) -> None:
    (folder,) = compiled.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir()} == {"q4_k_to_bfloat16", "q6_k_to_bfloat16"}


def test_the_second_process_neither_compiles_nor_imports_numba(filled: Path, expected: str) -> None:
    assert say(filled) == f"{expected} {LINKED}"


def test_processes_that_start_at_once(cache: Path, expected: str) -> None:
    command, variables = [sys.executable, "-c", PROGRAM], {"NUMALOAD_CACHE_DIR": str(cache)}
    children = [
        subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [child.communicate(timeout=300)[0].strip() for child in children]
    assert {text.removesuffix(COMPILED).removesuffix(LINKED).strip() for text in said} == {expected}
    (folder,) = cache.iterdir()
    assert [p.name for p in folder.iterdir()] == ["q4_k_to_bfloat16"]
    assert say(cache) == f"{expected} {LINKED}"


def test_one_compiler_lock_for_all_threads(cache: Path) -> None:
    """Threads that ask for the same kernels first: each is compiled once."""
    program = """
import threading
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry
from numaload.kernels.jit import compile
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
    assert python(program, NUMALOAD_CACHE_DIR=cache).split() == [
        "q4_0_to_float32", "q8_0_to_float32",
    ]  # fmt: skip


# versions --------------------------------------------------------------------------------------

CHANGES = {
    "the-kernel": ("kernels/kquants.py", "low = floats(q & 15) *", "low = floats(q & 14) *"),
    "a-constant-elsewhere": ("kernels/lanes.py", "CHUNK = 256", "CHUNK = 512"),
    "the-compiler": ("kernels/jit/lowering.py", '"fsub"', '"fadd"'),
    "sizes-of-blocks": (
        "formats/qtypes.py", "QuantType.Q8_K: (256, 292)", "QuantType.Q8_K: (256, 293)",
    ),
}  # fmt: skip


def changed(install: Path, change: str) -> Callable[[], int]:
    """Make a change in an installation; call the result to undo it."""
    file, old, new = CHANGES[change]
    source = install / "numaload" / file
    text = source.read_text(encoding="utf-8")
    assert old in text
    source.write_text(text.replace(old, new), encoding="utf-8")
    return lambda: source.write_text(text, encoding="utf-8")


def test_code_of_another_version_is_not_served(copied: Path, filled: Path, expected: str) -> None:
    assert say(filled, cwd=copied) == f"{expected} {LINKED}"
    undo = changed(copied, "the-kernel")
    after = say(filled, cwd=copied)
    assert after.endswith(COMPILED)
    assert not after.startswith(expected)
    assert len(list(filled.iterdir())) == 2
    undo()
    assert say(filled, cwd=copied) == f"{expected} {LINKED}"


def test_every_source_makes_a_version(copied: Path) -> None:
    """Also where only a file changed that the kernel itself is not in."""
    assert python(VERSION, cwd=copied) == kernels.version()
    found = {kernels.version()}
    for change in CHANGES:
        undo = changed(copied, change)
        found.add(python(VERSION, cwd=copied))
        undo()
    assert len(found) == 1 + len(CHANGES)
    assert python(VERSION, cwd=copied) == kernels.version()


def test_two_archives_do_not_share_code(
    copied: Path, filled: Path, expected: str, tmp_path: Path
) -> None:
    """Python imports from zip files too: their sources are hashed as well."""
    archive = shutil.make_archive(str(tmp_path / "a0"), "zip", copied)
    assert say(filled, cwd=tmp_path, PYTHONPATH=archive) == f"{expected} {LINKED}"
    changed(copied, "the-kernel")
    archive = shutil.make_archive(str(tmp_path / "a1"), "zip", copied)
    assert python(VERSION, cwd=tmp_path, PYTHONPATH=archive) != kernels.version()


def test_variables_make_a_version_if_they_change_code() -> None:
    assert python(VERSION, NUMBA_CACHE_DIR="1", NUMBA_NUM_THREADS="1") == kernels.version()
    found = {python(VERSION, NUMBA_OPT="1"), python(VERSION, NUMBA_CPU_NAME="x86-64")}
    assert len(found - {kernels.version()}) == 2


def test_code_for_another_processor_is_not_served(filled: Path, expected: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the other processor is an x86-64")
    assert say(filled, NUMBA_CPU_NAME="x86-64") == f"{expected} {COMPILED}"
    assert len(list(filled.iterdir())) == 2


def test_folders_of_old_versions_go_and_nothing_else(kept: Path) -> None:
    ours, cache = kept.parent, kept.parents[1]
    old = [cache / f"kernels-{i:032x}" for i in range(12)]
    foreign = [cache / name for name in ("mine", "kernels-5.15-src", f"kernels-{0:031x}")]
    for path in [*old, *foreign]:
        shutil.copytree(ours, path)
    (old[1] / "notes.txt").write_text("not ours")
    for i, path in enumerate([*foreign, *old]):
        os.utime(path, (1e9 + i, 1e9 + i))
    kernels.save("q6_k_to_float32", b"code")
    assert all((path / kept.name).exists() for path in foreign)
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


def test_a_version_in_use_is_not_an_old_one(kept: Path) -> None:
    os.utime(kept.parent, (1e9, 1e9))
    kernels.load(kept.name)
    assert kept.parent.stat().st_mtime > 1e9


# files that are no kernels -----------------------------------------------------------------------


def test_code_from_a_file_that_others_may_write_to_is_not_run(filled: Path, expected: str) -> None:
    """Nor is it replaced without a word."""
    (folder,) = filled.iterdir()
    kernel = folder / "q4_k_to_bfloat16"
    kernel.chmod(0o620)
    said = say(filled)
    assert said.startswith(f"{expected} True 1 {kernel} was not a file that only this user may")
    assert "compiled again" in said
    assert say(filled) == f"{expected} {LINKED}"


def bound_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def writable(mode: int) -> Change:
    def make(path: Path) -> None:
        path.write_bytes(b"")
        path.chmod(mode)

    return make


FOREIGN: dict[str, Change] = {
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to("/dev/zero"),
    "socket": bound_socket,
    "named-pipe": os.mkfifo,
    "group": writable(0o620),
    "others": writable(0o602),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_file_of_this_user_alone_is_named(kept: Path, make: Change) -> None:
    """It does not hang, and leaves no descriptor open."""
    kept.unlink()
    make(kept)
    assert kernels.load(kept.name) is None
    assert kernels.problem() == (
        f"{kept} was not a file that only this user may write to: it was not run, but compiled"
        " again"
    )
    before = os.listdir("/proc/self/fd")
    assert kernels.load(kept.name) is None
    assert os.listdir("/proc/self/fd") == before


def test_a_kernel_that_cannot_be_kept_is_named(kept: Path) -> None:
    kept.unlink()
    kept.mkdir()
    kernels.save(kept.name, b"code")
    assert f"not kept, each process compiles: {kept}: Is a directory; set" in kernels.problem()


DAMAGE: dict[str, Change] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff"),
    "another-kernel": lambda path: shutil.copy(path.with_name("q6_k_to_float32"), path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_not_taken(kept: Path, damage: Change) -> None:
    kernels.save("q6_k_to_float32", b"code")
    damage(kept)
    assert kernels.load(kept.name) is None
    kernels.save(kept.name, b"code")
    assert kernels.load(kept.name) == b"code"
    assert kernels.problem() == ""


def test_damaged_files_are_compiled_again(filled: Path, expected: str) -> None:
    (folder,) = filled.iterdir()
    kernel = folder / "q4_k_to_bfloat16"
    kernel.write_bytes(kernel.read_bytes()[:500] + b"\xff" * 64)
    assert say(filled) == f"{expected} {COMPILED}"
    assert say(filled) == f"{expected} {LINKED}"


# places ------------------------------------------------------------------------------------------


def test_without_sources_nothing_is_kept(copied: Path, cache: Path, expected: str) -> None:
    folder = copied / "numaload/kernels"
    subprocess.run([sys.executable, "-m", "compileall", "-qb", str(folder)], check=True)
    for path in folder.rglob("*.py"):
        path.unlink()
    said = say(cache, cwd=copied)
    assert said.startswith(f"{expected} True 1 compiled kernels are not kept")
    assert "sources of numaload.kernels are not there" in said


def test_a_read_only_install_is_no_matter(copied: Path, cache: Path, expected: str) -> None:
    """Nothing is ever written beside the sources."""
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(copied)], check=True)
    before = sorted(copied.rglob("*"))
    try:
        assert say(cache, cwd=copied, PYTHONDONTWRITEBYTECODE="1") == f"{expected} {COMPILED}"
        assert sorted(copied.rglob("*")) == before
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(copied)], check=True)


NOWHERE = {"HOME": "FILE", "XDG_CACHE_HOME": "", "NUMALOAD_CACHE_DIR": ""}
# {id: (variables, in which FILE is a file; what is said)}
UNUSABLE: dict[str, tuple[dict[str, str], str]] = {
    "no-home": (NOWHERE, "Not a directory"),
    "empty-home": (NOWHERE | {"HOME": ""}, "there is no home folder"),
    "not-a-folder": ({"NUMALOAD_CACHE_DIR": "FILE"}, "Not a directory"),
    "no-full-path": ({"NUMALOAD_CACHE_DIR": "~/kernels"}, "'~/kernels', which is no full path"),
    "proc": ({"NUMALOAD_CACHE_DIR": "/proc/numaload"}, "No such file or directory"),
}


@pytest.mark.parametrize("place", UNUSABLE)
def test_nowhere_to_keep_it_is_named(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    variables, why = UNUSABLE[place]
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("FILE", str(tmp_path / "file")))
    monkeypatch.setattr("numaload.kernels.jit.cache._problem", "")
    assert kernels.load("q4_k_to_float32") is None
    kernels.save("q4_k_to_float32", b"code")
    assert kernels.problem().startswith("compiled kernels are not kept, each process compiles: ")
    assert why in kernels.problem()
    assert "set NUMALOAD_CACHE_DIR to the full path of a folder of your own" in kernels.problem()


def test_nowhere_to_keep_it_is_said_once(tmp_path: Path, expected: str) -> None:
    (tmp_path / "file").write_text("")
    said = say(tmp_path / "file")
    assert said.startswith(f"{expected} True 1 compiled kernels are not kept, each process")
    assert "Not a directory" in said


def test_a_relative_xdg_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"NUMALOAD_CACHE_DIR": "", "XDG_CACHE_HOME": "here", "HOME": str(tmp_path)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    kernels.save("q4_k_to_float32", b"code")
    assert (tmp_path / ".cache/numaload" / f"kernels-{kernels.version()}").is_dir()
    assert not (tmp_path / "here").exists()


def test_a_full_disk(cache: Path) -> None:
    """A file size limit of 0 stands for it: nothing half-written stays."""
    program = """
import resource, signal
from numaload.kernels.jit import cache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
cache.save("q4_k_to_float32", b"code")
print(cache.problem())
"""
    said = python(program, NUMALOAD_CACHE_DIR=cache, PYTHONDONTWRITEBYTECODE="1")
    assert said.startswith("compiled kernels are not kept")
    assert "File too large" in said
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_to_is_not_used(kept: Path, mode: int) -> None:
    kept.parent.chmod(mode)
    assert kernels.load(kept.name) is None
    assert "is not a folder that only this user may write to" in kernels.problem()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_below_one_that_others_may_write_to_is_not_used(kept: Path, mode: int) -> None:
    """They could put another folder of this user in its place, but for the sticky bit."""
    above = kept.parents[2]
    above.chmod(mode)
    sticky = bool(mode & stat.S_ISVTX)
    assert kernels.load(kept.name) == (b"code" if sticky else None)
    said = f"others than this user may rename what is in {above}"
    assert (said in kernels.problem()) == (not sticky)


@pytest.mark.parametrize("where", ["folder", "cache", "link"])
def test_a_folder_of_somebody_else_is_not_used(kept: Path, where: str) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder to somebody else")
    folder, cache = kept.parent, kept.parents[1]
    said = f"others than this user may rename what is in {cache}"
    if where == "link":
        folder.rename(cache / "elsewhere")
        folder.symlink_to(cache / "elsewhere")
        said = folder.name
    elif where == "folder":
        os.chown(folder, USER, USER)
        said = "is not a folder that only this user may write to"
    else:
        os.chown(cache, USER, USER)
    assert kernels.load(kept.name) is None
    assert said in kernels.problem()
