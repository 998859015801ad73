"""residual_norm forward and backward against index_add, index_select and LayerNorm one after the other."""

import torch
import torch.nn.functional as F
from compare import all_close, compare

from pera_fast import ops
from pera_fast.ops import _dispatch


def bench_residual_norm(benchmark) -> None:
    torch.manual_seed(0)
    sequences, length, dim = 32, 158, 384
    x = torch.randn(sequences * length, dim, requires_grad=True)
    subsets = [torch.randperm(sequences)[: int(sequences * 0.7)] for _ in range(2)]
    rows, next_rows = ((s[:, None] * length + torch.arange(length)).flatten() for s in subsets)
    branch = torch.randn(len(rows), dim, requires_grad=True)
    scale = torch.full((len(rows),), sequences / len(subsets[0]))
    weight, bias = torch.ones(dim, requires_grad=True), torch.zeros(dim, requires_grad=True)
    inputs = (x, branch, weight, bias)

    def finish(stream: torch.Tensor, normed: torch.Tensor) -> list[torch.Tensor]:
        return [stream, normed, *torch.autograd.grad(stream.square().sum() + normed.pow(3).sum(), inputs)]

    def ours() -> list[torch.Tensor]:
        return finish(*ops.residual_norm(x, branch, rows, scale, next_rows, weight, bias))

    def theirs() -> list[torch.Tensor]:
        flat = x.view(sequences, -1)
        added = torch.index_add(
            flat, 0, subsets[0], branch.view(len(subsets[0]), -1), alpha=float(scale[0])
        ).view_as(x)
        chosen = torch.index_select(added.view(sequences, -1), 0, subsets[1]).view(-1, dim)
        return finish(added, F.layer_norm(chosen, (dim,), weight, bias, 1e-6))

    compare(
        benchmark, op="residual_norm", backend=_dispatch.resolve("residual_norm", "cpu").backend,
        peer="index_add, index_select, LayerNorm", ours=ours, theirs=theirs, same=all_close(1e-3),
        shape="32x158 rows of 384, 70 % subsets, fwd+bwd",
    )  # fmt: skip
