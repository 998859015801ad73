"""A model's copies on several ranks, whose gradients are averaged while the backward pass makes them: DDP."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel


def _sum_in_bfloat16(group, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, which are text here
    """torch's hook under a name that DDP does not refuse where gloo is the backend, which can do it, too."""
    return bf16_compress_hook(group, bucket)


class _Runs(nn.Module):
    """What DDP wraps: the model's parameters, under whatever forward pass it is called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class Replicas:
    """The forward pass of a model that every rank has a copy of.

    reduce_in: dtype in which gradients are averaged. Where one rank's pass fails, `finish_with_nan` takes that rank's
    part in what the others wait for: they come to the end of their step, see that it is not finite, and can agree.
    """

    def __init__(self, model: nn.Module, reduce_in: Literal["bf16", "fp32"]) -> None:
        self._model = model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers' new name is torch 2.13's
            # Buffers are equal on all ranks, as the centre is made of sums over them.
            self._ddp = DistributedDataParallel(
                _Runs(model), gradient_as_bucket_view=True, broadcast_buffers=False
            )
        if reduce_in == "bf16":
            self._ddp.register_comm_hook(None, _sum_in_bfloat16)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        # Those whose gradients the averaging backward pass has yet to make; None before its forward pass has ended.
        self._awaited: set[Tensor] | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._made) for p in self._trained]

    def close(self) -> None:
        """Take no part in backward passes any more; others may then take this object's place."""
        for hook in self._hooks:
            hook.remove()
        del self._ddp
        gc.collect()  # it is part of reference cycles, and takes its own hooks away at its end

    def _made(self, parameter: Tensor) -> None:
        if self._awaited is not None:
            self._awaited.discard(parameter)

    @contextmanager
    def averaging(self, is_last: bool) -> Iterator[None]:
        """Around a forward and backward pass: ranks average their gradients in the last of a step."""
        if is_last:
            yield
        else:
            with self._ddp.no_sync():
                yield
        self._awaited = None  # reached where nothing failed

    def __call__(self, *arguments: Any) -> Any:
        output = self._ddp(self._model, *arguments)
        if self._ddp.require_backward_grad_sync:
            self._awaited = set(self._trained)
        return output

    def finish_with_nan(self, forward: Callable[[], None]) -> None:
        """The averaging pass in place of one that failed, or what is left of it; the gradients are NaN.

        forward: what the forward pass exchanges with other ranks and has not yet, called unless that pass has ended.
        """

        def not_finite() -> Tensor:
            forward()
            return torch.stack([p.sum() for p in self._trained]).sum() * torch.nan

        if self._awaited is None:
            with self.averaging(is_last=True):
                self._ddp(not_finite).backward()
        elif self._awaited:
            torch.stack([p.sum() for p in self._awaited]).sum().mul(torch.nan).backward()
            self._awaited = None
