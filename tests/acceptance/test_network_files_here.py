"""Point "Faults" of storage: network files that stall, wherever FUSE can be mounted.

The same cases run in the guest named storage, tests/numa/test_network_files.py: where FUSE cannot
be mounted there is nothing here.
"""

from __future__ import annotations

from fuse_server import why_not

if not why_not():
    from network_cases import *  # noqa: F403
