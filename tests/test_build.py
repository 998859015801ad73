"""The build: what is installed loads, the backend asks for torch only when needed, CUDA sources are sound."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import DRAWN
from hypothesis import given
from hypothesis import strategies as st

from pera_fast import ops
from pera_fast.ops import _library
from pera_fast.reference import HUE, PIXEL_DTYPES, philox4x32_10
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


def test_nvcc_and_its_host_compiler_are_found(tmp_path, monkeypatch):
    for name in ("home/bin", "path"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "path/nvcc").touch(mode=0o755)
    functions = setup_functions(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert functions.find_nvcc() == str(tmp_path / "path/nvcc"), "a home without one"
    (tmp_path / "home/bin/nvcc").touch(mode=0o755)
    assert functions.find_nvcc() == str(tmp_path / "home/bin/nvcc")
    for compiler, program in (
        ("g++", "g++"),
        ("ccache /usr/bin/g++ -m64", "/usr/bin/g++"),
        ("clang++ -v", "clang++"),
    ):
        assert functions.program_of(compiler) == program


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


def quick_compiler(folder: Path) -> Path:
    """The C++ compiler without optimisation, where a library is only to be there."""
    script = folder / "quick-c++"
    script.write_text('#!/usr/bin/env bash\nexec c++ "${@/#-O3/-O0}"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Compiled files that builds of this module share."""
    return tmp_path_factory.mktemp("objects")


@pytest.mark.parametrize("require", [False, True])
def test_failed_cuda_build_keeps_the_cpu_library(require, tmp_path, objects):
    """With an nvcc that fails, the build warns and goes on, unless CUDA is required."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal error: broken toolkit'\nexit 1\n")
    nvcc.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"),
         "-t", str(objects)],
        cwd=ROOT, capture_output=True, text=True,
        env={
            **os.environ, "CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0",
            "PERA_FAST_REQUIRE_CUDA": str(int(require)), "PERA_FAST_BUILD_CUDA": "1",
            "CXX": str(quick_compiler(objects)),
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
def on_host(tmp_path_factory):
    """A function that runs csrc/cuda/<op>.cu, compiled for the CPU under the address sanitizer."""
    compiler = shutil.which("g++")
    if compiler is None or not sanitizer_works(compiler):
        pytest.skip("g++ with its address sanitizer is not installed")
    folder = tmp_path_factory.mktemp("host")

    @functools.cache
    def build(op: str) -> Path:
        subprocess.run(
            [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
             "-Wall", "-Werror", "-x", "c++", str(ROOT / f"csrc/testing/{op}_main.cpp"),
             str(ROOT / f"csrc/cuda/{op}.cu"), "-o", str(folder / op)],
            check=True,
        )  # fmt: skip
        return folder / op

    def run(op: str, order: str, *arguments: object, stdin: bytes = b"") -> bytes:
        done = subprocess.run(
            [str(build(op)), *map(str, arguments)], input=stdin, capture_output=True,
            env={**os.environ, "PERA_FAST_HOST_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return run


def masks_on_host(on_host, order: str, seed: int, step: int, counts: tuple[int, ...], crops: list[int]):
    text = on_host("disjoint_masks", order, seed, step, *counts, *crops).decode()
    return [list(map(int, line.split())) for line in text.splitlines()]


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    "counts", [(784, 157, 157), (36, 7, 7), (36, 7, 0), (2, 1, 0), (5, 3, 1), (65, 1, 63), (4096, 819, 819)]
)
def test_disjoint_masks_on_the_host_equal_the_reference(order, counts, on_host):
    seed, step, crops = 2**64 - 3, 2**32 - 1, [0, 1, 2**40 + 5]
    expected = torch.cat(disjoint_masks_reference(torch.tensor(crops), seed, step, *counts), dim=1)
    assert masks_on_host(on_host, order, seed, step, counts, crops) == expected.tolist()


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    "counts", [(8192, 1638, 1638), (8193, 1, 0), (8195, 1638, 1638), (13248, 9273, 0), (40001, 7, 39993)]
)
def test_disjoint_masks_on_the_host_past_what_is_sorted(order, counts, on_host):
    expected = torch.cat(disjoint_masks_reference(torch.tensor([3, 2**40]), 1, 2, *counts), dim=1)
    assert masks_on_host(on_host, order, 1, 2, counts, [3, 2**40]) == expected.tolist()


def test_disjoint_masks_on_the_host_part_equal_keys_by_patch(on_host):
    """Of 2^18 patches some have one key: the students end, and the targets, between two of those."""
    crop, num_patches = torch.tensor([0]), 2**18
    zero = torch.zeros(num_patches // 4, dtype=torch.int64)
    words = torch.stack(philox4x32_10([torch.arange(num_patches // 4), zero, zero, zero], (0, 0)), 1)
    equal = (words.flatten().sort().values.diff() == 0).nonzero().flatten().tolist()
    counts = (num_patches, equal[0] + 1, equal[-1] - equal[0])
    expected = torch.cat(disjoint_masks_reference(crop, 0, 0, *counts), dim=1)
    assert len(equal) > 1 and masks_on_host(on_host, "forward", 0, 0, counts, [0]) == expected.tolist()


ROW_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # as in csrc/crop_patches.h


class PatchesCall(NamedTuple):
    """Arguments of torch.ops.pera_fast.crop_patches, before the outputs."""

    images: ops.SourceImages
    table: ops.CropTable
    patches: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    mean: torch.Tensor
    std: torch.Tensor
    crop_px: int
    patch_px: int
    exact: bool

    def new_rows(self, leading: tuple[int, int, int], types: list[torch.dtype]) -> list[torch.Tensor]:
        row = len(self.mean) * self.patch_px**2
        return [
            torch.full((len(self.table.image), zeros + chosen.shape[1], row), float("nan"), dtype=dtype)
            for zeros, chosen, dtype in zip(leading, self.patches, types, strict=True)
        ]

    def on_cpu(self, leading: tuple[int, int, int], types: list[torch.dtype]) -> list[torch.Tensor]:
        rows = self.new_rows(leading, types)
        tensors = (*self.images, *self.table, *self.patches, self.mean, self.std)
        torch.ops.pera_fast.crop_patches(*tensors, self.crop_px, self.patch_px, self.exact, *rows)
        return rows

    def on_host(
        self, run, order: str, leading: tuple[int, int, int], types: list[torch.dtype]
    ) -> list[torch.Tensor]:
        images = self.images
        last_bytes = int(images.shapes[-1].prod()) * PIXEL_DTYPES[images.dtypes[-1]].itemsize
        # Up to the last pixel, so that the sanitizer sees a read past it.
        images = images._replace(buffer=images.buffer[: int(images.offsets[-1]) + last_bytes])
        sizes = [
            *images.low.shape, len(self.table.image), self.crop_px, self.patch_px, self.exact,
            len(images.buffer),
        ]  # fmt: skip
        for zeros, chosen, dtype in zip(leading, self.patches, types, strict=True):
            sizes += [chosen.shape[1], zeros, ROW_TYPES.index(dtype)]
        tensors = (torch.tensor(sizes), *images, *self.table, self.mean, self.std, *self.patches)
        output = run("crop_patches", order, stdin=b"".join(t.numpy().tobytes() for t in tensors))
        rows = self.new_rows(leading, types)
        parts = torch.from_numpy(np.frombuffer(output, np.uint8).copy()).split([to.nbytes for to in rows])
        for to, part in zip(rows, parts, strict=True):
            to.view(torch.uint8).flatten().copy_(part)
        return rows

    @staticmethod
    def draw(
        seed: int, crop_px: int, patch_px: int, bands: int, exact: bool, sources: list[str],
        boxes: list[list[int] | None], counts: tuple[int, int, int],
    ) -> PatchesCall:  # fmt: skip
        """sources: "dtype height width" each. boxes: of crops of images 0, 1, … in turn; None is the whole."""
        generator = torch.Generator().manual_seed(seed)

        def draw_images() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
            drawn, low, high = [], [], []
            for source in sources:
                dtype, height, width = source.split()
                noise = torch.rand(bands, int(height), int(width), generator=generator)
                pixels, bottom, top = {
                    "uint8": ((noise * 255.99).to(torch.uint8), 0.0, 255.0),
                    "uint8s": ((noise * 255.99).to(torch.uint8), 13.0, 190.0),
                    "uint16": ((noise * 40000).int().to(torch.uint16), 1000.0, 36000.0),
                    "float32": (noise * 3 - 1, -0.8, 1.9),
                }[dtype]
                if dtype == "float32":
                    pixels[..., 0] = float("nan")
                drawn.append(pixels)
                low.append(bottom)
                high.append(top)
            spread = torch.rand(len(sources), bands, generator=generator) * 0.01
            levels = torch.tensor([source.split()[0] == "uint8" for source in sources])[:, None]
            spread = torch.where(levels, 0.0, spread)
            return drawn, torch.tensor(low)[:, None] - spread, torch.tensor(high)[:, None] + spread

        images = ops.pack_images(*draw_images())
        n = len(boxes)
        image = torch.arange(n) % len(sources)
        whole = torch.tensor([[0, 0, *images.shapes[i, 1:].tolist()] for i in image])
        box = torch.stack([whole[i] if b is None else torch.tensor(b) for i, b in enumerate(boxes)])
        orders = torch.stack([torch.randperm(4, generator=generator) for _ in range(2 * n)]).view(n, 2, 4)
        kept = torch.randint(0, 6, (n, 2, 1), generator=generator).clamp(max=4)
        factor = torch.rand(n, 2, 4, generator=generator) * 1.6 + 0.2
        factor[..., HUE] = torch.rand(n, 2, generator=generator) * 2 - 1
        table = ops.CropTable(
            image=image,
            box=box,
            flip=torch.rand(n, 2, generator=generator) < 0.5,
            factor=factor,
            order=torch.where(torch.arange(4) < kept, orders, -1),
            grey=torch.rand(n, 2, generator=generator) < 0.15,
        )
        num_patches = (crop_px // patch_px) ** 2
        shuffled = torch.stack([torch.randperm(num_patches, generator=generator) for _ in range(n)])
        ends = torch.tensor(counts).cumsum(0).tolist()
        patches = tuple(
            shuffled[:, end - count : end].sort().values.contiguous()
            for end, count in zip(ends, counts, strict=True)
        )
        return PatchesCall(
            images, table, patches, torch.rand(bands, generator=generator),
            torch.rand(bands, generator=generator) + 0.2, crop_px, patch_px, exact,
        )  # fmt: skip


def assert_rows_agree(got: list[torch.Tensor], want: list[torch.Tensor], exact: bool) -> None:
    for on_host, on_cpu in zip(got, want, strict=True):
        if exact:
            assert torch.equal(on_host, on_cpu)
        else:
            step = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[on_cpu.dtype]
            torch.testing.assert_close(on_host.float(), on_cpu.float(), rtol=step, atol=1e-5)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "crop_px, patch_px, bands, sources, boxes, counts",
    [
        # Images of all types and sizes in one buffer.
        (32, 8, 3, ["uint8 40 53", "uint16 31 64", "float32 70 33", "uint8s 9 9"],
         [None, None, [3, 1, 60, 32], [2, 1, 6, 5], [10, 20, 25, 33]], (3, 3, 10)),
        # Boxes so much higher than wide that the vertical pass comes first, and the first one that is not.
        (32, 16, 3, ["uint8 150 100", "uint16 400 33"],
         [None, [1, 2, 399, 20], [0, 5, 150, 77], [20, 7, 100, 9], [0, 3, 150, 91]], (1, 1, 2)),
        # More tiles than blocks that share a sum.
        (96, 16, 3, ["uint8 120 90"], [None, None], (1, 2, 3)),
        # Other sizes of patches, larger ones than a tile too.
        (32, 4, 3, ["uint8 20 30"], [None], (12, 12, 40)),
        (28, 14, 3, ["uint8 30 45"], [[2, 5, 25, 33], [0, 0, 28, 28]], (1, 0, 3)),
        (64, 32, 3, ["uint8 90 70"], [None], (1, 1, 2)),
        (34, 17, 1, ["uint16 90 70"], [None], (1, 1, 2)),
        (9, 1, 3, ["uint8 12 8"], [None], (9, 5, 60)),
        # Other numbers of bands.
        (32, 16, 1, ["uint8 40 53"], [None, [0, 0, 13, 50]], (1, 1, 2)),
        (16, 8, 2, ["float32 21 17", "uint8 50 9"], [None, None], (1, 1, 2)),
        (32, 16, 6, ["uint16 37 41"], [None], (1, 1, 1)),
        # Single pixels, single rows and columns, boxes smaller than a patch.
        (16, 8, 3, ["uint8 1 1", "uint8 1 500", "uint8 500 1", "uint8 90 80"],
         [None, None, None, [89, 79, 1, 1], [0, 7, 1, 3], [0, 100, 1, 37]], (1, 1, 2)),
        # Ten and sixty source pixels to one: more taps and lines than one round takes.
        (16, 16, 3, ["uint8 160 155"], [None], (1, 0, 0)),
        (8, 8, 1, ["uint8 490 310", "uint16 300 480"], [None, None], (1, 0, 0)),
        (4, 4, 3, ["float32 250 40"], [None], (1, 0, 0)),
    ],
)  # fmt: skip
def test_crop_patches_on_the_host_equal_those_of_the_cpu(
    crop_px, patch_px, bands, sources, boxes, counts, exact, order, on_host
):
    assert _library.why_no_cpp() is None
    call = PatchesCall.draw(len(boxes) + bands, crop_px, patch_px, bands, exact, sources, boxes, counts)
    leading = (1, 0, 1) if len(boxes) % 2 else (0, 0, 0)
    types = [ROW_TYPES[(crop_px + i) % 3] for i in range(3)]
    assert_rows_agree(call.on_host(on_host, order, leading, types), call.on_cpu(leading, types), exact)


@DRAWN
@given(data=st.data())
def test_disjoint_masks_on_the_host_at_any_size(on_host, data):
    patches = data.draw(st.integers(2, 2000), "patches")
    student = data.draw(st.integers(1, patches - 1), "student")
    target = data.draw(st.integers(0, patches - 1 - student), "target")
    crops = data.draw(st.lists(st.integers(0, 2**62), min_size=1, max_size=3), "crops")
    seed, step = data.draw(st.integers(0, 2**64 - 1), "seed"), data.draw(st.integers(0, 2**32 - 1), "step")
    counts = (patches, student, target)
    expected = torch.cat(disjoint_masks_reference(torch.tensor(crops), seed, step, *counts), dim=1)
    assert masks_on_host(on_host, "forward", seed, step, counts, crops) == expected.tolist()


@DRAWN
@given(data=st.data())
def test_crop_patches_on_the_host_of_any_shape(on_host, data):
    bands, patch_px, grid = (
        data.draw(st.integers(1, top), name) for top, name in ((4, "bands"), (9, "patch"), (4, "grid"))
    )
    kinds = st.sampled_from(["uint8", "uint8s", "uint16", "float32"])
    sides = st.integers(1, 50)
    drawn = data.draw(st.lists(st.tuples(kinds, sides, sides), min_size=1, max_size=3), "sources")
    boxes = []
    for crop in range(data.draw(st.integers(1, 2), "crops")):
        _, height, width = drawn[crop % len(drawn)]
        h, w = data.draw(st.integers(1, height), "box height"), data.draw(st.integers(1, width), "box width")
        boxes.append(
            [data.draw(st.integers(0, height - h), "top"), data.draw(st.integers(0, width - w), "left"), h, w]
        )
    student = data.draw(st.integers(1, grid * grid), "student")
    target = data.draw(st.integers(0, grid * grid - student), "target")
    counts = student, target, grid * grid - student - target
    leading = (data.draw(st.integers(0, 2), "leading"), 0, data.draw(st.integers(0, 2), "leading"))
    types = [data.draw(st.sampled_from(ROW_TYPES), "rows") for _ in range(3)]
    exact = data.draw(st.booleans(), "exact")
    sources = [f"{kind} {height} {width}" for kind, height, width in drawn]
    call = PatchesCall.draw(len(boxes), grid * patch_px, patch_px, bands, exact, sources, boxes, counts)
    assert_rows_agree(call.on_host(on_host, "forward", leading, types), call.on_cpu(leading, types), exact)


# --- The ops over parameters: bit for bit the C++ library's results ---

# (numel, how many numbers behind an aligned address): tails, odd addresses, several chunks, none.
PARAMETERS = [(1, 0), (7, 0), (4096, 0), (4097, 0), (9001, 1), (1030, 2), (64, 3), (0, 0)]
SHAPES = st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 3)), min_size=1, max_size=8)
BYTES = {torch.float32: 4, torch.bfloat16: 2}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def packed(kind: str, *numbers: float) -> bytes:
    return struct.pack(f"={len(numbers)}{kind}", *numbers)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("param", BYTES)
@pytest.mark.parametrize("grad", BYTES)
@pytest.mark.parametrize("copies", [0, 6])  # more tensors than fit a launch
@pytest.mark.parametrize("norm", [2.0, 7.0, float("nan")])
def test_adamw_ema_on_the_host_equals_the_cpu(order, param, grad, copies, norm, on_host):
    check_adamw_ema(on_host, order, param, grad, norm, PARAMETERS + [(5, 0)] * (copies * 10))


@DRAWN
@given(shapes=SHAPES, param=st.sampled_from(list(BYTES)), grad=st.sampled_from(list(BYTES)))
def test_adamw_ema_on_the_host_of_any_shape(on_host, shapes, param, grad):
    check_adamw_ema(on_host, "forward", param, grad, 2.0, shapes)


def check_adamw_ema(run, order, param, grad, norm, shapes):
    random = torch.Generator().manual_seed(0)
    options = (1e-3, 0.1, 0.99, 0.9, 0.999, 1e-8, 3.0)  # lr, weight decay, momentum, betas, eps, clip norm
    stdin = packed("q", len(shapes)) + packed("d", *options) + packed("f", norm)
    lists: list[list[torch.Tensor]] = [[] for _ in range(8)]
    for i, (numel, shift) in enumerate(shapes):
        teacher = (None, torch.float32, torch.bfloat16)[i % 3]
        with_shadow = i % 2 == 1

        def drawn(dtype, numel=numel):
            return torch.randn(numel, generator=random).to(dtype)

        nothing = torch.empty(0)
        step = torch.tensor(float(i))
        p, g, m, v = drawn(param), drawn(grad), drawn(param), drawn(param).abs()
        t = nothing if teacher is None else drawn(teacher)
        low = torch.empty(numel, dtype=torch.bfloat16) if with_shadow else nothing
        teacher_low = torch.empty_like(low) if with_shadow and teacher is not None else nothing
        stdin += packed("q", numel, shift, BYTES[param], BYTES[grad], BYTES.get(teacher, 0), with_shadow)
        stdin += b"".join(map(raw, (p, g, m, v, step, t)))
        for one, tensor in zip(lists, (p, g, m, v, step, t, low, teacher_low), strict=True):
            one.append(tensor)
    result = run("adamw_ema", order, stdin=stdin)
    skipped = torch.zeros((), dtype=torch.bool)
    torch.ops.pera_fast.adamw_ema(
        *lists, torch.tensor(options[:3], dtype=torch.float64), torch.tensor(norm), *options[3:], skipped
    )
    assert result[0] == skipped == math.isnan(norm)
    if skipped:  # nothing is written, not even to the new copies
        return
    expected = b"".join(
        raw(tensor) for p, _, *rest in zip(*lists, strict=True) for tensor in (p, *rest) if tensor.numel()
    )
    assert result[1:] == expected


def check_ema_update(run, order, teacher, param, shapes):
    random = torch.Generator().manual_seed(0)
    stdin, teachers, params, shadows = packed("q", len(shapes)) + packed("d", 0.99), [], [], []
    for i, (numel, shift) in enumerate(shapes):
        teachers.append(torch.randn(numel, generator=random).to(teacher))
        params.append(torch.randn(numel, generator=random).to(param))
        shadows.append(torch.empty(numel if i % 2 else 0, dtype=torch.bfloat16))
        stdin += (
            packed("q", numel, shift, BYTES[teacher], BYTES[param], i % 2)
            + raw(teachers[-1])
            + raw(params[-1])
        )
    result = run("ema_update", order, stdin=stdin)
    torch.ops.pera_fast.ema_update(teachers, params, shadows, torch.tensor([0.99], dtype=torch.float64))
    assert result == b"".join(raw(x) for pair in zip(teachers, shadows, strict=True) for x in pair)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("teacher", BYTES)
@pytest.mark.parametrize("param", BYTES)
def test_ema_update_on_the_host_equals_the_cpu(order, teacher, param, on_host):
    check_ema_update(on_host, order, teacher, param, PARAMETERS + [(5, 0)] * 120)  # more than fit a launch


@DRAWN
@given(shapes=SHAPES, teacher=st.sampled_from(list(BYTES)), param=st.sampled_from(list(BYTES)))
def test_ema_update_on_the_host_of_any_shape(on_host, shapes, teacher, param):
    check_ema_update(on_host, "forward", teacher, param, shapes)


def check_grad_norm(run, order, shapes):
    random = torch.Generator().manual_seed(0)
    stdin, grads = packed("q", len(shapes)), []
    for i, (numel, shift) in enumerate(shapes):
        grads.append(torch.randn(numel, generator=random).to([torch.float32, torch.bfloat16][i % 2]))
        stdin += packed("q", numel, shift, BYTES[grads[-1].dtype]) + raw(grads[-1])
    (norm,) = struct.unpack("=f", run("grad_norm", order, stdin=stdin))
    assert norm == pytest.approx(float(torch.cat([g.double() for g in grads]).norm()), rel=1e-6)


@DRAWN
@given(shapes=SHAPES)
def test_grad_norm_on_the_host_of_any_shape(on_host, shapes):
    check_grad_norm(on_host, "forward", shapes)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_grad_norm_on_the_host(order, on_host):
    check_grad_norm(
        on_host, order, PARAMETERS + [(4096 * 300, 0)] + [(5, 0)] * 250
    )  # more partial sums than threads
    assert struct.unpack("=f", on_host("grad_norm", order, stdin=packed("q", 0))) == (0.0,)


def test_the_null_gpu_compiles() -> None:
    """Against the toolkit's own declarations; it runs where torch is a CUDA build (bench/null_gpu.py)."""
    built = _library.build_info() or {}
    toolkit = built.get("cuda", {}).get("toolkit")
    if not toolkit or not (Path(toolkit) / "include/cuda_runtime_api.h").is_file():
        pytest.skip("no CUDA toolkit")
    subprocess.run(
        [built["compiler"], "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{toolkit}/include",
         str(ROOT / "csrc/testing/null_gpu.cpp")], check=True,
    )  # fmt: skip
