"""scripts/inject-faults finds what it looks for; what it finds in numaload is its own business."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import LIMIT_S

SCRIPT = Path(__file__).parents[2] / "scripts" / "inject-faults"


def load_script() -> Any:
    loader = importlib.machinery.SourceFileLoader("inject_faults", str(SCRIPT))
    spec = importlib.util.spec_from_loader("inject_faults", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["inject_faults"] = module  # dataclasses look there
    loader.exec_module(module)
    return module


faults = load_script()


def test_sweep_makes_opening_the_model_fail() -> None:
    words = [sys.executable, str(SCRIPT), "--programs", "inspect", "--only", "openat MODEL/"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if "left out" in done.stdout:
        pytest.skip("no program may answer for the system calls of another one here")
    assert done.returncode == 0, done.stdout + done.stderr
    runs, hit, error, success, wrong = re.findall(
        r"(?m)^openat +" + r"(\d+) +" * 4 + r"(\d+)", done.stdout
    )[0]
    assert int(runs) >= 2
    assert (hit, error, success, wrong) == (runs, runs, "0", "0")


@pytest.mark.parametrize(
    "said",
    [
        "numaload: error: [Errno 5] Input/output error: '/dev/shm/store'\n",
        "numaload: error: too many open files\n",
        "numaload: error: /m.gguf: Permission denied\nnumaload: error: /m.gguf: again\n",
        "Traceback (most recent call last):\n",
        "",
    ],
)
def test_error_without_a_name_or_in_other_words_is_wrong(said: str) -> None:
    with pytest.raises(faults.Wrong):
        faults.check_message(said)


def test_error_that_names_a_path_or_a_call_is_right() -> None:
    faults.check_message("numaload: plan: mapped\nnumaload: error: /m.gguf: Permission denied\n")
    faults.check_named("NumaError: mbind: 4096 bytes to node 0: Operation not permitted")


def test_every_call_is_made_to_fail_or_left_out() -> None:
    left_out = " ".join(faults.LEFT_OUT.values()).split()
    names = [call.split("=")[0] for call in left_out]
    assert not set(names) & set(faults.SWEPT)
    assert len({*faults.NAMES, *faults.ALLOWED}) == len(faults.SWEPT) + len(names)
