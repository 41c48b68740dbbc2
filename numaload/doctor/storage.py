"""Storage: what makes reading the file slow, and whether it is whole.

Two gaps are priced. A program that maps the file reads it slower than the disk gives: one of
``Mapped``, ``ReadAhead``, ``HubMount`` and ``FarAway`` claims those seconds. The disk gives less
than it could: each of the others claims a part, and leaves out what more specific ones claim.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from shlex import quote

import xxhash

from numaload.doctor.check import ESTIMATED, MEASURED, Check, Price, Unknown
from numaload.doctor.speeds import pieces
from numaload.doctor.system import System
from numaload.errors import NumaloadError, ReadError, StoreError
from numaload.files.holes import find_holes, tensors_in
from numaload.files.residency import ByteRange
from numaload.files.source import SourceFile, real_path
from numaload.formats.splits import some
from numaload.linux.sysfs import SysFiles
from numaload.replicas.layout import MIXED
from numaload.replicas.verify import Checksum

GIB = 1 << 30
LEAST_S = 0.5  # seconds of a load that are worth a finding
CLEARLY = 0.75  # of what the disk gives: a mapping that is slower than this is slow
LOCAL = 3.0e9  # bytes a second of a local NVMe SSD (PCIe 3.0 x4)
SSD = 0.5e9  # bytes a second of a SATA SSD
WHOLE = {"nvme": 2.0e9, "ssd": 0.45e9, "raid": 2.0e9}  # bytes a second where nothing is wrong
NO_DISKS = ("network", "share", "memory")  # kinds of devices
NFS = ("nfs", "nfs4")
LOOPBACK = re.compile(r"127\.[0-9.]+|::1|localhost")
HUB = re.compile(r"\b(hf-mount|s3fs|mountpoint-s3|gcsfuse|goofys|geesefs|rclone|blobfuse2?)\b")
WINDOWS = {"hdd": 1024, "ssd": 1024, "nfs": 15360}  # KiB to read ahead; of others:
WINDOW = 4096
PARTITION = re.compile(r"(?<=\d)p\d+$|(?<=[a-z])\d+$")
CACHED = re.compile(r"/models--([^/]+)/snapshots/[^/]+/(.+)")  # in the cache of the hub
SHA256 = re.compile(r"/blobs/([0-9a-f]{64})$")  # how that cache names what it checked


class _OfFile(Check):
    """A check of a file, which must be given. ``why``: its explanation."""

    why = ""

    def explain(self) -> str:
        return self.why

    def available(self) -> bool:
        return self.system.size > 0

    def lost(self, rate: float | None, better: float | None) -> float:
        """Return the seconds that what is absent takes longer at ``rate``; 0 if not known."""
        if not rate or not better:
            return 0.0
        return max(0.0, self.system.absent / rate - self.system.absent / better)

    @property
    def rate(self) -> float | None:
        """Return how fast a program reads the file; None: not measured."""
        return self.system.speeds.mapped or self.system.speeds.disk

    @property
    def disk_s(self) -> float:
        """Return how long the disk takes for what is absent; 0 if not known."""
        disk = self.system.speeds.disk
        return self.system.absent / disk if disk else 0.0

    def claimed(self, *others: type[Check]) -> float:
        """Return the seconds that other checks claim: nobody may claim them twice."""
        prices = (_price(one(self.system)) for one in others)
        return sum(price.seconds for price in prices if price)

    @property
    def paths(self) -> str:
        """Return the names of the model's files, for a command."""
        names = [file.path for file in self.system.files] or [self.system.path or ""]
        return " ".join(map(quote, names))

    @property
    def path(self) -> str:
        return quote(self.system.path or "")

    @property
    def copying(self) -> str:
        where = (
            f"~ must be on a local disk with {_size(self.system.size)} free; then load that file"
        )
        return f"mkdir -p ~/models && cp {self.paths} ~/models/  # {where}"


def _price(check: Check) -> Price | None:
    with suppress(Unknown, NumaloadError, OSError):
        if check.available() and check.measure():
            return check.price()
    return None


class Mapped(_OfFile):
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
            f"page by page it comes at {_gb(speeds.mapped)}, the disk gives {_gb(speeds.disk)};"
            f" {_size(self.system.absent)} are not in RAM"
        )

    def price(self) -> Price | None:
        speeds = self.system.speeds
        return Price(self.lost(speeds.mapped, speeds.disk), MEASURED)

    def fix(self) -> str:
        return f"numaload prewarm {self.path}"

    def undo(self) -> str:
        return f"numaload evict {self.path}"


def slow_mapping(check: _OfFile) -> bool:
    """Return whether a mapping is read clearly slower than the disk gives."""
    mapped, disk = check.system.speeds.mapped, check.system.speeds.disk
    if not mapped or not disk or mapped > CLEARLY * disk:
        return False
    return check.lost(mapped, disk) >= LEAST_S


class ReadAhead(_OfFile):
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
            f" comes at {_gb(speeds.mapped)}, large reads get {_gb(speeds.disk)}"
        )

    def _place(self) -> str:
        """Return the file that counts: the block device's, or else the file system's own."""
        top = _top(self.system)
        if top and self.system.device.file_system != "btrfs":
            return f"/sys/block/{top}/queue/read_ahead_kb"
        if self.system.mount is None:
            raise Unknown("how far is read ahead: the mount of the file is not shown")
        return f"/sys/class/bdi/{self.system.mount.device}/read_ahead_kb"

    def price(self) -> Price | None:
        speeds = self.system.speeds
        return Price(self.lost(speeds.mapped, speeds.disk), MEASURED)

    def fix(self) -> str:
        return f"echo {self.wanted} > {quote(self.place)}"

    def undo(self) -> str:
        return f"echo {self.old} > {quote(self.place)}"


class _OfNfs(_OfFile):
    """A check of a mount of NFS whose server is another machine."""

    root = True

    def available(self) -> bool:
        mount = self.system.mount if super().available() else None
        return mount is not None and mount.kind in NFS and not _hub(self)

    def price(self) -> Price | None:
        seconds = self.seconds()
        return None if seconds is None else Price(seconds, ESTIMATED)

    def seconds(self) -> float | None:
        raise NotImplementedError

    def remounted(self, **changed: str) -> str:
        """Return the command that mounts it again: NFS does not change these in a remount."""
        mount = self.system.mount
        if mount is None:
            raise Unknown("the mount of the file is not shown")
        options = _options(self) | changed
        shown = ",".join(
            f"{k}={v}" if v else k for k, v in options.items() if k not in OF_THE_KERNEL
        )
        point, source = quote(mount.point), quote(mount.source)
        return f"umount {point} && mount -t {mount.kind} -o {quote(shown)} {source} {point}"

    def undo(self) -> str:
        return self.remounted()


# Options of NFS that the kernel shows and mount.nfs finds by itself.
OF_THE_KERNEL = (
    "addr", "clientaddr", "mountaddr", "mountport", "mountproto", "mountvers", "namlen",
)  # fmt: skip


class SmallReads(_OfNfs):
    id, title = "NL103", "NFS asks for small pieces"
    source = "nfs(5), rsize: the largest is 1 MiB; Linux servers give that by default, 2026-11"
    why = "rsize is how much one request to the NFS server asks for; each costs its time."
    LEAST = 1 << 20  # bytes
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

    def fix(self) -> str:
        return self.remounted(rsize=str(self.LEAST))


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

    def measure(self) -> str:
        rate, options = self.system.speeds.disk, _options(self)
        if "nconnect" in options or options.get("proto", "tcp").startswith("udp"):
            return ""
        if self.system.absent < self.LARGE or (rate and rate < self.FAST):
            return ""
        reads = f", which gives {_gb(rate)}" if rate else ""
        return f"{self.system.mount} has no nconnect: one connection to the server{reads}"

    def seconds(self) -> float | None:
        if not self.disk_s:
            return None
        return self.SAVED * max(0.0, self.disk_s - self.claimed(SmallReads))

    def fix(self) -> str:
        return self.remounted(nconnect="8") + "  # after all mounts of this server are unmounted"


class _Elsewhere(_OfFile):
    """A file that is not on a disk of this machine."""

    def figures(self) -> str:
        """Say how slow it is compared with a local disk, "" where it is about as fast."""
        if self.rate is None:
            silent = self.system.speeds.stalled_s or not self.system.absent
            return "" if silent else "it was not measured"
        if self.rate > LOCAL / 2 or self.lost(self.rate, LOCAL) < LEAST_S:
            return ""
        return f"it comes at {_gb(self.rate)}; a local NVMe disk typically gives {_gb(LOCAL)}"

    def price(self) -> Price | None:
        if self.rate is None:
            return None
        others = self.claimed(ReadAhead, SmallReads, OneConnection)
        return Price(max(0.0, self.lost(self.rate, LOCAL) - others), ESTIMATED)

    def undo(self) -> str:
        names = [file.path for file in self.system.files] or [self.system.path or ""]
        return "rm " + " ".join(f"~/models/{quote(os.path.basename(name))}" for name in names)


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
        name = os.path.basename(self.system.path or "")
        return f"{self.copying}; or: hf download ORG/NAME {quote(name)} --local-dir ~/models"


class FarAway(_Elsewhere):
    id, title = "NL106", "The file is on a network or a shared folder"
    source = "assumed: a local NVMe SSD (PCIe 3.0 x4) gives 3 GB/s, 2026-11"
    why = "Each load asks another machine for all of the file again, unless RAM still has it."

    def available(self) -> bool:
        far = super().available() and self.system.device.kind in ("network", "share")
        return far and not _hub(self)

    def measure(self) -> str:
        figures = self.figures()
        return figures and f"{self.system.device}: {figures}"

    def fix(self) -> str:
        return f"{self.copying}; or keep it in RAM: numaload mirror {self.path}"


class HardDisk(_OfFile):
    id, title = "NL107", "The file is on a hard disk"
    source = "assumed: a SATA SSD gives 0.5 GB/s, 2026-11"
    why = "Each load from a hard disk takes several times as long as from an SSD."

    def available(self) -> bool:
        return super().available() and self.system.device.kind == "hdd"

    def measure(self) -> str:
        rate = self.system.speeds.disk
        if self.lost(rate, SSD) < LEAST_S:
            return ""
        return f"{self.system.device} gives {_gb(rate)}; a SATA SSD typically gives {_gb(SSD)}"

    def price(self) -> Price | None:
        others = self.claimed(Busy, Degraded)
        return Price(max(0.0, self.lost(self.system.speeds.disk, SSD) - others), ESTIMATED)

    def fix(self) -> str:
        move = f"move it to an SSD with {_size(self.system.size)} free"
        if not self._fits():
            return move
        return f"{move}; or keep it in RAM for further loads: numaload mirror {self.path}"

    def undo(self) -> str:
        return f"numaload release {self.path}" if self._fits() else ""

    def _fits(self) -> bool:
        """Return whether RAM has room for it; True where that is not known."""
        with suppress(Unknown):
            return self.system.meminfo.get("MemAvailable", self.system.size) >= self.system.size
        return True


class _OnDisks(_OfFile):
    """A check of the block devices below the file."""

    def available(self) -> bool:
        return super().available() and self.system.device.kind not in NO_DISKS


def slow_disk(check: _OfFile) -> bool:
    """Return whether an SSD gives less than half of what its kind gives."""
    rate, whole = check.system.speeds.disk, WHOLE.get(check.system.device.kind, 0.0)
    return rate is not None and rate < whole / 2 and check.lost(rate, whole) >= LEAST_S


class Busy(_OnDisks):
    id, title = "NL108", "The disk is busy for others"
    source = "Linux Documentation/admin-guide/iostats.rst, 2026-11"
    why = "Programs share what a disk gives: the file comes faster once the others are done."
    SHARE = 0.1  # of what the disk gives

    def measure(self) -> str:
        if not self.disk_s:
            return ""
        rate, busy = self.system.disk_use
        self.share = rate / (rate + (self.system.speeds.disk or rate))
        if self.system.device.kind == "hdd":  # seeking takes time and moves nothing
            self.share = max(self.share, min(busy, 0.9))
        if self.share < self.SHARE or self.share * self.disk_s < LEAST_S:
            return ""
        return f"others read and write {_gb(rate)}, and keep it busy {busy:.0%} of the time"

    def price(self) -> Price | None:
        return Price(self.share * self.disk_s, MEASURED)

    def fix(self) -> str:
        return "see who it is (iotop -obP -n 3, as root), and load after that has ended"


class NotWhole(_OfFile):
    id, title = "NL109", "The file is not whole, or no model"
    source = "docs/errors.md; lseek(2), SEEK_HOLE, 2026-11"
    why = (
        "A download that did not finish leaves a file too short, or with holes that read as"
        " zeros; a model with them fails, or answers nonsense."
    )

    def measure(self) -> str:
        if self.system.damage:
            return self.system.damage
        return "; ".join(self._holes())

    def _holes(self) -> Iterator[str]:
        for part in self.system.weights.parts if self.system.weights else ():
            holes = find_holes(part.file, part.header.data_start)
            named = tensors_in(part.header.tensors, holes)
            if named:
                nbytes = sum(stop - start for start, stop in holes)
                yield (
                    f"{part.file.path}: {_size(nbytes)} from byte {holes[0][0]} on are on no disk"
                    f" and read as zeros, in tensors {some(named)}"
                )

    def fix(self) -> str:
        return _again(self.system.path or "")


class Scheduler(_OnDisks):
    id, title, root = "NL110", "An NVMe disk has a scheduler for hard disks", True
    source = "Linux Documentation/block/bfq-iosched.rst: it is for slow devices, 2026-11"
    why = (
        "bfq puts requests into an order that saves a hard disk from seeking, and waits for more of"
        " the same program. NVMe is fastest without."
    )

    def measure(self) -> str:
        names = [name for name in _layers(self) if name.startswith("nvme")]
        self.places = [f"/sys/block/{name}/queue/scheduler" for name in names]
        self.places = [p for p in self.places if "[bfq]" in self.system.text(p)]
        return ", ".join(f"{place} is bfq" for place in self.places)

    def fix(self) -> str:
        return " && ".join(f"echo none > {place}" for place in self.places)

    def undo(self) -> str:
        return " && ".join(f"echo bfq > {place}" for place in self.places)


class NotDirect(_OnDisks):
    id, title = "NL111", "The file system refuses reads past the page cache"
    source = "open(2), O_DIRECT: EINVAL where a file system has none, 2026-11"
    why = (
        "Copies and replicas of the file are then read through the page cache: every byte is copied"
        " once more, and pushes something else out of RAM."
    )

    def measure(self) -> str:
        if self.system.speeds.direct:
            return ""
        return f"{self.system.device.file_system} refuses O_DIRECT for this file"

    def price(self) -> Price | None:
        warm = self.system.speeds.warm  # one copy more, at the speed of one from RAM
        return Price(self.system.absent / warm, ESTIMATED) if warm else None

    def fix(self) -> str:
        return "keep models on ext4, xfs or btrfs; of ZFS, 2.3 and later read so (direct=standard)"


class Encrypted(_OnDisks):
    id, title, root = "NL112", "The disk is slow below its encryption", True
    source = "cryptsetup(8), --perf-no_read_workqueue; Linux 5.9, 2020-10"
    why = (
        "Every byte is decrypted. By default dm-crypt hands that to threads of its own, which"
        " costs more than decrypting where the disk is fast."
    )

    def measure(self) -> str:
        if not slow_disk(self):
            return ""
        self.names = [
            self.system.text(f"/sys/block/{name}/dm/name")
            for name in _layers(self)
            if name.startswith("dm-")
            and self.system.text(f"/sys/block/{name}/dm/uuid").startswith("CRYPT-")
        ]
        if not self.names:
            return ""
        rate, device = self.system.speeds.disk, self.system.device
        return (
            f"{device} with {', '.join(self.names)} (dm-crypt) gives {_gb(rate)}, such disks some"
            f" {_gb(WHOLE[device.kind])}"
        )

    def price(self) -> Price | None:
        lost = self.lost(self.system.speeds.disk, WHOLE[self.system.device.kind])
        return Price(max(0.0, lost - self.claimed(Busy, Degraded, SlowLink)), ESTIMATED)

    def fix(self) -> str:
        flags = "--perf-no_read_workqueue --perf-no_write_workqueue"
        each = " && ".join(f"cryptsetup refresh {flags} {quote(name)}" for name in self.names)
        return f"{each}  # if that is set already: keep models on a volume without encryption"

    def undo(self) -> str:
        return " && ".join(f"cryptsetup refresh {quote(name)}" for name in self.names)


class Loop(_OnDisks):
    id, title, root = "NL113", "A loop device reads through the page cache", True
    source = "losetup(8), --direct-io, 2026-11"
    why = "RAM then holds every byte twice: as part of this file, and of the disk's image."

    def measure(self) -> str:
        self.names = [
            name
            for name in _layers(self)
            if name.startswith("loop") and self.system.number(f"/sys/block/{name}/loop/dio") == 0
        ]
        files = [self.system.text(f"/sys/block/{name}/loop/backing_file") for name in self.names]
        pairs = zip(self.names, files, strict=True)
        return ", ".join(f"{name} reads {file} without direct I/O" for name, file in pairs)

    def price(self) -> Price | None:
        warm = self.system.speeds.warm  # one copy more, at the speed of one from RAM
        return Price(self.system.absent / warm, ESTIMATED) if warm else None

    def fix(self) -> str:
        return " && ".join(f"losetup --direct-io=on /dev/{name}" for name in self.names)

    def undo(self) -> str:
        return " && ".join(f"losetup --direct-io=off /dev/{name}" for name in self.names)


class Silent(_OfFile):
    id, title = "NL114", "The server does not answer"
    source = "docs/storage.md, network file systems, 2026-10"
    why = "A program that reads such a file waits until the server is back, maybe for ever."

    def measure(self) -> str:
        return self.system.speeds.why_not if self.system.speeds.stalled_s else ""

    def fix(self) -> str:
        point = quote(self.system.mount.point) if self.system.mount else "MOUNTPOINT"
        return f"see whether the server is reachable; to give it up: umount -f -l {point}"


class SlowLink(_OnDisks):
    id, title = "NL115", "The SSD's PCIe link is below what the SSD can"
    source = "Linux Documentation/ABI/testing/sysfs-bus-pci, current_link_speed, 2026-11"
    why = "An SSD gives at most what its PCIe link carries: so many lanes at such a speed."
    USED = 0.6  # of what the link gives: a disk this fast may be limited by it

    def available(self) -> bool:
        return super().available() and bool(self._controllers())

    def _controllers(self) -> list[str]:
        found = (re.match(r"nvme\d+(?=n\d)", disk) for disk in self.system.disks.disks)
        return [match[0] for match in found if match]

    def measure(self) -> str:
        self.share = 0.0  # of the link that is missing
        said = []
        for name in self._controllers():
            folder = f"/sys/class/nvme/{name}/device"
            now, best = self._link(folder, "current"), self._link(folder, "max")
            limit = self._limit(f"{folder}/..", best)
            rate = self.system.speeds.disk or 0.0
            used = rate / len(self._controllers())
            if _bandwidth(now) >= 0.99 * _bandwidth(best) or used < self.USED * _bandwidth(now):
                continue
            self.share = max(self.share, 1 - _bandwidth(now) / _bandwidth(best))
            self.by_slot = _bandwidth(limit) <= 1.01 * _bandwidth(now)
            told = f"{name}: {_link(now)} of {_link(best)}, {_gb(rate)} measured"
            if self.by_slot:
                told += ", and its slot gives no more"
            elif now[1] == best[1] and self._sleeps(folder):
                told += "; unproven, as the device sleeps"
            said.append(told)
        return "; ".join(said)

    def _link(self, folder: str, which: str) -> tuple[float, int]:
        """Return (GT/s, lanes) of a link. Raises: Unknown."""
        text = self.system.text(f"{folder}/{which}_link_speed")
        lanes = self.system.number(f"{folder}/{which}_link_width")
        speed = re.match(r"\d+(?:\.\d+)?(?= GT/s)", text)
        if speed is None or not 1 <= lanes <= 32:
            raise Unknown(f"{folder}: {text[:40]!r} by {lanes} is no link")
        return float(speed[0]), lanes

    def _limit(self, slot: str, best: tuple[float, int]) -> tuple[float, int]:
        """Return the best link that device and slot have in common."""
        with suppress(Unknown):
            speed, lanes = self._link(slot, "max")
            return min(speed, best[0]), min(lanes, best[1])
        return best

    def _sleeps(self, folder: str) -> bool:
        with suppress(Unknown):
            return self.system.text(f"{folder}/power_state") not in ("D0", "unknown")
        return False

    def price(self) -> Price | None:
        rest = self.disk_s - self.claimed(Busy, Degraded)
        return Price(max(0.0, rest) * self.share, ESTIMATED)  # as if the link were all

    def fix(self) -> str:
        if self.by_slot:
            return "no setting mends it: a faster slot would, see lspci -tv and the board's manual"
        return (
            "seat the SSD again, set the slot's link speed to Auto in the firmware, and look for"
            " link errors: dmesg | grep -i -e AER -e 'PCIe Bus Error'"
        )


class Degraded(_OnDisks):
    id, title, root = "NL116", "A RAID array lacks a disk", True
    source = "Linux Documentation/admin-guide/md.rst, degraded, 2026-11"
    why = "It still works, at a part of its speed, and loses all with the next disk."
    LOST = 0.5  # of the speed: what is missing is computed from all others, or read of one disk

    def measure(self) -> str:
        self.found: list[str] = []
        said = []
        for name in _layers(self):
            place = f"/sys/block/{name}/md/degraded"
            if name.startswith("md") and self.system.exists(place):  # stripes alone have none
                lacking = self.system.number(place)
                if lacking > 0:
                    self.found.append(name)
                    said.append(f"{place} is {lacking}")
        return ", ".join(said)

    def price(self) -> Price | None:
        if not self.disk_s:
            return None
        return Price(self.LOST * max(0.0, self.disk_s - self.claimed(Busy)), ESTIMATED)

    def fix(self) -> str:
        each = "; ".join(
            f"mdadm --detail /dev/{name}; mdadm --manage /dev/{name} --add /dev/NEW"
            for name in self.found
        )
        return f"{each}  # /dev/NEW: the disk that replaces the failed one"


class Unreadable(_OfFile):
    """Only with --deep: it reads all of the model, past the page cache."""

    id, title = "NL117", "Part of the file is unreadable or was changed"
    source = "checksums of the store (XXH3-64) and of the hub's cache (SHA-256), 2026-11"
    why = "A disk that fails, or a program that wrote to it, makes a model answer nonsense."
    MOST = 3  # pieces of a file that are wrong, after which no more are read: each may take long

    def available(self) -> bool:
        return self.system.deep and bool(self.system.files)

    def measure(self) -> str:
        weights = self.system.weights
        files = [part.file for part in weights.parts] if weights else self.system.files
        sums = _stored_sums(self.system, files)
        return "; ".join(said for i, file in enumerate(files) for said in self._read(i, file, sums))

    def _read(self, i: int, file: SourceFile, sums: Sequence[Sequence[Checksum]]) -> Iterator[str]:
        """Read a file piece by piece; yield what is wrong, with the tensors that are there."""
        wrong: list[tuple[ByteRange, str]] = []
        by_hub, whole = SHA256.search(real_path(file.path)), sha256()
        expected = {(start, stop): checksum for start, stop, checksum in sums[i]} if sums else {}
        for its, read in pieces(file, list(expected), self.system.device):
            if isinstance(read, ReadError):
                wrong.append((its, f"cannot be read ({read})"))
            elif its in expected and xxhash.xxh3_64_intdigest(read) != expected[its]:
                wrong.append((its, "differ from what replicas were built from"))
            elif by_hub:
                whole.update(read)
            if len(wrong) >= self.MOST:
                break
        weights = self.system.weights
        for its, why in wrong:
            named = tensors_in(weights.parts[i].header.tensors, [its]) if weights else []
            where = f", in tensors {some(named)}" if named else ""
            yield f"{file.path}: bytes {its[0]} to {its[1]} {why}{where}"
        if by_hub and not wrong and whole.hexdigest() != by_hub[1]:
            yield f"{file.path}: its SHA-256 is {whole.hexdigest()}, the hub's is {by_hub[1]}"

    def fix(self) -> str:
        return f"{_again(self.system.path or '')}; for the disk: smartctl -a, as root"


def _stored_sums(system: System, files: Sequence[SourceFile]) -> Sequence[Sequence[Checksum]]:
    """Return the checksums that the store has of these files, a row for each, or nothing."""
    wanted = [file.opened[:-1] for file in files]
    with suppress(StoreError):
        for entry in system.stored:
            its = [one[:-1] for one in entry.model.identities]
            if entry.policy != MIXED and its == wanted:
                return entry.sums()
    return ()


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
    words = (word.partition("=") for word in (mount.options if mount else "").split(",") if word)
    return {name: value for name, _, value in words}


def _top(system: System) -> str:
    """Return the block device, not a partition, that the file system is on; "" for none."""
    if system.device.kind in NO_DISKS:
        return ""
    for name in (system.disks.device, system.device.name):
        for whole in (name, PARTITION.sub("", name)):
            if whole and "/" not in whole and system.exists(f"/sys/block/{whole}/queue"):
                return whole
    return ""


def _layers(check: Check) -> list[str]:
    """Return the block devices below the file, from the top down. Raises: Unknown."""
    system = check.system
    found, todo = list[str](), [_top(system)]
    if not todo[0]:
        raise Unknown(system.disks.why or f"/sys/block does not show {system.device.name}")
    for name in todo:
        whole = name if system.exists(f"/sys/block/{name}") else PARTITION.sub("", name)
        if whole not in found:
            found.append(whole)
            todo += SysFiles().names(f"{system.sys}/block/{whole}/slaves")
    return found


def _again(path: str) -> str:
    """Say how to get the file once more."""
    cached = CACHED.search(path)
    if cached:
        repository = cached[1].replace("--", "/", 1)
        return f"hf download {quote(repository)} {quote(cached[2])} --force-download"
    return f"download it again; its checksum tells whether it is whole: sha256sum {quote(path)}"


def _bandwidth(link: tuple[float, int]) -> float:
    """Return the bytes a second that a PCIe link carries: 8b/10b up to 5 GT/s, then 128b/130b."""
    speed, lanes = link
    return speed * 1e9 / 8 * lanes * (0.8 if speed <= 5 else 128 / 130)


def _link(link: tuple[float, int]) -> str:
    return f"{link[0]:g} GT/s x{link[1]}"


def _gb(rate: float | None) -> str:
    return f"{(rate or 0) / 1e9:.2f} GB/s"


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / (1 << 20):.1f} MiB"


CHECKS: tuple[type[Check], ...] = (
    Mapped,
    ReadAhead,
    SmallReads,
    OneConnection,
    HubMount,
    FarAway,
    HardDisk,
    Busy,
    NotWhole,
    Scheduler,
    NotDirect,
    Encrypted,
    Loop,
    Silent,
    SlowLink,
    Degraded,
    Unreadable,
)
