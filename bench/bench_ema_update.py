"""The teacher's moving average alone, with its bfloat16 copies."""

from __future__ import annotations

import torch
from bench_adamw_ema import close
from compare import compare, needs_gpu
from parameters import Parameters, bandwidth

from pera_fast import ops


def measure(benchmark, device: str) -> None:
    x, twin = Parameters.of("ViT-B", device), Parameters.of("ViT-B", device)
    for p, q in zip(x.params, twin.params, strict=True):
        p.add_(1.0)
        q.add_(1.0)
    lows, wides = twin.copies()
    teachers = {id(t) for t in twin.teachers}
    copied = [(low, t) for low, t in zip(lows, wides, strict=True) if id(t) in teachers]
    shadows = [low for low, t in zip(x.teacher_shadows, x.teachers, strict=True) if t is not None]
    (taught, params), (their_taught, their_params) = x.taught(), twin.taught()

    def ours() -> list[torch.Tensor]:
        ops.ema_update(taught, params, 0.99, shadows)
        return [*taught, *(low for low in shadows if low is not None)]

    def theirs() -> list[torch.Tensor]:
        torch._foreach_lerp_(their_taught, their_params, 0.01)
        torch._foreach_copy_([low for low, _ in copied], [t for _, t in copied])
        return [*their_taught, *(low for low, _ in copied)]

    count = sum(t.numel() for t in taught)
    moved = 12 * count + 2 * sum(low.numel() for low, _ in copied)
    compare(
        benchmark, op="ema_update", device=device,
        peer="_foreach_lerp_, copies", ours=ours, theirs=theirs, same=close, bytes_moved=moved,
        bandwidth=bandwidth(device), shape=f"ViT-B with head, {count / 1e6:.0f} M parameters",
    )  # fmt: skip


def bench_ema_update(benchmark) -> None:
    measure(benchmark, "cpu")


@needs_gpu
def bench_ema_update_gpu(benchmark) -> None:
    measure(benchmark, "cuda")
