"""The parameters of whole models, and what the machine's memory gives: shared by the benchmarks of the update."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache

import torch
from compare import seconds_of
from torch import Tensor

from pera_fast.config import PRESETS
from pera_fast.model.pera import PerA
from pera_fast.model.shadow import give_shadows, shadows_of

MODELS = {"ViT-S": "vit_s", "ViT-B": "vit_b", "ViT-G": "vit_g_1024"}


@dataclass
class Parameters:
    """Of PerA's student and heads; teachers and bfloat16 copies are None where the model has none."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    teachers: list[Tensor | None]
    shadows: list[Tensor | None]
    teacher_shadows: list[Tensor | None]

    @classmethod
    def of(cls, model: str, device: str = "cpu") -> Parameters:
        with torch.device("meta"):
            network = PerA(PRESETS[MODELS[model]])
        give_shadows(network)
        copied = {shadow.weight for shadow in shadows_of(network)}
        torch.manual_seed(0)
        lists: list[list] = [[] for _ in range(8)]
        for _, parameter, teacher in network.ema_pairs():
            p = torch.randn(parameter.shape, device=device) * 0.02
            low = torch.zeros_like(p, dtype=torch.bfloat16) if parameter in copied else None
            taught_low = torch.zeros_like(p, dtype=torch.bfloat16) if teacher in copied else None
            t = None if teacher is None else p.clone()
            state = [torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=device)]
            for one, tensor in zip(
                lists, (p, torch.randn_like(p) * 1e-3, *state, t, low, taught_low), strict=True
            ):
                one.append(tensor)
        return cls(*lists)

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    def flat(self) -> list[Tensor]:
        """Everything that an update writes."""
        return [
            t
            for name, tensors in vars(self).items()
            if name not in ("grads", "steps")
            for t in tensors
            if t is not None
        ]

    def taught(self) -> tuple[list[Tensor], list[Tensor]]:
        """Teachers, and the parameters they follow."""
        both = [(t, p) for t, p in zip(self.teachers, self.params, strict=True) if t is not None]
        return [t for t, _ in both], [p for _, p in both]

    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """bfloat16 copies, and what they are of."""
        both = [
            (low, x)
            for lows, xs in ((self.shadows, self.params), (self.teacher_shadows, self.teachers))
            for low, x in zip(lows, xs, strict=True)
            if low is not None
        ]
        return [low for low, _ in both], [x for _, x in both]

    def bytes_moved(self) -> int:
        """Of one update that reads and writes each number once, and the gradient once more for its norm."""
        written = sum(t.numel() * t.element_size() for t in self.flat())
        read = written - sum(low.numel() * 2 for low in self.copies()[0]) + 4 * self.numel
        return written + read + 4 * self.numel


@cache
def bandwidth(device: str) -> float:
    """Bytes a second, read and written, of the faster of copying 256 MB and scaling them in place."""
    x = torch.ones(2**26, device=device)
    y = torch.empty_like(x)
    rates = []
    for function in (lambda: y.copy_(x), lambda: x.mul_(1.0)):
        function()
        rates.append(2 * x.nbytes / statistics.median(seconds_of(function, device) for _ in range(9)))
    return max(rates)
