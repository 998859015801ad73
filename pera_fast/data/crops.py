"""Drawing crop pairs: where each crop lies, how it is flipped, how each view's colours change."""

from __future__ import annotations

import math

import numpy as np

from pera_fast.config import CropConfig

# The colour operations of ops.crop_patches, in the order of CropTable.factor.
_NUM_OPERATIONS = 4


def draw_box(
    random: np.random.Generator,
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A random-resized crop's (top, left, height, width) inside a height x width image, at least 1 pixel.

    Area uniform in `area` (share of the image), aspect (width / height) log-uniform; after ten draws that
    do not fit, the largest centred box within the aspect limits. Source: Inception crop (arXiv 1409.4842),
    as torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        pixels = height * width * random.uniform(*area)
        ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width, box_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(random.integers(0, height - box_height + 1))
            left = int(random.integers(0, width - box_width + 1))
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < aspect[0]:
        box_height = max(1, min(height, round(width / aspect[0])))
    elif width / height > aspect[1]:
        box_width = max(1, min(width, round(height * aspect[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def draw_colours(
    random: np.random.Generator, config: CropConfig, view: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(factor float32 [4], order int64 [4] with -1 for none, grey) of view 0 (student) or 1 (teacher)."""
    factor = np.ones(_NUM_OPERATIONS, np.float32)
    order = np.full(_NUM_OPERATIONS, -1, np.int64)
    chance = config.student_colour_probability if view == 0 else config.teacher_colour_probability
    if random.random() >= chance:
        return factor, order, False
    if view == 0 and random.random() < config.grey_probability:
        return factor, order, True
    for i, strength in enumerate((config.brightness, config.contrast, config.saturation)):
        factor[i] = random.uniform(max(0.0, 1 - strength), 1 + strength)
    factor[3] = random.uniform(-config.hue, config.hue)
    return factor, random.permutation(_NUM_OPERATIONS).astype(np.int64), False


def draw_crops(
    random: np.random.Generator, height: int, width: int, config: CropConfig, kind: str
) -> dict[str, np.ndarray]:
    """All crops of one kind ("global" or "local") of one image: arrays named as in CropTable, [count, ...]."""
    count = config.num_global if kind == "global" else config.num_local
    area = config.global_area if kind == "global" else config.local_area
    crops: dict[str, list[object]] = {"box": [], "flip": [], "factor": [], "order": [], "grey": []}
    for _ in range(count):
        crops["box"].append(draw_box(random, height, width, area, config.aspect))
        crops["flip"].append(random.random(2) < config.flip_probability)
        views = [draw_colours(random, config, view) for view in range(2)]
        for name, values in zip(("factor", "order", "grey"), zip(*views, strict=True), strict=True):
            crops[name].append(values)
    return {name: np.array(values) for name, values in crops.items()}
