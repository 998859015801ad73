"""bfloat16 copies of float32 weights, so that a product need not make one each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Shadow:
    """A weight's bfloat16 copy. Made again when the weight has changed, unless who changed it made it, too.

    Changes are seen by PyTorch's version counter, which a write through `weight.data` and the fused steps of
    torch.optim do not advance: torch.autograd.graph.increment_version does.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.copy = torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
        self._version = -1

    def fresh(self) -> Tensor:
        """The copy, equal to the weight."""
        if self._version != self.weight._version:
            with torch.no_grad():
                self.copy.copy_(self.weight)
            self.mark()
        return self.copy

    def mark(self) -> None:
        """The copy has been made equal to the weight."""
        self._version = self.weight._version

    def __deepcopy__(self, memo: dict[int, Any]) -> Shadow:
        weight = memo.get(id(self.weight))
        if weight is None:
            raise RuntimeError("a Shadow is copied with the layer whose weight it is of")
        return Shadow(weight)


class _Stand(torch.autograd.Function):
    """The copy in the forward pass, the weight in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


def give_shadows(network: nn.Module) -> None:
    """A shadow for the weight of every linear layer and patch embedding of a network."""
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.dtype == torch.float32:
            layer.shadow = Shadow(layer.weight)  # type: ignore[assignment]


def shadows_of(network: nn.Module) -> list[Shadow]:
    """The shadows that `give_shadows` gave to it."""
    found = (getattr(layer, "shadow", None) for layer in network.modules())
    return [shadow for shadow in found if isinstance(shadow, Shadow)]


def weight_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The weight as a product takes it: under autocast to bfloat16 its shadow, if it has one."""
    weight, shadow = layer.weight, getattr(layer, "shadow", None)
    device = weight.device.type
    if shadow is None or not torch.is_autocast_enabled(device):
        return weight
    if torch.get_autocast_dtype(device) != torch.bfloat16:
        return weight
    copy = shadow.fresh()
    return _Stand.apply(weight, copy) if weight.requires_grad and torch.is_grad_enabled() else copy
