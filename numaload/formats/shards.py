"""Shards: one model in several safetensors files, and the folders that models come in.

The hub says shard where llama.cpp says split file. ``NAME-00002-of-00009.safetensors``, and beside
them ``NAME.safetensors.index.json``, which says where each tensor is::

    {"metadata": {"total_size": N, ...}, "weight_map": {"TENSOR": "FILE", ...}}

Folders: those of transformers, diffusers and peft, and of the hub's cache,
``models--ORG--NAME/{refs,snapshots,blobs}``, whose snapshots are links.

Neither names nor indexes are trusted: files are looked for inside of the folder only (links there
may lead elsewhere, as the hub's do). A tensor that the index does not know is read like all others,
as transformers does: tools that add scales leave the index as it was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from numaload.errors import ReadError, SplitError, printable, reason
from numaload.formats.splits import MAX_LINKS, MAX_SPLITS, all_there, is_there, some

if TYPE_CHECKING:
    from numaload.formats.safetensors import Header

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
# Compiled when first used: GGUF files need none of these.
SHARD = r"(?s)(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors"
INDEX = r"(?s).*\.safetensors\.index(\.[^/.]+)?\.json"  # with a variant, as fp16
COMMIT = r"[0-9A-Za-z][0-9A-Za-z._-]{0,254}"
# Where a folder has several models, the first of these is meant: transformers looks so too.
USUAL = tuple(
    stem + suffix
    for stem in ("model", "diffusion_pytorch_model", "adapter_model")
    for suffix in (SUFFIX, INDEX_SUFFIX)
)
# What a folder without safetensors files may have instead.
INSTEAD = {
    ".gguf": "GGUF files are opened by their own names",
    ".bin": "pickled weights are not read: convert them to safetensors where you trust them",
}
LONGEST_NAME = 4096  # bytes of a path that Linux takes

ReadFile = Callable[[str, int], bytes]  # path, most bytes: all of a file, or an error of its own


class Shards(NamedTuple):
    """The files of a model in the order of their names, and what the index says, if there is one.

    weight_map: {tensor: path of the file that holds it}.
    """

    paths: list[str]
    index_path: str | None
    weight_map: dict[str, str]


class ShardName(NamedTuple):
    prefix: str
    number: int  # from 1
    total: int

    def sibling(self, number: int) -> str:
        return f"{self.prefix}-{number:05d}-of-{self.total:05d}{SUFFIX}"

    def indexes(self) -> list[str]:
        """Return the names that an index of these files may have: plain, and of a variant."""
        folder, name = os.path.split(self.prefix)
        stem, _, variant = name.rpartition(".")
        names = [name + INDEX_SUFFIX]
        if stem:  # model.fp16-00001-of-00002 belongs to model.safetensors.index.fp16.json
            names.append(f"{stem}{SUFFIX}.index.{variant}.json")
        return [os.path.join(folder, name) for name in names]


def shard_name(path: str) -> ShardName | None:
    """Return what the file's name says of its place, or None where it is no shard's name."""
    match = re.fullmatch(SHARD, path)
    if match is None:
        return None
    name = ShardName(match["prefix"], int(match["number"]), int(match["count"]))
    return name if 1 <= name.number <= name.total else None


def is_layout(path: str) -> bool:
    """Return whether ``path`` is an index or a folder, which say where the weights are."""
    return path.endswith(".json") or os.path.isdir(path)


def find_shards(given: str, read: ReadFile) -> Shards:
    """Return the files of a model, given by any shard, an index, a folder or a single file.

    Folders of the hub's cache are those of a repository or of one snapshot. What is no shard stands
    for itself, whatever it is.
    Raises: SplitError for indexes that cannot be, files that are missing, and folders of several
    models; ReadError for folders of none; what ``read`` raises.
    """
    path = _in_folder(_snapshot(given, read)) if os.path.isdir(given) else given
    if path.endswith(".json"):
        return _of_index(path, read)
    shard = next((link for link in _links(path) if shard_name(link)), None)
    if shard is None:
        return Shards([path], None, {})
    return _of_shard(shard, read)


def check_shards(shards: Shards, headers: Sequence[Header]) -> None:
    """Refuse files that do not belong together, or not to their index. Raises: SplitError."""
    owner: dict[str, str] = {}
    for path, header in zip(shards.paths, headers, strict=True):
        for tensor in header.tensors:
            if tensor.name in owner:
                raise SplitError(
                    f"tensor {tensor.name!r} is in {owner[tensor.name]} too", path=path
                )
            owner[tensor.name] = path
    for name, path in shards.weight_map.items():
        found = owner.get(name)
        if found != path:
            where = f"it is in {found}" if found else "it is in no file"
            message = f"tensor {name!r} is not there, where {shards.index_path} has it: {where}"
            raise SplitError(message, path=path)


def _of_shard(path: str, read: ReadFile) -> Shards:
    name = shard_name(path)
    assert name is not None  # noqa: S101 - the caller looked
    for index in filter(is_there, name.indexes()):
        found = _of_index(index, read)
        if os.path.realpath(path) not in map(os.path.realpath, found.paths):
            raise SplitError(f"not among the files of {index}: {some(found.paths)}", path=path)
        return found
    paths = (name.sibling(number) for number in range(1, name.total + 1))
    return Shards(all_there(paths, name.total, "shards", path), None, {})


def _of_index(path: str, read: ReadFile) -> Shards:
    weight_map = _weight_map(path, read)
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_name(name, path)
    if not 1 <= len(names) <= MAX_SPLITS:
        raise SplitError(f"names {len(names)} files, expected 1 to {MAX_SPLITS}", path=path)
    # A link to an index: the files may be beside either.
    folders = [os.path.dirname(link) for link in _links(path) if link.endswith(".json")]
    beside = (f for f in folders if is_there(os.path.join(f, names[0])))
    folder = next(beside, os.path.dirname(path))
    paths = all_there((os.path.join(folder, name) for name in names), len(names), "shards", path)
    place = dict(zip(names, paths, strict=True))
    return Shards(paths, path, {tensor: place[name] for tensor, name in weight_map.items()})


def _weight_map(path: str, read: ReadFile) -> dict[str, str]:
    from numaload.formats.jsontext import MAX_TEXT, JsonText  # most models have no index

    walk = JsonText(read(path, MAX_TEXT), path, SplitError)
    found: dict[str, str] | None = None
    for name in walk.members("the index"):
        if name != "weight_map":
            walk.skip(repr(name))
        elif found is not None:
            walk.fail("weight_map appears twice")
        else:
            found = walk.string_map("weight_map")
    walk.end("the index")
    if found is None:
        raise SplitError("expected an index of safetensors files, found no weight_map", path=path)
    return found


def _check_name(name: str, index: str) -> None:
    """Check that a name stays inside the index's folder."""
    parts = name.split("/")
    outside = {"", ".", ".."} & set(parts) or "\0" in name or len(name) > LONGEST_NAME
    if outside or not name.endswith(SUFFIX):
        message = (
            f"expected a {SUFFIX} file inside of the folder, found {printable(repr(name), 200)}"
        )
        hint = f" ({INSTEAD['.bin']})" if name.endswith(".bin") else ""
        raise SplitError(message + hint, path=index)


def _links(path: str) -> list[str]:
    """Return ``path`` and the links that it leads through, as far as they can be followed."""
    found = [path]
    while len(found) < MAX_LINKS:
        try:
            target = os.readlink(found[-1])
        except (OSError, ValueError):  # no link, not there, or a path with a NUL in it
            break
        found.append(os.path.join(os.path.dirname(found[-1]), target))
    return found


def _snapshot(folder: str, read: ReadFile) -> str:
    """Return the snapshot ``main`` of a repository in the hub's cache; other folders as given."""
    snapshots, main = os.path.join(folder, "snapshots"), os.path.join(folder, "refs", "main")
    if not os.path.isdir(snapshots):
        return folder
    if not is_there(main):
        names = _listed(snapshots)
        if len(names) != 1:
            message = f"no refs/main, and {len(names)} snapshots: {some(names) or 'none'}"
            raise SplitError(f"{message}: open the folder of one", path=folder)
        return os.path.join(snapshots, names[0])
    commit = read(main, 256).decode("utf-8", "replace").strip()
    found = os.path.join(snapshots, commit)
    if not re.fullmatch(COMMIT, commit) or not os.path.isdir(found):
        message = f"main is {commit!r}, which is not in {snapshots}: download the model again"
        raise SplitError(message, path=main)
    return found


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ReadError(reason(error), path=folder) from error


def _in_folder(folder: str) -> str:
    """Return the one file, shard or index that stands for the model in a folder."""
    names = _listed(folder)
    known = set(names)
    models = sorted({_model_of(name, known) for name in names if _is_ours(name)})
    if not models:
        hints = [f"; {INSTEAD[end]}: {some(n)}" for end in INSTEAD if (n := _ending(names, end))]
        message = f"expected a file, found a directory without {SUFFIX} files{''.join(hints)}"
        raise ReadError(message, path=folder)
    usual = [name for name in USUAL if name in models]
    if len(models) > 1 and not usual:
        raise SplitError(f"{len(models)} models in this folder: {some(models)}", path=folder)
    return os.path.join(folder, (usual or models)[0])


def _is_ours(name: str) -> bool:
    return name.endswith(SUFFIX) or re.fullmatch(INDEX, name) is not None


def _ending(names: Sequence[str], end: str) -> list[str]:
    return [name for name in names if name.endswith(end)]


def _model_of(name: str, names: set[str]) -> str:
    """Return the index, or the first shard, of the model that a file belongs to."""
    shard = shard_name(name)
    if shard is None:
        return name
    return next((index for index in shard.indexes() if index in names), shard.sibling(1))
