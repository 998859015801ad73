"""Attention over many sequences packed as rows of one matrix, no padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch


def packed_attention(qkv: Tensor, groups: Sequence[tuple[int, int]], scale: float | None = None) -> Tensor:
    """Scaled dot-product attention within each sequence.

    qkv: float [rows, 3, heads, head_dim]; the sequences' rows lie one after the other.
    groups: (number of sequences, their length) of each run of equally long sequences, in row order.
    scale: factor on the scores, default head_dim ** -0.5.

    Returns [rows, heads, head_dim] in qkv's dtype. Raises ValueError when the shapes do not fit.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected shape [rows, 3, heads, head_dim], got {list(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv: expected a floating-point tensor, got {qkv.dtype}")
    if any(sequences < 0 or length < 1 for sequences, length in groups):
        raise ValueError(f"groups: expected (sequences >= 0, length >= 1) pairs, got {list(groups)}")
    rows = sum(sequences * length for sequences, length in groups)
    if rows != qkv.shape[0]:
        raise ValueError(f"groups: expected sequences that add up to {qkv.shape[0]} rows of qkv, got {rows}")
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return _dispatch.resolve("packed_attention", qkv.device.type).function(qkv, groups, scale)


def _sdpa(qkv: Tensor, groups: Sequence[tuple[int, int]], scale: float) -> Tensor:
    outputs, start = [], 0
    for sequences, length in groups:
        part = qkv[start : start + sequences * length].unflatten(0, (sequences, length))
        query, key, value = part.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, scale=scale)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        start += sequences * length
    return torch.cat(outputs)


_dispatch.register("packed_attention", "torch", _sdpa)
_dispatch.register("packed_attention", "reference", reference.packed_attention)
