"""Patch pixels to tokens: one product over the patches that are used, positions added to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch
from pera_fast.ops.linear import linear
from pera_fast.ops.residual_norm import residual_add


def patch_embed(
    rows: Tensor, weight: Tensor, table: Tensor, index: Tensor, place: Tensor | None = None
) -> Tensor:
    """table[index] + rows · weightᵀ: tokens with what belongs to each (position and bias, or the CLS token).

    rows: float [R, F], a patch's pixels each; of a row of zeros the table's entry is all there is.
    weight: float [D, F]. table: float [T, D]. index: int64 [N], entries of the table.
    place: int64 [R], which of the N tokens each row belongs to, each once; the others are the table's entries
    alone. None: N = R, in order.

    Returns [N, D] in table's dtype; the product is taken in rows' dtype, or in bfloat16 where autocast says
    so. Gradients to rows, weight and table. Raises ValueError when the shapes do not fit.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"rows: expected float [R, F], got {rows.dtype} {list(rows.shape)}")
    if weight.dim() != 2 or weight.shape[1] != rows.shape[1]:
        raise ValueError(f"weight: expected shape [D, {rows.shape[1]}], got {list(weight.shape)}")
    if table.dim() != 2 or table.shape[1] != weight.shape[0]:
        raise ValueError(f"table: expected shape [T, {weight.shape[0]}], got {list(table.shape)}")
    if place is not None and (place.dtype != torch.int64 or place.shape != rows.shape[:1]):
        raise ValueError(f"place: expected int64 [{len(rows)}], got {place.dtype} {list(place.shape)}")
    if index.dtype != torch.int64 or index.dim() != 1 or (place is None and len(index) != len(rows)):
        expected = len(rows) if place is None else "N"
        raise ValueError(f"index: expected int64 [{expected}], got {index.dtype} {list(index.shape)}")
    return _dispatch.function("patch_embed", rows.device.type)(rows, weight, table, index, place)


def _library(rows: Tensor, weight: Tensor, table: Tensor, index: Tensor, place: Tensor | None) -> Tensor:
    tokens = F.embedding(index, table)
    if place is not None:
        return residual_add(tokens, _product(rows, weight), place, None, inplace=True)
    low = torch.is_autocast_enabled(rows.device.type)
    if rows.device.type != "cpu" and rows.dtype == tokens.dtype and not low:
        return tokens.addmm_(rows, weight.to(rows.dtype).T)  # added within the product
    return tokens.add_(_product(rows, weight))


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return linear(rows, weight if torch.is_autocast_enabled(rows.device.type) else weight.to(rows.dtype))


_dispatch.register("patch_embed", "torch", _library)
_dispatch.register("patch_embed", "reference", reference.patch_embed)
