"""Where kt-kernel looks for a loader before it makes its own, by version.

Read in ``kt_kernel/utils/llamafile.py``: up to 0.7.0 one loader for the whole process, later one
for each real path. Its classes are given an attribute that they have anyway; no code is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numaload.errors import BackendError

INSTALL = "pip install kt-kernel"
BY_PATH, SINGLE = "_gguf_loaders_by_path", "_gguf_loader_instance"
POOL = "_cpu_infer_instance"  # the one CPUInfer that all wrappers of a process share
MISSING = object()


@dataclass
class Hook:
    """A way to hand a loader to kt-kernel. ``copies``: it copies weights also for one subpool."""

    wrapper: Any  # kt_kernel.utils.llamafile.LlamafileMoEWrapper, or a class like it
    version: str
    name: str
    copies: bool
    get: Callable[[str], Any]
    put: Callable[[str, Any], None]  # MISSING takes it out again

    @contextmanager
    def pool(self, instance: Any) -> Iterator[Callable[[], Any]]:
        """Wrappers made meanwhile use this CPUInfer, or make one if it is None.

        Yields what tells which one they used. The one of before is back at the end.
        """
        before = vars(self.wrapper).get(POOL, MISSING)
        setattr(self.wrapper, POOL, instance)
        try:
            yield lambda: getattr(self.wrapper, POOL)
        finally:
            if before is MISSING:
                delattr(self.wrapper, POOL)
            else:
                setattr(self.wrapper, POOL, before)


def find_hook() -> Hook:
    """The hook of the kt-kernel that is installed. Raises: BackendError."""
    try:
        import kt_kernel
        from kt_kernel.utils import llamafile
    except ModuleNotFoundError as error:
        if error.name != "kt_kernel":
            raise _broken(error) from error
        raise BackendError(f"kt-kernel is not installed: {INSTALL}") from error
    except ImportError as error:
        raise _broken(error) from error
    if not getattr(llamafile, "_HAS_LLAMAFILE_SUPPORT", True):
        raise BackendError(
            f"kt-kernel {kt_kernel.__version__} was built without its llamafile back end, which"
            f" GGUF needs: {INSTALL}"
        )
    return hook_of(llamafile.LlamafileMoEWrapper, kt_kernel.__version__)


def _broken(error: ImportError) -> BackendError:
    return BackendError(f"kt-kernel is installed and cannot be imported: {error}")


def hook_of(wrapper: Any, version: str) -> Hook:
    """Chosen by what the class has. Raises: BackendError if it has neither."""
    if isinstance(getattr(wrapper, BY_PATH, None), dict):
        loaders = getattr(wrapper, BY_PATH)

        def put(path: str, loader: Any) -> None:
            if loader is MISSING:
                loaders.pop(os.path.realpath(path), None)
            else:
                loaders[os.path.realpath(path)] = loader

        return Hook(
            wrapper, version, BY_PATH, copies=False, put=put,
            get=lambda path: loaders.get(os.path.realpath(path), MISSING),
        )  # fmt: skip
    if hasattr(wrapper, SINGLE):
        return _single(wrapper, version)
    raise BackendError(
        f"kt-kernel {version}: LlamafileMoEWrapper has neither {BY_PATH}, as in 0.7.2, nor"
        f" {SINGLE}, as in 0.7.0: this numaload does not know where it takes a loader; install one"
        " of these versions"
    )


def _single(wrapper: Any, version: str) -> Hook:
    def get(_: str) -> Any:
        return MISSING if getattr(wrapper, SINGLE) is None else getattr(wrapper, SINGLE)

    def put(_: str, loader: Any) -> None:
        setattr(wrapper, SINGLE, None if loader is MISSING else loader)

    return Hook(wrapper, version, SINGLE, copies=True, get=get, put=put)
