"""Self-distillation over weight-normalised prototypes, and the KoLeo spread of the student's logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch


def _check_prototypes(name: str, prototypes: tuple[Tensor, Tensor], z: Tensor) -> None:
    v, g = prototypes
    if v.dim() != 2 or v.shape[1] != z.shape[1]:
        raise ValueError(f"{name}: expected v of shape [K, {z.shape[1]}], got {list(v.shape)}")
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

    z_student, z_teacher: float [n, d], L2-normalised rows, crop-major. prototypes: v [K, d], g [K, 1].
    centre: float [K]. groups: rows of each crop, adding up to n.

    Returns float [len(groups)]: the mean over each crop's rows, computed in float32 or better, whatever
    autocast says. Raises ValueError naming the argument when a shape or temperature does not fit.
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
    function = _dispatch.resolve("distill_loss", z_student.device.type).function
    with torch.autocast(z_student.device.type, enabled=False):
        return function(
            _at_least_float32(z_student), _at_least_float32(z_teacher), prototypes_student, prototypes_teacher,
            centre, tau_student, tau_teacher, groups,
        )  # fmt: skip


def koleo(z: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """KoLeo over one crop's batch: -mean_i log(‖x_i - x_nn(i)‖ + 1e-8), x the L2-normalised prototype logits.

    z: float [n, d]. v: float [K, d]. g: float [K, 1].

    Returns (loss [], nearest neighbour of each row int64 [n]); below two rows the loss is 0.
    """
    _check_prototypes("v, g", (v, g), z)
    with torch.autocast(z.device.type, enabled=False):
        return _dispatch.resolve("koleo", z.device.type).function(_at_least_float32(z), v, g)


def mean_prototype_logit(z_mean: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Mean logit of a batch from its mean z, by linearity: d numbers instead of K to reduce over ranks.

    z_mean: float [d]. v: [K, d]. g: [K, 1]. Returns [K].
    """
    with torch.autocast(z_mean.device.type, enabled=False):
        return reference.prototype_logits(_at_least_float32(z_mean)[None], v, g)[0]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


_dispatch.register("distill_loss", "reference", reference.distill_loss)
_dispatch.register("koleo", "reference", reference.koleo)
