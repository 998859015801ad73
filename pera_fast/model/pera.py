"""Student and teacher on disjoint patches of the same crops, and the losses between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_fast import ops
from pera_fast.config import Config
from pera_fast.model.vit import Groups, Head, Subset, VisionTransformer


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


class Losses(NamedTuple):
    """One forward pass. `total` is what is minimised; the rest is for the log."""

    total: Tensor
    distill: Tensor  # [crops], cross-entropy of each crop, not yet divided by their number
    koleo: Tensor  # mean over the global crops
    pixel: Tensor  # mean over target patches of the summed squared error
    z_teacher_sum: Tensor  # [bottleneck], over all rows, for the centre
    koleo_neighbours: Tensor  # int64 [num_global, batch]


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

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        model = config.model
        self.student = Network(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.embed_dim).normal_(std=0.02))
        self.pixel_head = Head(model, model.patch_px**2 * model.in_bands)
        self.register_buffer("centre", torch.zeros(model.num_prototypes))

    def ema_pairs(self) -> list[tuple[str, nn.Parameter, Tensor | None]]:
        """(name, trained parameter, the teacher's counterpart or None) of everything the optimiser updates."""
        teachers = dict(self.teacher.named_parameters(prefix="student"))
        return [(n, p, teachers.get(n)) for n, p in self.named_parameters() if p.requires_grad]

    def student_forward(self, patches: Patches, subsets: Sequence[Subset]) -> tuple[Tensor, Tensor]:
        """(z [crops × images, bottleneck] unit rows, predicted pixels [target patches, p²·C])."""
        backbone, groups = self.student.backbone, patches.groups
        positions = self._positions(backbone, groups)
        x = backbone.embed(patches.student_rows, [g.student for g in groups], positions)
        middle = len(backbone.blocks) // 2
        x = backbone.blocks_forward(x, slice(0, middle), subsets[: 2 * middle])

        # The targets enter half way, as mask tokens that know only where they are.
        shapes = [(len(g.student), 1 + g.student.shape[1]) for g in groups]
        num_global, visible = shapes[0]
        masked = self.mask_token + F.embedding(groups[0].target, positions[0])
        first, rest = x.split([num_global * visible, len(x) - num_global * visible])
        first = torch.cat((first.unflatten(0, shapes[0]), masked.to(x.dtype)), dim=1)
        x = torch.cat((first.flatten(0, 1), rest))
        x = backbone.blocks_forward(x, slice(middle, None), subsets[2 * middle :])

        shapes[0] = (num_global, first.shape[1])
        cls_rows = _cls_rows(shapes, x.device)
        target_rows = torch.arange(num_global * first.shape[1], device=x.device).view(num_global, -1)
        target_rows = target_rows[:, visible:].flatten()
        normed = backbone.norm_rows(x, torch.cat((cls_rows, target_rows)))
        cls, targets = normed.split([len(cls_rows), len(target_rows)])
        return self.student.cls_head(cls), self.pixel_head.last_layer(self.pixel_head(targets))

    @torch.no_grad()
    def teacher_forward(self, patches: Patches) -> Tensor:
        """z [crops × images, bottleneck] unit rows."""
        backbone, groups = self.teacher.backbone, patches.groups
        positions = self._positions(backbone, groups)
        x = backbone.embed(patches.teacher_rows, [g.teacher for g in groups], positions)
        shapes: Groups = [(len(g.teacher), 1 + g.teacher.shape[1]) for g in groups]
        x = backbone.blocks_forward(x, slice(None), [Subset(shapes)] * (2 * len(backbone.blocks)))
        return self.teacher.cls_head(backbone.norm_rows(x, _cls_rows(shapes, x.device)))

    def forward(
        self,
        patches: Patches,
        subsets: Sequence[Subset],
        teacher_temperature: float,
        whole_batch: Callable[[Tensor], Tensor] | None = None,
    ) -> Losses:
        """Losses of one batch, subsets from `draw_subsets`.

        whole_batch: given this pass's student z of the global crops, [num_global, images, bottleneck], the
        same of the optimiser step's whole batch, for KoLeo (see `join_whole_batch`); None: it is the whole.
        """
        optim, crops = self.config.optim, self.config.crops
        z_teacher = self.teacher_forward(patches)
        z_student, predicted = self.student_forward(patches, subsets)
        v, g = self.student.prototypes()
        batch = len(patches.groups[0].student) // crops.num_global
        centre = self.centre
        if optim.centring == "sinkhorn":
            centre = ops.sinkhorn_centre(
                z_teacher, *self.teacher.prototypes(), teacher_temperature, optim.sinkhorn_iterations
            )
        distill = ops.distill_loss(
            z_student, z_teacher, (v, g), self.teacher.prototypes(), centre, optim.student_temperature,
            teacher_temperature, [batch] * (len(z_student) // batch),
        )  # fmt: skip

        z_global = z_student[: crops.num_global * batch].unflatten(0, (crops.num_global, batch))
        koleo, neighbours = ops.koleo(z_global if whole_batch is None else whole_batch(z_global), v, g)
        error = predicted.to(distill.dtype) - patches.target_pixels.flatten(0, 1)
        pixel = error.square().sum(-1).mean()
        total = distill.mean() + optim.koleo_weight * koleo.sum() + optim.pixel_weight * pixel
        return Losses(
            total, distill.detach(), koleo.detach().mean(), pixel.detach(), z_teacher.sum(0), neighbours
        )

    @torch.no_grad()
    def next_centre(self, z_teacher_mean: Tensor) -> Tensor:
        """The centre that the next step uses: an EMA of the mean teacher logit. [bottleneck] -> [K]."""
        mean = ops.mean_prototype_logit(z_teacher_mean, *self.teacher.prototypes())
        return torch.lerp(mean, self.centre, self.config.optim.centre_momentum)

    def _positions(self, backbone: VisionTransformer, groups: Sequence[CropGroup]) -> list[Tensor]:
        """Position table [L, D] of each crop size."""
        crops, patch_px = self.config.crops, self.config.model.patch_px
        sizes = (crops.global_px // patch_px, crops.local_px // patch_px)
        return [backbone.positions(grid, grid) for grid in sizes[: len(groups)]]


def draw_subsets(
    groups: Sequence[CropGroup], drop_path: float, depth: int, key: Sequence[int]
) -> list[Subset]:
    """The rows each of the student's 2 * depth branches works on, for one forward pass.

    Per branch and crop size a random subset of max(int(b·(1 - drop_path)), 1) of the b sequences, whose
    residual is scaled by b / subset size. key: whole numbers, e.g. (seed, step, part, rank); equal keys
    give equal subsets on every device.
    """
    counts = [len(g.student) for g in groups]
    random = np.random.default_rng([*key, 0x0D709])
    chosen = None
    if drop_path > 0:
        sizes = [max(int(count * (1 - drop_path)), 1) for count in counts]
        chosen = [
            [
                torch.from_numpy(random.permutation(count)[:size])
                for count, size in zip(counts, sizes, strict=True)
            ]
            for _ in range(2 * depth)
        ]
    return make_subsets(groups, depth, chosen)


def make_subsets(
    groups: Sequence[CropGroup], depth: int, chosen: Sequence[Sequence[Tensor]] | None
) -> list[Subset]:
    """Subsets from the chosen sequences, int64 per branch and crop size; None: every sequence."""
    device = groups[0].student.device
    counts = [len(g.student) for g in groups]
    before = [1 + g.student.shape[1] for g in groups]
    after = [before[0] + groups[0].target.shape[1], *before[1:]]
    halves = [before] * (2 * (depth // 2)) + [after] * (2 * (depth - depth // 2))
    if chosen is None:
        return [Subset(list(zip(counts, lengths, strict=True))) for lengths in halves]
    subsets = []
    for lengths, sequences in zip(halves, chosen, strict=True):
        rows, scales, start = [], [], 0
        for count, length, picked in zip(counts, lengths, sequences, strict=True):
            rows.append((start + picked[:, None] * length + torch.arange(length)).flatten())
            scales.append(torch.full((len(rows[-1]),), count / len(picked)))
            start += count * length
        shapes = [(len(picked), length) for picked, length in zip(sequences, lengths, strict=True)]
        subsets.append(Subset(shapes, torch.cat(rows).to(device), torch.cat(scales).to(device)))
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
