"""The teacher's moving average alone, for those who keep their optimiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch, _library, _parameters


@torch.no_grad()
def ema_update(
    teachers: Sequence[Tensor],
    params: Sequence[Tensor],
    momentum: float | Tensor,
    shadows: Sequence[Tensor | None] | None = None,
) -> None:
    """teacher += (1 - momentum)(param - teacher) in place, and shadow = bfloat16(teacher); in float32 or better.

    teachers, params: float tensors of equal shapes at each place; float32 and bfloat16 take the kernels, other
    dtypes PyTorch. momentum: a number, or a 0-d tensor that a captured graph reads anew at every replay.
    shadows: bfloat16 of the same shapes, or None at places without one, or None for none at all.

    Raises ValueError naming the argument when lengths, shapes, dtypes or devices do not fit.
    """
    shadows = shadows or [None] * len(teachers)
    _parameters.check("teachers", {"teachers": teachers, "params": params, "shadows": shadows})
    _parameters.check_shadows("shadows", shadows)
    if not teachers:
        return
    device = teachers[0].device
    _parameters.check_device("teachers", teachers, device)
    function = _dispatch.function("ema_update", device.type)
    if function is _kernels and not _parameters.are_low(teachers, params):
        function = _torch_foreach
    function(teachers, params, _parameters.scalars(device, momentum), shadows)


def _kernels(
    teachers: Sequence[Tensor], params: Sequence[Tensor], momentum: Tensor, shadows: Sequence[Tensor | None]
) -> None:
    written: _parameters.Lists = {"teachers": teachers, "shadows": shadows}
    t, low, p = _parameters.flat("teachers", written, {"params": params})
    torch.ops.pera_fast.ema_update(t, p, low, momentum)
    torch.autograd.graph.increment_version([x for x in (*t, *low) if x.numel()])


def _torch_foreach(
    teachers: Sequence[Tensor], params: Sequence[Tensor], momentum: Tensor, shadows: Sequence[Tensor | None]
) -> None:
    """Waits for a momentum that is on a GPU."""
    alike = [p.to(t.dtype) for p, t in zip(params, teachers, strict=True)]
    torch._foreach_lerp_(list(teachers), alike, float(1 - momentum))
    copies = [(low, t) for low, t in zip(shadows, teachers, strict=True) if low is not None]
    if copies:
        torch._foreach_copy_([low for low, _ in copies], [t for _, t in copies])


_library.without_result("ema_update")

_dispatch.register("ema_update", "cuda", _kernels, _library.why_no_cuda)
_dispatch.register("ema_update", "cpp", _kernels, _library.why_no_cpp)
_dispatch.register("ema_update", "torch", _torch_foreach)
_dispatch.register("ema_update", "reference", reference.ema_update)
