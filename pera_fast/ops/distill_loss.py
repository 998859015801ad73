"""Self-distillation over weight-normalised prototypes, and the KoLeo spread of the student's logits."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch, _library

_log = logging.getLogger("pera_fast")
# Raw logits of a chunk of prototypes fill about this much, to stay in cache on a CPU and to be many enough
# for a GPU; both networks' are there at once, and the gradient.
_CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
# Logits that fit into this are kept for the backward pass; those of the other chunks are made again.
_KEPT_BYTES = {"cpu": 32 * 2**20, "cuda": 64 * 2**20}


def _check_prototypes(name: str, prototypes: tuple[Tensor, Tensor], z: Tensor) -> None:
    v, g = prototypes
    if v.dim() != 2 or v.shape[1] != z.shape[1]:
        raise ValueError(f"{name}: expected v of shape [K, {z.shape[1]}], got {list(v.shape)}")
    if len(v) == 0:
        raise ValueError(f"{name}: expected at least one prototype, got v of shape {list(v.shape)}")
    if list(g.shape) != [len(v), 1]:
        raise ValueError(f"{name}: expected g of shape [{len(v)}, 1], got {list(g.shape)}")


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

    The logits are made chunk by chunk of the prototypes and never all at once, forward and backward: the
    extra memory is bounded whatever the number of rows. Nothing is approximated; equal calls on one device
    give equal bits. Under autocast to bfloat16 the products are taken in bfloat16, all sums in float32.

    z_student, z_teacher: float [n, d], crop-major. prototypes: v [K, d], g [K, 1].
    centre: float [K]. groups: rows of each crop, adding up to n.

    Returns float [len(groups)]: the mean over each crop's rows, in float32 or better. Gradients to
    z_student, and to the student's v and g. Raises ValueError naming the argument when a shape or
    temperature does not fit.
    """
    if z_student.dim() != 2 or z_student.shape != z_teacher.shape:
        raise ValueError(
            "z_teacher: expected the shape [n, d] of z_student, "
            f"got {list(z_student.shape)} and {list(z_teacher.shape)}"
        )
    _check_prototypes("prototypes_student", prototypes_student, z_student)
    _check_prototypes("prototypes_teacher", prototypes_teacher, z_teacher)
    num_prototypes = len(prototypes_student[0])
    if len(prototypes_teacher[0]) != num_prototypes:
        raise ValueError(
            f"prototypes_teacher: expected {num_prototypes} prototypes as the student's, "
            f"got {len(prototypes_teacher[0])}"
        )
    if list(centre.shape) != [num_prototypes]:
        raise ValueError(f"centre: expected shape [{num_prototypes}], got {list(centre.shape)}")
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
            return reference.distill_loss(
                _at_least_float32(z_student), _at_least_float32(z_teacher), prototypes_student,
                prototypes_teacher, centre, tau_student, tau_teacher, groups,
            )  # fmt: skip
        per_row = _chunked(*(x.float() for x in tensors), tau_student, tau_teacher, in_bfloat16)
        return torch.stack([part.mean() for part in per_row.split(list(groups))])


def koleo(z: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """KoLeo of each crop's batch: -mean_i log(‖x_i - x_nn(i)‖ + 1e-8), x the L2-normalised prototype logits.

    x_nn(i) is the row of the same crop that is nearest to x_i. Distances are taken through the prototypes'
    Gram matrix WᵀW, so that no logits are held; W = g v/‖v‖. Rows that are equal add a constant. Source:
    Sablayrolles et al. 2018 (arXiv 1806.03198).

    z: float [crops, n, d]. v: float [K, d]. g: float [K, 1].

    Returns (losses [crops] in float32 or better, nearest neighbour of each row int64 [crops, n]); below two
    rows the losses are 0, and a warning says so once. Raises ValueError when the shapes do not fit.
    """
    if z.dim() != 3 or z.shape[0] < 1 or z.shape[1] < 1:
        raise ValueError(f"z: expected shape [crops, n, d] with at least one row, got {list(z.shape)}")
    _check_prototypes("v, g", (v, g), z[0])
    if z.shape[1] < 2:
        _warn_of_one_row()
    with torch.autocast(z.device.type, enabled=False):
        return _dispatch.resolve("koleo", z.device.type).function(_at_least_float32(z), v, g)


@functools.cache
def _warn_of_one_row() -> None:
    _log.warning("KoLeo is 0: a batch of one image has no neighbours")


@torch.no_grad()
def sinkhorn_centre(
    z: Tensor, v: Tensor, g: Tensor, tau: float, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The centre that makes `distill_loss` use Sinkhorn-Knopp's assignments of the teacher's rows.

    Sinkhorn-Knopp scales exp(t/τ) in turn to equal sums over prototypes and over rows; what is left of it in
    a row's softmax is one factor per prototype, exp(-centre/τ). Source: SwAV (arXiv 2006.09882), as DINOv2
    uses it (arXiv 2304.07193).

    z: float [n, d], the teacher's rows of this rank. v: float [K, d]. g: float [K, 1]. tau: the teacher's
    temperature. group: the ranks whose rows count together, all with equally many iterations; None: the
    default group where torch.distributed is initialised, else this process alone.

    Returns float32 [K]. The logits are made chunk by chunk, once per iteration. Raises ValueError when a
    shape, the temperature or the number of iterations does not fit.
    """
    if z.dim() != 2 or len(z) < 1:
        raise ValueError(f"z: expected shape [n, d] with at least one row, got {list(z.shape)}")
    _check_prototypes("v, g", (v, g), z)
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau: expected a finite temperature above 0, got {tau}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")

    def over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, operation, group)
        return values

    with torch.autocast(z.device.type, enabled=False):
        z, v, g = z.float(), v.float(), g.float()
        log_w, log_u = z.new_zeros(len(z)), z.new_empty(len(v))
        rows = float(over_ranks(z.new_tensor([len(z)]), dist.ReduceOp.SUM))
        for _ in range(iterations):
            largest, total = z.new_full((len(z),), -torch.inf), z.new_zeros(len(z))
            for chunk, weight, chunks in _weights(v, g, len(z)):
                x = chunks.product(weight, z) / tau  # [prototypes, rows]
                scaled = x + log_w
                shift = over_ranks(scaled.amax(1), dist.ReduceOp.MAX)
                mass = over_ranks((scaled - shift[:, None]).exp_().sum(1), dist.ReduceOp.SUM)
                log_u[chunk] = -(shift + mass.log() + math.log(len(v)))
                x += log_u[chunk, None]
                larger = torch.maximum(largest, x.amax(0))
                total = total * (largest - larger).exp() + (x - larger).exp_().sum(0)
                largest = larger
            log_w = -(largest + total.log() + math.log(rows))
    return -tau * log_u


def mean_prototype_logit(z_mean: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Mean logit of a batch from its mean z, by linearity: d numbers instead of K to reduce over ranks.

    z_mean: float [d]. v: [K, d]. g: [K, 1]. Returns [K].
    """
    with torch.autocast(z_mean.device.type, enabled=False):
        return reference.prototype_logits(_at_least_float32(z_mean)[None], v, g)[0]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- chunks ---


@dataclass
class _Chunks:
    """The prototypes in chunks, and their products with rows of z."""

    rows: int
    prototypes: int
    dtype: torch.dtype  # of operands and raw logits
    device: str

    @staticmethod
    def of(z: Tensor, v: Tensor, in_bfloat16: bool = False) -> _Chunks:
        dtype = torch.bfloat16 if in_bfloat16 else torch.float32
        return _Chunks(len(z), len(v), dtype, z.device.type)

    @property
    def size(self) -> int:
        """Prototypes per chunk: a power of two from 256 to 4096 (CPU) or 16384 (GPU)."""
        fitting = _CHUNK_BYTES[self.device] // (self.rows * self.dtype.itemsize)
        most = 4096 if self.device == "cpu" else 16384
        return 2 ** int(math.log2(min(max(fitting, 256), most)))

    @property
    def kept(self) -> int:
        """How many of the first prototypes' logits are kept, in whole chunks."""
        fitting = _KEPT_BYTES[self.device] // (2 * self.rows * self.dtype.itemsize)
        return self.prototypes if fitting >= self.prototypes else fitting // self.size * self.size

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.prototypes, self.size):
            yield slice(start, min(start + self.size, self.prototypes))

    @property
    def kernels(self) -> Any:
        """What holds distill_sums and distill_gradient for this device."""
        if self.device == "cpu":
            return torch.ops.pera_fast
        from pera_fast.kernels import distill_loss  # needs Triton

        return distill_loss

    def operand(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v in the products' dtype, and the norms of its rows."""
        if self.dtype == torch.float32 or self.device != "cpu":
            return v.to(self.dtype), torch.linalg.vector_norm(v, dim=1)
        operand, norm = torch.empty_like(v, dtype=self.dtype), v.new_empty(len(v))
        torch.ops.pera_fast.distill_operand(v, operand, norm)  # reads v once
        return operand, norm

    def finish(self, product: Tensor, v: Tensor, along: Tensor, out: Tensor) -> None:
        """out = product - along * v, row by row."""
        if self.dtype == torch.float32 or self.device != "cpu":
            torch.addcmul(product.float(), v, along[:, None], value=-1, out=out)
        else:
            torch.ops.pera_fast.distill_finish(product, v, along, out)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a · bᵀ, [m, f] and [n, f] -> [m, n]; m is the long side."""
        if self.device == "cpu" and self.dtype == torch.float32:
            # As a convolution of one pixel, by oneDNN: see pera_fast.ops.patch_embed.
            kernel = b[:, :, None, None].contiguous(memory_format=torch.channels_last)
            return F.conv2d(_pixels(a), kernel).permute(0, 2, 3, 1).reshape(len(a), len(b))
        return a @ b.T

    def sum_over_prototypes(self, a: Tensor, b: Tensor) -> Tensor:
        """aᵀ · b, [m, n] and [m, f] -> [n, f]; m is the long side."""
        if self.device == "cpu" and self.dtype == torch.float32:
            # As the gradient of that convolution's kernel.
            kernel = a.new_empty(a.shape[1], b.shape[1], 1, 1)
            return torch.ops.aten.convolution_backward(
                _pixels(a), _pixels(b), kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
                [False, True, False],
            )[1].view(a.shape[1], b.shape[1])  # fmt: skip
        return a.T @ b


def _pixels(rows: Tensor) -> Tensor:
    """[m, f] as an image of m pixels and f channels, in place."""
    return rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)


_EIGHT = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("pera_fast::distill_loss", mutates_args=())
def _forward(
    z_student: Tensor, z_teacher: Tensor, v_student: Tensor, g_student: Tensor, v_teacher: Tensor,
    g_teacher: Tensor, centre: Tensor, tau_student: float, tau_teacher: float, in_bfloat16: bool,
) -> _EIGHT:  # fmt: skip
    """Each row's loss [n]; the rest is for the backward pass: log Σ exp x [n], log Σ exp y [n] (x and y as in
    csrc/distill_loss.h), scale of student and teacher [K], ‖v_student‖ [K], kept teacher and student logits.
    """
    chunks = _Chunks.of(z_student, v_student, in_bfloat16)
    rows, prototypes, dtype = chunks.rows, chunks.prototypes, chunks.dtype
    z_s, z_t = z_student.to(dtype), z_teacher.to(dtype)
    state = z_student.new_zeros(5, rows)
    state[[0, 3]] = -torch.inf
    norm_student, scale_student, scale_teacher = (z_student.new_empty(prototypes) for _ in range(3))
    kept = [z_s.new_empty(chunks.kept, rows) for _ in range(2)]
    for chunk in chunks:
        raw = []
        for z, v, g, scale, keep in (
            (z_t, v_teacher, g_teacher, scale_teacher, kept[0]),
            (z_s, v_student, g_student, scale_student, kept[1]),
        ):
            operand, norm = chunks.operand(v[chunk])
            if scale is scale_student:
                norm_student[chunk] = norm
            torch.div(g[chunk, 0], norm, out=scale[chunk])
            raw.append(chunks.product(operand, z))
            if chunk.stop <= len(keep):
                keep[chunk] = raw[-1]
        chunks.kernels.distill_sums(
            *raw, scale_teacher[chunk], scale_student[chunk], centre[chunk], 1 / tau_teacher, 1 / tau_student,
            state,
        )  # fmt: skip
    max_x, sum_x, sum_xy, max_y, sum_y = state
    log_x, log_y = max_x + sum_x.log(), max_y + sum_y.log()
    loss = log_y - sum_xy / sum_x
    return loss, log_x, log_y, scale_student, scale_teacher, norm_student, kept[0], kept[1]


@_forward.register_fake
def _(z_student, z_teacher, v_student, g_student, v_teacher, g_teacher, centre, tau_student, tau_teacher,
      in_bfloat16):  # type: ignore[no-untyped-def]  # fmt: skip
    chunks = _Chunks.of(z_student, v_student, in_bfloat16)
    rows = [z_student.new_empty(chunks.rows) for _ in range(3)]
    columns = [z_student.new_empty(chunks.prototypes) for _ in range(3)]
    kept = [z_student.new_empty((chunks.kept, chunks.rows), dtype=chunks.dtype) for _ in range(2)]
    return (*rows, *columns, *kept)


@torch.library.custom_op("pera_fast::distill_loss_backward", mutates_args=())
def _backward(
    gradient: Tensor, z_student: Tensor, z_teacher: Tensor, v_student: Tensor, v_teacher: Tensor,
    centre: Tensor, tau_student: float, tau_teacher: float, log_x: Tensor, log_y: Tensor,
    scale_student: Tensor, scale_teacher: Tensor, norm: Tensor, kept_teacher: Tensor, kept_student: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz [n, d], dv [K, d] and dg [K, 1] of the student, for the gradient [n] of the rows' losses."""
    chunks = _Chunks.of(z_student, v_student, kept_student.dtype == torch.bfloat16)
    dtype = chunks.dtype
    z_s, z_t = z_student.to(dtype), z_teacher.to(dtype)
    z_columns = z_s.T.contiguous()
    weight = gradient.float() / tau_student
    dz, dv = torch.zeros_like(z_student), torch.empty_like(v_student)
    dot = torch.empty_like(norm)
    buffer = z_s.new_empty(chunks.size, chunks.rows)
    for chunk in chunks:
        v = v_student[chunk].to(dtype)
        if chunk.stop <= len(kept_student):
            raw = [kept_teacher[chunk], kept_student[chunk]]
        else:
            raw = [chunks.product(v_teacher[chunk].to(dtype), z_t), chunks.product(v, z_s)]
        h = buffer[: chunk.stop - chunk.start]
        chunks.kernels.distill_gradient(
            *raw, scale_teacher[chunk], scale_student[chunk], centre[chunk], 1 / tau_teacher, 1 / tau_student,
            log_x, log_y, weight, h, dot[chunk],
        )  # fmt: skip
        dz += chunks.sum_over_prototypes(h, v)
        # The weight norm's derivative takes out what is along v.
        along = dot[chunk] * scale_student[chunk] / norm[chunk].square()
        chunks.finish(chunks.product(h, z_columns), v_student[chunk], along, dv[chunk])
    return dz, dv, (dot / norm)[:, None]


@_backward.register_fake
def _(gradient, z_student, z_teacher, v_student, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(z_student), torch.empty_like(v_student), v_student.new_empty(len(v_student), 1)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else zeros as large as the kept logits
    z_s, z_t, v_s, _, v_t, _, centre, *ctx.taus, _ = inputs
    ctx.save_for_backward(z_s, z_t, v_s, v_t, centre, *output[1:])


def _gradients(ctx, gradient, *_):  # type: ignore[no-untyped-def]
    z_s, z_t, v_s, v_t, centre, *saved = ctx.saved_tensors
    dz, dv, dg = _backward(gradient, z_s, z_t, v_s, v_t, centre, *ctx.taus, *saved)
    return dz, None, dv, dg, None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _chunked(*arguments: Any) -> Tensor:
    return _forward(*(x.contiguous() if isinstance(x, Tensor) else x for x in arguments))[0]


class _GramTimes(torch.autograd.Function):
    """WᵀW z for rows of z [m, d], W = g v/‖v‖ [K, d], without W as a whole."""

    @staticmethod
    def forward(ctx, z, v, g):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, v, g)
        product = torch.zeros_like(z)
        for _, w, chunks in _weights(v, g, len(z)):
            product += chunks.sum_over_prototypes(chunks.product(w, z), w)
        return product

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        z, v, g = ctx.saved_tensors
        gradient = gradient.contiguous()
        both = torch.cat((z, gradient))
        # dW = W (zᵀ gradient + gradientᵀ z): by the rows' logits while they are fewer than the columns of W.
        by_rows = len(both) < z.shape[1]
        swapped = torch.cat((gradient, z)).T.contiguous() if by_rows else both.T @ torch.cat((gradient, z))
        dz, dv, dg = torch.zeros_like(z), torch.empty_like(v), torch.empty_like(g)
        for chunk, w, chunks in _weights(v, g, len(both)):
            logits = chunks.product(w, both)
            dz += chunks.sum_over_prototypes(logits[:, len(z) :].contiguous(), w)
            dw = chunks.product(logits, swapped) if by_rows else w @ swapped
            norm = torch.linalg.vector_norm(v[chunk], dim=1, keepdim=True)
            unit = v[chunk] / norm
            along = torch.linalg.vecdot(dw, unit)[:, None]
            dg[chunk] = along
            torch.mul(dw.addcmul_(along, unit, value=-1), g[chunk] / norm, out=dv[chunk])
        return dz, dv, dg


def _weights(v: Tensor, g: Tensor, rows: int) -> Iterator[tuple[slice, Tensor, _Chunks]]:
    """The weight-normalised prototypes chunk by chunk."""
    chunks = _Chunks(rows, len(v), torch.float32, v.device.type)
    for chunk in chunks:
        norm = torch.linalg.vector_norm(v[chunk], dim=1, keepdim=True)
        yield chunk, v[chunk] * (g[chunk] / norm), chunks


def _koleo_gram(z: Tensor, v: Tensor, g: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    if z.dtype == torch.float64 or z.shape[1] < 2:
        return reference.koleo(z, v, g, eps)
    y = _GramTimes.apply(z.flatten(0, 1), v.float(), g.float()).view_as(z)
    # In the metric of the logits: the norm of z_i is √(z_i · y_i), the similarity z_i · y_j.
    norm = torch.linalg.vecdot(z, y).clamp(min=1e-30).sqrt()[..., None]
    with torch.no_grad():
        similarity = (z / norm) @ (y / norm).mT
        similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        neighbour = similarity.argmax(2)
    chosen = neighbour[..., None].expand_as(z)
    unit, image = z / norm, y / norm
    # Differences in z, not of similarities: near neighbours would be lost in the rounding of 1 - cos.
    squared = torch.linalg.vecdot(unit - unit.gather(1, chosen), image - image.gather(1, chosen))
    apart = squared > 0
    distance = torch.where(apart, squared, 1.0).sqrt() * apart  # equal rows: distance 0 and no gradient
    return -torch.log(distance + eps).mean(1), neighbour


if _library.why_no_cpp() is None:
    torch.library.register_fake("pera_fast::distill_sums", lambda *_: None)
    torch.library.register_fake("pera_fast::distill_gradient", lambda *_: None)
    torch.library.register_fake("pera_fast::distill_operand", lambda *_: None)
    torch.library.register_fake("pera_fast::distill_finish", lambda *_: None)

_dispatch.register("distill_loss", "triton", _chunked, _library.why_no_triton)
_dispatch.register("distill_loss", "cpp", _chunked, _library.why_no_cpp)
_dispatch.register("distill_loss", "reference", reference.distill_loss)
_dispatch.register("koleo", "torch", _koleo_gram)
_dispatch.register("koleo", "reference", reference.koleo)
