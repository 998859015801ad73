"""Self-distillation over weight-normalised prototypes, and the centre of the teacher's side."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch, _library, _prototypes

# Logits that fit into this are kept for the backward pass; those of the other prototypes are made again. On a GPU
# 131072 prototypes and 1000 rows fit in bfloat16.
KEPT_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


def distill_loss(
    z_student: Tensor,
    z_teacher: Tensor,
    prototypes_student: tuple[Tensor, Tensor],
    prototypes_teacher: tuple[Tensor, Tensor],
    centre: Tensor,
    tau_student: float,
    tau_teacher: float,
    groups: Sequence[int],
) -> Tensor:
    """Cross-entropy of each student crop against its own teacher crop, over K prototypes.

    For row i: -Σ_k softmax((t_i - centre) / tau_teacher)_k · log_softmax(s_i / tau_student)_k, where
    s = z_student · (g v/‖v‖)ᵀ with the student's (v, g) and t likewise with the teacher's. The teacher's
    side has no gradient. Source: DINO (arXiv 2104.14294), PerA (arXiv 2505.19447).

    The logits are made chunk by chunk of the prototypes; those that do not fit a fixed room are made again in the
    backward pass: the extra memory is bounded whatever the number of rows. Nothing is approximated; equal calls on
    one device give equal bits. Under autocast to bfloat16 the products are taken in bfloat16, all sums in float32.

    z_student, z_teacher: float [n, d], crop-major. prototypes: v [K, d], g [K, 1].
    centre: finite float [K]. groups: rows of each crop, adding up to n.

    Returns float [len(groups)]: the mean over each crop's rows, in float32 or better. Gradients to
    z_student, and to the student's v and g. Raises ValueError naming the argument when a shape or
    temperature does not fit.
    """
    if z_student.dim() != 2 or z_student.shape != z_teacher.shape:
        raise ValueError(
            "z_teacher: expected the shape [n, d] of z_student, "
            f"got {list(z_student.shape)} and {list(z_teacher.shape)}"
        )
    _prototypes.check("prototypes_student", prototypes_student, z_student)
    _prototypes.check("prototypes_teacher", prototypes_teacher, z_teacher)
    num_prototypes = len(prototypes_student[0])
    if len(prototypes_teacher[0]) != num_prototypes:
        raise ValueError(
            f"prototypes_teacher: expected {num_prototypes} prototypes as the student's, "
            f"got {len(prototypes_teacher[0])}"
        )
    for name, tensor in (("z_teacher", z_teacher), ("centre", centre)):
        if tensor.device != z_student.device:
            raise ValueError(f"{name}: expected it on {z_student.device} as z_student, got {tensor.device}")
    if list(centre.shape) != [num_prototypes]:
        raise ValueError(f"centre: expected shape [{num_prototypes}], got {list(centre.shape)}")
    _dispatch.check_constant(centre=centre, tau_student=tau_student, tau_teacher=tau_teacher)
    for name, tau in (("tau_student", tau_student), ("tau_teacher", tau_teacher)):
        if not (math.isfinite(tau) and tau > 0):
            raise ValueError(f"{name}: expected a finite temperature above 0, got {tau}")
    if min(groups, default=0) < 1 or sum(groups) != len(z_student):
        raise ValueError(
            f"groups: expected at least one row per crop, {len(z_student)} in all, got {list(groups)}"
        )
    device = z_student.device.type
    backend = _dispatch.resolve("distill_loss", device).backend
    tensors = (z_student, z_teacher, *prototypes_student, *prototypes_teacher, centre)
    is_double = any(x.dtype == torch.float64 for x in tensors)  # the kernels work in float32
    in_bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    with torch.autocast(device, enabled=False):
        if is_double or backend == "reference":
            z_s, z_t, v_s, g_s, v_t, g_t, centre = _prototypes.at_least_float32(*tensors)
            return reference.distill_loss(
                z_s, z_t, (v_s, g_s), (v_t, g_t), centre, tau_student, tau_teacher, groups
            )
        z_s, z_t, *rest = (x.float() for x in tensors)
        # Whole vectors of logits: a GPU's products and loads are several times as quick, a CPU's loops need no rest.
        z_s, z_t = (F.pad(z, (0, 0, 0, _prototypes.padding(len(z)))) for z in (z_s, z_t))
        per_row = _chunked(z_s, z_t, *rest, tau_student, tau_teacher, in_bfloat16)[: len(z_student)]
        if len(set(groups)) == 1:
            return per_row.view(len(groups), -1).mean(1)
        return torch.stack([part.mean() for part in per_row.split(list(groups))])


@torch.no_grad()
def sinkhorn_centre(
    z: Tensor, v: Tensor, g: Tensor, tau: float, iterations: int = 3, group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> Tensor:  # fmt: skip
    """The centre that makes `distill_loss` use Sinkhorn-Knopp's assignments of the teacher's rows.

    Sinkhorn-Knopp scales exp(t/τ) in turn to equal sums over prototypes and over rows; what is left of it in
    a row's softmax is one factor per prototype, exp(-centre/τ). Source: SwAV (arXiv 2006.09882), as DINOv2
    uses it (arXiv 2304.07193).

    z: float [n, d], the teacher's rows of this rank. v: float [K, d]. g: float [K, 1]. tau: the teacher's
    temperature. group: the ranks whose rows count together, all with equally many iterations; None: the
    default group where torch.distributed is initialised, else this process alone. alone: whether this rank's rows
    count without the others'.

    Returns float32 [K]. The logits are made chunk by chunk, once per iteration. Raises ValueError when a
    shape, the temperature or the number of iterations does not fit.
    """
    if z.dim() != 2 or len(z) < 1:
        raise ValueError(f"z: expected shape [n, d] with at least one row, got {list(z.shape)}")
    _prototypes.check("v, g", (v, g), z)
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau: expected a finite temperature above 0, got {tau}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")

    def over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if not alone and dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, operation, group)
        return values

    with torch.autocast(z.device.type, enabled=False):
        z, v, g = z.float(), v.float(), g.float()
        log_w, log_u = z.new_zeros(len(z)), z.new_empty(len(v))
        rows = over_ranks(z.new_full((), len(z)), dist.ReduceOp.SUM)
        for _ in range(iterations):
            largest, total = z.new_full((len(z),), -torch.inf), z.new_zeros(len(z))
            for chunk, weight in _prototypes.weights(v, g, len(z)):
                x = (weight @ z.T) / tau  # [prototypes, rows]
                scaled = x + log_w
                shift = over_ranks(scaled.amax(1), dist.ReduceOp.MAX)
                mass = over_ranks((scaled - shift[:, None]).exp_().sum(1), dist.ReduceOp.SUM)
                log_u[chunk] = -(shift + mass.log() + math.log(len(v)))
                x += log_u[chunk, None]
                larger = torch.maximum(largest, x.amax(0))
                total = total * (largest - larger).exp() + (x - larger).exp_().sum(0)
                largest = larger
            log_w = -(largest + total.log() + rows.log())
    return -tau * log_u


def mean_prototype_logit(z_mean: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Mean logit of a batch from its mean z, by linearity: d numbers instead of K to reduce over ranks.

    z_mean: float [d]. v: [K, d]. g: [K, 1]. Returns [K].
    """
    with torch.autocast(z_mean.device.type, enabled=False):
        z, v, g = _prototypes.at_least_float32(z_mean, v, g)
        # Not by W = g v/‖v‖, which would be written and read again.
        return (v @ z) * (g[:, 0] / torch.linalg.vector_norm(v, dim=1))


# --- both passes ---
#
# On a CPU the C++ kernels do everything, products included. On a GPU, and in bfloat16 on a CPU with AMX, the
# library takes the products, chunk by chunk of the prototypes, and kernels what lies between them.

_EIGHT = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@functools.cache
def _bfloat16_by() -> str:
    """What is quickest at bfloat16 products on this CPU: "library", "kernels", or "float32" kernels."""
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return "library"
    return "kernels" if torch.ops.pera_fast.isa() == 3 else "float32"


def _operand_dtype(z: Tensor, in_bfloat16: bool) -> torch.dtype:
    """Of the products' operands and of kept logits."""
    if in_bfloat16 and z.device.type == "cpu" and (_bfloat16_by() == "float32" or z.shape[1] % 32):
        return torch.float32
    return torch.bfloat16 if in_bfloat16 else torch.float32


def _is_whole(z: Tensor, dtype: torch.dtype) -> bool:
    """Whether the C++ kernels do everything."""
    return z.device.type == "cpu" and not (dtype == torch.bfloat16 and _bfloat16_by() == "library")


def _kept_shape(z: Tensor, prototypes: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of the kept raw logits, those of the first prototypes: whole chunks, or blocks of the C++ kernels."""
    rows = len(z) + (_prototypes.padding(len(z)) if _is_whole(z, dtype) else 0)
    fitting = KEPT_BYTES[z.device.type] // (2 * rows * dtype.itemsize)
    if fitting >= prototypes:
        return prototypes, rows
    first = _prototypes.chunks_of(prototypes, rows, dtype, z.device.type)[0].stop
    whole = 64 if _is_whole(z, dtype) else first
    return fitting // whole * whole, rows


def _row_pairs(z: Tensor) -> Tensor:
    """z itself; in bfloat16 two rows side by side, [stride / 2, d, 2]."""
    if z.dtype == torch.float32:
        return z
    return F.pad(z, (0, 0, 0, _prototypes.padding(len(z)))).unflatten(0, (-1, 2)).transpose(1, 2).contiguous()


def _kernels(z: Tensor) -> Any:
    """What holds distill_sums and distill_gradient for this device."""
    if z.device.type == "cpu":
        return torch.ops.pera_fast
    from pera_fast.kernels import distill_loss  # needs Triton

    return distill_loss


def _losses(
    z_student: Tensor, z_teacher: Tensor, v_student: Tensor, g_student: Tensor, v_teacher: Tensor,
    g_teacher: Tensor, centre: Tensor, tau_student: float, tau_teacher: float, in_bfloat16: bool,
) -> _EIGHT:  # fmt: skip
    """Each row's loss [n]; the rest is for the backward pass: log Σ exp x [n], log Σ exp y [n] (x and y as in
    csrc/distill_loss.h), scale of student and teacher [K], ‖v_student‖ [K], kept teacher and student logits.
    """
    prototypes, dtype = len(v_student), _operand_dtype(z_student, in_bfloat16)
    z_s, z_t = z_student.to(dtype), z_teacher.to(dtype)
    norm, scale_student, scale_teacher = (z_student.new_empty(prototypes) for _ in range(3))
    kept_teacher, kept_student = (z_s.new_empty(_kept_shape(z_student, prototypes, dtype)) for _ in range(2))
    state = z_student.new_zeros(5, len(z_student))
    if _is_whole(z_student, dtype):
        torch.ops.pera_fast.distill_forward(
            v_student, g_student, v_teacher, g_teacher, _prototypes.columns(z_s), _prototypes.columns(z_t),
            centre, 1 / tau_teacher, 1 / tau_student, scale_student, scale_teacher, norm, kept_teacher,
            kept_student, state,
        )  # fmt: skip
    else:
        state[::3].fill_(-torch.inf)  # the maxima; by a list of indices it would be a copy from the host
        for chunk in _prototypes.chunks_of(prototypes, len(z_s), dtype, z_s.device.type):
            raw = []
            for z, v, g, scale, kept in (
                (z_t, v_teacher, g_teacher, scale_teacher, kept_teacher),
                (z_s, v_student, g_student, scale_student, kept_student),
            ):
                operand, norm[chunk] = _operand(v[chunk], dtype)  # the student's norm is the last
                torch.div(g[chunk, 0], norm[chunk], out=scale[chunk])
                out = kept[chunk] if chunk.stop <= len(kept) else None
                raw.append(torch.mm(operand, z.T, out=out))
            _kernels(z_s).distill_sums(
                *raw, scale_teacher[chunk], scale_student[chunk], centre[chunk], 1 / tau_teacher, 1 / tau_student,
                state,
            )  # fmt: skip
    max_x, sum_x, sum_xy, max_y, sum_y = state
    log_x, log_y = max_x + sum_x.log(), max_y + sum_y.log()
    loss = log_y - sum_xy / sum_x
    return loss, log_x, log_y, scale_student, scale_teacher, norm, kept_teacher, kept_student


def _operand(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """v in the products' dtype, and the norms of its rows."""
    if v.device.type != "cpu" or dtype == torch.float32:
        return v.to(dtype), torch.linalg.vector_norm(v, dim=1)
    operand, norm = torch.empty_like(v, dtype=dtype), v.new_empty(len(v))
    torch.ops.pera_fast.distill_operand(v, operand, norm)  # reads v once
    return operand, norm


def _fake(z_student, z_teacher, v_student, g_student, v_teacher, g_teacher, centre, tau_student, tau_teacher,
      in_bfloat16):  # type: ignore[no-untyped-def]  # fmt: skip
    rows, prototypes = len(z_student), len(v_student)
    dtype = _operand_dtype(z_student, in_bfloat16)
    kept = _kept_shape(z_student, prototypes, dtype)
    return (
        *(z_student.new_empty(rows) for _ in range(3)),
        *(z_student.new_empty(prototypes) for _ in range(3)),
        *(z_student.new_empty(kept, dtype=dtype) for _ in range(2)),
    )


def _losses_backward(
    gradient: Tensor, z_student: Tensor, z_teacher: Tensor, v_student: Tensor, v_teacher: Tensor,
    centre: Tensor, tau_student: float, tau_teacher: float, log_x: Tensor, log_y: Tensor,
    scale_student: Tensor, scale_teacher: Tensor, norm: Tensor, kept_teacher: Tensor, kept_student: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz [n, d], dv [K, d] and dg [K, 1] of the student, for the gradient [n] of the rows' losses."""
    dtype = kept_student.dtype
    z_s, z_t = z_student.to(dtype), z_teacher.to(dtype)
    weight = gradient.float() / tau_student
    dz, dv, dot = torch.zeros_like(z_student), torch.empty_like(v_student), torch.empty_like(norm)
    if _is_whole(z_student, dtype):
        torch.ops.pera_fast.distill_backward(
            v_student, v_teacher, _prototypes.columns(z_s), _prototypes.columns(z_t), _row_pairs(z_s), centre,
            1 / tau_teacher, 1 / tau_student, scale_student, scale_teacher, norm, kept_teacher, kept_student,
            log_x, log_y, weight, dz, dv, dot,
        )  # fmt: skip
        return dz, dv, (dot / norm)[:, None]
    chunks = _prototypes.chunks_of(len(v_student), len(z_s), dtype, z_s.device.type)
    buffer = z_s.new_empty(chunks[0].stop, len(z_s))
    for chunk in chunks:
        v = v_student[chunk].to(dtype)
        if chunk.stop <= len(kept_student):
            raw = [kept_teacher[chunk], kept_student[chunk]]
        else:
            raw = [v_teacher[chunk].to(dtype) @ z_t.T, v @ z_s.T]
        h = buffer[: chunk.stop - chunk.start]
        _kernels(z_s).distill_gradient(
            *raw, scale_teacher[chunk], scale_student[chunk], centre[chunk], 1 / tau_teacher, 1 / tau_student,
            log_x, log_y, weight, h, dot[chunk],
        )  # fmt: skip
        dz += _prototypes.product(h.T, v)
        # The weight norm's derivative takes out what is along v.
        along = dot[chunk] * scale_student[chunk] / norm[chunk].square()
        if z_s.device.type == "cpu":
            torch.ops.pera_fast.distill_finish(h @ z_s, v_student[chunk], along, dv[chunk])
        else:
            slope = _prototypes.product(h, z_s)
            torch.addcmul(slope, v_student[chunk], along[:, None], value=-1, out=dv[chunk])
    return dz, dv, (dot / norm)[:, None]


def _fake_backward(gradient, z_student, z_teacher, v_student, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(z_student), torch.empty_like(v_student), v_student.new_empty(len(v_student), 1)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else zeros as large as the kept logits
    z_s, z_t, v_s, _, v_t, _, centre, *ctx.taus, _ = inputs
    ctx.save_for_backward(z_s, z_t, v_s, v_t, centre, *output[1:])


def _gradients(ctx, gradient, *_):  # type: ignore[no-untyped-def]
    z_s, z_t, v_s, v_t, centre, *saved = ctx.saved_tensors
    dz, dv, dg = _backward(gradient, z_s, z_t, v_s, v_t, centre, *ctx.taus, *saved)
    return dz, None, dv, dg, None, None, None, None, None, None


_forward = _library.define("distill_loss", _losses, _fake, _gradients, _save)
_backward = _library.define("distill_loss_backward", _losses_backward, _fake_backward)


def _chunked(*arguments: Any) -> Tensor:
    return _forward(*(x.contiguous() if isinstance(x, Tensor) else x for x in arguments))[0]


_library.without_result(
    "distill_forward",
    "distill_backward",
    "distill_sums",
    "distill_gradient",
    "distill_operand",
    "distill_finish",
)

_dispatch.register("distill_loss", "triton", _chunked, _library.why_no_triton)
_dispatch.register("distill_loss", "cpp", _chunked, _library.why_no_cpp)
_dispatch.register("distill_loss", "reference", reference.distill_loss)
