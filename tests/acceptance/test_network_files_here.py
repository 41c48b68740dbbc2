"""Point "Faults" of storage: network files that stall, wherever FUSE can be mounted.

The same cases run in the guest named storage: tests/numa/test_network_files.py.
"""

from __future__ import annotations

import pytest

from fuse_server import why_not
from network_cases import *  # noqa: F403

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "")
