"""linear, forward and backward, against F.linear at a ViT-S block's shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import all_close, compare, near, needs_bfloat16, peak_flops
from torch import Tensor

from pera_fast import ops


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
@pytest.mark.parametrize(("features", "dim"), [(384, 1152), (384, 384), (1536, 384)])
def bench_linear(benchmark, features: int, dim: int, dtype: str) -> None:
    rows = 2784  # four images' student tokens
    torch.manual_seed(0)
    x, weight, bias, gradient = (
        torch.randn(shape).to(getattr(torch, dtype))
        for shape in ((rows, features), (dim, features), (dim,), (rows, dim))
    )
    for leaf in (x, weight, bias):
        leaf.requires_grad_()

    def run(function) -> list[Tensor]:  # type: ignore[no-untyped-def]
        out = function(x, weight, bias)
        return [out, *torch.autograd.grad(out, (x, weight, bias), gradient)]

    compare(
        benchmark, op="linear", peer="F.linear",
        ours=lambda: run(ops.linear), theirs=lambda: run(F.linear), pairs=15,
        same=near if dtype == "bfloat16" else all_close(1e-2),
        flops=6 * rows * features * dim, peak_flops=peak_flops(dtype), dtype=dtype,
        shape=f"{rows} rows, {features} to {dim}, fwd+bwd",
    )  # fmt: skip


@needs_bfloat16
@pytest.mark.parametrize(("features", "dim"), [(384, 1152), (384, 384), (384, 1536), (1536, 384)])
def bench_linear_forward(benchmark, features: int, dim: int) -> None:
    """The teacher's products, which need no gradient."""
    rows = 4504  # four images' teacher tokens
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((rows, features), (dim, features), (dim,)))
    compare(
        benchmark, op="linear", peer="F.linear",
        ours=lambda: ops.linear(x, weight, bias), theirs=lambda: F.linear(x, weight, bias), pairs=25,
        same=lambda a, b: near([a], [b]), flops=2 * rows * features * dim, peak_flops=peak_flops("bfloat16"),
        dtype="bfloat16", shape=f"{rows} rows, {features} to {dim}, forward",
    )  # fmt: skip
