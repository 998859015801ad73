"""The optimiser: clip to a global norm, AdamW, and the teacher's moving average, as one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pera_fast import ops

_NOT_DECAYED = ("cls_token", "pos_embed", "mask_token", "weight_g")


class AdamWEMA(torch.optim.Optimizer):
    """AdamW over student parameters, each optionally followed by a teacher; state as torch.optim.AdamW's.

    pairs: (name, parameter, its teacher or None). decay_all: weight decay on every parameter, as the
    PerA authors do; off, it spares biases, norms, tokens, positions and weight_g.
    """

    def __init__(
        self,
        pairs: list[tuple[str, nn.Parameter, Tensor | None]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 2e-5,
        clip_norm: float = 3.0,
        decay_all: bool = True,
    ) -> None:
        self.names = [name for name, _, _ in pairs]
        self.clip_norm = clip_norm
        self._teacher = {parameter: teacher for _, parameter, teacher in pairs}
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter, _ in pairs:
            is_spared = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _NOT_DECAYED
            (spared if is_spared and not decay_all else decayed).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed, "decayed": True}]
        if spared:
            groups.append({"params": spared, "decayed": False})
        super().__init__(groups, {"betas": betas, "eps": eps})
        for parameter in self._teacher:
            self.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def parameters_in_order(self) -> list[nn.Parameter]:
        """The parameters in the order of `names`."""
        return list(self._teacher)

    def grad_norm(self) -> Tensor:
        """L2 norm of the whole gradient, float []."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._teacher if p.grad is not None])

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, *, lr: float, weight_decay: float, momentum: float, grad_norm: Tensor | None = None
    ) -> Tensor:
        """Update parameters and teachers; returns the gradient's norm before clipping.

        momentum: of the teacher's moving average. grad_norm: if it was computed before.
        """
        norm = self.grad_norm() if grad_norm is None else grad_norm
        clip_coefficient = min(1.0, self.clip_norm / (float(norm) + 1e-6))
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            for state in states:
                state["step"] += 1
            ops.adamw_ema(
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [self._teacher[p] for p in params],
                step=int(states[0]["step"]),
                lr=lr,
                weight_decay=weight_decay if group["decayed"] else 0.0,
                betas=group["betas"],
                eps=group["eps"],
                clip_coefficient=clip_coefficient,
                momentum=momentum,
            )
        return norm
