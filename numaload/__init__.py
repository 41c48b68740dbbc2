"""numaload: weights from storage into the right memory, as fast as the hardware allows.

The public names. They are loaded when first used: importing numaload loads neither numpy, numba,
torch nor libnuma.
"""

from __future__ import annotations

import os
from _thread import RLock
from typing import TYPE_CHECKING, Any

from numaload._version import __version__
from numaload.machine import affinity as _affinity  # noqa: F401 - reads the allowed CPUs, see there
from numaload.trace import span as _span

if TYPE_CHECKING:
    from numaload import errors
    from numaload.backends.state_dict import load_state_dict
    from numaload.bench.tune import TuneReport, tune
    from numaload.doctor.diagnosis import Diagnosis, diagnose
    from numaload.formats.qtypes import QuantType
    from numaload.machine.topology import Topology, topology
    from numaload.pagecache.background import PrewarmHolder
    from numaload.pagecache.evict import EvictReport, evict
    from numaload.pagecache.job import PrewarmJob, prewarm_async
    from numaload.pagecache.prewarm import PrewarmReport, prewarm
    from numaload.pagecache.residency_report import ResidencyReport, residency
    from numaload.pipeline.stream import stream
    from numaload.replicas import catalogue as store
    from numaload.replicas.exec import exec_programs as exec  # noqa: A004 - as the verb
    from numaload.replicas.mirror import attach, mirror
    from numaload.replicas.opening import open_model as open  # noqa: A004 - as files have
    from numaload.replicas.views import Mirror, MirrorReport
    from numaload.weights import Tensor, Weights

__all__ = [
    "Diagnosis",
    "EvictReport",
    "Mirror",
    "MirrorReport",
    "PrewarmHolder",
    "PrewarmJob",
    "PrewarmReport",
    "QuantType",
    "ResidencyReport",
    "Tensor",
    "Topology",
    "TuneReport",
    "Weights",
    "__version__",
    "attach",
    "diagnose",
    "errors",
    "evict",
    "exec",
    "load_state_dict",
    "mirror",
    "open",
    "prewarm",
    "prewarm_async",
    "residency",
    "store",
    "stream",
    "topology",
    "tune",
]

_PLACES: dict[str, tuple[str, str | None]] = {
    "errors": ("errors", None),
    "load_state_dict": ("backends.state_dict", "load_state_dict"),
    "QuantType": ("formats.qtypes", "QuantType"),
    "Topology": ("machine.topology", "Topology"),
    "topology": ("machine.topology", "topology"),
    "Mirror": ("replicas.views", "Mirror"),
    "MirrorReport": ("replicas.views", "MirrorReport"),
    "attach": ("replicas.mirror", "attach"),
    "mirror": ("replicas.mirror", "mirror"),
    "EvictReport": ("pagecache.evict", "EvictReport"),
    "evict": ("pagecache.evict", "evict"),
    "ResidencyReport": ("pagecache.residency_report", "ResidencyReport"),
    "residency": ("pagecache.residency_report", "residency"),
    "PrewarmReport": ("pagecache.prewarm", "PrewarmReport"),
    "prewarm": ("pagecache.prewarm", "prewarm"),
    "prewarm_async": ("pagecache.job", "prewarm_async"),
    "PrewarmHolder": ("pagecache.background", "PrewarmHolder"),
    "PrewarmJob": ("pagecache.job", "PrewarmJob"),
    "stream": ("pipeline.stream", "stream"),
    "Tensor": ("weights", "Tensor"),
    "Weights": ("weights", "Weights"),
    "open": ("replicas.opening", "open_model"),
    "exec": ("replicas.exec", "exec_programs"),
    "store": ("replicas.catalogue", None),
    "TuneReport": ("bench.tune", "TuneReport"),
    "tune": ("bench.tune", "tune"),
    "Diagnosis": ("doctor.diagnosis", "Diagnosis"),
    "diagnose": ("doctor.diagnosis", "diagnose"),
}


# What makes forks wait for imports takes 10 ms to import, which the command line does without. A
# fork waits for that, too.
_first_use = RLock()
os.register_at_fork(
    before=_first_use.acquire,
    after_in_parent=_first_use.release,
    after_in_child=_first_use.release,
)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'numaload' has no attribute {name!r}")
    from importlib import import_module

    with _span("import"):
        with _first_use:
            import_module("numaload.forks")
        module, attribute = _PLACES[name]
        found = import_module(f"numaload.{module}")
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
