"""The norm of the whole gradient."""

from __future__ import annotations

import pytest
import torch
from compare import all_close, compare, needs_gpu
from parameters import Parameters, bandwidth

from pera_fast import ops


def measure(benchmark, device: str, dtype: torch.dtype) -> None:
    grads = [g.to(dtype) for g in Parameters.of("ViT-B", device).grads]
    moved = sum(g.numel() * g.element_size() for g in grads)
    compare(
        benchmark, op="grad_norm", device=device,
        peer="torch.nn.utils.get_total_norm", ours=lambda: ops.grad_norm(grads),
        theirs=lambda: torch.nn.utils.get_total_norm(grads), same=all_close(1e-2), bytes_moved=moved,
        bandwidth=bandwidth(device), dtype=str(dtype).removeprefix("torch."),
        shape=f"ViT-B with heads, {sum(g.numel() for g in grads) / 1e6:.0f} M numbers",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_grad_norm(benchmark, dtype: torch.dtype) -> None:
    measure(benchmark, "cpu", dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_grad_norm_gpu(benchmark, dtype: torch.dtype) -> None:
    measure(benchmark, "cuda", dtype)
