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
    of_one_dtype = dtype == torch.bfloat16 or dtype == x.dtype == weight.dtype == torch.float32
    if of_one_dtype and (_is_convolution(len(x), dtype) or _is_wide(dtype)):
        return _Product.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return F.linear(x, weight, bias)


# With AVX-512 on an AMD processor, oneDNN's convolution of one pixel is quicker from so many rows on: F.linear goes to
# MKL in float32, and in bfloat16 has a pass of its own for the bias. With AVX2 it is half as fast (bench_linear.py).
_ROWS = {torch.float32: 160, torch.bfloat16: 1024}


def _is_convolution(rows: int, dtype: torch.dtype) -> bool:
    return _traits()[0] and rows >= _ROWS[dtype]


def _is_wide(dtype: torch.dtype) -> bool:
    """Without instructions for bfloat16, torch's products of it are up to a hundred times slower than float32's."""
    return dtype == torch.bfloat16 and not _traits()[1]


@functools.cache
def _traits() -> tuple[bool, bool]:
    """Whether oneDNN's convolution is the faster product, and whether bfloat16 products have instructions."""
    if _library.why_no_cpp() is not None:
        return False, True
    traits = torch.ops.pera_fast
    return traits.is_amd() and traits.isa() >= 2, traits.has_bfloat16()


class _Product(torch.autograd.Function):
    """A product of one dtype, each of its three parts as it is quickest; what is kept for the backward pass is of
    that dtype, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        dtype = x.dtype
        with torch.autocast("cpu", enabled=False):
            if _is_wide(dtype):
                x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
            if not _is_convolution(len(x), x.dtype):
                return F.linear(x, weight, bias).to(dtype)
            return _as_rows(F.conv2d(_as_pixels(x), _as_kernel(weight), bias)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dtype = x.dtype
        if _is_wide(dtype):
            gradient, x, weight = gradient.float(), x.float(), weight.float()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            return (
                _input_gradient(gradient, x, weight).to(dtype) if of_x else None,
                # As a convolution's, a third as fast where the rows have no good divisor.
                (gradient.T @ x).to(dtype) if of_weight else None,
                gradient.sum(0).to(dtype) if of_bias else None,
            )


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if gradient.dtype != torch.float32 or not _is_convolution(len(gradient), gradient.dtype):
        return gradient @ weight
    # What conv2d's own backward pass calls, for one of its three gradients.
    of_pixels = torch.ops.aten.convolution_backward(
        _as_pixels(gradient), _as_pixels(x), _as_kernel(weight), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [True, False, False],
    )[0]  # fmt: skip
    return _as_rows(of_pixels)


def _as_pixels(rows: Tensor) -> Tensor:
    """[R, F] as an image of R pixels with F channels, which come last in memory."""
    return rows.contiguous().view(1, 1, *rows.shape).permute(0, 3, 1, 2)


def _as_rows(pixels: Tensor) -> Tensor:
    """What `_as_pixels` was given."""
    return pixels.permute(0, 2, 3, 1).flatten(0, 2)


def _as_kernel(weight: Tensor) -> Tensor:
    return weight[:, :, None, None].contiguous(memory_format=torch.channels_last)


_dispatch.register("linear", "torch", _library_product)
_dispatch.register("linear", "reference", reference.linear)
