"""The element-wise part of distill_loss on a GPU: the sums over a chunk of prototypes, and the gradient.

A chunk holds raw logits transposed, [prototypes, rows]. Formulas and names: csrc/distill_loss.h. Every result
is written once by one program, partial sums are added in a fixed order: equal calls give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pera_fast.kernels.launch import on_its_device

# Prototypes x rows of a tile: in four warps, 64 x 64 floats are 32 registers a thread for each of x and y. The
# gradient's tile is half of that, or it spills on sm_80.
BLOCK_PROTOTYPES, GRADIENT_PROTOTYPES, BLOCK_ROWS, NUM_WARPS = 64, 32, 64, 4
# Of the sums: at most so many programs share a chunk's prototypes, and no more than make so many in all, four for each
# of an H100's multiprocessors.
SPLITS, PROGRAMS = 64, 528
MERGE_ROWS = 32


@triton.jit
def _logits(teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student,
            k, i, prototypes, rows):  # fmt: skip
    """x, y and the student's raw logits of a tile; where there is no prototype x and y are -inf."""
    is_prototype = k < prototypes
    inside = is_prototype[:, None] & (i < rows)[None, :]
    # 64-bit: a chunk of 16384 prototypes and 2^17 rows passes 2^31.
    place = k.to(tl.int64)[:, None] * rows + i[None, :]
    t = tl.load(teacher + place, inside, 0.0).to(tl.float32)
    s = tl.load(student + place, inside, 0.0).to(tl.float32)
    scale_x = tl.load(scale_teacher + k, is_prototype, 0.0) * inverse_tau_teacher
    shift_x = tl.load(centre + k, is_prototype, 0.0) * inverse_tau_teacher
    scale_y = tl.load(scale_student + k, is_prototype, 0.0) * inverse_tau_student
    x = tl.where(is_prototype[:, None], t * scale_x[:, None] - shift_x[:, None], float("-inf"))
    y = tl.where(is_prototype[:, None], s * scale_y[:, None], float("-inf"))
    return x, y, s, inside, place


@triton.jit
def sums_kernel(
    teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student, partial,
    prototypes, rows, per_split, BLOCK_PROTOTYPES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """partial [splits, 5, rows]: max x, Σ exp, Σ exp · y, max y, Σ exp of one split's prototypes."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(1)
    start = split * per_split
    stop = tl.minimum(start + per_split, prototypes)
    max_x = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    max_y = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    sum_x = tl.zeros((BLOCK_ROWS,), tl.float32)
    sum_xy = tl.zeros((BLOCK_ROWS,), tl.float32)
    sum_y = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(start, stop, BLOCK_PROTOTYPES):
        k = first + tl.arange(0, BLOCK_PROTOTYPES)
        x, y, _, _, _ = _logits(
            teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student,
            k, i, stop, rows,
        )  # fmt: skip
        larger_x = tl.maximum(max_x, tl.max(x, 0))
        larger_y = tl.maximum(max_y, tl.max(y, 0))
        e = tl.exp(x - larger_x[None, :])
        old_x = tl.exp(max_x - larger_x)
        sum_x = sum_x * old_x + tl.sum(e, 0)
        # y is -inf where there is no prototype, and e is 0 there: their product would be NaN.
        sum_xy = sum_xy * old_x + tl.sum(tl.where((k < stop)[:, None], e * y, 0.0), 0)
        sum_y = sum_y * tl.exp(max_y - larger_y) + tl.sum(tl.exp(y - larger_y[None, :]), 0)
        max_x, max_y = larger_x, larger_y
    out = partial + split.to(tl.int64) * 5 * rows + i
    tl.store(out, max_x, i < rows)
    tl.store(out + rows, sum_x, i < rows)
    tl.store(out + 2 * rows, sum_xy, i < rows)
    tl.store(out + 3 * rows, max_y, i < rows)
    tl.store(out + 4 * rows, sum_y, i < rows)


@triton.jit
def merge_kernel(partial, state, splits, rows, SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """state [5, rows]: with the sums of every split."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.arange(0, SPLITS)
    inside = (split < splits)[:, None] & (i < rows)[None, :]
    place = partial + split[:, None] * 5 * rows + i[None, :]
    max_x, max_y = tl.load(place, inside, float("-inf")), tl.load(place + 3 * rows, inside, float("-inf"))
    here = state + i
    old_x, old_y = tl.load(here, i < rows, 0.0), tl.load(here + 3 * rows, i < rows, 0.0)
    larger_x, larger_y = tl.maximum(old_x, tl.max(max_x, 0)), tl.maximum(old_y, tl.max(max_y, 0))
    shrink_x, shrink_y = tl.exp(max_x - larger_x[None, :]), tl.exp(max_y - larger_y[None, :])
    old_x, old_y = tl.exp(old_x - larger_x), tl.exp(old_y - larger_y)
    sum_x = old_x * tl.load(here + rows, i < rows, 0.0)
    sum_x += tl.sum(shrink_x * tl.load(place + rows, inside, 0.0), 0)
    sum_xy = old_x * tl.load(here + 2 * rows, i < rows, 0.0)
    sum_xy += tl.sum(shrink_x * tl.load(place + 2 * rows, inside, 0.0), 0)
    sum_y = old_y * tl.load(here + 4 * rows, i < rows, 0.0)
    sum_y += tl.sum(shrink_y * tl.load(place + 4 * rows, inside, 0.0), 0)
    tl.store(here, larger_x, i < rows)
    tl.store(here + rows, sum_x, i < rows)
    tl.store(here + 2 * rows, sum_xy, i < rows)
    tl.store(here + 3 * rows, larger_y, i < rows)
    tl.store(here + 4 * rows, sum_y, i < rows)


@triton.jit
def gradient_kernel(
    teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student, log_sum_x,
    log_sum_y, weight, gradient, dot, prototypes, rows, BLOCK_PROTOTYPES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """gradient[k, i] = weight_i (softmax(y) - softmax(x)) scale_student_k; dot[k]: Σ_i before scaling · raw."""
    k = tl.program_id(0) * BLOCK_PROTOTYPES + tl.arange(0, BLOCK_PROTOTYPES)
    scale = tl.load(scale_student + k, k < prototypes, 0.0)
    total = tl.zeros((BLOCK_PROTOTYPES,), tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        x, y, s, inside, place = _logits(
            teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student,
            k, i, prototypes, rows,
        )  # fmt: skip
        # Past the last row a logit has no bound, and its exponential must not be infinite: 0 times it would be NaN.
        q = tl.exp(x - tl.load(log_sum_x + i, i < rows, float("inf"))[None, :])
        p = tl.exp(y - tl.load(log_sum_y + i, i < rows, float("inf"))[None, :])
        value = tl.load(weight + i, i < rows, 0.0)[None, :] * (p - q)
        total += tl.sum(value * s, 1)
        tl.store(gradient + place, (value * scale[:, None]).to(gradient.dtype.element_ty), inside)
    tl.store(dot + k, total, k < prototypes)


@on_its_device
def distill_sums(
    teacher: Tensor, student: Tensor, scale_teacher: Tensor, scale_student: Tensor, centre: Tensor,
    inverse_tau_teacher: float, inverse_tau_student: float, state: Tensor,
) -> None:  # fmt: skip
    """Add a chunk's sums to `state` [5, rows]; as torch.ops.pera_fast.distill_sums."""
    prototypes, rows = student.shape
    blocks, row_blocks = triton.cdiv(prototypes, BLOCK_PROTOTYPES), triton.cdiv(rows, BLOCK_ROWS)
    per_split = triton.cdiv(blocks, min(SPLITS, max(1, PROGRAMS // row_blocks))) * BLOCK_PROTOTYPES
    splits = triton.cdiv(prototypes, per_split)
    partial = torch.empty(splits, 5, rows, dtype=torch.float32, device=student.device)
    sums_kernel[(row_blocks, splits)](
        teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student,
        partial, prototypes, rows, per_split, BLOCK_PROTOTYPES, BLOCK_ROWS, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
        partial, state, splits, rows, SPLITS, MERGE_ROWS, num_warps=NUM_WARPS, enable_fp_fusion=True
    )


@on_its_device
def distill_gradient(
    teacher: Tensor, student: Tensor, scale_teacher: Tensor, scale_student: Tensor, centre: Tensor,
    inverse_tau_teacher: float, inverse_tau_student: float, log_sum_x: Tensor, log_sum_y: Tensor, weight: Tensor,
    gradient: Tensor, dot: Tensor,
) -> None:  # fmt: skip
    """Write a chunk's gradient and dot; as torch.ops.pera_fast.distill_gradient."""
    prototypes, rows = student.shape
    gradient_kernel[(triton.cdiv(prototypes, GRADIENT_PROTOTYPES),)](
        teacher, student, scale_teacher, scale_student, centre, inverse_tau_teacher, inverse_tau_student,
        log_sum_x, log_sum_y, weight, gradient, dot, prototypes, rows, GRADIENT_PROTOTYPES, BLOCK_ROWS,
        num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
