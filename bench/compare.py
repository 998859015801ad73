"""Every benchmark's form: ours against a peer, outputs compared first, timed in interleaved pairs."""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pera_fast
from pera_fast.ops import _dispatch, _library

ROOT = Path(__file__).parent.parent
# Elsewhere torch's products of bfloat16 take a hundred times as long as those of float32.
HAS_BFLOAT16 = _library.why_no_cpp() is not None or torch.ops.pera_fast.has_bfloat16()
NO_BFLOAT16 = "this processor has no bfloat16 instructions"
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason=NO_BFLOAT16)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
_HEAD_START = 2_000_000  # GPU cycles, about a millisecond, in which the host launches what is timed
# Set before the process starts, it lasts; both sides run under it.
_MALLOC = ", page-fault-free malloc" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else ""
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def compare(
    benchmark: Any,
    *,
    op: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    shape: str,
    backend: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    same: Callable[[Any, Any], None] | None = None,
    pairs: int = 7,
    peak: int | None = None,
    **more: object,
) -> float:
    """Measure `ours` against `theirs`; returns ratio_vs_peer, the median of their times' ratios (> 1: ours faster).

    backend: None for the one that the op takes on the device.
    same: raises when the two outputs differ; None only where the peer draws its own random numbers.
    peak: our peak_bytes, where they were measured before.
    Fills benchmark.extra_info, and keeps it so that it is not lost where a later benchmark hangs. The plugin's own
    columns are ours alone.
    """
    first, second = ours(), theirs()
    if same is not None:
        same(first, second)
    del first, second
    if device == "cuda":
        _warm_up(ours, theirs)
    times = []
    for _ in range(pairs):
        times.append((seconds_of(ours, device), seconds_of(theirs, device)))
    ratios = sorted(t / o for o, t in times)
    benchmark.extra_info.update(
        op=op,
        backend=backend or _dispatch.resolve(op, device).backend,
        device=device_name(device),
        dtype=dtype,
        shape=shape + _MALLOC,
        peer=peer,
        ratio_vs_peer=statistics.median(ratios),
        ratio_spread=[ratios[0], ratios[-1]],
        ours_ms=1e3 * statistics.median(o for o, _ in times),
        peer_ms=1e3 * statistics.median(t for _, t in times),
        ours_stddev_ms=1e3 * statistics.pstdev(o for o, _ in times),
        peak_bytes=peak_bytes(ours, device) if peak is None else peak,
        peer_peak_bytes=peak_bytes(theirs, device),
        versions=versions(),
        commit=commit(),
        **more,
    )
    keep(benchmark)
    benchmark.pedantic(lambda: (ours(), _wait(device)), rounds=3)
    return benchmark.extra_info["ratio_vs_peer"]


def keep(benchmark: Any) -> None:
    """Add what is known to the file that $BENCH_ROWS names; of two lines of a benchmark the later one counts."""
    if path := os.environ.get("BENCH_ROWS"):
        row = {"benchmark": benchmark.name, "date": f"{date.today():%Y-%m-%d}", **benchmark.extra_info}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def near(a: list[Tensor], b: list[Tensor]) -> None:
    """For bfloat16: every tensor to a tenth of its norm."""
    for x, y in zip(a, b, strict=True):
        assert (x.float() - y.float()).norm() <= 0.1 * y.float().norm() + 1e-6


def all_close(tolerance: float) -> Callable[[Any, Any], None]:
    """A `same` for tensors or sequences of them: relative and absolute tolerance."""

    def check(a: Any, b: Any) -> None:
        pairs = zip(*([x] if isinstance(x, Tensor) else list(x) for x in (a, b)), strict=True)
        for x, y in pairs:
            torch.testing.assert_close(
                x.detach(), y.detach(), rtol=tolerance, atol=tolerance, check_dtype=False
            )

    return check


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """Of one call. On a GPU from its first kernel's start to its last one's end: in training the host is ahead."""
    _wait(device)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        start.record()
        result = function()
        end.record()
        _wait(device)
        del result
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - begun
    del result
    return elapsed


@functools.cache
def peak_flops(precision: str, device: str = "cpu") -> float:
    """Best rate of a large square product in this process, per second."""
    if device == "cuda":
        b = torch.randn(8192, 8192, dtype=getattr(torch, precision), device=device)
        return 2 * 8192**3 / min(seconds_of(lambda: b @ b, device) for _ in range(10))
    a = torch.randn(2048, 2048, dtype=getattr(torch, precision))
    pixels, kernel = a.view(1, 2048, 1, 2048).permute(0, 3, 1, 2), a[:, :, None, None]
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        # The quicker library for each: oneDNN, which takes float32 as a convolution of one pixel.
        F.conv2d(pixels, kernel) if precision == "float32" else a @ a.T
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def _warm_up(*functions: Callable[[], Any]) -> None:
    """Until the GPU's clock has risen and what chooses by trying has chosen."""
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        for function in functions:
            function()
            _wait("cuda")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Most bytes that torch had allocated at once during a call, beyond those before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(0, int(np.cumsum(changes).max())) if changes else 0


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its core count."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = dict(line.split(":", 1) for line in reversed(_lines("/proc/cpuinfo")) if ":" in line)
    known = {name.strip(): value.strip() for name, value in facts.items()}
    name = known.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in known:  # the name may leave the processor's generation open, as cloud machines' do
        name += f" {known['cpu family']}/{known['model']}"
    return f"{name} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return {
        "pera_fast": pera_fast.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        **({"cudnn": str(torch.backends.cudnn.version())} if torch.version.cuda else {}),
    }


def commit() -> str:
    """Short hash of the checkout, with "+" when files differ from it."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True
            ).stdout.strip()
        except OSError:
            return "unknown"  # no git here

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def _lines(path: str) -> Sequence[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
