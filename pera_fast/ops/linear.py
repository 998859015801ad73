"""x · weightᵀ + bias by the library that is quickest at it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pera_fast import reference
from pera_fast.ops import _dispatch, _library


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear of rows: x · weightᵀ + bias.

    x: float [R, F]. weight: float [D, F] in x's dtype, or any where autocast says which. bias: float [D].

    Returns [R, D]. Raises ValueError when the shapes do not fit.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [R, F], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected shape [D, {x.shape[1]}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{len(weight)}], got {list(bias.shape)}")
    return _dispatch.function("linear", x.device.type)(x, weight, bias)


def _library_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    on = x.device.type
    if on != "cpu" or len(x) == 0:
        return F.linear(x, weight, bias)
    dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else x.dtype
    if dtype == torch.bfloat16 and (not _traits()[1] or (_traits()[0] and len(x) >= _MANY_ROWS)):
        return _Bfloat16.apply(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())
    if dtype == x.dtype == weight.dtype == torch.float32:
        return _float32(x, weight, bias)
    return F.linear(x, weight, bias)


# A convolution takes the bias along, for which F.linear has a pass of its own in bfloat16; of few rows, as in the
# heads, it is slower (bench_linear.py).
_MANY_ROWS = 1024


def _float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN also takes the products of the gradients, where F.linear goes to MKL. With AVX-512 on an AMD processor
    # that is twice as fast, with AVX2 half as fast (bench_linear.py).
    return _convolution(x, weight, bias) if _traits()[0] else F.linear(x, weight, bias)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product as a convolution of one pixel."""
    pixels = x.contiguous().view(1, len(x), 1, -1).permute(0, 3, 1, 2)
    kernel = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(pixels, kernel, bias).permute(0, 2, 3, 1).reshape(len(x), -1)


@functools.cache
def _traits() -> tuple[bool, bool]:
    """Whether oneDNN's convolution is the faster product, and whether bfloat16 products have instructions."""
    if _library.why_no_cpp() is not None:
        return False, True
    traits = torch.ops.pera_fast
    return traits.is_amd() and traits.isa() >= 2, traits.has_bfloat16()


class _Bfloat16(torch.autograd.Function):
    """A product of bfloat16 as a convolution, or, without instructions for it, in float32: torch's own is then up to
    a hundred times slower. Operands and results are bfloat16, what is kept for the backward pass too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            if _traits()[1]:
                return _convolution(x, weight, bias)
            wide = None if bias is None else bias.float()
            return _float32(x.float(), weight.float(), wide).bfloat16()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not _traits()[1]:
            gradient, x, weight = gradient.float(), x.float(), weight.float()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            return (
                (gradient @ weight).bfloat16() if of_x else None,
                (gradient.T @ x).bfloat16() if of_weight else None,
                gradient.sum(0).bfloat16() if of_bias else None,
            )


_dispatch.register("linear", "torch", _library_product)
_dispatch.register("linear", "reference", reference.linear)
