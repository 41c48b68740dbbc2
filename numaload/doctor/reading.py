"""How the file is read: through a mapping, from NFS, or by way of a server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from shlex import quote
from typing import ClassVar

from numaload.doctor.check import ESTIMATED, MEASURED, Check, Price, Unknown
from numaload.doctor.storage import CACHED, GIB, LEAST_S, OfFile, gb, size_of, unused, whole_disk
from numaload.formats.splits import NAME
from numaload.linux.mounts import OVER_FOLDERS, Mount, network_of, real
from numaload.linux.sysfs import SysFiles

CLEARLY = 0.75  # of what the disk gives: a mapping that is slower than this is slow
LOCAL = 3.0e9  # bytes a second of a local NVMe SSD (PCIe 3.0 x4)
NFS = ("nfs", "nfs4")
LOOPBACK = re.compile(r"127\.[0-9.]+|::1|localhost")
BESIDE = re.compile(r"\.(jinja|json|model|py|tiktoken|txt)$")  # tokenizer, index, configuration
HUB = re.compile(r"\b(hf-mount|s3fs|mountpoint-s3|gcsfuse|goofys|geesefs|rclone|blobfuse2?)\b")
WINDOWS = {"hdd": 1024, "ssd": 1024, "card": 1024, "nfs": 15360}  # KiB to read ahead; of others:
WINDOW = 4096


class Mapped(OfFile):
    id, title = "NL101", "Mapping the file reads it slower than the disk gives"
    source = "measured in docs/storage.md, 2026-10: one thread that touches pages"
    why = (
        "A program that maps the file waits for the disk page by page, with one thread;"
        " numaload reads large pieces before the program asks for them."
    )

    def measure(self) -> str:
        speeds = self.system.speeds
        if not slow_mapping(self) or self.claimed(ReadAhead, HubMount, FarAway):
            return ""
        return (
            f"page by page it comes at {gb(speeds.mapped)}, the disk gives {gb(speeds.disk)};"
            f" {size_of(self.system.absent)} are not in RAM"
        )

    def price(self) -> Price | None:
        speeds = self.system.speeds
        return Price(self.lost(speeds.mapped, speeds.disk), MEASURED)

    def fix(self) -> str:
        return f"numaload prewarm {self.path}"

    def undo(self) -> str:
        return f"numaload evict {self.path}"


def slow_mapping(check: OfFile) -> bool:
    """Return whether a mapping is read clearly slower than the disk gives."""
    mapped, disk = check.system.speeds.mapped, check.system.speeds.disk
    if not check.known(mapped, disk) or not (mapped and disk) or mapped > CLEARLY * disk:
        return False
    return check.lost(mapped, disk) >= LEAST_S


class ReadAhead(OfFile):
    """The kernel reads ahead of a mapping as far as the disk, or the file system, is set to."""

    id, title, root = "NL102", "The kernel reads too little ahead", True
    source = (
        "Azure NetApp Files, Linux NFS read-ahead: 15 times rsize, 128 KiB since Linux 5.4,"
        " 2026-11; 4 MiB: docs/storage.md, 2026-10"
    )
    why = (
        "While a program reads on, the kernel fetches what comes next. With a small window the"
        " device is idle between two requests."
    )

    def available(self) -> bool:
        return super().available() and self.system.device.kind != "memory"

    def measure(self) -> str:
        if not slow_mapping(self):
            return ""
        self.place = self._place()
        self.old = self.system.number(self.place)
        device = self.system.device
        self.wanted = WINDOWS.get("nfs" if device.file_system in NFS else device.kind, WINDOW)
        if self.old >= self.wanted:
            return ""
        speeds = self.system.speeds
        return (
            f"{self.place} is {self.old}, expected {self.wanted} or more: page by page the file"
            f" comes at {gb(speeds.mapped)}, large reads get {gb(speeds.disk)}"
        )

    def _place(self) -> str:
        """Return the file that counts: the block device's, or else the file system's own."""
        top, kind = whole_disk(self.system), self.system.device.file_system
        if top and kind not in {"btrfs", "fuseblk"}:
            return f"/sys/block/{top}/queue/read_ahead_kb"
        if self.system.mount is None:
            raise Unknown("how far is read ahead: the mount of the file is not shown")
        return f"{self._bdi(kind, self.system.mount.device)}/read_ahead_kb"

    def _bdi(self, kind: str, device: str) -> str:
        """Return the folder of the file system's own window, as each kind of them names it."""
        files, sys = SysFiles(), self.system.sys
        if kind == "btrfs":  # which has disks of its own, and a number that no mount tells
            disk = self.system.disks.device
            folders = [f"/sys/fs/btrfs/{name}" for name in files.names(f"{sys}/fs/btrfs")]
            found = [f"{one}/bdi" for one in folders if self.system.exists(f"{one}/devices/{disk}")]
        else:
            names = files.names(f"{sys}/class/bdi")
            its = [name for name in names if name in {device, f"{device}-fuseblk"}]
            its = its or [name for name in names if re.fullmatch(rf"{re.escape(kind)}-\d+", name)]
            found = [f"/sys/class/bdi/{name}" for name in its]
        if len(found) != 1:
            place = "/sys/fs/btrfs" if kind == "btrfs" else "/sys/class/bdi"
            raise Unknown(
                f"how far is read ahead: {len(found)} of {place} may be that of {kind}, expected 1"
            )
        return found[0]

    def price(self) -> Price | None:
        speeds = self.system.speeds
        return Price(self.lost(speeds.mapped, speeds.disk), MEASURED)

    def fix(self) -> str:
        return f"echo {self.wanted} > {quote(self.place)}"

    def undo(self) -> str:
        return f"echo {self.old} > {quote(self.place)}"


class _OfNfs(OfFile):
    """A check of a mount of NFS whose server is another machine.

    ``wanted``: the options that it wants.
    """

    root = True
    wanted: ClassVar[dict[str, str]]

    def available(self) -> bool:
        mount = self.system.mount if super().available() else None
        return mount is not None and mount.kind in NFS and not _hub(self)

    def price(self) -> Price | None:
        seconds = self.seconds()
        return None if seconds is None else Price(seconds, ESTIMATED)

    def seconds(self) -> float | None:
        raise NotImplementedError

    @property
    def mount(self) -> Mount:
        if self.system.mount is None:
            raise Unknown("the mount of the file is not shown")
        return self.system.mount

    def fix(self) -> str:
        changed = self._wanted()
        if not self._mountable():
            named = ",".join(f"{name}={value}" for name, value in changed.items())
            return (
                f"give {named} to the mount of {quote(self.mount.source)} itself; what is at"
                f" {quote(self.mount.point)} was bound there from it"
            )
        after = "  # after all mounts of this server are unmounted" * ("nconnect" in changed)
        return self._remounted(changed) + after

    def undo(self) -> str:
        return self._remounted({}) if self._mountable() else ""

    def _wanted(self) -> dict[str, str]:
        """Return what every such check wants: the second remedy must not take the first back."""
        found = dict(self.wanted)
        for check in (SmallReads(self.system), OneConnection(self.system)):
            with suppress(Unknown):
                found |= check.wanted if check.measure() else {}
        return found

    def _mountable(self) -> bool:
        """Return whether it can be mounted by its name: not a file, or a folder that is gone."""
        mount = self.mount
        return mount.point not in map(real, self.paths) and not mount.root.endswith("//deleted")

    def _remounted(self, changed: dict[str, str]) -> str:
        """Return the command that mounts it again: NFS does not change these in a remount."""
        mount = self.mount
        options = _split(mount.flags) | _split(mount.options) | changed
        left_out = {*OF_THE_KERNEL, *({"rw"} if "ro" in options else ())}
        shown = ",".join(f"{k}={v}" if v else k for k, v in options.items() if k not in left_out)
        source = mount.source if mount.root == "/" else mount.source.rstrip("/") + mount.root
        point = quote(mount.point)
        return f"umount {point} && mount -t {mount.kind} -o {quote(shown)} {quote(source)} {point}"


# Options of NFS that the kernel shows and mount.nfs finds by itself, and the default of all mounts.
OF_THE_KERNEL = (
    "addr", "clientaddr", "mountaddr", "mountport", "mountproto", "mountvers", "namlen", "relatime",
)  # fmt: skip


class SmallReads(_OfNfs):
    id, title = "NL103", "NFS asks for small pieces"
    source = "nfs(5), rsize: the largest is 1 MiB; Linux servers give that by default, 2026-11"
    why = "rsize is how much one request to the NFS server asks for; each costs its time."
    LEAST = 1 << 20  # bytes
    wanted: ClassVar[dict[str, str]] = {"rsize": str(LEAST)}
    # A request costs the client and the server this much, however large it is.
    REQUEST_S = 50e-6
    MOST = 0.75  # of the time: what is left is the network's and the disk's behind it

    def measure(self) -> str:
        if not self.system.absent:
            return ""
        text = _options(self).get("rsize", "")
        if not text.isdecimal() or not int(text):
            raise Unknown("the mount table does not tell rsize")
        self.rsize = int(text)
        if self.rsize >= self.LEAST:
            return ""
        return f"{self.system.mount} has rsize={self.rsize}, expected {self.LEAST}"

    def seconds(self) -> float | None:
        absent = self.system.absent
        more = (absent / self.rsize - absent / self.LEAST) * self.REQUEST_S
        return min(more, self.MOST * self.disk_s) if self.disk_s else more


class OneConnection(_OfNfs):
    id, title = "NL104", "NFS uses one connection"
    source = "Azure NetApp Files, Linux NFS mount options: nconnect=8 takes 30 % less, 2026-11"
    why = (
        "One TCP connection is served by one CPU, and some networks limit each connection;"
        " nconnect spreads requests over several."
    )
    LARGE = GIB  # bytes to read, from which it matters
    FAST = 0.3e9  # bytes a second: below it the network itself, of 1 or 2.5 Gbit/s, is the limit
    SAVED = 0.3  # of the time
    wanted: ClassVar[dict[str, str]] = {"nconnect": "8"}

    def measure(self) -> str:
        rate, options = self.system.speeds.disk, _options(self)
        if "nconnect" in options or options.get("proto", "tcp").startswith("udp"):
            return ""
        if self.system.absent < self.LARGE or (rate and rate < self.FAST):
            return ""
        reads = f", which gives {gb(rate)}" if rate else ""
        return f"{self.system.mount} has no nconnect: one connection to the server{reads}"

    def seconds(self) -> float | None:
        if not self.disk_s:
            return None
        return self.SAVED * max(0.0, self.disk_s - self.claimed(SmallReads))


class _Elsewhere(OfFile):
    """A file that is not on a disk of this machine."""

    def figures(self) -> str:
        """Say how slow it is compared with a local disk, "" where it is about as fast."""
        if self.rate is None:
            silent = self.system.speeds.stalled_s or not self.system.absent
            return "" if silent else "it was not measured"
        if self.rate > LOCAL / 2 or self.lost(self.rate, LOCAL) < LEAST_S:
            return ""
        return f"it comes at {gb(self.rate)}; a local NVMe disk typically gives {gb(LOCAL)}"

    def price(self) -> Price | None:
        if self.rate is None:
            return None
        others = self.claimed(ReadAhead, SmallReads, OneConnection)
        return Price(max(0.0, self.lost(self.rate, LOCAL) - others), ESTIMATED)

    @cached_property
    def place(self) -> str:
        """Return a new folder for the model, for a command; "" where ~ is on a network as well."""
        home = network_of(os.path.expanduser("~"), self.system.proc)
        if home is not None and home.kind not in OVER_FOLDERS:
            return ""
        new = unused(os.path.expanduser(f"~/models/{_model_name(self.paths[0])}-copy"))
        return f"~/models/{quote(os.path.basename(new))}"

    @property
    def copying(self) -> str:
        room = f"with {size_of(self.system.size)} free"
        if not self.place:
            return f"copy it to a local disk {room}, which ~ is not on, and load that file"
        # Without -p the folder is new, so nothing is overwritten, and undoing removes nothing else.
        return (
            f"mkdir -p ~/models && mkdir {self.place} && cp {' '.join(self._sources())}"
            f" {self.place}/  # ~ must be on a local disk {room}; then load that file"
        )

    def _sources(self) -> Iterator[str]:
        """Yield the model's files, for a command, and patterns of what else belongs to it."""
        yield from dict.fromkeys(map(_pattern, self.paths))
        files = self.system.files
        if files and files[0].path.endswith(".safetensors"):
            folder = os.path.dirname(files[0].path)
            found = map(BESIDE.search, files[0].ask(os.listdir, folder))
            for suffix in sorted({match[0] for match in found if match}):
                yield f"{quote(folder)}/*{suffix}"

    def undo(self) -> str:
        return f"rm -r {self.place}" if self.place else ""


def _pattern(path: str) -> str:
    """Return a pattern of all files of a split model: their names may be too many for a line."""
    split = NAME.fullmatch(path)
    if split is None:
        return quote(path)
    return f"{quote(split[1])}-{'?' * len(split[2])}-of-{split[3]}{split[4]}"


def _model_name(path: str) -> str:
    """Name a model by its file, or by its folder or repository where all files have one name."""
    folder, name = os.path.split(path)
    cached, split = CACHED.search(path), NAME.fullmatch(name)
    stem, suffix = os.path.splitext(name)
    found = split[1] if split else stem
    if cached:
        found = cached[1]
    elif suffix == ".safetensors" and "model" in stem:
        found = os.path.basename(folder)
    return found.lstrip(".") or "model"  # never no name, or that of the folder above


class HubMount(_Elsewhere):
    id, title = "NL105", "The file comes through a server on this machine"
    source = "hf-mount 0.6, README and src/nfs.rs: read on demand, 2026-08"
    why = (
        "A program of this machine fetches the file from the network as it is read: each load waits"
        " for that again."
    )

    def available(self) -> bool:
        return super().available() and _hub(self)

    def measure(self) -> str:
        figures = self.figures()
        return (
            figures and f"{self.system.mount} is served, or tunnelled, by this machine: {figures}"
        )

    def fix(self) -> str:
        name, place = quote(os.path.basename(self.paths[0])), self.place or "THERE"
        return f"{self.copying}; or: hf download ORG/NAME {name} --local-dir {place}"


class FarAway(_Elsewhere):
    id, title = "NL106", "The file is on a network, a shared folder or FUSE"
    source = "assumed: a local NVMe SSD (PCIe 3.0 x4) gives 3 GB/s, 2026-11"
    why = "Each load asks {} for all of the file again, unless RAM still has it."

    def available(self) -> bool:
        if not super().available() or _hub(self):
            return False
        device = self.system.device
        return device.kind in ("network", "share") and device.file_system not in OVER_FOLDERS

    def explain(self) -> str:
        device = self.system.device
        if device.kind == "network" and device.file_system.startswith("fuse"):
            who = "a program (FUSE), which may have it from this machine or from another one,"
        elif _options(self).get("aname", "").startswith("drvfs"):  # of WSL2
            who = "Windows"
        else:
            who = "another machine" if device.kind == "network" else "the machine around this one"
        return self.why.format(who)

    def measure(self) -> str:
        figures = self.figures()
        return figures and f"{self.system.device}: {figures}"

    def fix(self) -> str:
        return f"{self.copying}; or keep it in RAM: numaload mirror {self.path}"


class Silent(OfFile):
    id, title, root = "NL114", "The server does not answer", True
    source = "docs/storage.md, network file systems, 2026-10"
    why = "A program that reads such a file waits until the server is back, maybe for ever."

    def measure(self) -> str:
        return self.system.speeds.why_not if self.system.speeds.stalled_s else ""

    def fix(self) -> str:
        point = quote(self.system.mount.point) if self.system.mount else "MOUNTPOINT"
        return f"see whether the server is reachable; to give it up: umount -f -l {point}"


def _hub(check: Check) -> bool:
    """Return whether a program of this machine serves the file from the hub or another store."""
    mount = check.system.mount
    if mount is None:
        return False
    if mount.kind in NFS:
        host = _options(check).get("addr") or mount.source.partition(":/")[0]
        return LOOPBACK.fullmatch(host) is not None
    return mount.kind.startswith("fuse") and HUB.search(f"{mount.kind} {mount.source}") is not None


def _options(check: Check) -> dict[str, str]:
    """Return the options of the file's mount: {name: value, or ""}."""
    mount = check.system.mount
    return _split(mount.options if mount else "")


def _split(options: str) -> dict[str, str]:
    words = (word.partition("=") for word in options.split(",") if word)
    return {name: value for name, _, value in words}


CHECKS: tuple[type[Check], ...] = (
    Mapped,
    ReadAhead,
    SmallReads,
    OneConnection,
    HubMount,
    FarAway,
    Silent,
)
