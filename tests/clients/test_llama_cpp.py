"""llama.cpp itself, as xllamacpp brings it, on files of the store that it knows nothing of."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import numaload as api
from commands import Numaload, resident
from llama_model import write_llama
from llama_run import ENGINE, run

pytest.importorskip("xllamacpp")

# Gives the source's page cache back before the engine starts.
COLD = f"""
import os, sys
for path in sys.argv[3:]:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    for _ in range(5):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
{ENGINE}
"""


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("splits", [1, 3])
def test_it_generates_the_same_from_a_folder_of_the_store(tmp_path: Path, splits: int) -> None:
    files = write_llama(tmp_path / "m.gguf", splits=splits)
    assert len(files) == splits
    expected = run(files[0]).tokens
    assert len(expected) > 8
    api.mirror(files[0], nodes="local", shared=True).close()
    folder = api.store.folder(files[0])
    for file in files:  # so that nothing can come from there
        os.unlink(file)
    assert run(os.path.join(folder, os.path.basename(files[0]))).tokens == expected


@pytest.mark.parametrize("splits", [1, 3])
def test_under_exec_it_generates_the_same_and_reads_no_byte_of_the_source(
    numaload: Numaload, tmp_path: Path, splits: int
) -> None:
    files = write_llama(tmp_path / "m.gguf", splits=splits)
    expected = run(files[0]).tokens
    assert resident(files) > 4 << 20
    words = (sys.executable, "-c", COLD, "{model}", "{}", *files)
    done = numaload("exec", files[0], "--", *words)
    (generated,) = (line for line in done.stdout.splitlines() if "GENERATED" in line)
    assert json.loads(generated.partition("GENERATED ")[2])["tokens"] == expected
    assert resident(files) == 0
