"""The shapes that PerA runs at, shared by the benchmarks."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch

from pera_fast.config import PRESETS, Config
from pera_fast.data.crops import draw_crops
from pera_fast.data.loader import Batch, Sample, collate
from pera_fast.data.statistics import Statistics

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
