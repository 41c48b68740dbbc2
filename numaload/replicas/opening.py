"""``numaload.open``: a model's files, or the replica of them that is nearest."""

from __future__ import annotations

import os

from numaload.errors import UsageError
from numaload.files.reader import Announce, Progress
from numaload.weights import Weights, open_weights


def open_model(
    path: str | os.PathLike[str],
    *,
    replica: str | int | None = None,
    copy: bool = False,
    io_timeout: float | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Weights:
    """Open a model by any one of its files: headers only, milliseconds.

    replica: "local": the replica in the store that is nearest to the CPU which this thread runs on;
    a node: that node's; it is in use until the weights are closed. None: the files themselves.
    All else, and errors: as ``open_weights``; also ReplicaNotFoundError where there is no replica
    of what the files are now.
    """
    if replica is None:
        return open_weights(
            path, copy=copy, io_timeout=io_timeout, progress=progress, announce=announce
        )
    if copy:
        raise UsageError("copy: a replica is in memory already: give replica or copy, not both")
    if replica != "local" and type(replica) is not int:
        raise UsageError(f"replica {replica!r}: expected 'local' or a node")
    from numaload.files.source import io_timeout as waiting
    from numaload.replicas.mirror import attach

    with waiting(io_timeout):
        return attach(path).only(None if replica == "local" else int(replica))
