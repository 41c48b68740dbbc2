"""Point 1, package: sdist and wheel hold the kernels in their place, and install as a command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import numaload

ROOT = Path(__file__).parents[2]


def run(*words: object, **options: object) -> str:
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel made from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "-o", out, ROOT)
    return out


@pytest.fixture(scope="session")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel)
    return target


def test_wheel_has_kernels_inside_numaload_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"numaload/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.startswith("numaload/kernels/")} == sources
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"numaload"}
    assert "numaload/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_sdist_has_what_building_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"kernels/registry.py", "numaload/weights/model.py", "README.md", "LICENSE"} <= names


def test_installed_package_runs_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    where = run(sys.executable, "-c", "import numaload; print(numaload.__file__)",
                cwd=tmp_path, env=environment)  # fmt: skip
    assert where.startswith(str(installed))
    shown = run(sys.executable, "-m", "numaload", "--version", cwd=tmp_path, env=environment)
    assert shown == f"numaload {numaload.__version__}\n"
    program = (
        "import numpy as np; from numaload.kernels import registry; out = np.zeros(32, 'f4')\n"
        "block = np.array([0, 0x38, *range(32)], 'u1')\n"  # half of 0 to 31
        "registry.load(8, 'float32')(block, out, False); print(out.sum())"
    )
    assert run(sys.executable, "-c", program, cwd=tmp_path, env=environment) == "248.0\n"


def test_command_is_installed_next_to_python() -> None:
    command = Path(sys.executable).parent / "numaload"
    assert run(command, "--version") == f"numaload {numaload.__version__}\n"


def test_every_package_is_listed() -> None:
    """setuptools is told them one by one: a new folder must not be forgotten."""
    section = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    listed = re.findall(r'"(.+)"', section)
    folders = {p.parent for p in (ROOT / "numaload").rglob("__init__.py")}
    found = {str(p.relative_to(ROOT)).replace("/", ".") for p in folders}
    found |= {"numaload.kernels", "numaload.kernels.jit"}
    assert sorted(found) == sorted(listed)


def in_checkout(program: str, path: Path) -> str:
    return run(sys.executable, "-c", program, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(path)})


def test_kernels_of_the_checkout_are_no_package_for_others(tmp_path: Path) -> None:
    """transformers asks for a package of that name, and takes one without a file for none."""
    program = "import kernels; print(kernels.__file__, *kernels.__path__)\nfrom kernels import "
    assert in_checkout(f"{program}__doc__", tmp_path) == "None\n"
    with pytest.raises(AssertionError, match="cannot import name 'lanes'"):
        in_checkout(f"{program}lanes", tmp_path)


def test_another_package_of_that_name_is_found_from_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("from kernels.layer import Mode")
    (tmp_path / "kernels/layer.py").write_text("Mode = 5")
    program = (
        "from kernels import Mode, layer; import kernels\n"
        "from numaload.kernels import lanes; print(kernels.__file__, Mode)"
    )
    assert in_checkout(program, tmp_path) == f"{tmp_path}/kernels/__init__.py 5\n"
