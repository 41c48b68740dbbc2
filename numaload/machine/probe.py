"""Whether memory can be bound to nodes here, asked on one page before anything large is touched.

Containers refuse the calls (EPERM from seccomp), kernels lack them (ENOSYS), and some sandboxes
return 0 and do nothing: so a page is bound, written and looked up again.
"""

from __future__ import annotations

from collections.abc import Collection

from numaload import trace
from numaload.errors import NumaError, NumaUnavailableError
from numaload.linux import syscalls
from numaload.linux.mapping import bind, map_private
from numaload.linux.placement import count_pages
from numaload.linux.syscalls import PAGE
from numaload.machine import memory


@trace.spanned("probe")
def why_not_bound(nodes: Collection[int]) -> NumaUnavailableError | None:
    """Return None where memory binds to each of these nodes, else what keeps it from that.

    Raises: NumaError for a node that is absent, has no memory or is not allowed here.
    """
    for node in nodes:
        try:
            found = _land(node)
        except NumaUnavailableError as error:
            return error
        if found - {node}:
            return NumaUnavailableError(
                f"mbind: a page bound to node {node} is on node {min(found)}: what runs this"
                " process accepts the call and ignores it",
                call="mbind",
                node=node,
            )
    return None


def _land(node: int) -> set[int]:
    """Return the node that a page bound to ``node`` is on; empty where nobody tells."""
    with map_private(PAGE) as mapping:
        bind(mapping, [node])
        if memory.node_free(node) == 0:  # a page bound to a full node may cost a process its life
            return set()
        with mapping.view(write=True) as view:
            view[0] = 1
        try:
            return {found for found in syscalls.pages_nodes([mapping.address]) if found >= 0}
        except NumaError:
            pass
        try:
            return {found for counts in count_pages([mapping.range]) for found in counts}
        except NumaError:
            return set()
