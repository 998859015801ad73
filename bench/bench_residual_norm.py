"""residual_norm forward and backward against index_add, index_select and LayerNorm one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import all_close, compare, near, needs_gpu
from torch import Tensor

from pera_fast import ops


def chain(
    x: Tensor,
    branch: Tensor,
    subsets: list[Tensor],
    sequences: int,
    alpha: float,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The usual way: whole sequences are added and chosen."""
    dim = x.shape[1]
    flat = x.view(sequences, -1)
    added = torch.index_add(
        flat, 0, subsets[0], branch.to(x.dtype).view(len(subsets[0]), -1), alpha=alpha
    ).view_as(x)
    chosen = torch.index_select(added.view(sequences, -1), 0, subsets[1]).view(-1, dim)
    return added, F.layer_norm(chosen, (dim,), weight, bias, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peer", ["index_add, index_select, LayerNorm", "the same, torch.compile"])
@pytest.mark.parametrize(
    ("sequences", "length", "dim", "device"),
    [
        (32, 158, 384, "cpu"),
        (8, 315, 384, "cpu"),
        (32, 315, 384, "cpu"),
        (128, 315, 384, "cpu"),
        (8, 315, 768, "cpu"),
        (8, 315, 1024, "cpu"),
        pytest.param(128, 158, 768, "cuda", marks=needs_gpu),
        pytest.param(128, 315, 768, "cuda", marks=needs_gpu),
    ],
)
def bench_residual_norm(
    benchmark, sequences: int, length: int, dim: int, device: str, peer: str, dtype: torch.dtype
) -> None:
    """dtype: of the branch and of the normalised rows; the stream is float32. Both keep x."""
    torch.manual_seed(0)
    with torch.device(device):
        x = torch.randn(sequences * length, dim, requires_grad=True)
        subsets = [torch.randperm(sequences)[: int(sequences * 0.7)] for _ in range(2)]
        rows, next_rows = ((s[:, None] * length + torch.arange(length)).flatten() for s in subsets)
        branch = torch.randn(len(rows), dim).to(dtype).requires_grad_()
        alpha = sequences / len(subsets[0])
        scale = torch.full((len(rows),), alpha)
        weight, bias = torch.ones(dim, requires_grad=True), torch.zeros(dim, requires_grad=True)
        inputs = (x, branch, weight, bias)
        gradients = torch.randn_like(x), torch.randn(len(next_rows), dim).to(dtype)
    usual: Callable[..., tuple[Tensor, Tensor]] = torch.compile(chain) if "compile" in peer else chain

    def finish(stream: Tensor, normed: Tensor) -> list[Tensor]:
        return [stream, normed, *torch.autograd.grad((stream, normed), inputs, gradients)]

    def ours() -> list[Tensor]:
        return finish(*ops.residual_norm(x, branch, rows, scale, next_rows, weight, bias, dtype=dtype))

    def theirs() -> list[Tensor]:
        added, normed = usual(x, branch, subsets, sequences, alpha, weight, bias)
        return finish(added, normed.to(dtype))

    compare(
        benchmark, op="residual_norm",
        device=device, peer=peer, ours=ours, theirs=theirs,
        same=all_close(1e-3) if dtype == torch.float32 else near, pairs=9,
        dtype=str(dtype).removeprefix("torch."),
        shape=f"{sequences}x{length} rows of {dim}, 70 % subsets, fwd+bwd",
    )  # fmt: skip
