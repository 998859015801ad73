"""adamw_ema against clip, torch's AdamW and a per-parameter EMA loop, on ViT-S with its heads."""

import copy

import torch
from compare import all_close, compare
from workload import small_vit_s

from pera_fast.model.pera import PerA
from pera_fast.ops import _dispatch
from pera_fast.optim import AdamWEMA


def bench_adamw_ema(benchmark) -> None:
    torch.manual_seed(0)
    model = PerA(small_vit_s())
    twin = copy.deepcopy(model)
    for m in (model, twin):
        torch.manual_seed(1)
        for p in m.parameters():
            p.grad = torch.randn_like(p) * 1e-3 if p.requires_grad else None
    optimizer = AdamWEMA(model.ema_pairs())
    trained = [p for p in twin.parameters() if p.requires_grad]
    theirs_optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.04, eps=2e-5, fused=True)

    def ours() -> list[torch.Tensor]:
        optimizer.step(lr=1e-3, weight_decay=0.04, momentum=0.99)
        return list(model.parameters())

    def theirs() -> list[torch.Tensor]:
        torch.nn.utils.clip_grad_norm_(trained, 3.0)
        theirs_optimizer.step()
        with torch.no_grad():
            for s, t in zip(twin.student.parameters(), twin.teacher.parameters(), strict=True):
                t.mul_(0.99).add_(s.detach(), alpha=0.01)
        return list(twin.parameters())

    count = sum(p.numel() for p in trained)
    compare(
        benchmark, op="adamw_ema", backend=_dispatch.resolve("adamw_ema", "cpu").backend,
        peer="clip, fused AdamW, EMA loop", ours=ours, theirs=theirs, same=all_close(1e-6),
        shape=f"ViT-S with heads, {count / 1e6:.0f} M parameters",
    )  # fmt: skip
