"""Tests with the real programs, in the environment that scripts/clients makes."""

from __future__ import annotations

import numaload

collect_ignore = [] if len(numaload.topology().all) > 1 else ["numa"]
