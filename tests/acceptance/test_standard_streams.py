"""Closed, full or broken stdin, stdout and stderr: the work is done, and no file takes a number."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from commands import LIMIT_S, Numaload, evict, resident

CLOSED = [">&-", "2>&-", "<&-", ">&- 2>&-", ">&- 2>&- <&-"]


def shell(numaload: Numaload, line: str, *words: object) -> subprocess.CompletedProcess[str]:
    """numaload with these redirections."""
    return subprocess.run(
        ["bash", "-c", f'"$0" "$@" {line}', *numaload.command(*words)],
        capture_output=True, text=True, env=numaload.environment, timeout=LIMIT_S, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("closed", CLOSED)
def test_closed_streams_stop_no_work(
    numaload: Numaload, model: str, model_files: list[str], closed: str
) -> None:
    evict(model_files)
    for words in (["prewarm", model], ["mirror", model], ["verify", model]):
        done = shell(numaload, closed, *words)
        assert done.returncode == 0, (words, done.stderr)
        assert "Traceback" not in done.stderr
        assert "unclosed" not in done.stderr
    assert all(map(resident, model_files))
    assert "all checksums right" in numaload("verify", model).stdout


@pytest.mark.parametrize("closed", CLOSED)
def test_errors_are_errors_without_streams(numaload: Numaload, closed: str) -> None:
    done = shell(numaload, closed, "prewarm", "/nowhere/m.gguf")
    assert done.returncode == 1
    assert done.stdout == ""


def test_a_full_disk_for_messages_stops_no_work(
    numaload: Numaload, model: str, model_files: list[str]
) -> None:
    evict(model_files)
    assert shell(numaload, "2>/dev/full", "mirror", model).returncode == 0
    assert "all checksums right" in numaload("verify", model).stdout


@pytest.fixture(params=["full", "unread"])
def lost(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that takes nothing: of a full disk, of a pipe that nobody reads any more."""
    if request.param == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("words", [["--version"], ["nodes"]])
def test_output_that_is_lost_is_a_failure(numaload: Numaload, words: list[str], lost: int) -> None:
    done = subprocess.run(
        numaload.command(*words), stdout=lost, stderr=subprocess.PIPE,
        text=True, env=numaload.environment, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr
