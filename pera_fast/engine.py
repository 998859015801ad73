"""One optimiser step: patches, forward passes, gradients, update. `train.py` calls it in a loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pera_fast import ops
from pera_fast.config import Config
from pera_fast.data.loader import Batch
from pera_fast.data.statistics import Statistics
from pera_fast.distributed import World
from pera_fast.graph import StepGraph
from pera_fast.health import assignment_health
from pera_fast.model.pera import (
    CropGroup,
    Losses,
    Patches,
    PerA,
    draw_sequences,
    join_whole_batch,
    make_subsets,
    split_patches,
)  # fmt: skip
from pera_fast.model.shadow import give_shadows, shadows_of
from pera_fast.model.shard import shard, whole
from pera_fast.model.vit import Subset, VisionTransformer
from pera_fast.optim import TeacherOptimizer, make
from pera_fast.replicas import Replicas
from pera_fast.schedules import StepValues

_log = logging.getLogger("pera_fast")
_WARMUP = 11  # steps before one is recorded; DDP asks for as many

Input = tuple[Patches, list[Tensor] | None]  # of a forward pass: patches, and what `draw_sequences` drew


class TrainingStopped(RuntimeError):
    """The run ends here; its text is one sentence for the user."""

    exit_code = 1


class Preempted(TrainingStopped):
    """A signal asked the run to stop, and its state is saved."""

    exit_code = 75  # EX_TEMPFAIL: to be tried again


@dataclass(frozen=True)
class StepReport:
    """One optimiser step, averaged over parts and ranks."""

    losses: dict[str, float]  # total, distill_global, distill_local, koleo, pixel
    grad_norm: float
    skipped: bool  # a loss or gradient was not finite: nothing was changed
    stop: bool = False  # some rank was asked to stop


@dataclass
class Engine:
    """The model with its optimiser on one rank."""

    config: Config
    statistics: Statistics
    world: World
    model: PerA = field(init=False)
    optimizer: TeacherOptimizer = field(init=False)

    def __post_init__(self) -> None:
        optim, run, device = self.config.optim, self.config.run, self.world.device
        torch.manual_seed(run.seed)  # the first weights are the same on every rank
        self.model = PerA(self.config)
        self._is_sharded = run.shard != "none" and self.world.ranks > 1
        if self._is_sharded:
            shard(self.model, self.world.mesh(per_node=run.shard == "node"), run.precision, run.reduce_in)
        self.model.to(device)
        if run.precision == "bf16" and not self._is_sharded:
            give_shadows(self.model)
        self.optimizer = make(
            optim.optimizer, self.model.ema_pairs(), betas=optim.betas, eps=optim.eps, clip_norm=optim.clip_norm,
            decay_all=optim.decay_all, shadows=shadows_of(self.model),
        )  # fmt: skip
        has_replicas = self.world.ranks > 1 and not self._is_sharded
        self._replicas = Replicas(self.model, run.reduce_in) if has_replicas else None
        self._passes_per_batch = 1
        self._crop_indices: dict[tuple[int, int], list[Tensor]] = {}
        self._gathered = 0  # exchanges of outputs in this step
        self._temperature, self._stop, self._failed = torch.zeros(3, device=device)
        self._graph: StepGraph | None = None
        self._done: torch.cuda.Event | None = None  # when the last step was
        self._prepared: tuple[int, Sequence[Batch], list[Input]] | None = None
        can_record = self.config.is_recorded
        # DDP rebuilds its buckets in the first steps, libraries choose their algorithms.
        self._steps_to_record = _WARMUP if can_record and device.type == "cuda" else math.inf
        self.first_steps = 1 if self._steps_to_record == math.inf else _WARMUP + 1  # unlike all that follow
        data = self.config.data
        self._mean = torch.tensor(data.mean or self.statistics.mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(data.std or self.statistics.std, dtype=torch.float32, device=device)

    def step(self, step: int, batches: Sequence[Batch], values: StepValues, stop: bool = False) -> StepReport:
        """`start`, and wait for it."""
        return self.start(step, batches, values, stop)()

    def start(
        self, step: int, batches: Sequence[Batch], values: StepValues, stop: bool = False
    ) -> Callable[[], StepReport]:
        """Update the model from `accumulate` batches; equal to one batch of them all on one rank.

        stop: whether this rank was asked to stop, of which every rank's report tells.

        Returns what waits for the device, to be called once, before the next step is started. Meanwhile the host is
        free to `prepare` that one.

        Where memory is short beside a recorded step, that is let go of on every rank. Else a forward pass that runs
        out of memory is taken again in smaller ones, on every rank, and so are all after it; the result stays that of
        the whole batch. The second time, or with one image, or where ranks share out the model or Sinkhorn's sums,
        TrainingStopped is raised.
        """
        self._temperature.fill_(values.teacher_temperature)
        self._stop.fill_(stop)
        self.optimizer.schedule(lr=values.lr, weight_decay=values.weight_decay, momentum=values.momentum)
        numbers = self._launch(step, batches)

        def wait() -> StepReport:
            nonlocal numbers
            while True:
                failed = 1
                if numbers is not None:
                    report, failed = self._report(numbers(), len(batches) * self._passes_per_batch)
                    if not failed:
                        return report
                self._make_room(step, len(batches[0]), failed)
                numbers = self._launch(step, batches)

        return wait

    def prepare(self, step: int, batches: Sequence[Batch]) -> None:
        """Crop the patches of a step that is started later, with these very batches."""
        with suppress(torch.OutOfMemoryError):  # the step tries again, and knows what to do
            self._prepared = step, batches, self._inputs(step, batches)

    def _launch(self, step: int, batches: Sequence[Batch]) -> Callable[[], list[float]] | None:
        """Have the device take a step: what waits for the numbers of `_update`, None where memory was short.

        On several ranks it is not None: then the numbers tell, for all ranks have to know.
        """
        self._failed.fill_(0)
        passes, images = len(batches) * self._passes_per_batch, len(batches[0]) // self._passes_per_batch
        self._gathered, inputs, update = 0, None, None
        self._steps_to_record -= 1
        try:
            inputs = self._inputs_prepared(step, batches)
        except torch.OutOfMemoryError as error:
            self._check_there_is_a_way(step, images, error)
        graph = self._recorded(inputs)  # of which all ranks know, also those that are short of memory
        try:
            if inputs is not None:
                update = (
                    partial(graph, inputs) if graph is not None else
                    partial(self._update, self._sums(self._gradients(inputs)), passes)
                )  # fmt: skip
        except torch.OutOfMemoryError as error:
            self._check_there_is_a_way(step, images, error)
        # Outside of the handler, whose traceback holds the tensors of the failed pass.
        if update is None and self._replicas is not None:
            update = partial(self._update, self._not_finite(passes, images), passes)
        return None if update is None else self._to_host(update())

    def _check_there_is_a_way(self, step: int, images: int, error: torch.OutOfMemoryError) -> None:
        """TrainingStopped where a step that is short of memory in passes of so many images cannot do with less."""
        shares_sums = self._replicas is not None and self.config.optim.centring == "sinkhorn"
        is_last_try = self._graph is None and (self._passes_per_batch > 1 or images == 1)
        if is_last_try or self._is_sharded or shares_sums:
            raise TrainingStopped(
                f"out of memory in step {step + 1} on rank {self.world.rank} with {images} images in a forward pass: "
                "a smaller --batch-size, --activation blocks, or --shard all needs less"
            ) from error

    def _to_host(self, numbers: Tensor) -> Callable[[], list[float]]:
        """What waits for numbers of the device, and not for what it is given to do after them."""
        if numbers.device.type != "cuda":
            return numbers.tolist
        host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        self._done = done = torch.cuda.Event(enable_timing=True)
        done.record()

        def wait() -> list[float]:
            done.synchronize()
            return host.tolist()

        return wait

    def idle_seconds(self) -> float:
        """Since the device has had nothing to do; infinity where that is not known, or always, as on a CPU."""
        if self._done is None:
            return math.inf
        if not torch.cuda.current_stream().query():
            return 0.0
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self._done.elapsed_time(now) / 1000

    def _make_room(self, step: int, images: int, failed: int) -> None:
        """After a step for which memory was short on `failed` ranks: without the graph, else in smaller passes."""
        if self._graph is not None:
            how = "beside the recorded step, which is let go of"
        else:
            passes = self._passes_per_batch = next(n for n in range(2, images + 1) if images % n == 0)
            how = (
                f"with {images} images in a forward pass; taken again with {images // passes} in each of "
                f"{passes} passes"
            )
        self.release()
        if self.world.is_first:
            where = f" on {failed} of {self.world.ranks} ranks" if self.world.ranks > 1 else ""
            _log.warning("out of memory in step %d%s %s", step + 1, where, how)

    def release(self) -> None:
        """Let go of a recorded step, of gradients, of what was prepared and of what else the steps before have left."""
        if self._graph is not None:
            self._graph.release()
        self._graph = self._prepared = None
        self.optimizer.zero_grad()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def probe(self, patches: Patches, passes: int = 1) -> None:
        """Forward and backward passes that change nothing, for measuring memory: of a step of `passes` the first two,
        as gradients lie beside the second.

        Replicas take no part: one may be short of memory where others go on. Outputs like this one's stand for theirs.
        """
        self.optimizer.zero_grad()  # of a probe that failed
        self._temperature.fill_(0.04)
        parts, inputs = (
            passes * self.world.ranks,
            [(patches, self._sequences(0, 0, patches))] * min(passes, 2),
        )
        if self._is_sharded:
            self._gradients(inputs)
        else:
            for one in inputs:
                with self._autocast(), self.model.alone():
                    losses = self.model(
                        patches, self._subsets(*one), self._temperature,
                        None if parts == 1 else lambda z: join_whole_batch(z, z.detach().repeat(1, parts, 1), 0, parts),
                    )  # fmt: skip
                losses.total.backward()
        self.optimizer.zero_grad()

    def _inputs_prepared(self, step: int, batches: Sequence[Batch]) -> list[Input]:
        """`_inputs`, which may be there already."""
        prepared, self._prepared = self._prepared, None
        if prepared and prepared[0] == step and prepared[1] is batches:
            return prepared[2]
        return self._inputs(step, batches)

    def _inputs(self, step: int, batches: Sequence[Batch]) -> list[Input]:
        """Everything of a step that the host has a part in: patches and drop path's choice of each forward pass."""
        crops, patches = self.config.crops, []
        graph = self._graph if self._passes_per_batch == 1 else None  # parts are not where the whole was
        for part, batch in enumerate(batches):
            whole_pass = self.patches(step, part, batch, None if graph is None else graph.inputs[part][0])
            patches += split_patches(whole_pass, self._passes_per_batch, crops.num_global, crops.num_local)
        return [(one, self._sequences(step, part, one)) for part, one in enumerate(patches)]

    def _recorded(self, inputs: list[Input] | None) -> StepGraph | None:
        """The graph of the step, which is recorded once the first steps are done, on every rank or on none.

        inputs: None on a rank that has no memory for them.
        """
        if self._graph is None and self._steps_to_record < 0:
            self._steps_to_record = math.inf  # once, whether it goes well or not
            why = "out of memory"
            try:
                if inputs is not None:
                    self._graph = StepGraph(
                        lambda inputs: self._update(self._sums(self._gradients(inputs)), len(inputs)), inputs
                    )
            except RuntimeError as error:  # out of memory is one, too
                why = str(error).splitlines()[0]
            # Outside of the handler, whose traceback holds what was made.
            self._gathered = 0  # nothing was exchanged
            if self._graph is None:
                _log.warning("the step is not recorded in a CUDA graph: %s", why)
            if self.world.any(self._graph is None):
                self.release()
                if self._replicas is not None:  # DDP waits for gradients that a failed recording has not made
                    self._replicas.close()
                    self._replicas = Replicas(self.model, self.config.run.reduce_in)
            else:
                _log.info("the step is recorded in a CUDA graph")
        return self._graph

    def _gradients(self, inputs: list[Input]) -> list[Losses]:
        """Every forward pass's losses; their mean's gradient is in the parameters."""
        whole_batches = self._whole_batches(inputs)
        self.optimizer.zero_grad()
        parts: list[Losses] = []
        for part, ((patches, sequences), whole_batch) in enumerate(zip(inputs, whole_batches, strict=True)):
            with self._averaging_gradients(is_last=part == len(inputs) - 1):
                with self._autocast():
                    forward = self._replicas or self.model
                    subsets = self._subsets(patches, sequences)
                    losses = forward(patches, subsets, self._temperature, whole_batch)
                (losses.total / len(inputs)).backward()
            parts.append(losses._replace(total=losses.total.detach()))
        return parts

    def _averaging_gradients(self, is_last: bool) -> AbstractContextManager[None]:
        """Ranks average their gradients in the last backward pass of the step."""
        if self._is_sharded:
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        return self._replicas.averaging(is_last) if self._replicas else nullcontext()

    def _not_finite(self, passes: int, images: int) -> Tensor:
        """In place of a step's gradients and sums where memory was short, while the other ranks take theirs."""
        self._failed.fill_(1)
        exchanges = passes if self.config.optim.koleo_weight else 0
        z = torch.full(
            (self.config.crops.num_global, images, self.config.model.head_bottleneck_dim), torch.nan,
            device=self.world.device,
        )  # fmt: skip

        def exchange(in_forward: int) -> None:
            for _ in range(exchanges - in_forward - self._gathered):
                self._gather(z)

        # The last exchange is in the first forward pass, in which DDP has something to exchange before it.
        exchange(in_forward=1)
        self._replicas.finish_with_nan(lambda: exchange(in_forward=0))  # type: ignore[union-attr]
        return torch.full((5 + z.shape[-1],), torch.nan, device=self.world.device)

    def _sums(self, parts: list[Losses]) -> Tensor:
        """float [5 + bottleneck]: over this rank's parts, the losses and the teacher's mean z."""
        num_global = self.config.crops.num_global
        self._sample = parts[-1].sample  # of a recorded step: where each replay puts it
        rows = []
        for p in parts:
            distill = p.distill[:num_global].mean(), p.distill[num_global:].sum()
            losses = torch.stack((p.total, *distill, p.koleo, p.pixel))
            rows.append(torch.cat((losses, p.z_teacher_sum / p.rows)))
        return torch.stack(rows).sum(0)

    def _update(self, sums: Tensor, passes: int) -> Tensor:
        """Update model, teacher and centre, by this rank's `_sums` over `passes` parts.

        Returns float [9]: the losses summed over parts and ranks, how many ranks were asked to stop and how many were
        short of memory, the gradient's norm, whether the step was skipped.
        """
        sums = self.world.sum(torch.cat((sums, self._stop[None], self._failed[None])))
        mean_z = sums[5:-2] / (passes * self.world.ranks)
        centre = self.model.next_centre(mean_z)  # of the teacher that made z

        # The sums hold every rank's losses and the norm is of averaged gradients, so all ranks agree here.
        grad_norm = torch.where(sums.isfinite().all(), self.optimizer.grad_norm(), torch.nan)
        self.optimizer.step(grad_norm=grad_norm)
        skipped = self.optimizer.skipped
        self.model.centre.copy_(torch.where(skipped, self.model.centre, centre))
        return torch.cat((sums[:5], sums[-2:], grad_norm[None], skipped[None]))

    def _report(self, numbers: Sequence[float], passes: int) -> tuple[StepReport, int]:
        """Of what `_update` returned, and how many ranks failed."""
        *sums, stop, failed, norm, skipped = numbers
        named = ("total", "distill_global", "distill_local", "koleo", "pixel")
        losses = {name: value / (passes * self.world.ranks) for name, value in zip(named, sums, strict=True)}
        losses["distill_local"] /= max(1, self.config.crops.num_local)
        return StepReport(losses, norm, skipped=bool(skipped), stop=stop > 0), int(failed)

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """How a few images of the last step are assigned to prototypes; where those are shared out, all ranks ask."""
        optim, teacher = self.config.optim, self.model.teacher.prototypes()
        return assignment_health(
            *self._sample, [whole(x) for x in self.model.student.prototypes()], [whole(x) for x in teacher],
            self.model.centre, optim.student_temperature, self._temperature,
        )  # fmt: skip

    def teacher(self) -> VisionTransformer:
        """The teacher's backbone whole, for evaluation; where it is shared out, every rank must ask for it."""
        backbone = self.model.teacher.backbone
        if not self._is_sharded:
            return backbone
        weights = {name: whole(value.detach()).cpu() for name, value in backbone.state_dict().items()}
        copy = VisionTransformer(self.config.model, self.config.crops.global_px)
        copy.load_state_dict(weights)
        return copy.to(self.world.device).requires_grad_(False)

    def patches(self, step: int, part: int, batch: Batch, into: Patches | None = None) -> Patches:
        """The used patches of a batch's crops, on this rank's device. into: whose pixels are overwritten by theirs."""
        config, device = self.config.crops, self.world.device
        if batch.buffer.device.type != device.type:
            batch = batch.to(device)
        masks = self._masks(step, part, len(batch))
        patch_px, tables = self.config.model.patch_px, batch.tables
        row_size = self.config.model.in_bands * patch_px**2
        dtype = torch.bfloat16 if self.config.run.precision == "bf16" else torch.float32

        def packed(counts: list[tuple[int, int]], rows: Tensor | None) -> tuple[Tensor, list[Tensor]]:
            """One matrix for all crops, and its rows of each crop size as [n, rows, row size]."""
            if rows is None:
                rows = torch.empty(
                    sum(n * count for n, count in counts), row_size, dtype=dtype, device=device
                )
            parts = rows.split([n * count for n, count in counts])
            return rows, [x.view(n, count, row_size) for x, (n, count) in zip(parts, counts, strict=True)]

        own = (
            (None,) * 3
            if into is None
            else (into.student_rows, into.target_pixels.flatten(0, 1), into.teacher_rows)
        )
        student, students = packed([(len(m.student), 1 + m.student.shape[1]) for m in masks], own[0])
        _, targets = packed([(len(m.target), m.target.shape[1]) for m in masks], own[1])
        teacher, teachers = packed([(len(m.teacher), 1 + m.teacher.shape[1]) for m in masks], own[2])
        images, sizes = batch.images, (config.global_px, config.local_px)
        for i, (table, mask, crop_px) in enumerate(zip(tables, masks, sizes, strict=False)):
            ops.crop_patches(
                images, table, *mask, crop_px=crop_px, patch_px=patch_px, mean=self._mean, std=self._std,
                exact=config.exact_augmentation, leading_rows=1, out=(students[i], targets[i], teachers[i]),
                check_values=device.type == "cpu",  # made right by the loader; a GPU need not be waited for
            )  # fmt: skip
        return Patches(masks, student, targets[0], teacher)

    def _masks(self, step: int, part: int, images: int) -> list[CropGroup]:
        """Which patches of each crop are used, global crops and then local ones."""
        crops, patch_px = self.config.crops, self.config.model.patch_px
        groups: list[CropGroup] = []
        for crop_index, crop_px in zip(
            self._crop_index(part, images), (crops.global_px, crops.local_px), strict=False
        ):
            students, targets, teachers = crops.mask_counts((crop_px // patch_px) ** 2)
            masks = CropGroup(
                *ops.disjoint_masks(
                    crop_index, seed=self.config.run.seed, step=step,
                    num_patches=students + targets + teachers, num_student=students, num_target=targets,
                )
            )  # fmt: skip
            if groups:
                masks = masks._replace(target=masks.target[:, :0].contiguous())  # local crops have no targets
            groups.append(masks)
        return groups

    def _crop_index(self, part: int, images: int) -> list[Tensor]:
        """Numbers of a forward pass's crops within the step, int64 [crops × images], global ones and then local ones.

        By the image's place in the whole batch: equal masks however the batch is shared out. Equal in every step.
        """
        if (part, images) not in self._crop_indices:
            counts, device = (self.config.crops.num_global, self.config.crops.num_local), self.world.device
            image = (part * self.world.ranks + self.world.rank) * images + torch.arange(images, device=device)
            crop = torch.arange(sum(counts), device=device)[:, None]
            by_crop = image * sum(counts) + crop
            self._crop_indices[part, images] = [x.flatten() for x in by_crop.split(counts) if len(x)]
        return self._crop_indices[part, images]

    def _whole_batches(self, inputs: list[Input]) -> list[Callable[[Tensor], Tensor] | None]:
        """For each part, in order, how its student outputs become the whole batch's (see join_whole_batch).

        Each part after the first costs one more student pass, without gradient; the first one's outputs come with it.
        """
        parts = len(inputs) * self.world.ranks
        if parts == 1 or self.config.optim.koleo_weight == 0:
            return [None] * len(inputs)
        later, everyone = [], []
        for patches, sequences in inputs[1:]:
            with self._autocast():
                later += self._gather(self.model.student_z(patches, self._subsets(patches, sequences)))

        def join(part: int, z: Tensor) -> Tensor:
            if part == 0:
                everyone.append(torch.cat((*self._gather(z), *later), dim=1))
            start = (part * self.world.ranks + self.world.rank) * z.shape[1]
            return join_whole_batch(z, everyone[0], start, parts)

        return [partial(join, part) for part in range(len(inputs))]

    def _gather(self, z: Tensor) -> list[Tensor]:
        everyone = self.world.gather(z)
        self._gathered += 1
        return everyone

    def _subsets(self, patches: Patches, sequences: list[Tensor] | None) -> list[Subset]:
        return make_subsets(patches.groups, self.config.model.depth, sequences)

    def _sequences(self, step: int, part: int, patches: Patches) -> list[Tensor] | None:
        model, seed = self.config.model, self.config.run.seed
        number = part * self.world.ranks + self.world.rank
        return draw_sequences(patches.groups, model.drop_path, model.depth, seed=seed, step=step, part=number)

    def _autocast(self) -> torch.autocast:
        enabled = self.config.run.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)
