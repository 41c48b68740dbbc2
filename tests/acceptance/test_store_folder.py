"""The store's own folder: what lies beside and in it that numaload did not make stays as it is."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import LIMIT_S, Numaload, running, sparse_model
from numaload.errors import NumaloadWarning, StoreError
from numaload.holder.process import HolderProcess
from numaload.linux.mounts import mount_of
from numaload.machine import userdir
from numaload.pagecache.records import Record
from numaload.replicas import hold as holding
from numaload.replicas import reclaim
from numaload.replicas import store as stores

pytestmark = pytest.mark.usefixtures("nothing_said")

MIB = 1 << 20
OWN = f"numaload-{os.geteuid()}"
ENTRY = f"{'0' * 32}.{'0' * 8}"  # as entries are named


@pytest.fixture
def small(tmp_path: Path) -> str:
    return sparse_model(tmp_path / "m.gguf", MIB)


@pytest.fixture
def base(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private folder on a tmpfs, which NUMALOAD_STORE names."""
    monkeypatch.setenv("NUMALOAD_STORE", str(store.parent))
    return store.parent


def furnish(folder: Path) -> dict[str, str]:
    """Put a user's things there; their paths and contents."""
    for name in (
        ".bashrc", ".ssh/id_ed25519", "thesis.txt", "photos.2025/1.jpg", "lock/x",
        "known/notes.json", "prewarming/x.json", "reading/list", f"{ENTRY}/manifest.json",
        f"{ENTRY}/node0/m.gguf", f".{ENTRY}/manifest.json", f"{ENTRY[:-1]}1/x", "manifest.json",
        "m.gguf",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"name": "{name}"}}')
    return contents(folder)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and OWN not in path.parts]
    return {str(path): path.read_text() for path in files}


def test_what_lies_beside_the_store_stays(base: Path, small: str) -> None:
    before, numaload = furnish(base), Numaload(base)
    for verb in ("status", "prewarm", "mirror", "verify", "status", "release", "release"):
        numaload(verb, *([small] if verb in ("prewarm", "mirror") else []))
        assert contents(base) == before
    assert stores.entries() == []
    assert (base / OWN / userdir.MARKER).exists()


def test_what_others_put_into_the_store_stays_and_is_named(base: Path, small: str) -> None:
    numaload, own = Numaload(base), base / OWN
    numaload("mirror", small)
    (entry,) = stores.entries()
    kept = [
        own / "thesis.txt", own / ".hidden" / "x", own / ENTRY / "manifest.json",
        own / f".{ENTRY}" / "manifest.json", own / "known" / ".x.json", own / "known" / "x.json",
        own / "reading" / "x", own / "reading" / "a-b", own / "prewarming" / ".1-1.json.x",
    ]  # fmt: skip
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a user's, and longer than the record of a reader")
    (own / entry.name / "node0" / "notes.txt").touch()
    done = numaload("release")
    assert "released" in done.stdout
    assert all(path.exists() for path in kept)
    assert (own / f".{entry.name}" / "node0" / "notes.txt").exists()
    assert not list(own.rglob("*.gguf"))
    for name in ("thesis.txt", ".hidden", ENTRY, f".{entry.name}"):
        assert f"{own}/{name} stays: " in done.stderr
    assert not numaload("release").stdout  # least of all that nothing was there
    assert all(path.exists() for path in kept)


def test_links_in_the_store_are_not_followed(base: Path, small: str, tmp_path: Path) -> None:
    with api.mirror(small, shared=True):
        pass
    (entry,) = stores.entries()
    elsewhere = tmp_path / "node0"
    shutil.copytree(base / OWN / entry.name / "node0", elsewhere)
    shutil.rmtree(base / OWN / entry.name / "node0")
    (base / OWN / entry.name / "node0").symlink_to(elsewhere)
    with pytest.warns(NumaloadWarning, match="stays: some of it"):
        reclaim.release([entry])
    assert (elsewhere / "m.gguf").exists()


@pytest.mark.parametrize("kind", ["hard link", "symbolic link", "FIFO", "folder"])
def test_what_is_no_replica_in_its_place_is_refused(base: Path, small: str, kind: str) -> None:
    api.mirror(small, shared=True).close()
    (entry,) = stores.entries()
    replica = base / OWN / entry.name / "node0" / "m.gguf"
    other = base / "other.gguf"
    replica.rename(other)
    if kind == "hard link":
        replica.hardlink_to(other)
    elif kind == "symbolic link":
        replica.symlink_to(other)
    elif kind == "FIFO":
        os.mkfifo(replica)
    else:
        replica.mkdir()
    with pytest.raises(StoreError, match=r"m\.gguf|cannot be opened"):
        api.attach(small)
    assert other.exists()


@pytest.mark.parametrize("kind", ["empty", "numaload's", "a user's"])
def test_a_folder_without_the_marker(base: Path, small: str, kind: str) -> None:
    """Empty, it may have been made just now; its maker may have been killed."""
    own = base / OWN
    if kind == "numaload's":
        api.mirror(small, shared=True).close()
        (own / userdir.MARKER).unlink()
        api.attach(small).close()
    else:
        own.mkdir(mode=0o700)
    if kind == "a user's":
        (own / "thesis.txt").touch()
        for use in (
            lambda: api.attach(small),
            reclaim.sweep,
            lambda: api.mirror(small, shared=True),
        ):
            with pytest.raises(StoreError, match=r"did not make it, found thesis\.txt"):
                use()
        assert os.listdir(own) == ["thesis.txt"]
    else:
        api.mirror(small, shared=True).close()
        assert (own / userdir.MARKER).exists()
        reclaim.release(stores.entries())


EARLIER = """
import signal, sys
with open("/proc/self/comm", "w") as file:
    file.write(sys.argv[1])
print("ready", flush=True)
signal.pause()
"""


@contextmanager
def earlier_holder(name: str, *fds: int) -> Iterator[HolderProcess]:
    """A process as an earlier version's holder is known: by its name and its start."""
    with subprocess.Popen(
        [sys.executable, "-c", EARLIER, name], stdout=subprocess.PIPE, pass_fds=fds
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"ready\n"
        ticks = Path(f"/proc/{job.pid}/stat").read_text().rpartition(")")[2].split()[19]
        yield HolderProcess(job.pid, int(ticks), os.readlink("/proc/self/ns/pid"))
        job.kill()


@pytest.fixture
def as_before(base: Path, small: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An entry where earlier versions kept it: in the very folder that NUMALOAD_STORE names."""
    with monkeypatch.context() as earlier:
        earlier.setattr(userdir, "path", lambda: str(base))
        api.mirror(small, shared=True).close()
        (entry,) = stores.entries()
    (base / userdir.MARKER).unlink()
    (base / "thesis.txt").touch()
    return base / entry.name


def test_an_earlier_version_s_replicas_are_taken_over(
    base: Path, small: str, as_before: Path
) -> None:
    assert len(Numaload(base).json("status")["replicas"]) == 1
    with api.attach(small) as mirror:
        assert mirror.verify().right
    Numaload(base)("release")
    assert stores.entries() == []
    assert sorted(os.listdir(base)) == ["known", "lock", OWN, "thesis.txt"]


def test_an_earlier_version_s_holder_is_ended(base: Path, small: str, as_before: Path) -> None:
    (replica,) = as_before.glob("node*/*")
    with replica.open("rb") as file, earlier_holder("numaload-hold", file.fileno()) as holder:
        status = os.fstat(file.fileno())
        row = json.loads((as_before / "manifest.json").read_text())
        row["holder"] = {
            "pid": holder.pid, "start": holder.start, "files": [[status.st_dev, status.st_ino]],
        }  # fmt: skip
        (as_before / "manifest.json").write_text(
            json.dumps(row | {"pid_namespace": holder.namespace})
        )
        replica.unlink()
        replica.symlink_to(f"/proc/{holder.pid}/fd/{file.fileno()}")
        shutil.copytree(as_before, base / "again", symlinks=True)
        assert len(Numaload(base).json("status")["replicas"]) == 1
        os.rename(base / "again", as_before)  # as it publishes again what was moved
        assert Numaload(base).json("status")["replicas"][0]["holder"] == holder.pid
        with api.attach(small) as mirror:
            assert mirror.verify().right
        Numaload(base)("release")
        assert not running(holder.pid)
        shutil.rmtree(as_before)  # as it takes away itself what it published
        assert stores.entries() == []


def test_an_earlier_version_s_prewarming_is_seen_and_ended(base: Path, small: str) -> None:
    (base / "prewarming").mkdir()
    with earlier_holder("numaload-warm") as holder:
        status = os.stat(small)
        record = Record(
            **holder._asdict(), paths=(small,), files=((status.st_dev, status.st_ino),),
            part=("", ""), lock=False, since=1e9,
        )  # fmt: skip
        (base / "prewarming" / record.name).write_bytes(record.to_json())
        (row,) = Numaload(base).json("status")["prewarming"]
        assert row["pid"] == holder.pid
        Numaload(base)("release")
        assert not running(holder.pid)


NONSENSE = ["a disk", "a file", "no parent", "another kind", "a newline", "too long"]


@pytest.mark.parametrize("kind", NONSENSE)
def test_what_needs_no_store_works_without_one(
    kind: str, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, file, shared = tmp_path / "home", tmp_path / "file", Path(userdir.SHARED_MEMORY)
    home.mkdir(mode=0o700)
    file.touch()
    mount = mount_of(str(home))
    if kind == "a disk" and mount is not None and mount.kind == "tmpfs":
        pytest.skip("temporary files are on no disk here")
    where = {
        "a disk": home, "a file": file, "no parent": shared / "numaload-absent/a/b",
        "another kind": Path("/proc"), "a newline": tmp_path / "a\nb/c",
        "too long": shared / ("x" * 5000),
    }[kind]  # fmt: skip
    before = furnish(home)
    monkeypatch.setenv("NUMALOAD_STORE", str(where))
    with pytest.warns(NumaloadWarning, match="NUMALOAD_STORE") as warned:
        report = api.prewarm(small)
    assert report.size == os.path.getsize(small)
    assert len(warned) == 1
    for use in (
        lambda: api.mirror(small, shared=True),
        lambda: api.prewarm(small, background=True),
    ):
        with pytest.raises(StoreError):
            use()
    for verb, words in (("plan", "policy  "), ("status", "page cache")):
        assert words in Numaload(where).start(verb, small).communicate()[0]
    assert contents(home) == before


def test_another_user_s_folder_is_named_with_the_way_out(base: Path, small: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a folder away")
    (base / OWN).mkdir(mode=0o700)
    os.chown(base / OWN, 65534, 65534)
    with pytest.raises(StoreError, match=r"belongs to user nobody.*set NUMALOAD_STORE to"):
        api.mirror(small, shared=True)
    Numaload(base)("prewarm", small)
    assert "page cache" in Numaload(base)("status", small, status=1).stdout


@pytest.mark.parametrize("kind", ["a file", "a folder", "a link"])
def test_something_else_in_a_place_of_the_store_does_not_stop_release(
    base: Path, small: str, kind: str
) -> None:
    api.mirror(small, shared=True).close()
    for name in ("known", "prewarming", "reading", "lock", ENTRY, f".{ENTRY}"):
        place = base / OWN / name
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        if kind == "a file":
            place.touch()
        elif kind == "a folder":
            place.mkdir()
        else:
            place.symlink_to("/")
    assert "m.gguf" in Numaload(base)("release").stdout
    assert not list((base / OWN).rglob("*.gguf"))


def test_a_store_that_is_removed_meanwhile_is_an_error(
    base: Path, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at logout: an error or a warning, and no file in the working folder."""
    real = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if "dir_fd" in options:
            shutil.rmtree(userdir.path(), ignore_errors=True)
        real(path, *arguments, **options)

    monkeypatch.chdir(tmp_path)
    api.evict(small)
    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.warns(NumaloadWarning, match="removed while it was made"):
        api.prewarm(small)
    with pytest.raises(StoreError, match="removed while it was made"):
        api.prewarm(small, lock=True)
    assert os.listdir(tmp_path) == [os.path.basename(small)]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_replicas_that_cannot_be_removed_are_not_released(base: Path, small: str) -> None:
    api.mirror(small, shared=True).close()
    program = f"""
        mount --bind {base} {base} && mount -o remount,bind,ro {base} || exit 77
        {shlex.join(Numaload(base).command("release"))}; echo "status $?"
    """
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", program], capture_output=True, text=True,
        env=Numaload(base).environment, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode in (1, 77):
        pytest.skip("nothing can be mounted here")
    assert "status 1" in done.stdout
    assert "released" not in done.stdout
    assert "stays" in done.stderr
    assert len(stores.entries()) == 1


@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a link"])
def test_what_is_only_called_as_the_marker_is_none(base: Path, kind: str) -> None:
    store = Path(userdir.path())
    store.mkdir(mode=0o700)
    (store / "thesis.txt").touch()
    marker = store / userdir.MARKER
    if kind == "a folder":
        marker.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(marker)
    else:
        marker.symlink_to("x")
    with pytest.raises(StoreError, match="numaload did not make it"):
        stores.entries()


def test_a_marker_that_another_process_makes_meanwhile(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = userdir.listed

    def late(folder: int | None) -> list[str]:
        (base / OWN / userdir.MARKER).touch()
        return listed(folder)

    monkeypatch.setattr(userdir, "listed", late)
    with userdir.opened() as folder:
        assert os.listdir(folder) == [userdir.MARKER]


def test_a_folder_that_others_use_is_not_to_be_closed(base: Path) -> None:
    store = Path(userdir.path())
    store.mkdir()
    store.chmod(0o1777)
    with pytest.raises(StoreError, match="set NUMALOAD_STORE to another") as caught:
        stores.entries()
    assert "chmod" not in str(caught.value)
    store.chmod(0o700)
    with reclaim.building():
        store.chmod(0o755)
    with pytest.raises(StoreError, match=f"chmod 700 {store}"):
        stores.entries()


def test_what_was_lost_to_release_while_it_was_published_is_built_again(
    base: Path, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pids = holding.hold, []

    def start(*arguments: Any) -> HolderProcess:
        holder = real(*arguments)
        pids.append(holder.pid)
        if len(pids) == 1:
            reclaim.release(stores.entries())
        return holder

    monkeypatch.setattr(holding, "hold", start)
    with pytest.warns(NumaloadWarning, match="while it was published.*mirroring once more"):
        api.mirror(small, shared=True, hold=True).close()
    assert [running(pid) for pid in pids] == [False, True]
    reclaim.release(stores.entries())


def test_what_is_not_a_replica_s_size_or_mode_stays(base: Path, small: str) -> None:
    """Whatever the manifest, which anybody may have edited, says of its name."""
    api.mirror(small, shared=True).close()
    (entry,) = stores.entries()
    replica = Path(entry.path(entry.groups[0], 0))
    replica.unlink()
    replica.write_text("precious")
    with pytest.warns(NumaloadWarning, match="stays: some of it"):
        (done,) = reclaim.release([entry])
    (left,) = [path for path in Path(userdir.path()).rglob("*") if path.name == replica.name]
    assert left.read_text() == "precious"
    assert not done.error
