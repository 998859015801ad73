"""Augmentation as most training code does it: Pillow, one full crop per view, then float32 tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from pera_fast.reference import CropTable

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def _hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue).astype(np.int16) + int(turn * 255)) % 256
    bands = (Image.fromarray(shifted.astype(np.uint8)), saturation, value)
    return Image.merge("HSV", bands).convert("RGB")


def _view(image: Image.Image, factor: list[float], order: list[int], grey: bool) -> Image.Image:
    if grey:
        return image.convert("L").convert("RGB")
    for operation in order:
        if operation == 3:
            image = _hue(image, factor[3])
        elif operation >= 0:
            image = _ENHANCERS[operation](image).enhance(factor[operation])
    return image


def crop_pairs(
    images: list[np.ndarray], table: CropTable, crop_px: int, mean: Tensor, std: Tensor
) -> list[Tensor]:
    """Student and teacher views of all crops. images: uint8 [3, H, W] -> two float32 [n, 3, crop_px, crop_px]."""
    opened = [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images]
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, source in enumerate(table.image.tolist()):
        top, left, height, width = table.box[i].tolist()
        crop = opened[source].crop((left, top, left + width, top + height))
        crop = crop.resize((crop_px, crop_px), Image.Resampling.BILINEAR)
        for on, flip in zip(
            table.flip[i].tolist(),
            (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM),
            strict=True,
        ):
            crop = crop.transpose(flip) if on else crop
        for view in range(2):
            coloured = _view(
                crop, table.factor[i, view].tolist(), table.order[i, view].tolist(), bool(table.grey[i, view])
            )
            tensor = torch.from_numpy(np.array(coloured)).permute(2, 0, 1).float().div_(255)
            views[view].append(tensor.sub_(mean[:, None, None]).div_(std[:, None, None]))
    return [torch.stack(view) for view in views]
