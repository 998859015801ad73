"""packed_attention on a GPU: tiles that hold many short sequences, or a slice of a long one.

A tile is up to 64 rows of queries and the range of keys they may see: whole short sequences side by side,
each row seeing its own sequence's keys, or part of one long sequence. The tiles of a shape are made once. Short
sequences need one tile of keys, so their backward pass has all it needs at hand: no statistics are read and every
gradient is written once. Long ones take two passes, one per side. No atomics: equal calls give equal bits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pera_fast.kernels.launch import on_its_device

NUM_STAGES = 2
LOG2_E = tl.constexpr(1.4426950408889634)  # a GPU's exponential is of base 2


def config(dtype: torch.dtype, dim: int, capability: int) -> tuple[int, int, int, int]:
    """(rows of a tile, head_dim as a power of two, warps, warps of long sequences' backward passes) that spill no
    registers on sm_80 and sm_90.

    Raises ValueError for a head_dim that has none: above 128, in float32 above 64.
    """
    most = 64 if dtype == torch.float32 else 128
    if dim > most:
        raise ValueError(f"head_dim: expected at most {most} in {dtype}, got {dim}")
    block_d = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:  # tf32x3 holds three parts of every operand
        return 16, block_d, 4, (2 if dim <= 32 else 4)
    if dim > 64:
        return 32, block_d, 4, 4
    # Four warps are one warp group, which multiplies whole tiles of 64 rows: of two, each would make the same scores.
    return 64, block_d, 4, (8 if dim > 32 and capability < 90 else 4)


@functools.lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


class Tiles(NamedTuple):
    """Of each tile first row, end row, first key, end key: int32 [tiles, 4]; and of each row its sequence's
    start and end: int32 [rows]."""

    short: Tensor
    long: Tensor
    start: Tensor
    end: Tensor


@functools.lru_cache(maxsize=64)
def tiles_of(groups: tuple[tuple[int, int], ...], device: torch.device, block: int) -> Tiles:
    """The tiles of (number of sequences, their length) in row order."""
    short, long, starts, ends, row = [], [], [], [], 0
    for count, length in groups:
        if length == 0:
            continue
        together = block // length  # sequences in a tile
        for i in range(0, count, max(together, 1)):
            n = min(together, count - i) if together else 1
            first, end = row + i * length, row + (i + n) * length
            if together:
                short.append((first, end, first, end))
            else:
                long += [(at, min(at + block, end), first, end) for at in range(first, end, block)]
        first_rows = row + torch.arange(count, dtype=torch.int32) * length
        starts.append(first_rows.repeat_interleave(length))
        ends.append(starts[-1] + length)
        row += count * length
    tables = [torch.tensor(t, dtype=torch.int32).view(-1, 4).to(device) for t in (short, long)]
    rows = [
        torch.cat(t).to(device) if t else torch.empty(0, dtype=torch.int32, device=device)
        for t in (starts, ends)
    ]
    return Tiles(*tables, *rows)


_recorded: dict[Any, Tiles] = {}


def _tiles(groups: tuple[tuple[int, int], ...], device: torch.device, block: int) -> Tiles:
    """`tiles_of`, for good where a graph is recorded, which holds their addresses and not them."""
    tiles = tiles_of(groups, device, block)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _recorded[groups, device, block] = tiles
    return tiles


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _rows(base, first, stride, i, d, dim, end):
    """Rows first + i of a larger matrix, zeros from `end` on. The start is 64-bit, what varies within a tile not:
    half the registers."""
    offsets = i[:, None] * stride + d[None, :]
    is_row = (first + i < end)[:, None] & (d < dim)[None, :]
    start = (tl.full((), 0, tl.int64) + first) * stride
    return tl.load(base + start + offsets, is_row, 0.0)


@triton.jit
def _store(base, first, stride, i, d, dim, end, value):
    offsets = i[:, None] * stride + d[None, :]
    is_row = (first + i < end)[:, None] & (d < dim)[None, :]
    start = (tl.full((), 0, tl.int64) + first) * stride
    tl.store(base + start + offsets, value.to(base.dtype.element_ty), is_row)


@triton.jit
def _weights_of(query, key, low, high, key_row, is_row, factor):
    """The softmax of a tile of whole sequences, each row over its own sequence's keys; rows outside are zeros."""
    sees = (key_row[None, :] >= low[:, None]) & (key_row[None, :] < high[:, None])
    score = tl.where(sees, _dot(query, tl.trans(key)) * factor, float("-inf"))
    weight = tl.math.exp2(score - tl.where(is_row, tl.max(score, 1), 0.0)[:, None])
    return weight / tl.where(is_row, tl.sum(weight, 1), 1.0)[:, None]


@triton.jit
def short_forward_kernel(
    qkv, out, tiles, start, end, heads, dim, scale, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A tile of whole sequences."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    first_row, end_row = tl.load(tile), tl.load(tile + 1)
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    row = first_row + i
    is_row = row < end_row
    width = heads * dim
    low, high = tl.load(start + row, is_row, 0), tl.load(end + row, is_row, 0)
    query = _rows(qkv + head * dim, first_row, 3 * width, i, d, dim, end_row)
    key = _rows(qkv + width + head * dim, first_row, 3 * width, i, d, dim, end_row)
    value = _rows(qkv + 2 * width + head * dim, first_row, 3 * width, i, d, dim, end_row)
    weight = _weights_of(query, key, low, high, row, is_row, scale * LOG2_E)
    _store(out + head * dim, first_row, width, i, d, dim, end_row, _dot(weight.to(value.dtype), value))


@triton.jit
def long_forward_kernel(
    qkv, out, log_sum, tiles, rows, heads, dim, scale, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A slice of a long sequence, and log_sum [heads, 2, rows]: of each row, first, log2 Σ exp of its scores."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    first_row, end_row = tl.load(tile), tl.load(tile + 1)
    first_key, end_key = tl.load(tile + 2), tl.load(tile + 3)
    width = heads * dim
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    row = first_row + i
    query = _rows(qkv + head * dim, first_row, 3 * width, i, d, dim, end_row)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    value_sum = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    factor = scale * LOG2_E  # > 0: the largest product is the largest score
    for at in range(first_key, end_key, BLOCK):
        key = _rows(qkv + width + head * dim, at, 3 * width, i, d, dim, end_key)
        value = _rows(qkv + 2 * width + head * dim, at, 3 * width, i, d, dim, end_key)
        product = _dot(query, tl.trans(key)) + tl.where(at + i < end_key, 0.0, float("-inf"))[None, :]
        larger = tl.maximum(largest, tl.max(product, 1))
        weight = tl.math.exp2(product * factor - (larger * factor)[:, None])
        old = tl.math.exp2((largest - larger) * factor)
        total = total * old + tl.sum(weight, 1)
        value_sum = value_sum * old[:, None] + _dot(weight.to(value.dtype), value)
        largest = larger
    _store(out + head * dim, first_row, width, i, d, dim, end_row, value_sum * (1.0 / total)[:, None])
    saved = log_sum + head.to(tl.int64) * 2 * rows + row
    tl.store(saved, largest * factor + tl.math.log2(total), row < end_row)


@triton.jit
def short_backward_kernel(
    gradient,
    qkv,
    qkv_gradient,
    tiles,
    start,
    end,
    heads,
    dim,
    scale,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients of a tile of whole sequences; their softmax is made again."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    first_row, end_row = tl.load(tile), tl.load(tile + 1)
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    row = first_row + i
    is_row = row < end_row
    width = heads * dim
    low, high = tl.load(start + row, is_row, 0), tl.load(end + row, is_row, 0)
    query = _rows(qkv + head * dim, first_row, 3 * width, i, d, dim, end_row)
    key = _rows(qkv + width + head * dim, first_row, 3 * width, i, d, dim, end_row)
    value = _rows(qkv + 2 * width + head * dim, first_row, 3 * width, i, d, dim, end_row)
    given = _rows(gradient + head * dim, first_row, width, i, d, dim, end_row)
    weight = _weights_of(query, key, low, high, row, is_row, scale * LOG2_E)
    slope = _dot(given, tl.trans(value))
    slope = weight * (slope - tl.sum(weight * slope, 1)[:, None]) * scale
    slope = slope.to(query.dtype)
    into = qkv_gradient + head * dim
    _store(into, first_row, 3 * width, i, d, dim, end_row, _dot(slope, key))
    _store(into + width, first_row, 3 * width, i, d, dim, end_row, _dot(tl.trans(slope), query))
    _store(
        into + 2 * width,
        first_row,
        3 * width,
        i,
        d,
        dim,
        end_row,
        _dot(tl.trans(weight.to(query.dtype)), given),
    )


@triton.jit
def query_backward_kernel(
    gradient, qkv, out, log_sum, along, qkv_gradient, tiles, rows, heads, dim, scale, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The queries' gradients of a slice of a long sequence, and along [heads, rows]: output times its gradient."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    first_row, end_row = tl.load(tile), tl.load(tile + 1)
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    row = first_row + i
    is_row = row < end_row
    first_key, end_key = tl.load(tile + 2), tl.load(tile + 3)
    width = heads * dim
    query = _rows(qkv + head * dim, first_row, 3 * width, i, d, dim, end_row)
    given = _rows(gradient + head * dim, first_row, width, i, d, dim, end_row)
    result = _rows(out + head * dim, first_row, width, i, d, dim, end_row)
    product = tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(along + head.to(tl.int64) * rows + row, product, is_row)
    # Infinite where there is no row: its weights are zeros.
    log = tl.load(log_sum + head.to(tl.int64) * 2 * rows + row, is_row, float("inf"))
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    factor = scale * LOG2_E
    for at in range(first_key, end_key, BLOCK):
        key = _rows(qkv + width + head * dim, at, 3 * width, i, d, dim, end_key)
        value = _rows(qkv + 2 * width + head * dim, at, 3 * width, i, d, dim, end_key)
        past = tl.where(at + i < end_key, 0.0, float("-inf"))[None, :]
        weight = tl.math.exp2(_dot(query, tl.trans(key)) * factor - log[:, None] + past)
        slope = weight * (_dot(given, tl.trans(value)) - product[:, None])
        total += _dot(slope.to(key.dtype), key)
    _store(qkv_gradient + head * dim, first_row, 3 * width, i, d, dim, end_row, total * scale)


@triton.jit
def key_backward_kernel(
    gradient, qkv, log_sum, along, qkv_gradient, tiles, rows, heads, dim, scale, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The keys' and values' gradients of a slice of a long sequence."""
    tile, head = tiles + 4 * tl.program_id(0), tl.program_id(1)
    first_key, end_key = tl.load(tile), tl.load(tile + 1)
    first_row, end_row = tl.load(tile + 2), tl.load(tile + 3)
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    width = heads * dim
    key = _rows(qkv + width + head * dim, first_key, 3 * width, i, d, dim, end_key)
    value = _rows(qkv + 2 * width + head * dim, first_key, 3 * width, i, d, dim, end_key)
    key_sum = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    factor = scale * LOG2_E
    for at in range(first_row, end_row, BLOCK):
        row = at + i
        is_row = row < end_row
        query = _rows(qkv + head * dim, at, 3 * width, i, d, dim, end_row)
        given = _rows(gradient + head * dim, at, width, i, d, dim, end_row)
        product = tl.load(along + head.to(tl.int64) * rows + row, is_row, 0.0)
        log = tl.load(log_sum + head.to(tl.int64) * 2 * rows + row, is_row, float("inf"))
        weight = tl.math.exp2(_dot(query, tl.trans(key)) * factor - log[:, None])
        value_sum += _dot(tl.trans(weight.to(given.dtype)), given)
        slope = weight * (_dot(given, tl.trans(value)) - product[:, None])
        key_sum += _dot(tl.trans(slope.to(query.dtype)), query)
    into = qkv_gradient + head * dim
    _store(into + width, first_key, 3 * width, i, d, dim, end_key, key_sum * scale)
    _store(into + 2 * width, first_key, 3 * width, i, d, dim, end_key, value_sum)


@on_its_device
def attention_forward(
    qkv: Tensor, groups: tuple[tuple[int, int], ...], scale: float, out: Tensor, softmax: Tensor
) -> None:
    """As torch.ops.pera_fast.attention_forward, for (number of sequences, their length) in row order and scale > 0;
    of softmax only what `long_forward_kernel` leaves for the backward pass is written.
    """
    rows, _, heads, dim = qkv.shape
    block, block_d, warps, _ = config(qkv.dtype, dim, _capability(qkv.device))
    tiles = _tiles(groups, qkv.device, block)
    options = {"num_warps": warps, "num_stages": NUM_STAGES, "enable_fp_fusion": True}
    if len(tiles.short):
        short_forward_kernel[(len(tiles.short), heads)](
            qkv, out, tiles.short, tiles.start, tiles.end, heads, dim, scale, block, block_d, **options
        )
    if len(tiles.long):
        long_forward_kernel[(len(tiles.long), heads)](
            qkv, out, softmax, tiles.long, rows, heads, dim, scale, block, block_d, **options
        )


@on_its_device
def attention_backward(
    gradient: Tensor, qkv: Tensor, groups: tuple[tuple[int, int], ...], scale: float, out: Tensor, softmax: Tensor,
    qkv_gradient: Tensor,
) -> None:  # fmt: skip
    """As torch.ops.pera_fast.attention_backward."""
    rows, _, heads, dim = qkv.shape
    block, block_d, warps, warps_long = config(qkv.dtype, dim, _capability(qkv.device))
    tiles = _tiles(groups, qkv.device, block)
    options = {"num_stages": NUM_STAGES, "enable_fp_fusion": True}
    if len(tiles.short):
        short_backward_kernel[(len(tiles.short), heads)](
            gradient, qkv, qkv_gradient, tiles.short, tiles.start, tiles.end, heads, dim, scale, block,
            block_d, num_warps=warps, **options,
        )  # fmt: skip
    if len(tiles.long):
        along, grid = softmax.new_empty(heads, rows), (len(tiles.long), heads)
        query_backward_kernel[grid](
            gradient, qkv, out, softmax, along, qkv_gradient, tiles.long, rows, heads, dim, scale, block,
            block_d, num_warps=warps_long, **options,
        )  # fmt: skip
        key_backward_kernel[grid](
            gradient, qkv, softmax, along, qkv_gradient, tiles.long, rows, heads, dim, scale, block,
            block_d, num_warps=warps_long, **options,
        )  # fmt: skip
