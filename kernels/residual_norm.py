"""residual_norm on a GPU: each row of the stream passes once. Formulas and names: csrc/residual_norm.h.

Rows of a branch are unique, so every result is written once and no atomics are needed; the sums over rows for
weight and bias are added in a fixed order: equal calls give equal bits.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pera_fast.kernels.launch import on_its_device

# Of the backward pass, in which a program's rows share its sums for weight and bias: one wave of programs, as many as
# registers let run at once, but no fewer rows than make the sums over programs a small part of the work.
PROGRAMS_PER_MULTIPROCESSOR, LEAST_ROWS = 6, 16


@triton.jit
def _place(table, row, HAS: tl.constexpr, HAS_TABLE: tl.constexpr):
    """Where a row of the stream lies among a branch's, if there is one; -1 for nowhere."""
    place = tl.full((), -1, tl.int32)
    if HAS:
        place = row
        if HAS_TABLE:
            place = tl.load(table + row)
    return place


@triton.jit
def forward_kernel(
    source, x, branch, branch_row, scale, y, next_row, weight, bias, normalised, inverse_deviation, dim, eps,
    IN_PLACE: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_BRANCH_ROW: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_NEXT_ROW: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    KEEPS: tl.constexpr, KEEPS_NORMALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < dim
    place = _place(branch_row, row, HAS_BRANCH, HAS_BRANCH_ROW)
    target = _place(next_row, row, HAS_Y, HAS_NEXT_ROW)
    # In place, a row that neither branch works on stays as it is: most do, in the blocks before the targets enter.
    reads, writes = inside, inside
    if IN_PLACE:
        reads = inside & (k * 0 + tl.maximum(place, target) >= 0)
        writes = inside & (k * 0 + place >= 0)
    value = tl.load(source + row.to(tl.int64) * dim + k, reads, 0.0)
    if HAS_BRANCH:
        if place >= 0:
            factor = 1.0
            if HAS_SCALE:
                factor = tl.load(scale + place)
            added = tl.load(branch + place.to(tl.int64) * dim + k, inside, 0.0).to(tl.float32)
            value += factor * added
        tl.store(x + row.to(tl.int64) * dim + k, value, writes)
    if HAS_Y:
        if target >= 0:
            mean = tl.sum(value, 0) / dim
            centred = tl.where(inside, value - mean, 0.0)
            inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / dim + eps)
            out = centred * inverse
            there = target.to(tl.int64) * dim + k
            if KEEPS:
                tl.store(inverse_deviation + target, inverse)
            if KEEPS_NORMALISED:
                tl.store(normalised + there, out.to(normalised.dtype.element_ty), inside)
            if HAS_WEIGHT:
                out *= tl.load(weight + k, inside, 0.0)
            if HAS_BIAS:
                out += tl.load(bias + k, inside, 0.0)
            tl.store(y + there, out.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    x_gradient, y_gradient, branch_row, scale, next_row, weight, normalised, inverse_deviation, out,
    branch_gradient, partial, rows, each, dim, IN_PLACE: tl.constexpr, HAS_X: tl.constexpr, HAS_Y: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_BRANCH_ROW: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NEXT_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [programs, 2, dim]: sums over this program's rows, of which it has `each`, for weight and bias."""
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < dim
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    factors = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_WEIGHT:
        factors = tl.load(weight + k, inside, 0.0)
    for i in range(each):
        row = tl.minimum(program * each + i, rows - 1)  # the last row again, unstored, where there is none
        stores = inside & (k * 0 + program * each + i < rows)
        place = row.to(tl.int64) * dim + k
        target = _place(next_row, row, HAS_Y, HAS_NEXT_ROW)
        source = _place(branch_row, row, HAS_BRANCH, HAS_BRANCH_ROW)
        reads, writes = inside, stores
        if IN_PLACE:  # only the norm changes a row's gradient
            reads = inside & (k * 0 + tl.maximum(source, target) >= 0)
            writes = stores & (k * 0 + target >= 0)
        gradient = tl.zeros((BLOCK,), tl.float32)
        if HAS_X:
            gradient = tl.load(x_gradient + place, reads, 0.0)
        if HAS_Y:
            if target >= 0:
                there = target.to(tl.int64) * dim + k
                given = tl.load(y_gradient + there, inside, 0.0).to(tl.float32)
                value = tl.load(normalised + there, inside, 0.0).to(tl.float32)
                weighted = given * factors
                mean = tl.sum(weighted, 0) / dim
                slope = tl.sum(weighted * value, 0) / dim
                gradient += tl.load(inverse_deviation + target) * (weighted - mean - value * slope)
                weight_sum += tl.where(stores, given * value, 0.0)
                bias_sum += tl.where(stores, given, 0.0)
        tl.store(out + place, gradient, writes)
        if HAS_BRANCH:
            if source >= 0:
                factor = 1.0
                if HAS_SCALE:
                    factor = tl.load(scale + source)
                there = source.to(tl.int64) * dim + k
                tl.store(
                    branch_gradient + there, (factor * gradient).to(branch_gradient.dtype.element_ty), stores
                )
    if HAS_Y:
        tl.store(partial + program.to(tl.int64) * 2 * dim + k, weight_sum, inside)
        tl.store(partial + program.to(tl.int64) * 2 * dim + dim + k, bias_sum, inside)


# A branch's table is asked for four times in a step: by it and the one before, forward and backward.
_tables: MutableMapping[Tensor, tuple[tuple[int, ...], Tensor]] = WeakIdKeyDictionary()


def _table(chosen: Tensor | None, rows: int) -> Tensor | None:
    """Where each row of the stream lies among `chosen`, int32 [rows], -1 for nowhere; made once until it changes.

    Once for a stream, and again for a graph, whose replays make it anew: two graphs must not share one `chosen`.
    """
    if chosen is None:
        return None
    state = (rows, -1 if chosen.is_inference() else chosen._version)
    if chosen.is_cuda:
        stream = torch.cuda.current_stream(chosen.device).cuda_stream
        state += (stream, torch.cuda.is_current_stream_capturing())
    known = _tables.get(chosen)
    if known is not None and known[0] == state and state[1] >= 0:
        return known[1]
    table = torch.full((rows,), -1, dtype=torch.int32, device=chosen.device)
    table.scatter_(0, chosen, torch.arange(len(chosen), dtype=torch.int32, device=chosen.device))
    _tables[chosen] = state, table
    return table


def num_warps(block: int) -> int:
    """For rows padded to `block` numbers: one thread for each, as in place a second could read what one has written."""
    return max(1, min(4, block // 128))


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@on_its_device
def residual_norm_forward(
    source: Tensor,
    x: Tensor, branch: Tensor | None, rows: Tensor | None, scale: Tensor | None, next_rows: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, y: Tensor | None, normalised: Tensor | None,
    inverse_deviation: Tensor | None,
) -> None:  # fmt: skip
    """As torch.ops.pera_fast.residual_norm_forward; rows that are out of bounds or twice are not noticed."""
    if len(x) == 0:
        return
    keeps_normalised = normalised is not None and y is not None and normalised.data_ptr() != y.data_ptr()
    block = triton.next_power_of_2(x.shape[1])
    forward_kernel[(len(x),)](
        source, x, branch, _table(rows, len(x)), scale, y, _table(next_rows, len(x)), weight, bias, normalised,
        inverse_deviation, x.shape[1], eps, source.data_ptr() == x.data_ptr(), branch is not None,
        rows is not None, scale is not None, y is not None, next_rows is not None, weight is not None,
        bias is not None, inverse_deviation is not None, keeps_normalised, block, num_warps=num_warps(block),
        enable_fp_fusion=True,
    )  # fmt: skip


@on_its_device
def residual_norm_backward(
    x_gradient: Tensor | None, y_gradient: Tensor | None, rows: Tensor | None, scale: Tensor | None,
    next_rows: Tensor | None, weight: Tensor | None, normalised: Tensor | None,
    inverse_deviation: Tensor | None, out: Tensor, branch_gradient: Tensor | None,
    weight_gradient: Tensor | None, bias_gradient: Tensor | None,
) -> None:  # fmt: skip
    """As torch.ops.pera_fast.residual_norm_backward."""
    count, dim = out.shape
    block = triton.next_power_of_2(dim)
    most = PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(out.device)
    each = max(triton.cdiv(count, most), LEAST_ROWS)
    programs = triton.cdiv(count, each)
    partial = None if y_gradient is None else out.new_empty(programs, 2, dim)
    if programs:
        backward_kernel[(programs,)](
            x_gradient, y_gradient, _table(rows, count), scale, _table(next_rows, count), weight, normalised,
            inverse_deviation, out, branch_gradient, partial, count, each, dim,
            x_gradient is not None and x_gradient.data_ptr() == out.data_ptr(), x_gradient is not None,
            y_gradient is not None, branch_gradient is not None, rows is not None, scale is not None,
            next_rows is not None, weight is not None, block, num_warps=num_warps(block), enable_fp_fusion=True,
        )  # fmt: skip
    for which, target in enumerate((weight_gradient, bias_gradient)):
        if target is not None and partial is not None:
            torch.sum(partial[:, which], 0, out=target)
        elif target is not None:
            target.zero_()
