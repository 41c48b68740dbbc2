"""Where kt-kernel looks for a loader before it makes its own, by version.

Read in ``kt_kernel/utils/llamafile.py``: up to 0.7.0 one loader for the whole process, later one
for each real path. Its classes are given an attribute that they have anyway; no code is changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numaload.errors import BackendError

INSTALL = "pip install kt-kernel"
BY_PATH, SINGLE = "_gguf_loaders_by_path", "_gguf_loader_instance"
POOL = "_cpu_infer_instance"  # the one CPUInfer that all wrappers of a process share
MISSING = object()


class Hook:
    """The attribute of kt-kernel's wrapper class that holds loaders. ``name`` is the attribute's.

    Raises: BackendError where the class has none that is known.
    """

    def __init__(self, wrapper: Any, version: str) -> None:
        self.wrapper, self.version, self.name = wrapper, version, SINGLE
        if isinstance(getattr(wrapper, BY_PATH, None), dict):
            self.name = BY_PATH
        elif not hasattr(wrapper, SINGLE):
            raise BackendError(
                f"kt-kernel {version}: LlamafileMoEWrapper has neither {BY_PATH}, as in 0.7.2, nor"
                f" {SINGLE}, as in 0.7.0: this numaload does not know where it takes a loader;"
                " install one of these versions"
            )

    def get(self, path: str) -> Any:
        """Return the loader for this path, or None."""
        found = getattr(self.wrapper, self.name)
        return found if self.name == SINGLE else found.get(os.path.realpath(path))

    def put(self, path: str, loader: Any) -> None:
        """Hand over a loader for this path, or with None take it out again."""
        if self.name == SINGLE:
            setattr(self.wrapper, SINGLE, loader)
        elif loader is None:
            getattr(self.wrapper, BY_PATH).pop(os.path.realpath(path), None)
        else:
            getattr(self.wrapper, BY_PATH)[os.path.realpath(path)] = loader

    @contextmanager
    def pool(self, pools: dict[int, Any], node: int) -> Iterator[None]:
        """Let wrappers made meanwhile use this node's CPUInfer, or note the one that they make."""
        before = vars(self.wrapper).get(POOL, MISSING)
        setattr(self.wrapper, POOL, pools.get(node))
        try:
            yield
            pools[node] = getattr(self.wrapper, POOL)
        finally:
            if before is MISSING:  # a base class has it
                delattr(self.wrapper, POOL)
            else:
                setattr(self.wrapper, POOL, before)


def find_hook() -> Hook:
    """Find the hook of the kt-kernel that is installed. Raises: BackendError."""
    try:
        import kt_kernel
        from kt_kernel.utils import llamafile
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "kt_kernel":
            raise BackendError(f"kt-kernel is not installed: {INSTALL}") from error
        raise BackendError(f"kt-kernel is installed and cannot be imported: {error}") from error
    if not getattr(llamafile, "_HAS_LLAMAFILE_SUPPORT", True):
        raise BackendError(
            f"kt-kernel {kt_kernel.__version__} was built without its llamafile back end, which"
            f" GGUF needs: {INSTALL}"
        )
    return Hook(llamafile.LlamafileMoEWrapper, kt_kernel.__version__)
