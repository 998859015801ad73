"""linear in float32, forward and backward, against F.linear at a ViT-S block's shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench_distill_loss import peak_flops
from compare import all_close, compare
from torch import Tensor

from pera_fast import ops
from pera_fast.ops import _dispatch


@pytest.mark.parametrize(("features", "dim"), [(384, 1152), (384, 384), (1536, 384)])
def bench_linear(benchmark, features: int, dim: int) -> None:
    rows = 2784  # four images' student tokens
    torch.manual_seed(0)
    x, weight = (
        torch.randn(rows, features, requires_grad=True),
        torch.randn(dim, features, requires_grad=True),
    )
    bias, gradient = torch.randn(dim, requires_grad=True), torch.randn(rows, dim)

    def run(function) -> list[Tensor]:  # type: ignore[no-untyped-def]
        out = function(x, weight, bias)
        return [out, *torch.autograd.grad(out, (x, weight, bias), gradient)]

    compare(
        benchmark, op="linear", backend=_dispatch.resolve("linear", "cpu").backend, peer="F.linear",
        ours=lambda: run(ops.linear), theirs=lambda: run(F.linear), same=all_close(1e-2), pairs=9,
        flops=6 * rows * features * dim, peak_flops=peak_flops("float32"),
        shape=f"{rows} rows, {features} to {dim}, fwd+bwd",
    )  # fmt: skip
