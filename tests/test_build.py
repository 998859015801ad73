"""The build: what is installed loads, the backend asks for torch only when needed, CUDA sources are sound."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pera_fast.ops import _library
from pera_fast.reference import disjoint_masks as disjoint_masks_reference

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


def load_file(path: Path):
    """Import a Python file that no package contains."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def setup_functions(monkeypatch):
    """The functions of setup.py, without building anything."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return load_file(ROOT / "setup.py")


# --- what is installed ---


def test_library_is_built_and_loads():
    assert _library.why_no_cpp() is None
    assert torch.ops.pera_fast.disjoint_masks.default is not None


def test_cuda_library_is_loaded_or_says_why_not():
    reason = _library.why_no_cuda()
    if torch.version.cuda is None:
        assert reason == "this torch is a CPU build"
    else:
        assert reason is None or reason == "no GPU visible" or "library" in reason


def test_libraries_depend_on_no_python_and_on_libtorch_only():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    for name in ("_C.so", "_C_cuda.so"):
        if not (_library._PACKAGE / name).is_file():
            assert name != "_C.so", "the CPU library is not built"
            continue
        dynamic = subprocess.run(
            ["readelf", "-d", str(_library._PACKAGE / name)], capture_output=True, text=True, check=True
        ).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic)
        # libtorch itself: through it the loader finds libtorch_cuda, which the CUDA library calls.
        assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
        assert not [lib for lib in needed if re.match(r"libpython|libtorch_python|libc10|libcudart", lib)]
        assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


def test_packages_and_data_are_installed():
    import pera_fast
    import pera_fast.kernels

    assert (Path(pera_fast.__file__).parent / "demo/PROVENANCE.md").is_file()
    assert pera_fast.kernels.__doc__
    versions = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert versions == [pera_fast.__version__]


def run_info(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pera_fast.info", *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout


def test_info_as_json():
    facts = json.loads(run_info("--json", PERA_FAST_BACKEND="auto"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["processor"]["isa"] == torch.backends.cpu.get_cpu_capability()
    assert facts["build"]["compiler_version"] and "-O3" in facts["build"]["cpu_flags"]
    assert not any("-march" in flag for flag in facts["build"]["cpu_flags"])
    assert facts["ops"]["disjoint_masks"]["cpu"] == {"backend": "cpp", "error": None, "missing": {}}
    on_cuda = facts["ops"]["disjoint_masks"]["cuda"]
    assert on_cuda["backend"] == "cuda" or on_cuda["missing"]["cuda"]


def test_info_for_people():
    text = run_info(PERA_FAST_BACKEND="disjoint_masks=reference")
    assert re.search(r"^torch +" + re.escape(torch.__version__), text, re.MULTILINE)
    assert re.search(r"disjoint_masks +cpu +reference", text)
    assert "compiler_version" in text


@pytest.mark.parametrize(
    "files, is_nvidia, note",
    [
        ([], False, "not installed"),
        (["apex/__init__.py"], False, "unrelated"),
        (["apex/__init__.py", "apex/optimizers/__init__.py"], True, "without its compiled kernels"),
        (["apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"], True, "NVIDIA apex"),
    ],
)
def test_apex_is_told_from_its_namesake(files, is_nvidia, note, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        # Looking must not import it.
        (tmp_path / name).write_text("raise AssertionError('imported')\n")
    facts = json.loads(run_info("--json", PYTHONPATH=str(tmp_path)))
    if not files and facts["apex"]["note"] != "not installed":
        pytest.skip("apex is installed here")
    assert facts["apex"]["is_nvidia"] is is_nvidia
    assert note in facts["apex"]["note"]


@pytest.mark.parametrize(
    "arch, capability, runs",
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("80", (9, 0), False),
        ("86", (8, 0), False),
        ("90+PTX", (12, 0), True),
        ("90+PTX", (8, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
    ],
)
def test_which_gpu_runs_which_arch(arch, capability, runs):
    assert _library._runs_on(arch, capability) is runs


# --- the build backend and setup.py ---


@pytest.fixture
def backend():
    return load_file(ROOT / "csrc/build_backend.py")


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_backend_asks_for_torch_only_where_there_is_none(kind, backend, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    asks = getattr(backend, f"get_requires_for_build_{kind}")
    assert not [requirement for requirement in asks() if requirement.startswith("torch")]
    monkeypatch.setattr(backend, "target_site_packages", lambda: [str(tmp_path)])
    assert "torch>=2.10" in asks()


@pytest.mark.parametrize(
    "version, usable", [("2.9.1", False), ("2.10.0+cpu", True), ("2.14.1+cu130", True), ("3.0.0a0", True)]
)
def test_backend_knows_a_new_enough_torch(version, usable, backend, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "target_site_packages", lambda: [str(tmp_path)])
    metadata = tmp_path / f"torch-{version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    assert backend.installed_torch() is None  # no headers
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert backend.installed_torch() == (str(tmp_path) if usable else None)


def test_missing_compiler_is_one_clear_sentence(monkeypatch):
    setup = setup_functions(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(setup.BuildError, match=r"but CXX=no-such-compiler is not on PATH"):
        setup.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(setup.BuildError, match=r"but neither c\+\+ nor g\+\+ nor clang\+\+ is on PATH"):
        setup.find_compiler()


def test_architectures(monkeypatch):
    setup = setup_functions(monkeypatch)
    answers = {"--list-gpu-arch": "compute_75\ncompute_80\ncompute_90\n", "--query-gpu=compute_cap": ""}
    monkeypatch.setattr(setup, "output_of", lambda *command: answers[command[1]])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup.cuda_archs("nvcc") == ["80", "90+PTX"]
    answers["--query-gpu=compute_cap"] = "9.0\n8.0\n9.0\n"
    assert setup.cuda_archs("nvcc") == ["80", "90+PTX"]
    answers["--query-gpu=compute_cap"] = "8.0\n"
    assert setup.cuda_archs("nvcc") == ["80+PTX"]
    answers["--query-gpu=compute_cap"] = "12.0\n"  # newer than nvcc: PTX has to do
    assert setup.cuda_archs("nvcc") == ["80", "90+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;10.0+PTX")
    assert setup.cuda_archs("nvcc") == ["86", "90a", "100+PTX"]
    assert setup.gencode(["90a", "100+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(setup.BuildError, match="TORCH_CUDA_ARCH_LIST.*got 'Hopper'"):
        setup.cuda_archs("nvcc")


@pytest.mark.parametrize("require", [False, True])
def test_failed_cuda_build_keeps_the_cpu_library(require, tmp_path):
    """With an nvcc that fails, the build warns and goes on, unless CUDA is required."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal error: broken toolkit'\nexit 1\n")
    nvcc.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"),
         "-t", str(tmp_path / "objects")],
        cwd=ROOT, capture_output=True, text=True,
        env={
            **os.environ, "CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0",
            "PERA_FAST_REQUIRE_CUDA": str(int(require)), "PERA_FAST_BUILD_CUDA": "1",
        },
    )  # fmt: skip
    sentence = "nvcc failed: nvcc fatal error: broken toolkit"
    assert (tmp_path / "lib/pera_fast/_C.so").is_file(), done.stderr
    assert not (tmp_path / "lib/pera_fast/_C_cuda.so").exists()
    assert (done.returncode != 0) is require
    assert sentence in done.stderr
    if not require:
        info = json.loads((tmp_path / "lib/pera_fast/_build_info.json").read_text())
        assert info["cuda"] == {"missing": sentence}


# --- CUDA sources without a GPU ---


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arch", [80, 90])
def test_cuda_kernels_compile_without_spills(source, arch, tmp_path, monkeypatch):
    nvcc = setup_functions(monkeypatch).find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}",
         "-Xcompiler=-fPIC", "-c", str(source), "-o", str(tmp_path / "kernel.o")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout + done.stderr)
    assert spills, "ptxas reported no kernel"
    assert set(spills) == {("0", "0")}


@functools.cache
def sanitizer_works(compiler: str) -> bool:
    program = "int main() { return 0; }"
    options = ["-fsanitize=address,undefined", "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run([compiler, *options], input=program, text=True, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def masks_on_host(tmp_path_factory):
    """csrc/cuda/disjoint_masks.cu compiled for the CPU under the address sanitizer, as a function."""
    compiler = shutil.which("g++")
    if compiler is None or not sanitizer_works(compiler):
        pytest.skip("g++ with its address sanitizer is not installed")
    program = tmp_path_factory.mktemp("host") / "disjoint_masks"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
         "-Wall", "-Werror", "-x", "c++", str(ROOT / "csrc/testing/disjoint_masks_main.cpp"),
         str(ROOT / "csrc/cuda/disjoint_masks.cu"), "-o", str(program)],
        check=True,
    )  # fmt: skip

    def run(
        order: str, seed: int, step: int, counts: tuple[int, int, int], crops: list[int]
    ) -> list[list[int]]:
        done = subprocess.run(
            [str(program), *map(str, (seed, step, *counts, *crops))],
            capture_output=True, text=True,
            env={**os.environ, "PERA_FAST_HOST_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [list(map(int, line.split())) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    "counts", [(784, 157, 157), (36, 7, 7), (36, 7, 0), (2, 1, 0), (5, 3, 1), (65, 1, 63), (4096, 819, 819)]
)
def test_cuda_kernel_on_the_cpu_equals_reference(order, counts, masks_on_host):
    seed, step, crops = 2**64 - 3, 2**32 - 1, [0, 1, 2**40 + 5]
    expected = torch.cat(disjoint_masks_reference(torch.tensor(crops), seed, step, *counts), dim=1)
    assert masks_on_host(order, seed, step, counts, crops) == expected.tolist()


def test_cuda_kernel_on_the_cpu_at_its_largest(masks_on_host):
    counts = (8192, 1638, 1638)
    expected = torch.cat(disjoint_masks_reference(torch.tensor([3]), 1, 2, *counts), dim=1)
    assert masks_on_host("forward", 1, 2, counts, [3]) == expected.tolist()
