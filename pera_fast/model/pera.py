"""Student and teacher on disjoint patches of the same crops, and the losses between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pera_fast import ops
from pera_fast.config import Config
from pera_fast.model.shard import by_rows
from pera_fast.model.vit import Groups, Head, Subset, VisionTransformer, resample_positions
from pera_fast.ops.koleo import koleo_and_prototypes


class CropGroup(NamedTuple):
    """Which patches of all crops of one size are used; n = crops × images, crop-major. Raster indices."""

    student: Tensor  # int64 [n, S]
    target: Tensor  # int64 [n, P]; P = 0 in local crops
    teacher: Tensor  # int64 [n, T]


class Patches(NamedTuple):
    """One forward pass's input: the used patches of all crops, packed, and where they lie.

    The rows of every crop begin with one of zeros, the place of its CLS token.
    """

    groups: list[CropGroup]  # global crops[, local crops]
    student_rows: Tensor  # float [Σ n·(1 + S), C·p²], view 0
    target_pixels: Tensor  # float [n, P, p²·C] of the global crops, view 0 in (p, q, c) order
    teacher_rows: Tensor  # float [Σ n·(1 + T), C·p²], view 1


def split_patches(patches: Patches, parts: int, num_global: int, num_local: int) -> list[Patches]:
    """Equal parts of the images of a forward pass, each with all its crops."""
    if parts == 1:
        return [patches]
    crops = [num_global, num_local][: len(patches.groups)]

    def shared_out(x: Tensor, number: int) -> list[Tensor]:
        """Of [number · images, …], each part's."""
        pieces = x.unflatten(0, (number, -1)).chunk(parts, dim=1)
        return [piece.flatten(0, 1) for piece in pieces]

    def rows(x: Tensor, lengths: list[int]) -> list[Tensor]:
        """The same of packed rows: `length` of them for each crop."""
        counts = [len(g.student) * length for g, length in zip(patches.groups, lengths, strict=True)]
        kinds = [
            shared_out(part.unflatten(0, (-1, length)), number)
            for part, length, number in zip(x.split(counts), lengths, crops, strict=True)
        ]
        return [torch.cat([piece.flatten(0, 1) for piece in kind]) for kind in zip(*kinds, strict=True)]

    groups = [
        [CropGroup(*sets) for sets in zip(*(shared_out(x, number) for x in g), strict=True)]
        for g, number in zip(patches.groups, crops, strict=True)
    ]
    columns = (
        [list(kinds) for kinds in zip(*groups, strict=True)],
        rows(patches.student_rows, [1 + g.student.shape[1] for g in patches.groups]),
        shared_out(patches.target_pixels, num_global),
        rows(patches.teacher_rows, [1 + g.teacher.shape[1] for g in patches.groups]),
    )
    return [Patches(*part) for part in zip(*columns, strict=True)]


class Losses(NamedTuple):
    """One forward pass. `total` is what is minimised; the rest is for the log."""

    total: Tensor
    distill: Tensor  # [crops], cross-entropy of each crop, not yet divided by their number
    koleo: Tensor  # mean over the global crops
    pixel: Tensor  # mean over target patches of the summed squared error
    z_teacher_sum: Tensor  # [bottleneck], over all rows, for the centre
    koleo_neighbours: Tensor  # int64 [num_global, batch]
    rows: int  # crops × images
    sample: tuple[Tensor, Tensor]  # student's and teacher's z [n, bottleneck] of n different images, n <= 16


class Network(nn.Module):
    """Backbone and CLS head: what student and teacher each are."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = VisionTransformer(config.model, config.crops.global_px)
        self.cls_head = Head(config.model, config.model.num_prototypes)

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """(v [K, bottleneck], g [K, 1]) of the weight-normalised last layer."""
        return self.cls_head.last_layer.weight_v, self.cls_head.last_layer.weight_g


class PerA(nn.Module):
    """The method's networks: student, EMA teacher, mask token, pixel head and centre.

    Formulas and names: PerA, arXiv 2505.19447. The teacher starts equal to the student.
    """

    centre: Tensor
    resampling: Tensor  # [local patches, global patches]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        model = config.model
        self.student = Network(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.embed_dim).normal_(std=0.02))
        self.pixel_head = Head(model, model.patch_px**2 * model.in_bands)
        self.register_buffer("centre", torch.zeros(model.num_prototypes))
        # The local crops' positions as a product: a GPU's bicubic kernel gives a thread to each of few positions.
        grid, local = (px // model.patch_px for px in (config.crops.global_px, config.crops.local_px))
        resampling = resample_positions(torch.eye(grid**2), local, local) if config.crops.num_local else None
        self.register_buffer("resampling", resampling, persistent=False)
        self._is_alone = False

    def ema_pairs(self) -> list[tuple[str, nn.Parameter, Tensor | None]]:
        """(name, trained parameter, the teacher's counterpart or None) of everything the optimiser updates."""
        teachers = dict(self.teacher.named_parameters(prefix="student"))
        return [(n, p, teachers.get(n)) for n, p in self.named_parameters() if p.requires_grad]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Forward passes in which other ranks have no part: Sinkhorn's sums are over this one's rows."""
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def student_forward(self, patches: Patches, subsets: Sequence[Subset]) -> tuple[Tensor, Tensor]:
        """(z [crops × images, bottleneck] unit rows, predicted pixels [target patches, p²·C])."""
        backbone, groups = self.student.backbone, patches.groups
        positions = self._positions(backbone, groups)
        # The targets enter half way: their rows are there from the start, and the first half leaves them out.
        x = backbone.embed(
            patches.student_rows, [g.student for g in groups], positions, (self.mask_token, groups[0].target)
        )
        x = backbone.blocks_forward(x, subsets)

        shapes = [(len(g.student), 1 + g.student.shape[1] + g.target.shape[1]) for g in groups]
        num_global, length = shapes[0]
        cls_rows = _cls_rows(shapes, x.device)
        target_rows = torch.arange(num_global * length, device=x.device).view(num_global, length)
        target_rows = target_rows[:, 1 + groups[0].student.shape[1] :].flatten()
        normed = backbone.norm_rows(x, torch.cat((cls_rows, target_rows)))
        cls, targets = normed.split([len(cls_rows), len(target_rows)])
        return self.student.cls_head(cls), self.pixel_head.last_layer(self.pixel_head(targets))

    @torch.no_grad()
    def student_z(self, patches: Patches, subsets: Sequence[Subset]) -> Tensor:
        """z of the global crops alone, [num_global, images, bottleneck], without gradient."""
        z, _ = self.student_forward(patches, subsets)
        num_global = self.config.crops.num_global
        return z[: len(patches.groups[0].student)].unflatten(0, (num_global, -1))

    def teacher_forward(self, patches: Patches) -> Tensor:
        """z [crops × images, bottleneck] unit rows, without gradient."""
        backbone, groups = self.teacher.backbone, patches.groups
        with torch.inference_mode():
            positions = self._positions(backbone, groups)
            x = backbone.embed(patches.teacher_rows, [g.teacher for g in groups], positions)
            shapes: Groups = [(len(g.teacher), 1 + g.teacher.shape[1]) for g in groups]
            cls_rows = _cls_rows(shapes, x.device)
            # Of the last MLP's output nothing but the CLS tokens is read.
            last = Subset([(count, 1) for count, _ in shapes], cls_rows)
            x = backbone.blocks_forward(x, [*[Subset(shapes)] * (2 * len(backbone.blocks) - 1), last])
            z = self.teacher.cls_head(backbone.norm_rows(x, cls_rows))
        return z.clone()  # of an inference tensor, which the loss could not keep for its backward pass

    def forward(
        self,
        patches: Patches,
        subsets: Sequence[Subset],
        teacher_temperature: float | Tensor,
        whole_batch: Callable[[Tensor], Tensor] | None = None,
    ) -> Losses:
        """Losses of one batch, subsets from `draw_subsets`.

        teacher_temperature: a number or a tensor [], of which a graph reads the value anew.
        whole_batch: given this pass's student z of the global crops, [num_global, images, bottleneck], the
        same of the optimiser step's whole batch, for KoLeo (see `join_whole_batch`); None: it is the whole.
        """
        optim, crops = self.config.optim, self.config.crops
        z_teacher = self.teacher_forward(patches)
        z_student, predicted = self.student_forward(patches, subsets)
        v, g = self.student.prototypes()
        batch = len(patches.groups[0].student) // crops.num_global
        # (z · w - centre) / temperature, divided beforehand: the ops take the temperature as a number.
        sharp, centre = z_teacher / teacher_temperature, self.centre / teacher_temperature
        if optim.centring == "sinkhorn":
            centre = ops.sinkhorn_centre(
                sharp, *self.teacher.prototypes(), 1.0, optim.sinkhorn_iterations, alone=self._is_alone
            )
        z_global = z_student[: crops.num_global * batch].unflatten(0, (crops.num_global, batch))
        koleo, neighbours, v, g = koleo_and_prototypes(
            z_global if whole_batch is None else whole_batch(z_global), v, g
        )
        distill = ops.distill_loss(
            z_student, sharp, (v, g), self.teacher.prototypes(), centre, optim.student_temperature, 1.0,
            [batch] * (len(z_student) // batch),
        )  # fmt: skip

        error = predicted.to(distill.dtype) - patches.target_pixels.flatten(0, 1)
        pixel = error.square().sum(-1).mean()
        total = distill.mean() + optim.koleo_weight * koleo.sum() + optim.pixel_weight * pixel
        return Losses(
            total, distill.detach(), koleo.detach().mean(), pixel.detach(), z_teacher.sum(0), neighbours,
            len(z_teacher), (z_student[: min(batch, 16)].detach(), z_teacher[: min(batch, 16)]),
        )  # fmt: skip

    @torch.no_grad()
    def next_centre(self, z_teacher_mean: Tensor) -> Tensor:
        """The centre that the next step uses: an EMA of the mean teacher logit. [bottleneck] -> [K]."""
        v, g = self.teacher.prototypes()
        mean = by_rows(lambda v, g: ops.mean_prototype_logit(z_teacher_mean, v, g), v, g)
        return torch.lerp(mean, self.centre, self.config.optim.centre_momentum)

    def _positions(self, backbone: VisionTransformer, groups: Sequence[CropGroup]) -> list[Tensor]:
        """Position table [L, D] of each crop size."""
        table = backbone.pos_embed[0, 1:].float()
        if len(groups) == 1:
            return [table]
        with torch.autocast(table.device.type, enabled=False):
            return [table, self.resampling.to(table.dtype) @ table]


def draw_subsets(
    groups: Sequence[CropGroup], drop_path: float, depth: int, *, seed: int = 0, step: int = 0, part: int = 0
) -> list[Subset]:
    """`make_subsets` of `draw_sequences`."""
    return make_subsets(
        groups, depth, draw_sequences(groups, drop_path, depth, seed=seed, step=step, part=part)
    )


def draw_sequences(
    groups: Sequence[CropGroup], drop_path: float, depth: int, *, seed: int = 0, step: int = 0, part: int = 0
) -> list[Tensor] | None:
    """The sequences that each of the student's 2 * depth branches works on in one forward pass, int64 [2 * depth, size]
    of each crop size; None: all.

    A random subset of max(int(b·(1 - drop_path)), 1) of the b sequences. part: of the forward passes of a step, counted
    over all ranks. Equal numbers give equal subsets on every device, which are drawn where the groups are.
    """
    if drop_path == 0:
        return None
    device, chosen = groups[0].student.device, []
    branch = part * 2 * depth + torch.arange(2 * depth, device=device)
    for kind, group in enumerate(groups):
        count = len(group.student)
        size = max(int(count * (1 - drop_path)), 1)
        if size == count:
            chosen.append(torch.arange(count, device=device).expand(2 * depth, count))
            continue
        # A subset is drawn as a crop's patches are, with a seed of its own.
        own = (seed + 0x0D709A7 + kind) % 2**64
        drawn = ops.disjoint_masks(
            branch, seed=own, step=step, num_patches=count, num_student=size, num_target=0
        )
        chosen.append(drawn[0])
    return chosen


def make_subsets(groups: Sequence[CropGroup], depth: int, chosen: Sequence[Tensor] | None) -> list[Subset]:
    """The rows each of the student's 2 * depth branches works on, from `draw_sequences`.

    The residual of a subset is scaled by b / its size. In the first depth // 2 blocks the sequences end before their
    targets. The last MLP sees only what is read of its output: CLS tokens and targets.
    """
    device = groups[0].student.device
    counts = [len(g.student) for g in groups]
    visible = [1 + g.student.shape[1] for g in groups]
    lengths = [n + g.target.shape[1] for n, g in zip(visible, groups, strict=True)]
    starts = [
        sum(n * length for n, length in zip(counts[:i], lengths[:i], strict=True)) for i in range(len(groups))
    ]
    every = [
        torch.arange(start, start + length, device=device)
        for start, length in zip(starts, lengths, strict=True)
    ]  # rows of each size's first sequence
    half, last = 2 * (depth // 2), 2 * depth - 1
    subsets: list[Subset] = []
    for branches, tokens in (
        (range(half), [of[:n] for of, n in zip(every, visible, strict=True)]),
        (range(half, last), every),
        (range(last, last + 1), [torch.cat((of[:1], of[n:])) for of, n in zip(every, visible, strict=True)]),
    ):
        seen = [len(of) for of in tokens]
        if chosen is None and seen == lengths:
            subsets += [Subset(list(zip(counts, lengths, strict=True)))] * len(branches)
            continue
        rows, scales, shapes = [], [], []
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            if chosen is None:
                picked = torch.arange(count, device=device).expand(len(branches), count)
            else:
                picked = chosen[i].to(device)[branches.start : branches.stop]
            size = picked.shape[1]
            rows.append(torch.add(tokens[i], picked[:, :, None], alpha=length).flatten(1))
            scales.append(torch.full((size * seen[i],), count / size, device=device))
            shapes.append((size, seen[i]))
        scale = None if chosen is None else torch.cat(scales)
        subsets += [Subset(shapes, of_branch, scale) for of_branch in torch.cat(rows, dim=1).unbind()]
    return subsets


def _cls_rows(shapes: Groups, device: torch.device) -> Tensor:
    """Row of every sequence's CLS token, int64."""
    starts, start = [], 0
    for count, length in shapes:
        starts.append(start + length * torch.arange(count, device=device))
        start += count * length
    return torch.cat(starts)


def join_whole_batch(z: Tensor, whole: Tensor, start: int, parts: int) -> Tensor:
    """`whole` with the rows of this one of `parts` forward passes live, their gradient times `parts`.

    KoLeo couples the images of a batch. Every part computes the whole batch's KoLeo and the parts' gradients
    are averaged, so a part's own rows, live in that part alone, need the factor; the prototypes, live in
    every part, do not. z [num_global, images, d], whole [num_global, all images, d] without gradient,
    start: this part's first image -> [num_global, all images, d].
    """
    live = z.detach() + parts * (z - z.detach())
    return torch.cat((whole[:, :start], live, whole[:, start + z.shape[1] :]), dim=1)
