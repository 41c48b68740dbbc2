"""Classic ktransformers (0.2, 0.3, its archive) with numaload's loaders instead of its own.

``install()`` before a model is loaded, or the loaders by themselves. Its successor is kt-kernel:
see ``numaload.backends.kt_kernel``.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from numaload.backends.ktransformers.folder import FolderLoader, Replica, files_below, folder_of
from numaload.backends.ktransformers.gguf import GGUFLoader
from numaload.backends.ktransformers.names import translate_name_to_gguf
from numaload.backends.ktransformers.safetensors import SafeTensorLoader
from numaload.backends.replacing import Replaced, replace
from numaload.errors import BackendError, ModelNotFoundError

__all__ = [
    "GGUFLoader",
    "ModelLoaderFactory",
    "SafeTensorLoader",
    "install",
    "translate_name_to_gguf",
]

# Where it has its loaders: since 0.3.2, and before.
MODULES = ("ktransformers.util.custom_loader", "ktransformers.util.custom_gguf")
LOADERS: tuple[type[GGUFLoader | SafeTensorLoader], ...] = (SafeTensorLoader, GGUFLoader)


class ModelLoaderFactory:
    """Choose the loader by the files that are there."""

    @staticmethod
    def create_loader(path: str | os.PathLike[str]) -> GGUFLoader | SafeTensorLoader:
        """Open a file or a folder: safetensors files in it or below come before GGUF files.

        Raises: ModelNotFoundError (a FileNotFoundError), what the loaders raise.
        """
        folder, given = folder_of(path), os.fsdecode(path)
        for loader in LOADERS:
            if given.endswith(loader.suffix) and os.path.isfile(given):
                return loader(folder)
        for loader in LOADERS:
            if any(files_below(folder, loader.suffix)):
                return loader(folder)
        raise ModelNotFoundError("no .safetensors or .gguf files here or below", path=folder)


OURS: dict[str, Any] = {
    "GGUFLoader": GGUFLoader,
    "SafeTensorLoader": SafeTensorLoader,
    "ModelLoaderFactory": ModelLoaderFactory,
}


def install(replica: Replica = None) -> Replaced:
    """Put these loaders where ktransformers' are, in every module that has them, before it loads.

    replica: a Mirror, or a view, or several: loaders take the files that these have from their
    memory. Returns what says where, and takes it back. Raises: BackendError.
    """
    module = _import()
    theirs = {name: vars(module)[name] for name in OURS if name in vars(module)}
    if "GGUFLoader" not in theirs:
        raise BackendError(f"{module.__name__} has no GGUFLoader: it is not classic ktransformers")
    done = replace({name: (found, OURS[name]) for name, found in theirs.items()})
    done.set(FolderLoader, "replica", replica)
    return done


def _import() -> Any:
    """Import the module that has the loaders. Raises: BackendError."""
    for name in MODULES:
        try:
            return import_module(name)
        except ImportError as error:  # noqa: PERF203 - of two names
            if error.name not in {name, "ktransformers", "ktransformers.util"}:
                raise BackendError(f"{name} cannot be imported: {error}") from error
    raise BackendError(
        "classic ktransformers is not installed: it comes from its repository, see archive/ of"
        " github.com/kvcache-ai/ktransformers"
    )
