"""The L2 norm over all gradients, with equal bits whenever it is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch, _library, _parameters


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """√(Σ g²) over all numbers of all tensors, summed in a fixed order.

    grads: float tensors of any shapes on one device; float32 and bfloat16 take the kernels, other dtypes PyTorch.

    Returns float32 [] on their device (0 without tensors, on the CPU), not waited for. Raises ValueError when the
    tensors are on several devices.
    """
    if not grads:
        return torch.zeros(())
    device = grads[0].device
    _parameters.check_device("grads", grads, device)
    function = _dispatch.function("grad_norm", device.type)
    if function is _kernels and not _parameters.are_low(grads):
        function = _torch_foreach
    return function(grads)


def _kernels(grads: Sequence[Tensor]) -> Tensor:
    norm = torch.empty((), dtype=torch.float32, device=grads[0].device)
    torch.ops.pera_fast.grad_norm([_parameters.in_memory_order(g).contiguous() for g in grads], norm)
    return norm


def _torch_foreach(grads: Sequence[Tensor]) -> Tensor:
    norms: list[Tensor] = []
    # clip_grad_norm_ sums bfloat16 in bfloat16: off by some thousandths, and float16's norms overflow.
    for dtype in (torch.float32, torch.float64):
        if same := [g for g in grads if (g.dtype == torch.float64) == (dtype == torch.float64)]:
            norms += torch._foreach_norm(same, 2, dtype)
    return torch.stack([norm.double() for norm in norms]).norm().float()


_library.without_result("grad_norm")

_dispatch.register("grad_norm", "cuda", _kernels, _library.why_no_cuda)
_dispatch.register("grad_norm", "cpp", _kernels, _library.why_no_cpp)
_dispatch.register("grad_norm", "torch", _torch_foreach)
_dispatch.register("grad_norm", "reference", reference.grad_norm)
