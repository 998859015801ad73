"""What changes from step to step: learning rate, weight decay, teacher momentum and temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pera_fast.config import Config


@dataclass(frozen=True)
class StepValues:
    lr: float
    weight_decay: float
    momentum: float  # of the teacher's moving average
    teacher_temperature: float


@dataclass(frozen=True)
class Schedules:
    """Values per optimiser step, counted from 0. Source: PerA (arXiv 2505.19447).

    lr: 0 -> lr linearly over warmup_epochs, then cosine to lr_final. Weight decay and momentum: cosine from
    start to end. Teacher temperature: linear over its warm-up, then constant.
    """

    config: Config
    steps_per_epoch: float
    total_steps: int

    @classmethod
    def of(cls, config: Config, images_per_epoch: int, ranks: int) -> Schedules:
        """Schedules for a run over `images_per_epoch` images on `ranks` ranks."""
        whole_batch = config.run.images * config.run.accumulate * ranks
        per_epoch = images_per_epoch / whole_batch
        return cls(config, per_epoch, max(1, math.ceil(config.run.epochs * per_epoch)))

    def at(self, step: int) -> StepValues:
        optim, last = self.config.optim, self.total_steps
        warmup = min(round(optim.warmup_epochs * self.steps_per_epoch), last)
        if step < warmup:
            lr = _linear(0.0, optim.lr, step, warmup)
        else:
            lr = _cosine(optim.lr, optim.lr_final, step - warmup, last - warmup)
        tau_warmup = round(optim.teacher_temperature_warmup_epochs * self.steps_per_epoch)
        return StepValues(
            lr=lr,
            weight_decay=_cosine(*optim.weight_decay, step, last),
            momentum=_cosine(*optim.momentum, step, last),
            teacher_temperature=_linear(*optim.teacher_temperature, step, tau_warmup),
        )


def _linear(start: float, end: float, step: int, steps: int) -> float:
    """`start` at step 0, `end` at the last of `steps` steps and after."""
    return end if step >= steps - 1 else start + (end - start) * step / (steps - 1)


def _cosine(start: float, end: float, step: int, steps: int) -> float:
    """`start` at step 0, towards `end`, which is reached at `steps`."""
    progress = min(step / steps, 1.0) if steps else 1.0
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
