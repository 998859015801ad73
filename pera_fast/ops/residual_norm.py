"""One branch's residual added to its rows, and the next branch's rows gathered and normalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pera_fast import reference
from pera_fast.ops import _dispatch, _library


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    next_rows: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    inplace: bool = False,
    with_normalised: bool = False,
) -> tuple[Tensor, ...]:
    """x[rows] += scale * branch, then y = LayerNorm(x[next_rows]) * weight + bias.

    x: float [R, D], the residual stream. branch: float [r, D], or None to only gather and normalise.
    rows, next_rows: int64 [r], [s], unique within each, or None for all R rows in order.
    scale: float [r], or None for 1. weight, bias: float [D], or None for 1 and 0.
    dtype: of y, default x's; statistics are float32 or better.
    inplace: x itself is added to, where it is contiguous float32, and the backward pass overwrites the gradient of x
    after the addition likewise; for a stream that only these functions read.
    with_normalised: return n, too, of which y = n * weight + bias. It is kept for the backward pass anyway, so a
    product of y may keep it instead of y (`norm` of `ops.linear`); no gradient flows through it.

    Returns (x after the addition [R, D], y [s, D]), or these and n [s, D]. Raises ValueError when the shapes do not
    fit.
    """
    _check(x, branch, rows, scale)
    _check_devices(x, next_rows=next_rows, weight=weight, bias=bias)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != x.shape[1:]:
            raise ValueError(f"{name}: expected shape [{x.shape[1]}], got {list(value.shape)}")
    function, is_n = _dispatch.function("residual_norm", x.device.type), weight is None and bias is None
    outputs = 3 if with_normalised and not is_n else 2
    found = function(x, branch, rows, scale, next_rows, weight, bias, eps, dtype or x.dtype, inplace, outputs)
    return (*found, found[1].detach()) if with_normalised and is_n else found


def residual_add(
    x: Tensor, branch: Tensor, rows: Tensor | None, scale: Tensor | None, *, inplace: bool = False
) -> Tensor:
    """The first half of `residual_norm` alone, for the last branch: returns x after the addition [R, D]."""
    _check(x, branch, rows, scale)
    function = _dispatch.function("residual_norm", x.device.type)
    return function(x, branch, rows, scale, None, None, None, 0.0, x.dtype, inplace, 1)[0]


def _check_devices(x: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name}: expected it on {x.device} as x, got {value.device}")


def _check(x: Tensor, branch: Tensor | None, rows: Tensor | None, scale: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [R, D], got {list(x.shape)}")
    _check_devices(x, branch=branch, rows=rows, scale=scale)
    _dispatch.check_constant(scale=scale)
    if branch is not None:
        expected = [len(x) if rows is None else len(rows), x.shape[1]]
        if list(branch.shape) != expected:
            raise ValueError(f"branch: expected shape {expected}, got {list(branch.shape)}")
        if scale is not None and list(scale.shape) != expected[:1]:
            raise ValueError(f"scale: expected shape {expected[:1]}, got {list(scale.shape)}")


def _reference(
    x: Tensor, branch: Tensor | None, rows: Tensor | None, scale: Tensor | None, next_rows: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, inplace: bool, outputs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        if outputs == 1:
            assert branch is not None
            return (reference.residual_add(x, branch, rows, scale),)
        x, y = reference.residual_norm(x, branch, rows, scale, next_rows, weight, bias, eps)
        if outputs == 2:
            return x, y.to(dtype)
        with torch.no_grad():
            n = reference.residual_norm(x, None, None, None, next_rows, None, None, eps)[1]
        return x, y.to(dtype), n.to(dtype)


def _of(x: Tensor) -> Any:
    """What holds the two passes for this device."""
    if x.device.type == "cpu":
        return torch.ops.pera_fast
    from pera_fast.kernels import residual_norm  # needs Triton

    return residual_norm


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, rows, scale, next_rows, weight, bias, eps, dtype, inplace,
                outputs):  # type: ignore[no-untyped-def]  # fmt: skip
        if branch is not None and inplace:
            ctx.mark_dirty(x)
        source = x
        if branch is not None and not inplace:
            x = torch.empty_like(x)
        y = normalised = inverse_deviation = None
        if outputs > 1:
            count = len(x) if next_rows is None else len(next_rows)
            y = x.new_empty(count, x.shape[1], dtype=dtype)
            if any(ctx.needs_input_grad) or outputs == 3:
                inverse_deviation = x.new_empty(count)
                normalised = y if weight is None and bias is None else torch.empty_like(y)
        _of(x).residual_norm_forward(
            source, x, branch, rows, scale, next_rows, weight, bias, eps, y, normalised, inverse_deviation
        )
        ctx.save_for_backward(rows, scale, next_rows, weight, normalised, inverse_deviation)
        ctx.branch_dtype, ctx.shape, ctx.inplace = None if branch is None else branch.dtype, x.shape, inplace
        ctx.set_materialize_grads(False)
        if outputs == 3:
            ctx.mark_non_differentiable(normalised)
        return (x, y, normalised)[branch is None : outputs]

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        has_branch = ctx.branch_dtype is not None
        x_gradient: Any = gradients[0] if has_branch else None
        y_gradient: Any = gradients[has_branch] if len(gradients) > has_branch else None
        rows, scale, next_rows, weight, normalised, inverse_deviation = ctx.saved_tensors
        if x_gradient is None and y_gradient is None:
            return (None,) * 11
        given = y_gradient if x_gradient is None else x_gradient
        if x_gradient is not None:
            x_gradient = x_gradient.contiguous()
        overwrites = ctx.inplace and x_gradient is not None
        out = x_gradient if overwrites else given.new_empty(ctx.shape, dtype=torch.float32)
        branch_gradient = weight_gradient = bias_gradient = None
        if has_branch and ctx.needs_input_grad[1]:
            count = len(out) if rows is None else len(rows)
            branch_gradient = out.new_empty(count, out.shape[1], dtype=ctx.branch_dtype)
        if y_gradient is not None:
            y_gradient = y_gradient.contiguous()
            if ctx.needs_input_grad[5]:
                weight_gradient = torch.empty_like(weight)
            if ctx.needs_input_grad[6]:
                bias_gradient = out.new_empty(out.shape[1])
        _of(out).residual_norm_backward(
            x_gradient, y_gradient, rows, scale, next_rows, weight, normalised, inverse_deviation, out,
            branch_gradient, weight_gradient, bias_gradient,
        )  # fmt: skip
        return out, branch_gradient, None, None, None, weight_gradient, bias_gradient, *(None,) * 4


def _kernels(*arguments: Any) -> tuple[Tensor, ...]:
    x, branch, rows, scale, next_rows, weight, bias, eps, dtype, inplace, outputs = arguments
    low = (torch.float32, torch.bfloat16)
    if not (
        x.dtype == torch.float32
        and dtype in low
        and (branch is None or branch.dtype in low)
        and all(t is None or t.dtype == torch.float32 for t in (weight, bias))
        and (not inplace or x.is_contiguous())
    ):
        return _reference(*arguments)
    scale = None if scale is None else scale.float()
    contiguous = [
        None if t is None else t.contiguous() for t in (branch, rows, scale, next_rows, weight, bias)
    ]
    result = _ResidualNorm.apply(x.contiguous(), *contiguous, eps, dtype, inplace, outputs)
    return (x, *result) if branch is None else result


_library.without_result("residual_norm_forward", "residual_norm_backward")

_dispatch.register("residual_norm", "triton", _kernels, _library.why_no_triton)
_dispatch.register("residual_norm", "cpp", _kernels, _library.why_no_cpp)
_dispatch.register("residual_norm", "reference", _reference)
