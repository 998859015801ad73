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
    views = [torch.empty(len(table.image), 3, crop_px, crop_px) for _ in range(2)]
    for i, source in enumerate(table.image.tolist()):
        for to, tensor in zip(views, crop_pair(opened[source], table, i, crop_px, mean, std), strict=True):
            to[i] = tensor
    return views


def crop_pair(
    image: Image.Image, table: CropTable, crop: int, crop_px: int, mean: Tensor, std: Tensor
) -> list[Tensor]:
    """The two views of one crop, float32 [3, crop_px, crop_px] each."""
    top, left, height, width = table.box[crop].tolist()
    cut = image.crop((left, top, left + width, top + height))
    cut = cut.resize((crop_px, crop_px), Image.Resampling.BILINEAR)
    for on, flip in zip(
        table.flip[crop].tolist(),
        (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM),
        strict=True,
    ):
        cut = cut.transpose(flip) if on else cut
    pair = []
    for view in range(2):
        coloured = _view(
            cut, table.factor[crop, view].tolist(), table.order[crop, view].tolist(),
            bool(table.grey[crop, view]),
        )  # fmt: skip
        tensor = torch.from_numpy(np.array(coloured)).permute(2, 0, 1).float().div_(255)
        pair.append(tensor.sub_(mean[:, None, None]).div_(std[:, None, None]))
    return pair
