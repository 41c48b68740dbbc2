"""How much of a range is mapped by huge pages, by a scan of /proc/self/pagemap (Linux 6.7).

smaps says the same, but looks at each of the 512 pages in every huge one: 15 ms instead of 0.1 for
4 GiB, while a fast disk reads 60 MiB.
"""

from __future__ import annotations

import fcntl
import struct
from array import array
from collections.abc import Sequence

PAGEMAP = "/proc/self/pagemap"
# linux/fs.h: struct pm_scan_arg, struct page_region, PAGEMAP_SCAN, PAGE_IS_HUGE
ARGUMENT = struct.Struct("12Q")
REGION = 24  # bytes
PAGEMAP_SCAN = 3 << 30 | ARGUMENT.size << 16 | ord("f") << 8 | 16
PAGE_IS_HUGE = 1 << 6
REGIONS = 256  # answered at a time; neighbours are one region
WALKED = 4  # index of the field that says how far it came


def huge_ranges(ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]] | None:
    """Return what huge pages map of each (address, bytes): [(first, last address), ...].

    None: the kernel hides it.
    """
    try:
        with open(PAGEMAP, "rb", buffering=0) as file:
            return [_huge_ranges(file.fileno(), start, start + length) for start, length in ranges]
    except OSError:
        return None


def _huge_ranges(fd: int, start: int, stop: int) -> list[tuple[int, int]]:
    regions, found = array("Q", bytes(REGION * REGIONS)), list[tuple[int, int]]()
    while start < stop:
        asked = (ARGUMENT.size, 0, start, stop, 0, regions.buffer_info()[0], REGIONS, 0)
        argument = bytearray(ARGUMENT.pack(*asked, 0, PAGE_IS_HUGE, 0, PAGE_IS_HUGE))
        count = fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
        words = count * REGION // regions.itemsize  # first, last and categories of each
        found += zip(regions[0:words:3], regions[1:words:3], strict=True)
        walked = ARGUMENT.unpack(argument)[WALKED]
        if walked <= start:  # of a sandbox that takes the call and does nothing
            raise OSError(f"{PAGEMAP}: scanned to {walked:#x} from {start:#x}")
        start = walked
    return found
