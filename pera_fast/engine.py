"""One optimiser step: patches, forward passes, gradients, update. `train.py` calls it in a loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pera_fast import ops
from pera_fast.config import Config
from pera_fast.data.loader import Batch
from pera_fast.data.statistics import Statistics
from pera_fast.distributed import World
from pera_fast.model.pera import CropGroup, Losses, PerA, draw_subsets, join_whole_batch
from pera_fast.model.vit import Subset
from pera_fast.optim import AdamWEMA
from pera_fast.schedules import StepValues


@dataclass(frozen=True)
class StepReport:
    """One optimiser step, averaged over parts and ranks."""

    losses: dict[str, float]  # total, distill_global, distill_local, koleo, pixel
    grad_norm: float
    skipped: bool  # a loss or gradient was not finite: nothing was changed


@dataclass
class Engine:
    """The model with its optimiser on one rank."""

    config: Config
    statistics: Statistics
    world: World
    model: PerA = field(init=False)
    optimizer: AdamWEMA = field(init=False)

    def __post_init__(self) -> None:
        optim = self.config.optim
        torch.manual_seed(self.config.run.seed)  # the first weights are the same on every rank
        self.model = PerA(self.config).to(self.world.device)
        self.optimizer = AdamWEMA(
            self.model.ema_pairs(), betas=optim.betas, eps=optim.eps, clip_norm=optim.clip_norm,
            decay_all=optim.decay_all,
        )  # fmt: skip
        self._forward: PerA | DistributedDataParallel = self.model
        if self.world.ranks > 1:
            self._forward = DistributedDataParallel(self.model)
        data, device = self.config.data, self.world.device
        self._mean = torch.tensor(data.mean or self.statistics.mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(data.std or self.statistics.std, dtype=torch.float32, device=device)

    def step(self, step: int, batches: Sequence[Batch], values: StepValues) -> StepReport:
        """Update the model from `accumulate` batches; equal to one batch of them all on one rank."""
        groups = [self.patches(step, part, batch) for part, batch in enumerate(batches)]
        whole_batches = self._whole_batches(step, groups)
        self.optimizer.zero_grad(set_to_none=True)
        parts: list[Losses] = []
        for part, (group, whole_batch) in enumerate(zip(groups, whole_batches, strict=True)):
            is_last = part == len(groups) - 1
            # DDP averages gradients over ranks in the last backward pass of the step.
            waits = isinstance(self._forward, DistributedDataParallel) and not is_last
            with self._forward.no_sync() if waits else nullcontext():  # type: ignore[union-attr,operator]
                with self._autocast():
                    subsets = self._subsets(step, part, group)
                    losses = self._forward(group, subsets, values.teacher_temperature, whole_batch)
                (losses.total / len(groups)).backward()
            parts.append(losses._replace(total=losses.total.detach()))
        return self._update(groups, parts, values)

    def _update(self, groups: list[list[CropGroup]], parts: list[Losses], values: StepValues) -> StepReport:
        num_global = self.config.crops.num_global
        rows = [
            torch.cat(
                (
                    torch.stack(
                        (
                            p.total,
                            p.distill[:num_global].mean(),
                            p.distill[num_global:].sum(),
                            p.koleo,
                            p.pixel,
                        )
                    ),
                    p.z_teacher_sum,
                )
            )
            for p in parts
        ]
        sums = self.world.sum(torch.stack(rows).sum(0))
        passes = len(parts) * self.world.ranks
        named = ("total", "distill_global", "distill_local", "koleo", "pixel")
        losses = {name: float(value) / passes for name, value in zip(named, sums[:5], strict=True)}
        losses["distill_local"] /= max(1, self.config.crops.num_local)
        z_mean = sums[5:] / (passes * sum(len(g.teacher_rows) for g in groups[0]))

        # The sums hold every rank's losses and the norm is of averaged gradients, so all ranks agree here.
        grad_norm = self.optimizer.grad_norm()
        finite = math.isfinite(float(grad_norm)) and bool(torch.isfinite(sums).all())
        if finite:
            centre = self.model.next_centre(z_mean)  # from the teacher that made these logits
            self.optimizer.step(
                lr=values.lr, weight_decay=values.weight_decay, momentum=values.momentum, grad_norm=grad_norm
            )
            self.model.centre.copy_(centre)
        return StepReport(losses, float(grad_norm), skipped=not finite)

    def patches(self, step: int, part: int, batch: Batch) -> list[CropGroup]:
        """The used patches of a batch's crops, on this rank's device."""
        device, crops, patch_px = self.world.device, self.config.crops, self.config.model.patch_px
        images = batch.images(batch.buffer.to(device, non_blocking=True))
        low, high = batch.low.to(device), batch.high.to(device)
        count = len(images)
        first_image = (part * self.world.ranks + self.world.rank) * count
        groups, first_crop = [], 0
        for table, crop_px, num_crops in zip(
            batch.tables, (crops.global_px, crops.local_px), (crops.num_global, crops.num_local), strict=False
        ):
            is_global = first_crop == 0
            students, targets, teachers = crops.mask_counts((crop_px // patch_px) ** 2)
            # Keyed by the image's place in the whole batch: equal masks however the batch is shared out.
            image = first_image + torch.arange(count, device=device)
            crop = first_crop + torch.arange(num_crops, device=device)
            crop_index = (image * (crops.num_global + crops.num_local) + crop[:, None]).flatten()
            student, target, teacher = ops.disjoint_masks(
                crop_index, seed=self.config.run.seed, step=step, num_patches=students + targets + teachers,
                num_student=students, num_target=targets,
            )  # fmt: skip
            if not is_global:
                target = target[:, :0]  # local crops have no pixel targets; these patches go unused
            student_rows, target_pixels, teacher_rows = ops.crop_patches(
                images, low, high, table, student, target, teacher, crop_px=crop_px, patch_px=patch_px,
                mean=self._mean, std=self._std,
            )  # fmt: skip
            groups.append(CropGroup(student_rows, student, teacher_rows, teacher, target_pixels, target))
            first_crop += num_crops
        return groups

    def _whole_batches(
        self, step: int, groups: list[list[CropGroup]]
    ) -> list[Callable[[Tensor], Tensor] | None]:
        """For each part, how its student outputs become the whole batch's (see join_whole_batch).

        With several forward passes per step this costs one more student pass, without gradient.
        """
        parts = len(groups) * self.world.ranks
        if parts == 1 or self.config.optim.koleo_weight == 0:
            return [None] * len(groups)

        def join(part: int, whole: Tensor | None, z: Tensor) -> Tensor:
            start = (part * self.world.ranks + self.world.rank) * z.shape[1]
            everyone = torch.cat(self.world.gather(z), dim=1) if whole is None else whole
            return join_whole_batch(z, everyone, start, parts)

        if len(groups) == 1:
            return [partial(join, 0, None)]
        num_global, gathered = self.config.crops.num_global, []
        for part, group in enumerate(groups):
            with torch.no_grad(), self._autocast():
                z, _ = self.model.student_forward(group, self._subsets(step, part, group))
            gathered += self.world.gather(z[: len(group[0].student_rows)].unflatten(0, (num_global, -1)))
        whole = torch.cat(gathered, dim=1)
        return [partial(join, part, whole) for part in range(len(groups))]

    def _subsets(self, step: int, part: int, groups: list[CropGroup]) -> list[Subset]:
        model, key = self.config.model, (self.config.run.seed, step, part, self.world.rank)
        return draw_subsets(groups, model.drop_path, model.depth, key)

    def _autocast(self) -> torch.autocast:
        enabled = self.config.run.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)
