"""Point "Faults" of storage: network files that stall, on a kernel that surely has FUSE.

StalledError, and all that is said of it, is tested here. Needs a guest with that: scripts/numa-vm
--modules fuse
"""

from __future__ import annotations

import os

import pytest

from fuse_server import why_not
from network_cases import *  # noqa: F403

HERE = os.environ.get("NUMALOAD_GUEST") == "storage"
WHY = why_not() if HERE else "needs the guest named storage"
pytestmark = pytest.mark.skipif(WHY is not None, reason=WHY or "")
