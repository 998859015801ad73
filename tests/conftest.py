"""What several tests share."""

from __future__ import annotations

import logging
import os
import runpy
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from pera_fast.config import PRESETS, Config, CropConfig, ModelConfig, OptimConfig
from pera_fast.distributed import World
from pera_fast.ops import _library

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
ONE = World(0, 1, torch.device("cpu"))
EXAMPLES = int(os.environ.get("PERA_FAST_EXAMPLES", 12))
DRAWN = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
needs_cuda = pytest.mark.skipif(_library.why_no_cuda() is not None, reason=f"cuda: {_library.why_no_cuda()}")


def shared_file(name: str) -> Path:
    """A file that is too large for the repository; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout")
    return path


def tiny_config(**run: object) -> Config:
    """A config whose step takes milliseconds; in float32 without drop path, so that runs can be compared."""
    config = Config(
        model=ModelConfig(
            embed_dim=32, depth=2, num_heads=2, patch_px=8, drop_path=0.0, head_hidden_dim=32,
            head_bottleneck_dim=16, num_prototypes=64,
        ),
        crops=CropConfig(global_px=40, local_px=24, num_local=2),
        data=replace(PRESETS["demo"].data, workers=0, window_px=64),
        optim=OptimConfig(warmup_epochs=1, teacher_temperature_warmup_epochs=2),
    )  # fmt: skip
    defaults: dict[str, object] = {"precision": "fp32", "device": "cpu", "batch_size": 4, "epochs": 4}
    return replace(config, run=replace(config.run, **{**defaults, **run}))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve small RGB images."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        low = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(low).resize((72, 64)).save(folder / f"{i:02d}.png")
    return folder


def run_module(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m …` in a fresh process on one thread per library."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def run_here(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m …` in this process, on one thread: a fresh one takes seconds to import torch."""
    from pera_fast import run as run_of_training  # not for tests of ops alone

    out, err, code, log = StringIO(), StringIO(), None, logging.getLogger("pera_fast")
    kept, threads = (log.handlers[:], log.propagate, log.level), torch.get_num_threads()
    log.handlers.clear()
    torch.set_num_threads(1)
    with (
        redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(),
        patch.object(sys, "argv", [module, *map(str, arguments)]),
        patch.object(run_of_training, "_keep_freed_memory", lambda: None),  # it would outlast the test
    ):  # fmt: skip
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that is imported already
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code
        finally:
            log.handlers[:], log.propagate, log.level = kept
            torch.set_num_threads(threads)
    assert code is None or isinstance(code, int)
    return subprocess.CompletedProcess([module, *arguments], code or 0, out.getvalue(), err.getvalue())


def python_path(folder: Path = ROOT / "tests") -> str:
    """PYTHONPATH of a process that imports from the folder, too."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def start_ranks(
    ranks: int, *command: object, per_node: int | None = None, **options: Any
) -> list[subprocess.Popen[Any]]:
    """A Python process with the arguments for each rank; per_node: of this many ranks. options: Popen's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(per_node or ranks), "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank % (per_node or ranks))}, **options,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def several_ranks(file: str, ranks: int, *arguments: object, per_node: int | None = None) -> None:
    """Run a test file's `__main__` with the arguments on each rank; per_node: of this many ranks."""
    processes = start_ranks(ranks, file, *arguments, per_node=per_node)
    try:
        assert [p.wait(timeout=200) for p in processes] == [0] * ranks
    finally:
        for p in processes:
            p.kill()


def interpreted(code: str, *arguments: str, **environment: str) -> str:
    """What code prints whose Triton kernels run in the interpreter, in a process of its own."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    source = (Path(triton.__file__).parent / "runtime/interpreter.py").read_text()
    if "int(self.handle.data)" in source and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs NumPy < 2.4, got {np.__version__}")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=280,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": python_path(), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.strip()


def three_way(
    function: Callable[..., torch.Tensor] | dict[str, Callable[..., torch.Tensor]],
    eager: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
    slack: float,
    floor: float = 0.0,
    exact: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """error(function vs float64) <= error(eager in the same dtype vs float64) + slack, outputs and gradients.

    function: one, or several by their names, with one eager computation between them. Errors are shares of a tensor's
    norm, or of `floor` where that is larger: what is all but 0 is a difference of larger numbers. Returns what
    float64 gave, which a later call on the same inputs may take as `exact`.
    """
    functions = function if isinstance(function, dict) else {"": function}
    if exact is None:
        exact = _outputs_and_gradients(eager, [x.double() for x in inputs])

    def errors(f: Callable[..., torch.Tensor]) -> list[float]:
        got = _outputs_and_gradients(f, list(inputs))
        return [
            (a.double() - b).norm().item() / (max(b.norm().item(), floor) or 1)
            for a, b in zip(got, exact, strict=True)
        ]

    of_eager = errors(eager)
    for name, f in functions.items():
        for ours, theirs in zip(errors(f), of_eager, strict=True):
            assert ours <= theirs + slack, f"{name} error {ours:.3g} against {theirs:.3g} of eager PyTorch"
    return exact


def _outputs_and_gradients(f: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = f(*leaves)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def run_on_isa(capability: str, code: str) -> None:
    """Run `code` with tests/ on its path and sys.argv[1:] = [capability] on a lower instruction set."""
    if torch.ops.pera_fast.isa() < ["baseline", "avx2", "avx512"].index(capability):
        pytest.skip(f"this processor has no {capability}")
    environment = {
        **os.environ,
        "PERA_FAST_CPU_CAPABILITY": capability,
        "PYTHONPATH": python_path(),
    }
    run = subprocess.run(
        [sys.executable, "-c", code, capability], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
