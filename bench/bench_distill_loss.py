"""distill_loss forward and backward against materialised logits with weight norm per call."""

import pytest
import torch
import torch.nn.functional as F
from compare import all_close, compare

from pera_fast import ops
from pera_fast.ops import _dispatch


@pytest.mark.parametrize("prototypes", [16384])
def bench_distill_loss(benchmark, prototypes: int) -> None:
    torch.manual_seed(0)
    images, crops, dim = 8, 10, 384
    z = [F.normalize(torch.randn(images * crops, dim), dim=-1) for _ in range(2)]
    v = [torch.randn(prototypes, dim) for _ in range(2)]
    g = [torch.ones(prototypes, 1) for _ in range(2)]
    centre = torch.zeros(prototypes)
    leaves = [z[0].requires_grad_(), v[0].requires_grad_(), g[0].requires_grad_()]

    def ours() -> list[torch.Tensor]:
        losses = ops.distill_loss(z[0], z[1], (v[0], g[0]), (v[1], g[1]), centre, 0.1, 0.04, [images] * crops)
        return [losses, *torch.autograd.grad(losses.mean(), leaves)]

    def theirs() -> list[torch.Tensor]:
        def logits(side: int) -> torch.Tensor:
            weight = g[side] * v[side] / v[side].norm(2, dim=1, keepdim=True).expand_as(v[side])
            return F.linear(z[side], weight)

        with torch.no_grad():
            target = F.softmax((logits(1) - centre) / 0.04, dim=-1)
        per_row = -(target * F.log_softmax(logits(0) / 0.1, dim=-1)).sum(-1)
        losses = torch.stack([part.mean() for part in per_row.chunk(crops)])
        return [losses, *torch.autograd.grad(losses.mean(), leaves)]

    compare(
        benchmark, op="distill_loss", backend=_dispatch.resolve("distill_loss", "cpu").backend,
        peer="materialised logits", ours=ours, theirs=theirs, same=all_close(1e-4), pairs=5,
        shape=f"8 images x 10 crops, {prototypes} prototypes, fwd+bwd",
    )  # fmt: skip
