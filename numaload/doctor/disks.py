"""The disks under the file: what makes them give less than they could."""

from __future__ import annotations

import re
from contextlib import suppress
from shlex import join, quote

from numaload.doctor.check import ESTIMATED, MEASURED, Check, Price, Unknown
from numaload.doctor.storage import LEAST_S, NO_DISKS, PARTITION, OfFile, gb, size_of, whole_disk
from numaload.linux.sysfs import SysFiles
from numaload.machine.devices import kind_of

SSD = 0.5e9  # bytes a second of a SATA SSD
WHOLE = {"nvme": 2.0e9, "ssd": 0.45e9}  # bytes a second of a disk where nothing is wrong


class HardDisk(OfFile):
    id, title = "NL107", "The file is on a hard disk"
    source = "assumed: a SATA SSD gives 0.5 GB/s, 2026-11"
    why = "Each load from a hard disk takes several times as long as from an SSD."

    def available(self) -> bool:
        return super().available() and self.system.device.kind == "hdd"

    def measure(self) -> str:
        rate = self.system.speeds.disk
        if self.lost(rate, SSD) < LEAST_S:
            return ""
        return f"{self.system.device} gives {gb(rate)}; a SATA SSD typically gives {gb(SSD)}"

    def price(self) -> Price | None:
        others = self.claimed(Busy, Degraded)
        return Price(max(0.0, self.lost(self.system.speeds.disk, SSD) - others), ESTIMATED)

    def fix(self) -> str:
        move = f"move it to an SSD with {size_of(self.system.size)} free"
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


class _OnDisks(OfFile):
    """A check of the block devices below the file."""

    def available(self) -> bool:
        return super().available() and self.system.device.kind not in NO_DISKS


def second_copy(check: OfFile) -> Price | None:
    """Price one copy more of what is absent, at the speed of one from RAM."""
    warm = check.system.speeds.warm
    return Price(check.system.absent / warm, ESTIMATED) if warm else None


def copy_is_slow(check: OfFile) -> bool:
    price = second_copy(check)
    return price is None or price.seconds >= LEAST_S


def whole_rate(check: OfFile) -> float:
    """Return what the slowest disk below the file gives where nothing is wrong; 0: unknown."""
    system, files = check.system, SysFiles()
    kinds = [kind_of(files, f"{system.sys}/block/{name}") for name in system.disks.disks]
    return min((WHOLE.get(kind, 0.0) for kind in kinds), default=0.0)


def slow_disk(check: OfFile) -> bool:
    """Return whether SSDs give less than half of what the slowest of them gives alone."""
    rate, whole = check.system.speeds.disk, whole_rate(check)
    return check.known(rate) and (rate or 0) < whole / 2 and check.lost(rate, whole) >= LEAST_S


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
        return f"others read and write {gb(rate)}, and keep it busy {busy:.0%} of the time"

    def price(self) -> Price | None:
        return Price(self.share * self.disk_s, MEASURED)

    def fix(self) -> str:
        return "load after that has ended; as root iotop -obP shows who it is"


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
        if self.system.speeds.direct or not copy_is_slow(self):
            return ""
        return f"{self.system.device.file_system} refuses O_DIRECT for this file"

    def price(self) -> Price | None:
        return second_copy(self)

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
        # Refreshing resets every flag that is not named. The kernel shows this one.
        self.names = {
            self.system.text(f"/sys/block/{name}/dm/name"): (
                ["--allow-discards"]
                if self.system.number(f"/sys/block/{name}/queue/discard_max_bytes")
                else []
            )
            for name in _layers(self)
            if name.startswith("dm-")
            and self.system.text(f"/sys/block/{name}/dm/uuid").startswith("CRYPT-")
        }
        if not self.names:
            return ""
        rate, device = self.system.speeds.disk, self.system.device
        return (
            f"{device} with {', '.join(self.names)} (dm-crypt) gives {gb(rate)}, such disks some"
            f" {gb(whole_rate(self))}"
        )

    def price(self) -> Price | None:
        lost = self.lost(self.system.speeds.disk, whole_rate(self))
        return Price(max(0.0, lost - self.claimed(Busy, Degraded, SlowLink)), ESTIMATED)

    def fix(self) -> str:
        return (
            f"{self._refresh('--perf-no_read_workqueue', '--perf-no_write_workqueue')}  # see"
            " cryptsetup status NAME before: other flags that it shows are reset unless you add"
            " them, here and to undo; if these two are there, move models to a volume without"
            " encryption"
        )

    def undo(self) -> str:
        return self._refresh()

    def _refresh(self, *flags: str) -> str:
        return " && ".join(
            f"cryptsetup refresh {join([*kept, *flags, name])}" for name, kept in self.names.items()
        )


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
        pairs = zip(self.names, map(quote, files), strict=True)
        found = ", ".join(f"{name} reads {file} without direct I/O" for name, file in pairs)
        return found if copy_is_slow(self) else ""

    def price(self) -> Price | None:
        return second_copy(self)

    def fix(self) -> str:
        return " && ".join(f"losetup --direct-io=on /dev/{name}" for name in self.names)

    def undo(self) -> str:
        return " && ".join(f"losetup --direct-io=off /dev/{name}" for name in self.names)


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
            self.root = not self.by_slot  # most distributions show dmesg to root only
            told = f"{name}: {_link(now)} of {_link(best)}, {gb(rate)} measured"
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


def _layers(check: Check) -> list[str]:
    """Return the block devices below the file, from the top down. Raises: Unknown."""
    system = check.system
    found, todo = list[str](), [whole_disk(system)]
    if not todo[0]:
        raise Unknown(system.disks.why or f"/sys/block does not show {system.device.name}")
    for name in todo:
        whole = name if system.exists(f"/sys/block/{name}") else PARTITION.sub("", name)
        if whole not in found:
            found.append(whole)
            todo += SysFiles().names(f"{system.sys}/block/{whole}/slaves")
    return found


def _bandwidth(link: tuple[float, int]) -> float:
    """Return the bytes a second that a PCIe link carries: 8b/10b up to 5 GT/s, then 128b/130b."""
    speed, lanes = link
    return speed * 1e9 / 8 * lanes * (0.8 if speed <= 5 else 128 / 130)


def _link(link: tuple[float, int]) -> str:
    return f"{link[0]:g} GT/s x{link[1]}"


CHECKS: tuple[type[Check], ...] = (
    HardDisk,
    Busy,
    Scheduler,
    NotDirect,
    Encrypted,
    Loop,
    SlowLink,
    Degraded,
)
