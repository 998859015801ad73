"""The update of student and teacher: clip, AdamW, moving average, bfloat16 copies, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw

from pera_fast import reference
from pera_fast.ops import _dispatch, _library, _parameters

_MaybeTensors = Sequence[Tensor | None]


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    teachers: _MaybeTensors | None = None,
    shadows: _MaybeTensors | None = None,
    teacher_shadows: _MaybeTensors | None = None,
    *,
    grad_norm: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    momentum: float | Tensor = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip_norm: float = float("inf"),
) -> Tensor:
    """One optimiser step over all parameters, in place. Where grad_norm is not finite nothing changes at all.

    g = grad · min(1, clip_norm / (grad_norm + 1e-6)); p -= lr·weight_decay·p; AdamW with bias correction;
    then teacher += (1 - momentum)(p - teacher), and shadow = bfloat16(p), teacher_shadow = bfloat16(teacher).
    Source: Loshchilov & Hutter 2019; PerA (arXiv 2505.19447).

    params, grads, exp_avgs, exp_avg_sqs: one float tensor per parameter, of equal shapes at each place; the moments
    have the parameter's dtype. float32 and bfloat16 take the kernels, other dtypes PyTorch, which leaves the gradients
    clipped.
    steps: float32 [] per parameter, the updates it has had; advanced.
    teachers, shadows, teacher_shadows: the same, or None at places without one, or None for none at all.
    grad_norm: float32 [] on the device, of `ops.grad_norm` or any other. lr, weight_decay, momentum: numbers, or
    0-d tensors, which a captured graph reads anew at every replay.

    Returns bool []: whether the step was skipped; it is decided on the device and not waited for. Equal calls give
    equal bits. Raises ValueError naming the argument when lengths, shapes, dtypes or devices do not fit.
    """
    nothing: list[Tensor | None] = [None] * len(params)
    teachers, shadows = teachers or nothing, shadows or nothing
    teacher_shadows = teacher_shadows or nothing
    lists = {
        "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "teachers": teachers,
        "shadows": shadows, "teacher_shadows": teacher_shadows,
    }  # fmt: skip
    _parameters.check("params", lists)
    _parameters.check_shadows("shadows", shadows)
    _parameters.check_shadows("teacher_shadows", teacher_shadows)
    _check_state(params, exp_avgs, exp_avg_sqs, steps, grad_norm)
    device = grad_norm.device
    hyper = _parameters.scalars(device, lr, weight_decay, momentum)
    function = _dispatch.function("adamw_ema", device.type)
    if function is _kernels and not _parameters.are_low(params, grads, teachers):
        function = _torch_fused
    return function(
        params, grads, exp_avgs, exp_avg_sqs, steps, teachers, shadows, teacher_shadows, hyper, grad_norm,
        betas=betas, eps=eps, clip_norm=clip_norm,
    )  # fmt: skip


def _check_state(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grad_norm: Tensor,
) -> None:
    if grad_norm.dim() != 0 or grad_norm.dtype != torch.float32:
        raise ValueError(f"grad_norm: expected float32 [], got {grad_norm.dtype} {list(grad_norm.shape)}")
    if len(steps) != len(params):
        raise ValueError(f"steps: expected {len(params)} tensors, one for each of params, got {len(steps)}")
    for place, param in enumerate(params):
        for name, moments in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
            if moments[place].dtype != param.dtype:
                raise ValueError(f"{name}[{place}]: expected {param.dtype}, got {moments[place].dtype}")
        step = steps[place]
        if step.numel() != 1 or step.dtype != torch.float32:
            raise ValueError(f"steps[{place}]: expected float32 [], got {step.dtype} {list(step.shape)}")
        if param.device != grad_norm.device or step.device != grad_norm.device:
            raise ValueError(
                f"params[{place}], steps[{place}]: expected grad_norm's device {grad_norm.device}, "
                f"got {param.device} and {step.device}"
            )


def _kernels(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], teachers: _MaybeTensors, shadows: _MaybeTensors, teacher_shadows: _MaybeTensors,
    hyper: Tensor, grad_norm: Tensor, *, betas: tuple[float, float], eps: float, clip_norm: float,
) -> Tensor:  # fmt: skip
    written = {
        "params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "teachers": teachers,
        "shadows": shadows, "teacher_shadows": teacher_shadows,
    }  # fmt: skip
    p, m, v, t, low, teacher_low, g = _parameters.flat("params", written, {"grads": grads})
    skipped = torch.empty((), dtype=torch.bool, device=grad_norm.device)
    torch.ops.pera_fast.adamw_ema(
        p, g, m, v, list(steps), t, low, teacher_low, hyper, grad_norm, *betas, eps, clip_norm, skipped
    )
    # As PyTorch's own operations do: a backward pass that needs an old value then says so.
    torch.autograd.graph.increment_version([x for x in (*p, *m, *v, *t, *low, *teacher_low) if x.numel()])
    return skipped


def _torch_fused(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], teachers: _MaybeTensors, shadows: _MaybeTensors, teacher_shadows: _MaybeTensors,
    hyper: Tensor, grad_norm: Tensor, *, betas: tuple[float, float], eps: float, clip_norm: float,
) -> Tensor:  # fmt: skip
    skipped = ~grad_norm.isfinite()
    lr, weight_decay, momentum = hyper.tolist()  # waits for the device
    if params:
        _torch_adamw(
            list(params), [g.to(p.dtype) for g, p in zip(grads, params, strict=True)], list(exp_avgs),
            list(exp_avg_sqs), [], list(steps), fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr,
            weight_decay=weight_decay, eps=eps, maximize=False, found_inf=skipped.float(),
            grad_scale=((grad_norm + 1e-6) / clip_norm).clamp(min=1),
        )  # fmt: skip
    copies = [(low, p) for low, p in zip(shadows, params, strict=True) if low is not None]
    taught = list(zip(teachers, params, teacher_shadows, strict=True))
    rate = torch.where(skipped, 0.0, 1 - momentum)
    for teacher, p, low in taught:
        if teacher is not None:
            teacher.lerp_(p.to(teacher.dtype), rate.to(teacher.dtype))
            if low is not None:
                copies.append((low, teacher))
    if copies and not skipped:
        torch._foreach_copy_([low for low, _ in copies], [x for _, x in copies])
    return skipped


_library.without_result("adamw_ema")

_dispatch.register("adamw_ema", "cuda", _kernels, _library.why_no_cuda)
_dispatch.register("adamw_ema", "cpp", _kernels, _library.why_no_cpp)
_dispatch.register("adamw_ema", "torch", _torch_fused)
_dispatch.register("adamw_ema", "reference", reference.adamw_ema)
