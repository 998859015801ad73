"""The C++ library, compiled with a sanitizer, under the shapes of test_shapes.py: no access outside, no race."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from pera_fast.ops import _library

BUILT = _library.build_info()
# Findings end the process. Python and torch are not compiled with the sanitizer: leaks are theirs, and what they do
# to memory between two of our calls is not seen.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=99:report_signal_unsafe=0",
}
SHAPES = """
import sys
import pytest
sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-o", "timeout=0", "-k", "cpp and any_shape", sys.argv[1]]))
"""
OUTSIDE = """
import torch
from pera_fast import ops
from test_crop_patches import table
images = ops.pack_images([torch.zeros(3, 8, 8, dtype=torch.uint8)])
masks = ops.disjoint_masks(torch.tensor([0]), seed=0, step=0, num_patches=4, num_student=1, num_target=1)
ops.crop_patches(images, table([[0, 0, 900, 8]]), *masks, crop_px=16, patch_px=8, mean=torch.zeros(3),
                 std=torch.ones(3), check_values=False)
"""
RACE = """
import threading
import torch
from pera_fast import ops
teachers, params = [torch.zeros(2_000_000)], [torch.ones(2_000_000)]
both = [threading.Thread(target=lambda: [ops.ema_update(teachers, params, 0.9) for _ in range(20)]) for _ in range(2)]
for one in both: one.start()
for one in both: one.join()
"""


def runtime(compiler: str, name: str) -> str:
    """The compiler's own shared library of this name; empty when it has none."""
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    return os.path.realpath(found) if "/" in found and Path(found).exists() else ""


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(kind, a function that runs Python code with the library compiled that way)."""
    kind = request.param
    compiler = shutil.which("g++")
    if compiler is None or BUILT is None:
        pytest.skip("g++ is not installed" if compiler is None else "library not built")
    library = runtime(compiler, "libasan.so" if kind.startswith("address") else "libtsan.so")
    if not library:
        pytest.skip(f"g++ has no {kind} sanitizer")
    folder = tmp_path_factory.mktemp("sanitized")
    package = folder / "pera_fast"
    shutil.copytree(ROOT / "pera_fast", package, ignore=shutil.ignore_patterns("*.so", "demo", "__pycache__"))
    torch_root = Path(torch.__file__).parent
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    if kind == "thread":
        sources.append(ROOT / "csrc/testing/threads.cpp")
    target = re.search(r'^TORCH_TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    command = [
        compiler, *BUILT["cpu_flags"], "-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={kind}",
        "-fno-sanitize-recover=all", f"-DTORCH_TARGET_VERSION={target}", f"-isystem{torch_root / 'include'}",
    ]  # fmt: skip

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
    link = [
        "-shared",
        "-Wl,-Bsymbolic",
        f"-fsanitize={kind}",
        f"-L{torch_root / 'lib'}",
        "-Wl,--no-as-needed",
    ]
    subprocess.run(
        [compiler, *link, *objects, "-ltorch", "-ltorch_cpu", "-o", str(package / "_C.so")], check=True
    )

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ, **OPTIONS, "LD_PRELOAD": f"{library} {runtime(compiler, 'libstdc++.so')}",
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'tests'}", "PERA_FAST_EXAMPLES": "5", "OMP_NUM_THREADS": "3",
        }  # fmt: skip
        found = (
            f"import pera_fast\nassert pera_fast.__file__.startswith({str(folder)!r}), pera_fast.__file__\n"
        )
        return subprocess.run(
            [sys.executable, "-c", found + code, *map(str, arguments)], capture_output=True, text=True,
            env=environment, timeout=280, cwd=folder,
        )  # fmt: skip

    return kind, run


def test_no_finding_in_any_shape(sanitized) -> None:  # type: ignore[no-untyped-def]
    done = sanitized[1](SHAPES, ROOT / "tests/test_shapes.py")
    said = done.stdout + done.stderr
    assert done.returncode == 0, (
        "\n".join(x for x in said.splitlines() if "csrc" in x or "rror" in x) or said[-4000:]
    )
    assert " passed" in done.stdout


def test_what_is_wrong_is_found(sanitized) -> None:  # type: ignore[no-untyped-def]
    kind, run = sanitized
    done = run(RACE if kind == "thread" else OUTSIDE)
    words = "data race" if kind == "thread" else "heap-buffer-overflow"
    assert done.returncode != 0 and words in done.stderr, done.stderr[-4000:]
