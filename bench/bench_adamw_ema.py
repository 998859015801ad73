"""The whole update, gradient's norm included, against what PyTorch and the authors' data flow do in passes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import pytest
import torch
from compare import compare, needs_gpu
from parameters import MODELS, Parameters, bandwidth
from torch import Tensor
from torch.optim.adamw import adamw

from pera_fast import ops
from pera_fast.optim import apex

LR, DECAY, MOMENTUM, EPS, CLIP = 1e-3, 0.04, 0.99, 2e-5, 3.0


def ours(x: Parameters) -> list[Tensor]:
    ops.adamw_ema(
        **vars(x), grad_norm=ops.grad_norm(x.grads), lr=LR, weight_decay=DECAY, momentum=MOMENTUM, eps=EPS,
        clip_norm=CLIP,
    )  # fmt: skip
    return x.flat()


def clip_and_adamw(x: Parameters, fused: bool) -> None:
    """Not fused it is torch's default: parameter by parameter on a CPU, foreach on a GPU."""
    norm = torch.nn.utils.get_total_norm(x.grads)
    torch._foreach_mul_(x.grads, (CLIP / (norm + 1e-6)).clamp(max=1.0))
    adamw(
        x.params, x.grads, x.exp_avgs, x.exp_avg_sqs, [], x.steps, fused=fused,
        foreach=x.params[0].is_cuda and not fused, amsgrad=False,
        beta1=0.9, beta2=0.999, lr=LR, weight_decay=DECAY, eps=EPS, maximize=False,
    )  # fmt: skip


def foreach_chain(x: Parameters) -> list[Tensor]:
    clip_and_adamw(x, fused=True)
    torch._foreach_lerp_(*x.taught(), 1 - MOMENTUM)
    torch._foreach_copy_(*x.copies())
    return x.flat()


def authors_loop(x: Parameters) -> list[Tensor]:
    """Clip, AdamW as torch does it by default, EMA and autocast's copies one by one."""
    clip_and_adamw(x, fused=False)
    for teacher, p in zip(*x.taught(), strict=True):
        teacher.mul_(MOMENTUM).add_(p, alpha=1 - MOMENTUM)
    for low, wide in zip(*x.copies(), strict=True):
        low.copy_(wide)
    return x.flat()


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        bound = 1e-5 if x.dtype == torch.float32 else 2**-7  # one unit in a copy's last place
        torch.testing.assert_close(x, y, rtol=bound, atol=1e-5)


@cache
def _fused_adam(params: tuple[Tensor, ...]):  # type: ignore[no-untyped-def]
    fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    return fused_adam(params, lr=LR, eps=EPS, weight_decay=DECAY, adam_w_mode=True)


def apex_chain(x: Parameters) -> list[Tensor]:
    norm = torch.nn.utils.get_total_norm(x.grads)
    torch._foreach_mul_(x.grads, (CLIP / (norm + 1e-6)).clamp(max=1.0))
    for p, g in zip(x.params, x.grads, strict=True):
        p.grad = g
    _fused_adam(tuple(x.params)).step()
    torch._foreach_lerp_(*x.taught(), 1 - MOMENTUM)
    torch._foreach_copy_(*x.copies())
    return x.flat()


def measure(
    benchmark, model: str, peer: str, theirs: Callable[[Parameters], list[Tensor]], device: str
) -> None:
    x = Parameters.of(model, device)
    # ViT-G fills the memory once: there both update the same tensors, and outputs are compared on the smaller.
    twin, same = (x, None) if model == "ViT-G" else (Parameters.of(model, device), close)
    moved, rate = x.bytes_moved(), bandwidth(device)
    compare(
        benchmark, op="adamw_ema", peer=peer, device=device,
        ours=lambda: ours(x), theirs=lambda: theirs(twin), same=same, pairs=3 if model == "ViT-G" else 7,
        shape=f"{model} with heads, {x.numel / 1e6:.0f} M parameters, {moved / x.numel:.0f} bytes each",
        bytes_moved=moved, bandwidth=rate,
    )  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("peer", ["foreach", "authors"])
def bench_adamw_ema(benchmark, model: str, peer: str) -> None:
    named = {
        "foreach": ("clip, fused AdamW, _foreach_lerp_, copies", foreach_chain),
        "authors": ("the authors' passes, one parameter at a time", authors_loop),
    }
    measure(benchmark, model, *named[peer], "cpu")


@needs_gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("peer", ["foreach", "authors", "apex"])
def bench_adamw_ema_gpu(benchmark, model: str, peer: str) -> None:
    if peer == "apex" and not apex()["has_kernels"]:
        pytest.skip(f"apex: {apex()['note']}")
    named = {
        "foreach": ("clip, fused AdamW, _foreach_lerp_, copies", foreach_chain),
        "authors": ("the authors' passes: clip, foreach AdamW, EMA and copies one at a time", authors_loop),
        "apex": ("clip, apex FusedAdam, _foreach_lerp_, copies", apex_chain),
    }
    measure(benchmark, model, *named[peer], "cuda")
