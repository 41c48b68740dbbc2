"""Point 6, mirror: planned, built whole or not at all, kept in the store, verified again.

Placement on several nodes is tested in tests/numa; this is what one node can show.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import gguf
import pytest

import numaload as api
from commands import KEPT, Numaload, evict, sparse_model, used_bytes, wait_for
from numaload.files import known
from numaload.machine.memory import available
from numaload.machine.userdir import MARKER

MIB = 1 << 20
ATTACH = """
import json, sys, numaload
m = numaload.attach(sys.argv[1])
found = m.verify()
print(json.dumps({"nodes": m.nodes, "right": found.right, "chunks": found.chunks,
                  "sum": int(m.view(m.nodes[0])["blk.0.attn_q.weight"].blocks.sum())}))
"""


def replicas(numaload: Numaload) -> list[str]:
    entries = numaload.json("status")["replicas"]
    return [path for entry in entries for paths in entry["replicas"].values() for path in paths]


def left_over(numaload: Numaload) -> list[str]:
    """What is in the store beside its lock and its own folders."""
    own = (MARKER, "lock", "known", "pools", "reading", "prewarming")
    return [name for name in os.listdir(numaload.store) if name not in own]


@pytest.fixture
def own_model(model_files: list[str], tmp_path: Path) -> list[str]:
    """A copy that a test may change."""
    return [shutil.copy(path, str(tmp_path)) for path in model_files]


@pytest.mark.fast
def test_a_replica_is_the_file_itself(numaload: Numaload, model_files: list[str]) -> None:
    (report,) = numaload.json("mirror", model_files[0], "--nodes", "all")
    assert report["placed"]
    assert report["kind"] == "shared"
    paths = replicas(numaload)
    assert [os.path.basename(p) for p in paths] == [os.path.basename(p) for p in model_files]
    for replica, source in zip(paths, model_files, strict=True):
        assert Path(replica).read_bytes() == Path(source).read_bytes()
        assert stat.S_IMODE(os.stat(replica).st_mode) == 0o400
        assert len(gguf.GGUFReader(replica).tensors) > 0  # another engine maps it unmodified
    assert stat.S_IMODE(os.stat(numaload.store).st_mode) == 0o700
    with api.open(paths[1]) as weights:  # and so do we, split files and all
        assert weights.paths == paths


@pytest.mark.fast
def test_another_process_attaches_verifies_and_releases(numaload: Numaload, model: str) -> None:
    before = used_bytes(numaload.store)
    numaload("mirror", model)
    found = numaload.python(ATTACH, model)
    assert found["right"]
    with api.open(model) as weights:
        assert found["sum"] == int(weights["blk.0.attn_q.weight"].blocks.sum())
    assert "all checksums right" in numaload("verify", model).stdout
    assert "released" in numaload("release", model).stdout
    assert replicas(numaload) == []
    assert used_bytes(numaload.store) - before < MIB
    assert "no replica" in numaload("verify", model, status=1).stderr


def test_mirroring_twice_builds_once(numaload: Numaload, model: str) -> None:
    numaload("mirror", model)
    first = replicas(numaload)
    assert "there already" in numaload("mirror", model).stdout
    assert replicas(numaload) == first


def test_two_at_once_build_once(numaload: Numaload, model: str) -> None:
    jobs = [numaload.start("mirror", model) for _ in range(3)]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], outputs
    assert len(numaload.json("status")["replicas"]) == 1


def test_without_file_the_models_used_since_boot(
    numaload: Numaload, own_model: list[str], tmp_path: Path
) -> None:
    assert "numaload prewarm MODEL.gguf" in numaload("mirror", status=2).stderr
    numaload("prewarm", own_model[0])
    done = numaload("mirror")
    assert f"plan: {own_model[0]}" in done.stderr
    assert len(replicas(numaload)) == 2
    numaload("release")
    with open(own_model[1], "ab") as file:
        file.write(b"more")
    done = numaload("mirror", status=2)
    assert "changed or went away" in done.stderr
    assert left_over(numaload) == []


def test_without_file_nothing_is_built_unless_all_fit(
    numaload: Numaload, model: str, tmp_path: Path
) -> None:
    huge = sparse_model(tmp_path / "huge.gguf", available().free + (1 << 30))
    numaload("prewarm", model)
    known.remember(known.identify([huge]))
    done = numaload("mirror", status=1)
    assert "does NOT fit" in done.stderr
    assert f"plan: {huge}" in done.stderr
    assert left_over(numaload) == []


def test_what_does_not_fit_is_refused_with_numbers(numaload: Numaload, tmp_path: Path) -> None:
    huge = sparse_model(tmp_path / "huge.gguf", available().free + (1 << 30))
    before = used_bytes(numaload.store)
    done = numaload("mirror", huge, status=1)
    assert "nothing was built" in done.stderr
    assert str(-(-os.path.getsize(huge) // 4096) * 4096) in done.stderr
    assert left_over(numaload) == []
    assert used_bytes(numaload.store) - before < MIB
    assert numaload.json("plan", huge, status=1)["fits"] is False


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["SIGKILL", "ctrl-c"]
)
def test_a_builder_stopped_half_way_leaves_nothing(
    numaload: Numaload, tmp_path: Path, model: str, how: signal.Signals, status: int
) -> None:
    big = sparse_model(tmp_path / "big.gguf", 1500 * MIB)
    before = used_bytes(numaload.store.parent)
    job = numaload.start("mirror", big)
    wait_for(lambda: used_bytes(numaload.store.parent) - before > 64 * MIB, "the build to begin")
    job.send_signal(how)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == status, errors
    assert "Traceback" not in errors
    wait_for(lambda: used_bytes(numaload.store.parent) - before < MIB, "memory to come back", 30)
    assert left_over(numaload) == []
    assert replicas(numaload) == []
    numaload("mirror", model)
    assert len(replicas(numaload)) == 2


def test_leftovers_of_a_kill_while_publishing_are_cleared(numaload: Numaload, model: str) -> None:
    numaload("mirror", model)
    (entry,) = left_over(numaload)
    os.rename(numaload.store / entry, numaload.store / f".{entry}")  # as before the last rename
    assert numaload.json("status")["replicas"] == []
    assert left_over(numaload) == []


def test_source_cache_that_was_there_stays_and_other_is_given_back(
    numaload: Numaload, model_files: list[str]
) -> None:
    def resident() -> int:
        rows = numaload.json("status", model_files[0])["page_cache"]
        return sum(row["resident"] for row in rows)

    size = sum(map(os.path.getsize, model_files))
    numaload("prewarm", model_files[0])
    numaload("mirror", model_files[0])
    assert resident() > KEPT * size
    numaload("release")
    evict(model_files)
    numaload("mirror", model_files[0])
    assert resident() < size // 4


def test_a_changed_file_finds_no_replica(numaload: Numaload, own_model: list[str]) -> None:
    numaload("mirror", own_model[0])
    with open(own_model[0], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    for words in ((own_model[0],), ()):  # the replica itself is what it was
        done = numaload("verify", *words)
        assert "changed since it was mirrored" in done.stderr
        assert "all checksums right" in done.stdout
    assert "CHANGED" in numaload("status").stdout
    with pytest.raises(api.errors.ReplicaNotFoundError, match="changed"):
        api.attach(own_model[0])
    numaload("mirror", own_model[0])
    assert len(numaload.json("status")["replicas"]) == 1  # nobody used the old one
    numaload("release", own_model[0])
    assert left_over(numaload) == []


def test_a_file_that_changes_while_it_is_copied(numaload: Numaload, own_model: list[str]) -> None:
    def rewrite(done: int, total: int) -> None:
        if done == total:
            os.utime(own_model[0])

    with pytest.raises(api.errors.FileChangedError, match="mtime_ns"):
        api.mirror(own_model[0], shared=True, progress=rewrite)
    assert left_over(numaload) == []


def test_a_file_that_shrinks_while_it_is_copied(numaload: Numaload, own_model: list[str]) -> None:
    def cut(done: int, total: int) -> None:
        os.truncate(own_model[1], 4096)

    with pytest.raises(api.errors.FileChangedError):
        api.mirror(own_model[0], shared=True, progress=cut)
    assert left_over(numaload) == []


def test_callback_cancels(numaload: Numaload, model: str) -> None:
    with pytest.raises(api.errors.CancelledError):
        api.mirror(model, shared=True, progress=lambda *_: False)
    assert left_over(numaload) == []


def test_a_flipped_bit_is_found(numaload: Numaload, model: str) -> None:
    numaload("mirror", model)
    path = replicas(numaload)[1]
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(17 * MIB)
        byte = file.read(1)
        file.seek(17 * MIB)
        file.write(bytes([byte[0] ^ 4]))
    assert "DIFFER" in numaload("verify", status=1).stdout
    with api.attach(model) as mirror:
        found = mirror.verify()
        assert found.wrong_chunks == {mirror.nodes[0]: [(mirror.report.paths[1], 1)]}
        with pytest.raises(api.errors.ChecksumError, match="chunk"):
            found.check()


def test_releasing_what_is_in_use_says_so_and_hurts_nobody(numaload: Numaload, model: str) -> None:
    numaload("mirror", model)
    with api.attach(model) as mirror:
        blocks = mirror.local()["blk.0.attn_q.weight"].blocks
        total = int(blocks.sum())
        assert "still in use" in numaload("release").stdout
        assert int(blocks.sum()) == total
    assert "nothing was in the store" in numaload("release").stdout


@pytest.mark.parametrize("kind", ["open to others", "a link", "somebody else's"])
def test_an_unsafe_store_is_refused(
    numaload: Numaload, model: str, tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    if kind == "a link":
        numaload.store.symlink_to(target)
    else:
        numaload.store.mkdir(mode=0o700)
    if kind == "open to others":
        numaload.store.chmod(0o755)
    if kind == "somebody else's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(numaload.store, 12345, 12345)
    done = numaload("mirror", model, status=1)
    assert str(numaload.store) in done.stderr
    assert list(target.iterdir()) == []


def test_in_process_on_one_node_copies_nothing(store: Path, model: str) -> None:
    if len(api.topology().usable) != 1:
        pytest.skip("this machine has several nodes")
    with api.mirror(model) as mirror:
        assert mirror.report.kind == "mapped"
        assert "nothing was copied" in mirror.report.note
        assert mirror.local()["blk.0.attn_q.weight"].node is None
    assert not store.exists()


@pytest.mark.fast
def test_all_files_of_a_model_given_build_it_once(
    numaload: Numaload, model_files: list[str], tmp_path: Path
) -> None:
    """As the shell expands model-*.gguf."""
    links = [tmp_path / os.path.basename(path) for path in model_files]
    for link, path in zip(links, model_files, strict=True):
        link.symlink_to(path)
    found = numaload.json("plan", *model_files, *links)
    assert len(found["builds"]) == 1
    assert found["nbytes"] == sum(-(-os.path.getsize(p) // 4096) * 4096 for p in model_files)
    (report,) = numaload.json("mirror", *model_files, *links)
    assert report["placed"]
    assert len(numaload.json("status")["replicas"]) == 1
    (row,) = numaload.json("verify", *model_files)
    assert row["right"]


def test_one_model_twice_in_one_call_is_planned_once(store: Path, model: str) -> None:
    from numaload.replicas.mirror import MirrorOptions, mirror_shared, plan_shared

    machine = api.topology()
    nodes = machine.all
    options = MirrorOptions(machine.groups(nodes))
    with api.open(model) as one, api.open(model) as other:
        plan = plan_shared([one, other], machine, options)
        assert [list(one.layouts) for one in plan.builds] == [options.groups, []]
        mirrors = mirror_shared([one, other], machine, options)
        assert [mirror.report.built for mirror in mirrors] == [nodes, []]
        for mirror in mirrors:
            mirror.close()
    assert len([name for name in os.listdir(store) if "." in name]) == 1


def test_a_replica_whose_file_is_gone(numaload: Numaload, own_model: list[str]) -> None:
    numaload("mirror", own_model[0])
    for path in own_model:
        os.unlink(path)
    for words in (own_model, ()):
        done = numaload("verify", *words)
        assert "the file is gone" in done.stderr
        assert "all checksums right" in done.stdout
        assert "GONE" in numaload("status", *words).stdout
    (row,) = numaload.json("verify", own_model[1])
    assert (row["right"], row["source"]) == (True, "gone")
    assert "released" in numaload("release", own_model[1]).stdout
    assert left_over(numaload) == []


def test_replicas_are_found_through_links_and_relative_paths(
    numaload: Numaload, own_model: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    links = [folder / os.path.basename(path) for path in own_model]
    for link, path in zip(links, own_model, strict=True):
        link.symlink_to(path)
    for mirrored, asked in ((own_model[0], links[1]), (links[0], own_model[1])):
        numaload("mirror", mirrored)
        relative = os.path.relpath(asked)
        assert len(numaload.json("status", relative)["replicas"]) == 1
        assert "all checksums right" in numaload("verify", relative).stdout
        assert "released" in numaload("release", relative).stdout
    assert left_over(numaload) == []


def test_replicas_are_found_by_any_name_of_their_files(
    numaload: Numaload, own_model: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "others"
    folder.mkdir()
    others = [folder / os.path.basename(path) for path in own_model]
    for move in (os.link, os.replace):
        numaload("mirror", own_model[0])
        for path, other in zip(own_model, others, strict=True):
            move(path, other)
        assert len(numaload.json("status", others[1])["replicas"]) == 1
        assert "all checksums right" in numaload("verify", others[1]).stdout
        assert "released" in numaload("release", others[0]).stdout
    assert left_over(numaload) == []


def test_files_without_replicas_are_named(
    numaload: Numaload, model: str, own_model: list[str]
) -> None:
    numaload("mirror", model)
    done = numaload("release", own_model[0], model, status=1)
    assert f"{own_model[0]}: no replicas" in done.stderr
    assert "released" in done.stdout
    assert numaload.json("release", own_model[0], status=1) == []
    assert numaload.json("verify", own_model[0], status=1) == []


def test_one_damaged_replica_hides_no_other(
    numaload: Numaload, model: str, own_model: list[str]
) -> None:
    numaload("mirror", model)
    os.unlink(replicas(numaload)[0])
    numaload("mirror", own_model[0])
    for verb in ("status", "verify"):
        done = numaload(verb, status=1)
        assert "removed: release it, then mirror again" in done.stderr
        assert own_model[0] in done.stdout
        rows = numaload.json(verb, status=1)
        assert len(rows["replicas"] if verb == "status" else rows) == 2
    for name in left_over(numaload):
        manifest = numaload.store / name / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"version": 1}))
    for verb in ("status", "verify"):
        for words in ((), (own_model[0],)):  # of which it may be an entry
            assert "error: " + str(numaload.store) in numaload(verb, *words, status=1).stderr
    assert "this entry cannot be read" in numaload("mirror", own_model[0]).stderr
    assert "removed" in numaload("release").stdout
    assert left_over(numaload) == []


def test_a_bare_mirror_leaves_out_what_it_cannot_read(numaload: Numaload, model: str) -> None:
    numaload("prewarm", model)
    bad = numaload.store.parent / "bad.gguf"
    bad.write_bytes(b"GGUF but no more")
    numaload("prewarm", bad)
    (numaload.store / "known" / f"{'0' * 32}.json").write_text("[")
    done = numaload("mirror")
    assert f"{bad}: " in done.stderr
    assert "no record that can be read" in done.stderr
    assert len(replicas(numaload)) == 2
    assert "page cache" in numaload("status").stdout


FULL = """
import json, os, sys, numaload
small = os.environ["NUMALOAD_STORE"] + "/.."
def fill(done, total):  # after the plan, by somebody else
    if not done:
        room = os.statvfs(small)
        with open(small + "/filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (16 << 10))
try:
    numaload.mirror(sys.argv[1], shared=True, progress=fill)
except numaload.errors.NodeMemoryError as error:
    print(json.dumps(str(error)))
"""


def test_a_tmpfs_that_others_fill_meanwhile_is_an_error(
    numaload: Numaload, model: str, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=80M,mode=700", "small", str(small)]
    if subprocess.run(words, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here: root is needed")
    try:
        there = Numaload(small / f"numaload-{os.geteuid()}")
        assert "tmpfs" in there.python(FULL, model)
        (small / "filler").unlink()
        assert used_bytes(small) < MIB
        assert left_over(there) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_names_that_are_no_text(numaload: Numaload, own_model: list[str], tmp_path: Path) -> None:
    """Python gives such bytes as characters that cannot be printed."""
    named = sparse_model(tmp_path / "x.gguf", MIB)
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff\n.gguf")
    os.rename(named, path)
    numaload("mirror", path)
    assert "released" not in numaload("status").stdout
    assert "all checksums right" in numaload("verify", path).stdout
    assert numaload.json("status")["replicas"][0]["paths"] == [path]
    assert "released" in numaload("release", path).stdout
