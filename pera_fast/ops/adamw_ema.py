"""The update of student and teacher: clip, AdamW, moving average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw

from pera_fast import reference
from pera_fast.ops import _dispatch


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    teachers: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    clip_coefficient: float,
    momentum: float,
) -> None:
    """One optimiser step over all parameters, in place; gradients may be overwritten.

    g = grad · clip_coefficient; p -= lr·weight_decay·p; AdamW with bias correction of `step` (from 1);
    then teacher += (1 - momentum)(p - teacher) where a parameter has a teacher (None: it has none).
    Source: Loshchilov & Hutter 2019; PerA (arXiv 2505.19447).

    All sequences have one float tensor per parameter, equal shapes at each place. Raises ValueError
    when their lengths or shapes differ.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "teachers": teachers}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name}: expected {len(params)} tensors, one per parameter, got {len(tensors)}")
        for place, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor is not None and tensor.shape != param.shape:
                raise ValueError(
                    f"{name}[{place}]: expected shape {list(param.shape)}, got {list(tensor.shape)}"
                )
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    if not params:
        return
    _dispatch.function("adamw_ema", params[0].device.type)(
        params, grads, exp_avgs, exp_avg_sqs, teachers, step=step, lr=lr, weight_decay=weight_decay, betas=betas,
        eps=eps, clip_coefficient=clip_coefficient, momentum=momentum,
    )  # fmt: skip


def _torch_fused(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    teachers: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    clip_coefficient: float,
    momentum: float,
) -> None:
    if clip_coefficient != 1:
        torch._foreach_mul_(list(grads), clip_coefficient)
    # torch's function advances each step itself before it uses it.
    steps = [torch.tensor(float(step - 1), device=p.device) for p in params]
    _torch_adamw(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], steps, fused=True, amsgrad=False,
        beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
    )  # fmt: skip
    pairs = [(t, p) for t, p in zip(teachers, params, strict=True) if t is not None]
    if pairs:
        torch._foreach_lerp_([t for t, _ in pairs], [p for _, p in pairs], 1 - momentum)


_dispatch.register("adamw_ema", "torch", _torch_fused)
_dispatch.register("adamw_ema", "reference", reference.adamw_ema)
