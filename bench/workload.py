"""The shapes that PerA runs at, shared by the benchmarks."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pera_fast.config import PRESETS, Config
from pera_fast.data.crops import draw_crops
from pera_fast.data.loader import Batch, Sample, collate
from pera_fast.data.statistics import Statistics
from pera_fast.model.pera import Patches

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def statistics() -> Statistics:
    zero, full = (0.0,) * 3, (255.0,) * 3
    return Statistics({"uint8": zero}, {"uint8": full}, *IMAGENET, num_windows=1, num_pixels=1)


def small_vit_s(num_prototypes: int = 8192, drop_path: float = 0.3) -> Config:
    """ViT-S at the paper's crop sizes with fewer prototypes: a step that two CPU cores can repeat."""
    base = PRESETS["vit_s"]
    return replace(
        base,
        model=replace(base.model, num_prototypes=num_prototypes, drop_path=drop_path),
        run=replace(base.run, device="cpu"),
    )


@functools.cache
def textured_image(px: int, seed: int) -> np.ndarray:
    """uint8 [3, px, px] with structure at several scales, as photographs have."""
    random = np.random.default_rng(seed)
    image = np.zeros((3, px, px))
    for cells in (4, 16, 64, px):
        noise = torch.from_numpy(random.standard_normal((1, 3, cells, cells)))
        image += torch.nn.functional.interpolate(noise, (px, px), mode="bilinear")[0].numpy()
    return np.clip(128 + 32 * image, 0, 255).astype(np.uint8)


def batch(config: Config, images: int, px: int = 512) -> Batch:
    """A decoded batch of px x px RGB images with drawn crops."""
    random = np.random.default_rng(0)
    low, high = statistics().scale_of("uint8")
    samples = [
        Sample(
            textured_image(px, seed % 64),
            low.astype(np.float32),
            high.astype(np.float32),
            {kind: draw_crops(random, px, px, config.crops, kind) for kind in ("global", "local")},
            [],
        )
        for seed in range(images)
    ]
    return collate(samples)


def whole_views(patches: Patches, size: int, crop_px: int) -> list[Tensor]:
    """Student and teacher views of one crop size, float32, put together from the patches; the rest is zero."""
    views = []
    for name, rows in (("student", patches.student_rows), ("teacher", patches.teacher_rows)):
        sets = [getattr(group, name) for group in patches.groups]
        counts = [(len(s), 1 + s.shape[1]) for s in sets]
        part = rows.split([n * count for n, count in counts])[size].view(*counts[size], -1)[:, 1:].float()
        grid, n = crop_px // 16, len(part)
        every = part.new_zeros(n, grid**2, part.shape[2]).scatter_(
            1, sets[size][:, :, None].expand_as(part), part
        )
        tiles = every.view(n, grid, grid, -1, 16, 16).permute(0, 3, 1, 4, 2, 5)
        views.append(tiles.reshape(n, -1, crop_px, crop_px))
    return views
