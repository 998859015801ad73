"""One branch's residual added to its rows, and the next branch's rows gathered and normalised."""

from __future__ import annotations

from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    next_rows: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x[rows] += scale * branch, then y = LayerNorm(x[next_rows]) * weight + bias.

    x: float [R, D], the residual stream. branch: float [r, D], or None to only gather and normalise.
    rows, next_rows: int64 [r], [s], unique within each, or None for all R rows in order.
    scale: float [r], or None for 1. weight, bias: float [D].

    Returns (x after the addition [R, D], y [s, D]). Raises ValueError when the shapes do not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [R, D], got {list(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != x.shape[1:]:
            raise ValueError(f"{name}: expected shape [{x.shape[1]}], got {list(value.shape)}")
    if branch is not None:
        expected = [len(x) if rows is None else len(rows), x.shape[1]]
        if list(branch.shape) != expected:
            raise ValueError(f"branch: expected shape {expected}, got {list(branch.shape)}")
        if scale is not None and list(scale.shape) != expected[:1]:
            raise ValueError(f"scale: expected shape {expected[:1]}, got {list(scale.shape)}")
    function = _dispatch.function("residual_norm", x.device.type)
    return function(x, branch, rows, scale, next_rows, weight, bias, eps)


def residual_add(x: Tensor, branch: Tensor, rows: Tensor | None, scale: Tensor | None) -> Tensor:
    """The first half of `residual_norm` alone, for the last branch: returns x after the addition [R, D]."""
    return reference.residual_add(x, branch, rows, scale)


_dispatch.register("residual_norm", "reference", reference.residual_norm)
