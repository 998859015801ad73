"""Patch pixels to tokens: one product over the patches that are used, positions added to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch


def patch_embed(rows: Tensor, weight: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """table[index] + rows · weightᵀ: tokens with what belongs to each (position and bias, or the CLS token).

    rows: float [R, F], a patch's pixels each; of a row of zeros the table's entry is all there is.
    weight: float [D, F]. table: float [T, D]. index: int64 [R], entries of the table.

    Returns [R, D] in table's dtype; the product is taken in rows' dtype, or in bfloat16 where autocast says
    so. Gradients to weight and table, not to rows. Raises ValueError when the shapes do not fit.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"rows: expected float [R, F], got {rows.dtype} {list(rows.shape)}")
    if weight.dim() != 2 or weight.shape[1] != rows.shape[1]:
        raise ValueError(f"weight: expected shape [D, {rows.shape[1]}], got {list(weight.shape)}")
    if table.dim() != 2 or table.shape[1] != weight.shape[0]:
        raise ValueError(f"table: expected shape [T, {weight.shape[0]}], got {list(table.shape)}")
    if index.dtype != torch.int64 or index.shape != rows.shape[:1]:
        raise ValueError(f"index: expected int64 [{len(rows)}], got {index.dtype} {list(index.shape)}")
    return _dispatch.function("patch_embed", rows.device.type)(rows, weight, table, index)


def _library(rows: Tensor, weight: Tensor, table: Tensor, index: Tensor) -> Tensor:
    tokens = F.embedding(index, table)
    if torch.is_autocast_enabled(rows.device.type):
        return tokens.add_(F.linear(rows, weight))
    weight = weight.to(rows.dtype)
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        # As a convolution of one pixel, oneDNN takes the product: up to twice as fast as the BLAS behind
        # F.linear on AMD processors, where that is MKL (bench_patch_embed.py).
        pixels = rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)
        kernel = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
        return tokens.add_(F.conv2d(pixels, kernel).permute(0, 2, 3, 1).view(len(rows), -1))
    if rows.dtype == tokens.dtype:
        return tokens.addmm_(rows, weight.T)  # added within the product
    return tokens.add_(F.linear(rows, weight))


_dispatch.register("patch_embed", "torch", _library)
_dispatch.register("patch_embed", "reference", reference.patch_embed)
