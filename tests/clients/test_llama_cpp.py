"""llama.cpp itself, as xllamacpp brings it, on files of the store that it knows nothing of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import numaload
from llama_model import write_llama
from llama_run import run

pytest.importorskip("xllamacpp")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("splits", [1, 3])
def test_it_generates_the_same_from_a_folder_of_the_store(tmp_path: Path, splits: int) -> None:
    files = write_llama(tmp_path / "m.gguf", splits=splits)
    assert len(files) == splits
    expected = run(files[0]).tokens
    assert len(expected) > 8
    numaload.mirror(files[0], nodes="local", shared=True).close()
    folder = numaload.store.folder(files[0])
    for file in files:  # so that nothing can come from there
        os.unlink(file)
    assert run(os.path.join(folder, os.path.basename(files[0]))).tokens == expected
