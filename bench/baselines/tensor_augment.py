"""Augmentation as torchvision.transforms.v2 does it on tensors of any device: one full crop per view."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from pera_fast.reference import BRIGHTNESS, CONTRAST, HUE, SATURATION, CropTable

_ADJUST = {
    BRIGHTNESS: transforms.adjust_brightness,
    CONTRAST: transforms.adjust_contrast,
    SATURATION: transforms.adjust_saturation,
    HUE: transforms.adjust_hue,
}


def crop_pairs(
    images: list[Tensor], table: CropTable, crop_px: int, mean: Tensor, std: Tensor
) -> list[Tensor]:
    """Student and teacher views of all crops: uint8 [3, H, W] -> two float32 [n, 3, crop_px, crop_px].

    The table is on the CPU, as code that draws and applies each image's transforms in turn has it.
    """
    mean_of_bands, std_of_bands = mean.tolist(), std.tolist()  # once: it waits for the device
    views = [torch.empty(len(table.image), 3, crop_px, crop_px, device=mean.device) for _ in range(2)]
    for i, source in enumerate(table.image.tolist()):
        cut = transforms.resized_crop(
            images[source], *table.box[i].tolist(), [crop_px, crop_px], antialias=True
        )
        for on, flip in zip(
            table.flip[i].tolist(), (transforms.horizontal_flip, transforms.vertical_flip), strict=True
        ):
            cut = flip(cut) if on else cut
        for view in range(2):
            coloured = cut
            if table.grey[i, view]:
                coloured = transforms.rgb_to_grayscale(cut, num_output_channels=3)
            for operation in [] if table.grey[i, view] else table.order[i, view].tolist():
                if operation >= 0:
                    coloured = _ADJUST[operation](coloured, float(table.factor[i, view, operation]))
            scaled = transforms.to_dtype(coloured, torch.float32, scale=True)
            views[view][i] = transforms.normalize(scaled, mean_of_bands, std_of_bands)
    return views
