"""What is published: a source distribution that builds, a wheel that runs, with all they need and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from test_build import quick_compiler

from pera_fast import __version__

_LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "site", "*.egg-info", "*.so", "__pycache__", ".*cache", "shared"
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m build`: the source distribution, and the wheel made from it, in this environment."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "source", ignore=_LEFT_OUT)
    environment = {**os.environ, "PERA_FAST_BUILD_CUDA": "0", "CXX": str(quick_compiler(folder))}
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


def test_the_wheel_holds_what_runs(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert re.fullmatch(rf"pera_fast-{re.escape(__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "pera_fast").rglob("*.py")}
    kernels = {f"pera_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    demo = {str(p.relative_to(ROOT)) for p in (ROOT / "pera_fast/demo").iterdir() if p.is_file()}
    assert demo and modules | kernels | demo | {"pera_fast/_C.so", "pera_fast/_build_info.json"} <= names
    assert {name.split("/")[0] for name in names} == {"pera_fast", f"pera_fast-{__version__}.dist-info"}


def test_the_source_distribution_holds_what_builds(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    code = (
        p
        for p in (ROOT / "csrc").rglob("*")
        if p.suffix in (".h", ".cpp", ".cu") and p.parent.name != "testing"
    )
    sources = {str(p.relative_to(ROOT)) for p in code}
    assert sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/build_backend.py"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_the_wheel_runs_where_it_is_installed(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", *map(str, install)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = run(sys.executable, "-c", "import pera_fast; print(pera_fast.__file__)")
    assert where.strip() == str(site / "pera_fast/__init__.py")
    assert run(str(site / "bin/pera-fast"), "--version") == f"pera_fast {__version__}\n"
    facts = json.loads(run(str(site / "bin/pera-fast"), "info", "--json"))
    assert facts["libraries"]["cpp"] is None and facts["versions"]["pera_fast"] == __version__
    scenes = (
        "from pera_fast.run import DEMO_SCENES, scan_or_open as s; print(len(s(DEMO_SCENES, None, 0).scenes))"
    )
    assert int(run(sys.executable, "-c", scenes)) >= 7
