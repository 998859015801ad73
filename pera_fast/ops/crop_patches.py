"""From source images to the patches that are used: crop, resize, colour, normalise, gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch
from pera_fast.reference import CropTable


def crop_patches(
    images: Sequence[Tensor],
    low: Tensor,
    high: Tensor,
    table: CropTable,
    student_patches: Tensor,
    target_patches: Tensor,
    teacher_patches: Tensor,
    *,
    crop_px: int,
    patch_px: int,
    mean: Tensor,
    std: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Augment n crop pairs and gather the patches each network uses.

    images: uint8, uint16 or float32 [C, H, W] each, any sizes. low, high: float [images, C], the values that
    become 0 and 1. table: n crops (see CropTable). *_patches: int64 [n, S], [n, P], [n, T], raster indices.
    mean, std: float [C], of the values in 0..1. Computes in low's dtype.

    Returns (student rows [n, S, C·patch_px²] of view 0 in the patch embedding's (c, p, q) order,
    target pixels [n, P, patch_px²·C] of view 0 in (p, q, c) order, teacher rows [n, T, C·patch_px²] of view 1).
    Raises ValueError when a box lies outside its image, an index is out of range or counts do not match.
    """
    crops = len(table.image)
    if crop_px < 1 or patch_px < 1 or crop_px % patch_px:
        raise ValueError(f"crop_px: expected a multiple of patch_px = {patch_px}, got {crop_px}")
    num_patches = (crop_px // patch_px) ** 2
    named = {"student": student_patches, "target": target_patches, "teacher": teacher_patches}
    for name, patches in named.items():
        if patches.dim() != 2 or len(patches) != crops:
            raise ValueError(f"{name}_patches: expected shape [{crops}, count], got {list(patches.shape)}")
        if patches.numel() and not (0 <= int(patches.min()) and int(patches.max()) < num_patches):
            raise ValueError(
                f"{name}_patches: expected indices from 0 to {num_patches - 1}, "
                f"got {int(patches.min())} to {int(patches.max())}"
            )
    for name, scale in (("low", low), ("high", high)):
        if list(scale.shape) != [len(images), len(mean)]:
            raise ValueError(f"{name}: expected shape [{len(images)}, {len(mean)}], got {list(scale.shape)}")
    for crop, (source, (top, left, height, width)) in enumerate(
        zip(table.image.tolist(), table.box.tolist(), strict=True)
    ):
        if not 0 <= source < len(images):
            raise ValueError(f"table.image[{crop}]: expected 0 to {len(images) - 1}, got {source}")
        image_height, image_width = images[source].shape[1:]
        if (
            min(top, left, height - 1, width - 1) < 0
            or top + height > image_height
            or left + width > image_width
        ):
            raise ValueError(
                f"table.box[{crop}]: expected a box inside the {image_height}x{image_width} image, "
                f"got top {top}, left {left}, height {height}, width {width}"
            )
    return _dispatch.resolve("crop_patches", low.device.type).function(
        images, low, high, table, student_patches, target_patches, teacher_patches,
        crop_px=crop_px, patch_px=patch_px, mean=mean, std=std,
    )  # fmt: skip


_dispatch.register("crop_patches", "reference", torch.no_grad()(reference.crop_patches))
