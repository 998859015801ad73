"""Ahead-of-time compilation of Triton kernels, which the kernels' own tests build on."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from pera_fast.kernels import aot  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter compiles nothing"
)


@triton.jit
def scale_kernel(x, y, factor, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    tl.store(y + offsets, tl.load(x + offsets, inside) * factor, inside)


@triton.jit
def gram_kernel(x, y, n, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        tile = tl.load(x + (start + rows)[:, None] * BLOCK + rows[None, :])
        total += tl.dot(tl.trans(tile), tile)
    tl.store(y + rows[:, None] * BLOCK + rows[None, :], total)


SCALE_TYPES = {"x": "*bf16", "y": "*bf16", "factor": "fp32", "n": "i32"}


@pytest.mark.parametrize("capability", [80, 90])
def test_small_kernel_needs_few_registers_and_no_spills(capability):
    report = aot.compile_kernel(scale_kernel, SCALE_TYPES, {"BLOCK": 1024}, capability=capability)
    assert report.name == "scale_kernel"
    assert 0 < report.registers <= 64
    assert report.spill_bytes == 0
    assert report.shared_bytes == 0
    assert report.cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("capability", [80, 90])
def test_shared_memory_is_reported(capability):
    report = aot.compile_kernel(
        gram_kernel, {"x": "*bf16", "y": "*fp32", "n": "i32"}, {"BLOCK": 64}, capability=capability
    )
    assert 64 * 64 * 2 <= report.shared_bytes <= aot.SHARED_MEMORY_LIMIT[capability]
    assert report.spill_bytes == 0


def test_spills_are_reported():
    # 128 x 128 fp32 accumulators in one warp: 512 registers a thread where 255 exist.
    report = aot.compile_kernel(
        gram_kernel, {"x": "*bf16", "y": "*fp32", "n": "i32"}, {"BLOCK": 128}, num_warps=1, num_stages=1
    )
    assert report.spill_bytes > 0


def test_argument_names_are_checked():
    with pytest.raises(ValueError, match=r"missing \['n'\].*\['m'\]"):
        aot.compile_kernel(
            scale_kernel, {"x": "*bf16", "y": "*bf16", "factor": "fp32", "m": "i32"}, {"BLOCK": 64}
        )
    with pytest.raises(RuntimeError, match="triton.jit"):
        aot.compile_kernel(lambda x: x, {"x": "*fp32"})
