"""Augmentation as most training code does it: Pillow, one full crop per view, then float32 tensors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

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


class Ahead:
    """The same on every core for a GPU, a batch ahead of the one that is trained on, as a data loader does it."""

    def __init__(
        self, images: list[np.ndarray], tables: Sequence[CropTable], sizes: Sequence[int], mean: Tensor, std: Tensor
    ) -> None:  # fmt: skip
        cores = len(os.sched_getaffinity(0))
        self._pool = torch.multiprocessing.get_context("forkserver").Pool(cores, initializer=_start)
        self._thread = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream()
        self._tables, self._sizes = tables, sizes
        self._tasks, self._places = [], []
        for part in np.array_split(np.arange(len(images)), min(cores, len(images))):
            places = [torch.isin(table.image, torch.from_numpy(part)).nonzero()[:, 0] for table in tables]
            few = [CropTable(*(x[at] for x in table)) for table, at in zip(tables, places, strict=True)]
            few = [table._replace(image=table.image - int(part[0])) for table in few]
            self._tasks.append(
                partial(_crop_pairs_of, [images[i] for i in part], few, tuple(sizes), mean, std)
            )
            self._places.append(places)
        self._views = self._load()

    def _load(self) -> list[tuple[Tensor, Tensor]]:
        views = [
            [torch.empty(len(table.image), 3, px, px, pin_memory=True) for _ in range(2)]
            for table, px in zip(self._tables, self._sizes, strict=True)
        ]
        for places, part in zip(self._places, self._pool.imap(_call, self._tasks), strict=True):
            for at, to, pair in zip(places, views, part, strict=True):
                for view, crops in zip(to, pair, strict=True):
                    view[at] = crops
        with torch.cuda.stream(self._stream):
            copies = [
                tuple(view.to(self._stream.device, non_blocking=True) for view in pair) for pair in views
            ]
        self._stream.synchronize()
        return copies

    def during(self, step: Callable[[list[tuple[Tensor, Tensor]]], Any]) -> Any:
        """step(views of this batch), while those of the next are made; returns when both are done."""
        following = self._thread.submit(self._load)
        result = step(self._views)
        self._views = following.result()
        return result

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._pool.terminate()


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its owner waits for what is made here, then ends it
    torch.set_num_threads(1)


def _call(task: Callable[[], Any]) -> Any:
    return task()


def _crop_pairs_of(
    images: list[np.ndarray], tables: list[CropTable], sizes: tuple[int, ...], mean: Tensor, std: Tensor
) -> list[list[Tensor]]:
    return [crop_pairs(images, table, px, mean, std) for table, px in zip(tables, sizes, strict=True)]


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
