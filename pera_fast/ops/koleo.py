"""KoLeo: the spread of a crop's batch, through the prototypes' Gram matrix."""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pera_fast import reference
from pera_fast.ops import _dispatch, _library, _prototypes

_log = logging.getLogger("pera_fast")
_PAIRS = 2**25  # of a crop's rows whose distances are held at once


def koleo(z: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """KoLeo of each crop's batch: -mean_i log(‖x_i - x_nn(i)‖ + 1e-8), x the L2-normalised prototype logits.

    x_nn(i) is the row of the same crop that is nearest to x_i. Distances are taken through the prototypes'
    Gram matrix WᵀW, so that no logits are held; W = g v/‖v‖. Rows that are equal add a constant. Under autocast to
    bfloat16 on a GPU it is the Gram matrix of W rounded to bfloat16. Source: Sablayrolles et al. 2018
    (arXiv 1806.03198).

    z: float [crops, n, d]. v: float [K, d]. g: float [K, 1].

    Returns (losses [crops] in float32 or better, nearest neighbour of each row int64 [crops, n]); below two
    rows the losses are 0, and a warning says so once. Raises ValueError when the shapes do not fit.
    """
    return koleo_and_prototypes(z, v, g)[:2]


def koleo_and_prototypes(z: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`koleo`, and v and g again, for `distill_loss` to take: its gradients come first, and KoLeo's are added in place.

    A gradient of v is as large as all prototypes, and two would be there at once. Not public: what hands one gradient
    to several of its inputs, as a sum does, must not take these.
    """
    if z.dim() != 3 or z.shape[0] < 1 or z.shape[1] < 1:
        raise ValueError(f"z: expected shape [crops, n, d] with at least one row, got {list(z.shape)}")
    _prototypes.check("v, g", (v, g), z[0])
    if z.shape[1] < 2:
        _warn_of_one_row()
    device = z.device.type
    in_bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    with torch.autocast(device, enabled=False):
        z, v, g = _prototypes.at_least_float32(z, v, g)
        if _dispatch.resolve("koleo", device).backend == "reference":
            return *reference.koleo(z, v, g), v, g
        return _gram(z, v, g, in_bfloat16 and device == "cuda")


@functools.cache
def _warn_of_one_row() -> None:
    _log.warning("KoLeo is 0: a batch of one image has no neighbours")


class _GramTimes(torch.autograd.Function):
    """WᵀW z for rows of z [m, d], W = g v/‖v‖ [K, d], without W as a whole; and v and g as they are.

    In C++ by the rows' logits, block by block: few rows are less work than WᵀW. Elsewhere by WᵀW itself, whatever the
    rows, which a GPU is quick at.
    """

    @staticmethod
    def forward(ctx, z, v, g, in_bfloat16):  # type: ignore[no-untyped-def]
        ctx.in_bfloat16 = in_bfloat16
        ctx.set_materialize_grads(False)
        if _is_cpp(z):
            ctx.save_for_backward(z, v, g)
            product = torch.empty_like(z)
            torch.ops.pera_fast.gram_forward(v, g, _prototypes.columns(z), product)
            return product, v, g
        gram = z.new_zeros(z.shape[1], z.shape[1])
        for _, w in _prototypes.weights(v, g, z.shape[1]):
            w = w.bfloat16() if in_bfloat16 else w
            gram += _prototypes.product(w.T, w)
        ctx.save_for_backward(z, v, g, gram)
        return z @ gram, v, g

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, dv, dg):  # type: ignore[no-untyped-def]
        if gradient is None:
            return None, dv, dg, None
        z, v, g, *gram = ctx.saved_tensors
        gradient = gradient.contiguous()
        adds = dv is not None or dg is not None
        both, swapped = torch.cat((z, gradient)), torch.cat((gradient, z))
        make = torch.zeros_like if adds else torch.empty_like
        dv, dg = (make(x) if d is None else d.contiguous() for d, x in ((dv, v), (dg, g)))
        if _is_cpp(z):
            # dW = W (zᵀ gradient + gradientᵀ z): by the rows' logits while they are fewer than the columns of W.
            by_rows, dz = len(both) < z.shape[1], torch.zeros_like(z)
            swapped = swapped if by_rows else both.T @ swapped
            torch.ops.pera_fast.gram_backward(
                v, g, _prototypes.columns(both), swapped, by_rows, adds, dz, dv, dg
            )
            return dz, dv, dg, None
        mixed = both.T @ swapped
        operand = mixed.bfloat16() if ctx.in_bfloat16 else mixed
        for chunk in _prototypes.chunks_of(len(v), z.shape[1], v.dtype, v.device.type):
            part = v[chunk]
            # dW = (g/‖v‖) v (zᵀ gradient + gradientᵀ z), of which the weight norm takes out what is along v.
            slope = _prototypes.product(part.to(operand.dtype), operand)
            norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            factor, along = g[chunk] / norm, torch.linalg.vecdot(slope, part)[:, None]
            of_g, of_v = along * factor / norm, slope.addcmul_(part, along / norm.square(), value=-1)
            if adds:
                dg[chunk] += of_g
                dv[chunk].addcmul_(of_v, factor.square())
            else:
                dg[chunk] = of_g
                torch.mul(of_v, factor.square(), out=dv[chunk])
        return gradient @ gram[0], dv, dg, None


def _is_cpp(z: Tensor) -> bool:
    return _dispatch.resolve("koleo", z.device.type).backend == "cpp"


def _gram(
    z: Tensor, v: Tensor, g: Tensor, in_bfloat16: bool = False, eps: float = 1e-8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if z.dtype == torch.float64 or z.shape[1] < 2:
        return *reference.koleo(z, v, g, eps), v, g
    rows = (x.contiguous() for x in (z.flatten(0, 1), v, g))
    y, v, g = _GramTimes.apply(*rows, in_bfloat16)
    y = y.view_as(z)
    # In the metric of the logits: the norm of z_i is √(z_i · y_i), the similarity z_i · y_j.
    norm = torch.linalg.vecdot(z, y).clamp(min=eps**2).sqrt()[..., None]
    unit, image = z / norm, y / norm
    with torch.no_grad():
        # About their mean: distances of rows that are all alike are lost in the rounding of 1 - cos.
        neighbour = _nearest(unit - unit.mean(1, keepdim=True), image - image.mean(1, keepdim=True))
    place = neighbour + z.shape[1] * torch.arange(len(z), device=z.device)[:, None]
    # Not by gather, whose gradient a GPU adds up in any order.
    nearest = (F.embedding(place, x.flatten(0, 1)) for x in (unit, image))
    squared = torch.linalg.vecdot(*(x - y for x, y in zip((unit, image), nearest, strict=True)))
    apart = ~(squared <= 0)  # NaN is no distance of 0
    distance = torch.where(apart, squared, 1.0).sqrt() * apart  # equal rows: distance 0 and no gradient
    return -torch.log(distance + eps).mean(1), neighbour, v, g


def _nearest(x: Tensor, image: Tensor) -> Tensor:
    """For each row of x [crops, n, d] the nearest other one of its crop, int64 [crops, n]; image: x times WᵀW."""
    own, rows, found = torch.linalg.vecdot(x, image), x.shape[1], []
    # A part of the rows at a time: with hundreds of ranks all pairs would be more than the rest of the step.
    for start in range(0, rows, block := max(1, _PAIRS // rows)):
        part = slice(start, start + block)
        pairs = own[:, part, None] + own[:, None] - x[:, part] @ image.mT - image[:, part] @ x.mT
        pairs.diagonal(start, 1, 2).fill_(torch.inf)
        found.append(pairs.argmin(2))
    return torch.cat(found, dim=1)


_library.without_result("gram_forward", "gram_backward")

_dispatch.register("koleo", "cpp", _gram, _library.why_no_cpp)
_dispatch.register("koleo", "torch", _gram)
_dispatch.register("koleo", "reference", reference.koleo)
