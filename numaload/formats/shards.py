"""Shards: one model in several safetensors files, and the folders that models come in.

The hub says shard where llama.cpp says split file. ``NAME-00002-of-00009.safetensors``, and beside
them ``NAME.safetensors.index.json``, which says where each tensor is::

    {"metadata": {"total_size": N, ...}, "weight_map": {"TENSOR": "FILE", ...}}

Which files are one model, the index says that names the file given; without one their numbers do.
Folders: those of transformers, diffusers and peft, and of the hub's cache,
``models--ORG--NAME/{refs,snapshots,blobs}``, whose snapshots are links.

Neither names nor indexes are trusted: files are looked for inside of the folder only (links there
may lead elsewhere, as the hub's do). A tensor that the index does not know is read like all others,
as transformers does: tools that add scales leave the index as it was. An index that knows tensors
which are nowhere, or files of an older layout, leaves what is there usable, and is said once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from numaload.errors import ReadError, SplitError, check_limits, printable, reason, warn_once
from numaload.formats.splits import MAX_LINKS, MAX_SPLITS, all_there, is_there, some, split_name
from numaload.formats.unusable import instead

if TYPE_CHECKING:
    from numaload.formats.safetensors import Header

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
# Compiled when first used: GGUF files need none of these.
INDEX = r"(?s)([^.].*)\.safetensors\.index(\.[^/.]+)?\.json"  # with a variant, as fp16
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
    "model_index.json": "parts of a diffusers pipeline are models: name the folder of one, as unet",
}
LONGEST_NAME = 4096  # bytes of a path that Linux takes
MAX_INDEX = 100_000_000  # bytes
SHOWN = 8  # of them, in an error

ReadFile = Callable[[str, int], bytes]  # path, most bytes: all of a file, or an error of its own


class Shards(NamedTuple):
    """The files of a model in the order of their names, and what the index says, if there is one.

    weight_map: {tensor: path of the file that holds it}.
    """

    paths: list[str]
    index_path: str | None
    weight_map: dict[str, str]


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
        return _of_index(path, _weight_map(path, read(path, MAX_INDEX)))
    links = _links(path)
    for link in links:
        for index in _indexes(os.path.dirname(link)):
            raw, name = read(index, MAX_INDEX), os.path.basename(link)
            weight_map = _weight_map(index, raw) if os.fsencode(name) in raw else {}
            if name in weight_map.values():
                return _of_index(index, weight_map, name)
    shard = next((link for link in links if split_name(link, SUFFIX)), None)
    return Shards([path], None, {}) if shard is None else _of_numbers(shard)


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
    index = shards.index_path
    wrong = [name for name, path in shards.weight_map.items() if owner.get(name) != path]
    if not wrong:
        return
    nowhere = [name for name in wrong if name not in owner]
    message = f"{len(wrong)} tensors are not in the files that it names for them"
    message += f", {len(nowhere)} of them in none: {some(nowhere)}" if nowhere else ""
    if not owner:
        raise SplitError(f"{message}: download the model again", path=index)
    text = f"{index}: {message}; all that the files hold is there. Download the index again"
    warn_once(f"index {index}", text)


def _of_numbers(path: str) -> Shards:
    name = split_name(path, SUFFIX)
    assert name is not None  # noqa: S101 - the caller looked
    folder, prefix = os.path.split(name.prefix)
    others = [index for index in _indexes(folder) if _stem(index) in (prefix, prefix + SUFFIX)]
    form, numbers = name.numbering()
    try:
        paths = all_there(map(form.sibling, numbers), len(numbers), "shards", path)
    except SplitError as error:
        error.add(f"; {others[0]} does not name it, but perhaps others" if others else "")
        raise
    for index in others:
        text = f"{index}: does not name {path}, whose {len(paths)} shards are opened: remove it"
        warn_once(f"index {index}", f"{text} if it is of an older layout")
    return Shards(paths, None, {})


def _of_index(path: str, weight_map: dict[str, str], given: str = "") -> Shards:
    """Return the files that an index names; ``given``: one of them that was asked for."""
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_name(name, path)
    if not 1 <= len(names) <= MAX_SPLITS:
        raise SplitError(f"names {len(names)} files, expected 1 to {MAX_SPLITS}", path=path)
    # A link to an index: the files may be beside either.
    folders = [os.path.dirname(link) for link in _links(path) if link.endswith(".json")]
    beside = (f for f in folders if is_there(os.path.join(f, names[0])))
    folder = next(beside, os.path.dirname(path))
    try:
        paths = all_there((os.path.join(folder, n) for n in names), len(names), "shards", path)
    except SplitError as error:
        paths = [] if given else _other_layout(path, names)
        if not paths:
            error.add("; download them, or the index of the files that are there")
            raise
        text = f"{error}; opened is another layout beside it: {some(paths)}; remove the index"
        warn_once(f"index {path}", text)
        return Shards(paths, None, {})
    place = dict(zip(names, paths, strict=True))
    return Shards(paths, path, {tensor: place[name] for tensor, name in weight_map.items()})


def _other_layout(index: str, names: Sequence[str]) -> list[str]:
    """Return the one complete set of files, of this model by their names, beside an index."""
    folder, stem = os.path.dirname(index), _stem(index)
    layouts: dict[str, dict[int, str]] = {}  # {count of files: {number: path}}
    for name in set(_names(folder)).difference(names):
        shard = split_name(name, SUFFIX)
        if shard.prefix in (stem, stem + SUFFIX) if shard else name == stem + SUFFIX:
            number, count = (shard.number, shard.of) if shard else (1, "1")
            layouts.setdefault(count, {})[number] = os.path.join(folder, name)
    complete = [
        [found[number] for number in sorted(found)]
        for count, found in layouts.items()
        if len(found) == int(count) == max(found) - min(found) + 1
    ]
    return complete[0] if len(complete) == 1 else []


def _indexes(folder: str) -> list[str]:
    """Return the indexes in a folder, by path and in order."""
    found = (n for n in _names(folder) if n.endswith(".json") and re.fullmatch(INDEX, n))
    return [os.path.join(folder, name) for name in sorted(found)]


def _names(folder: str) -> list[str]:
    """Return the names in a folder; none where it cannot be listed. Raises: ReadError."""
    try:
        return os.listdir(folder or ".")
    except (OSError, ValueError) as error:
        check_limits(error, folder)
        return []


def _stem(index: str) -> str:
    """Return what the names of an index's shards begin with: the model's, and the variant's."""
    match = re.fullmatch(INDEX, os.path.basename(index))
    return match[1] + (match[2] or "") if match else ""


def _weight_map(path: str, raw: bytes) -> dict[str, str]:
    from numaload.formats.jsontext import JsonText  # most models have no index

    if not raw.lstrip().startswith(b"{"):
        what = instead(lambda at, nbytes: raw[at : at + nbytes], len(raw))
        raise SplitError(f"expected {{ of an index, found {raw[:SHOWN]!r}{what}", path=path)
    walk = JsonText(raw, path, SplitError)
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
    """Return the names in a folder that are not hidden: ._NAME is what macOS keeps of NAME."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise ReadError(reason(error), path=folder) from error


def _in_folder(folder: str) -> str:
    """Return the one file, shard or index that stands for the model in a folder."""
    names = _listed(folder)
    ours = [name for name in names if name.endswith(SUFFIX) or re.fullmatch(INDEX, name)]
    stems = {_stem(name) for name in ours if not name.endswith(SUFFIX)}
    first: dict[str, str] = {}
    for name in ours:
        shard = split_name(name, SUFFIX)
        if shard is None:
            first[name] = name
        elif shard.prefix not in stems and shard.prefix.removesuffix(SUFFIX) not in stems:
            first.setdefault(shard._replace(number=0, digits=0).sibling(0), name)
    models = sorted(first.values())
    if not models:
        hints = [f"; {INSTEAD[end]}: {some(n)}" for end in INSTEAD if (n := _ending(names, end))]
        message = f"expected a file, found a directory without {SUFFIX} files{''.join(hints)}"
        raise ReadError(message, path=folder)
    usual = [name for name in USUAL if name in models]
    if len(models) > 1 and not usual:
        raise SplitError(f"{len(models)} models in this folder: {some(models)}", path=folder)
    return os.path.join(folder, (usual or models)[0])


def _ending(names: Sequence[str], end: str) -> list[str]:
    return [name for name in names if name.endswith(end)]
