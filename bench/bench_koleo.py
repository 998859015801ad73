"""koleo forward and backward against materialised, normalised logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench_distill_loss import PROTOTYPES, inputs, logits
from compare import all_close, compare, needs_gpu
from torch import Tensor

from pera_fast import ops


@pytest.mark.parametrize(("images", "device"), [(8, "cpu"), pytest.param(64, "cuda", marks=needs_gpu)])
def bench_koleo(benchmark, images: int, device: str) -> None:
    z, v, g, _ = inputs(2 * images, device)
    leaves = [z[0], v[0], g[0]]

    def ours() -> list[Tensor]:
        losses, _ = ops.koleo(z[0].unflatten(0, (2, images)), v[0], g[0])
        return [losses, *torch.autograd.grad(losses.sum(), leaves)]

    def theirs() -> list[Tensor]:
        losses = []
        for rows in F.normalize(logits(z[0], v[0], g[0]), dim=-1).chunk(2):
            nearest = (rows.detach() @ rows.detach().T).fill_diagonal_(-2).argmax(1)
            losses.append(-torch.log((rows - rows[nearest]).norm(dim=1) + 1e-8).mean())
        return [torch.stack(losses), *torch.autograd.grad(sum(losses), leaves)]

    compare(
        benchmark, op="koleo", peer="materialised logits",
        ours=ours, theirs=theirs, same=all_close(1e-4), pairs=3, device=device,
        shape=f"2 crops of {images} images, {PROTOTYPES} prototypes, fwd+bwd",
    )  # fmt: skip
