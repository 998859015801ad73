"""x · weightᵀ + bias by the library that is quickest at it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch


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


def _library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if x.device.type != "cpu" or not is_float32 or len(x) == 0:
        return F.linear(x, weight, bias)
    # As a convolution of one pixel, oneDNN takes the product, and those of the gradients: twice as fast as the
    # BLAS behind F.linear on AMD processors, where that is MKL (bench_linear.py).
    pixels = x.contiguous().view(1, len(x), 1, -1).permute(0, 3, 1, 2)
    kernel = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(pixels, kernel, bias).permute(0, 2, 3, 1).reshape(len(x), -1)


_dispatch.register("linear", "torch", _library)
_dispatch.register("linear", "reference", reference.linear)
