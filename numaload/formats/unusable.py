"""What a file is that is no model, or not a whole one, and what helps.

Asked when reading has failed, so that a healthy file costs nothing. All readers say it by these.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress

from numaload.errors import ReadError

SHOWN = 64  # bytes of a file's beginning that tell what it is, and characters of it that are shown
# {how a file may begin: what that means}
BEGINNINGS = {
    b"GGUF": "a GGUF file",
    b"\xef\xbb\xbfGGUF": "GGUF behind a byte order mark: a program took it for text, which damages"
    " it; download it again",
    b"version https://git-lfs": "a git-lfs pointer: fetch the real file with git lfs pull",
    b"lmgg": "GGML, of before August 2023: convert the model again, or download a GGUF of it",
    b"fmgg": "GGMF, of before August 2023: convert the model again, or download a GGUF of it",
    b"tjgg": "GGJT, of before August 2023: convert the model again, or download a GGUF of it",
    b"algg": "GGLA, an adapter of llama.cpp of before July 2024: convert the adapter again",
    b"PK\3\4": "a zip archive, as torch.save writes: convert it to safetensors where you trust it;"
    " any other: unpack it",
    b"\x1f\x8b": "compressed by gzip: gunzip it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: zstd -d unpacks it",
    b"\xfd7zXZ": "compressed by xz: xz -d unpacks it",
    b"BZh": "compressed by bzip2: bzip2 -d unpacks it",
    b"7z\xbc\xaf": "a 7-zip archive: 7z x unpacks it",
    b"\x80": "a pickle, as torch.save wrote: convert it to safetensors where you trust it",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\0\5\x16\7": "AppleDouble, what macOS keeps of a file on other disks: open the file whose"
    " name has no ._ before it",
    b"\0\5\x16\0": "AppleSingle, a file wrapped by macOS: unwrap it there",
}
# What a program adds to the name of a file that it has not finished.
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
PART = r"(?s)(.+)\.part([0-9]{1,5})of([0-9]{1,5})"
HUB_DOWNLOADS = ".cache/huggingface/download"  # below the folder of `hf download --local-dir`


def instead(read_at: Callable[[int, int], bytes], size: int) -> str:
    """Return what a file is instead of a model, in brackets and after a blank; "" if unknown.

    read_at: as of a parser; size: bytes of the file.
    """
    try:
        start = bytes(read_at(0, min(SHOWN, size)))
    except ReadError:  # a file of /sys has less than its size says
        return ""
    if not start:
        return " (the file is empty: download it again)"
    if not any(start):
        return " (zeros: a download that did not finish, or a sparse file; download it again)"
    known = (why for first, why in BEGINNINGS.items() if start.startswith(first))
    found = next(known, "") or _text(start)
    return f" ({found})" if found else ""


def _text(start: bytes) -> str:
    """Describe text that is found where a model should be: mostly a server wrote it."""
    text = start.decode("utf-8", "ignore").strip("\ufeff \t\r\n")
    if len(text) < max(8, len(start) // 2) or not "".join(text.split()).isprintable():
        return ""
    again = "download it again (hf download, or /resolve/ in the address in place of /blob/)"
    if text.startswith("<"):
        return f"a web page, or a server's error, in place of the file: {again}"
    if text.startswith(("{", "[")):
        return f"JSON, perhaps an index, a config or a server's error: {text!r}; then {again}"
    return f"text, perhaps a server's error: {text!r}; log in if it says so, and {again}"


def unfinished(path: str) -> str:
    """Return what the file's name, and those beside it, say of how it came to be cut; or ""."""
    name = os.path.basename(path)
    part = re.fullmatch(PART, name)
    if part is not None:
        return (
            f"part {part[2]} of {part[3]} of one file: join them in this order with cat, as"
            f" {part[1]}, and open that"
        )
    if name.endswith(UNFINISHED):
        return (
            "its name is that of a download which did not finish: let it finish, or begin it again"
        )
    if os.path.exists(f"{path}.aria2"):
        return f"the download did not finish: {name}.aria2 is beside it; aria2c -c goes on with it"
    return ""


def absence(path: str) -> str:
    """Return why no file of this name is there, in brackets and after a blank; or ""."""
    told, target = "", path
    with suppress(OSError, ValueError):  # no link, or a NUL in the name
        target = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        told = f"a link to {target}, which is not there: download it again"
    folder, name = os.path.split(target)
    # The hub calls what it has begun by hashes.
    for place, first in ((folder or ".", f"{name}."), (f"{folder or '.'}/{HUB_DOWNLOADS}", "")):
        with suppress(OSError, ValueError):
            begun = (n for n in sorted(os.listdir(place)) if n.startswith(first) and unfinished(n))
            for other in begun:
                link = told and "a link, of whose target only "
                return f" ({link}{os.path.join(place, other)} is there: {unfinished(other)})"
    return f" ({told})" if told else ""
