"""distill_loss forward and backward against materialised logits with weight norm per call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import HAS_BFLOAT16, NO_BFLOAT16, all_close, compare, near, needs_gpu, peak_flops
from torch import Tensor

from pera_fast import ops

PROTOTYPES, DIM, CROPS = 131072, 384, 10


def inputs(rows: int, device: str = "cpu") -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """z, v, g of student and teacher, and the centre."""
    torch.manual_seed(0)
    z = [F.normalize(torch.randn(rows, DIM, device=device), dim=-1) for _ in range(2)]
    v = [torch.randn(PROTOTYPES, DIM, device=device) for _ in range(2)]
    g = [torch.ones(PROTOTYPES, 1, device=device) for _ in range(2)]
    for x in (z[0], v[0], g[0]):
        x.requires_grad_()
    return z, v, g, torch.zeros(PROTOTYPES, device=device)


def logits(z: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return F.linear(z, g * v / v.norm(2, dim=1, keepdim=True).expand_as(v))


def materialised(z: list[Tensor], v: list[Tensor], g: list[Tensor], centre: Tensor) -> Tensor:
    with torch.no_grad():
        target = F.softmax((logits(z[1], v[1], g[1]).float() - centre) / 0.04, dim=-1)
    per_row = -(target * F.log_softmax(logits(z[0], v[0], g[0]).float() / 0.1, dim=-1)).sum(-1)
    return torch.stack([part.mean() for part in per_row.chunk(CROPS)])


def flops(rows: int) -> int:
    """Of the products that any exact method needs: two logits, two gradients."""
    return 4 * 2 * rows * DIM * PROTOTYPES


@pytest.mark.parametrize(
    ("images", "device"), [(8, "cpu"), (16, "cpu"), (64, "cpu"), pytest.param(64, "cuda", marks=needs_gpu)]
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["materialised logits", "materialised logits, torch.compile"])
def bench_distill_loss(benchmark, images: int, device: str, precision: str, peer: str) -> None:
    if device == "cpu" and precision == "bfloat16" and not HAS_BFLOAT16:
        pytest.skip(NO_BFLOAT16)
    if images == 64 and device == "cpu" and peer.endswith("compile"):
        pytest.skip("the largest batch once is enough")
    z, v, g, centre = inputs(images * CROPS, device)
    leaves = [z[0], v[0], g[0]]
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
    function = torch.compile(materialised) if peer.endswith("compile") else materialised

    def ours() -> list[Tensor]:
        with autocast:
            losses = ops.distill_loss(
                z[0], z[1], (v[0], g[0]), (v[1], g[1]), centre, 0.1, 0.04, [images] * CROPS
            )
        return [losses, *torch.autograd.grad(losses.mean(), leaves)]

    def theirs() -> list[Tensor]:
        with autocast:
            losses = function(z, v, g, centre)
        return [losses, *torch.autograd.grad(losses.mean(), leaves)]

    def same(a: list[Tensor], b: list[Tensor]) -> None:
        all_close(1e-4 if precision == "float32" else 2e-2)(a, b)
        near(a[1:], b[1:])  # the gradients are far smaller than any such tolerance

    compare(
        benchmark, op="distill_loss", peer=peer,
        device=device, ours=ours, theirs=theirs, same=same,
        pairs=1 if images == 64 and device == "cpu" else 3, dtype=precision, flops=flops(images * CROPS),
        peak_flops=peak_flops(precision, device),
        shape=f"{images} images x {CROPS} crops, {PROTOTYPES} prototypes, fwd+bwd",
    )  # fmt: skip
