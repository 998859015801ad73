"""KoLeo: the spread of a crop's batch, through the prototypes' Gram matrix."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch, _library, _prototypes

_log = logging.getLogger("pera_fast")


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
    _prototypes.check("v, g", (v, g), z[0])
    if z.shape[1] < 2:
        _warn_of_one_row()
    with torch.autocast(z.device.type, enabled=False):
        return _dispatch.function("koleo", z.device.type)(_prototypes.at_least_float32(z), v, g)


@functools.cache
def _warn_of_one_row() -> None:
    _log.warning("KoLeo is 0: a batch of one image has no neighbours")


class _GramTimes(torch.autograd.Function):
    """WᵀW z for rows of z [m, d], W = g v/‖v‖ [K, d], without W as a whole."""

    @staticmethod
    def forward(ctx, z, v, g):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, v, g)
        if _is_cpp(z):
            product = torch.empty_like(z)
            torch.ops.pera_fast.gram_forward(v, g, _prototypes.columns(z), product)
            return product
        product = torch.zeros_like(z)
        for _, w in _prototypes.weights(v, g, len(z)):
            product += (w @ z.T).T @ w
        return product

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        z, v, g = ctx.saved_tensors
        gradient = gradient.contiguous()
        both = torch.cat((z, gradient))
        # dW = W (zᵀ gradient + gradientᵀ z): by the rows' logits while they are fewer than the columns of W.
        by_rows = len(both) < z.shape[1]
        swapped = torch.cat((gradient, z)) if by_rows else both.T @ torch.cat((gradient, z))
        dz, dv, dg = torch.zeros_like(z), torch.empty_like(v), torch.empty_like(g)
        if _is_cpp(z):
            torch.ops.pera_fast.gram_backward(v, g, _prototypes.columns(both), swapped, by_rows, dz, dv, dg)
            return dz, dv, dg
        for chunk, w in _prototypes.weights(v, g, len(both)):
            logits = w @ both.T
            dz += logits[:, len(z) :].T @ w
            dw = (logits if by_rows else w) @ swapped
            norm = torch.linalg.vector_norm(v[chunk], dim=1, keepdim=True)
            unit = v[chunk] / norm
            along = torch.linalg.vecdot(dw, unit)[:, None]
            dg[chunk] = along
            torch.mul(dw.addcmul_(along, unit, value=-1), g[chunk] / norm, out=dv[chunk])
        return dz, dv, dg


def _is_cpp(z: Tensor) -> bool:
    return _dispatch.resolve("koleo", z.device.type).backend == "cpp"


def _gram(z: Tensor, v: Tensor, g: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
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
    torch.library.register_fake("pera_fast::gram_forward", lambda *_: None)
    torch.library.register_fake("pera_fast::gram_backward", lambda *_: None)

_dispatch.register("koleo", "cpp", _gram, _library.why_no_cpp)
_dispatch.register("koleo", "torch", _gram)
_dispatch.register("koleo", "reference", reference.koleo)
