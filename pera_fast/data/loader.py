"""From an index of scenes to batches: which image when, its window, its crops. Workers only decode.

Everything random about a sample follows from (seed, epoch, sample), so the stream of images is the same
for any number of workers, ranks and parts, and a run goes on from a step number alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pera_fast.config import Config
from pera_fast.data.crops import draw_crops
from pera_fast.data.sources import DataError, Scene, SceneIndex, UnreadableImage, printable, read_windows
from pera_fast.data.statistics import Statistics
from pera_fast.reference import CropTable

_log = logging.getLogger("pera_fast")
_DTYPES = (torch.uint8, torch.uint16, torch.float32)
_ALIGN = 16  # bytes; every image starts where any dtype may be viewed
_WINDOW_DRAWS = 10
_DATA_ERROR = f"{DataError.__module__}.{DataError.__qualname__}"  # as a traceback names it


class Sample(NamedTuple):
    """One decoded window with its crop pairs."""

    pixels: np.ndarray  # uint8, uint16 or float32 [C, H, W]
    low: np.ndarray  # float32 [C], the value that becomes 0
    high: np.ndarray  # float32 [C], the value that becomes 1
    crops: dict[str, dict[str, np.ndarray]]  # "global", "local" -> arrays of CropTable
    bad: list[tuple[str, str]]  # (path, reason) of images that were skipped on the way


class Batch(NamedTuple):
    """Source images of any size and dtype in one buffer, and the crops to cut from them."""

    buffer: Tensor  # uint8 [bytes]
    offsets: Tensor  # int64 [images], first byte of each
    shapes: Tensor  # int64 [images, 3]: bands, height, width
    dtypes: Tensor  # int64 [images]: 0 uint8, 1 uint16, 2 float32
    low: Tensor  # float32 [images, bands]
    high: Tensor  # float32 [images, bands]
    tables: list[CropTable]  # global crops, and local ones if there are any; crop-major
    bad: list[tuple[str, str]]

    def images(self, buffer: Tensor | None = None) -> list[Tensor]:
        """Views [C, H, W] of each image in `buffer` (the batch's own, or its copy on a device)."""
        buffer = self.buffer if buffer is None else buffer
        views = []
        for offset, shape, code in zip(
            self.offsets.tolist(), self.shapes.tolist(), self.dtypes.tolist(), strict=True
        ):
            size = math.prod(shape) * _DTYPES[code].itemsize
            views.append(buffer[offset : offset + size].view(_DTYPES[code]).view(shape))
        return views


class WindowDataset(Dataset[Sample]):
    """Position in the endless stream of shuffled epochs -> Sample.

    A scene larger than the window counts as often per epoch as windows fit, each time at a random place.
    """

    def __init__(self, index: SceneIndex, statistics: Statistics, config: Config) -> None:
        self.scenes, self.statistics, self.config = index.scenes, statistics, config
        window_px = config.data.window_px
        repeats = [math.ceil(s.height / window_px) * math.ceil(s.width / window_px) for s in self.scenes]
        self.ends = np.cumsum(repeats)
        for dtype in sorted({s.dtype for s in self.scenes}):
            statistics.scale_of(dtype)  # a DataError now rather than in a worker later
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Windows per epoch."""
        return int(self.ends[-1])

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order of samples, int64 [len(self)]."""
        if self._order is None or self._order[0] != epoch:
            shuffled = np.random.default_rng([self.config.run.seed, epoch]).permutation(len(self))
            self._order = (epoch, shuffled)
        return self._order[1]

    def __getitem__(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self))
        bad: list[tuple[str, str]] = []
        # The next scene in the epoch's order stands in for one that cannot be read or shows nothing.
        for tries in range(len(self)):
            sample = int(self.order(epoch)[(place + tries) % len(self)])
            scene = self.scenes[int(np.searchsorted(self.ends, sample, side="right"))]
            random = np.random.default_rng([self.config.run.seed, epoch, sample])
            try:
                pixels = self._read(scene, random)
            except UnreadableImage as error:
                bad.append((error.path, error.reason))
                continue
            if pixels is None:
                continue  # bad luck in a scene that is mostly empty, not a bad file
            low, high = self.statistics.scale_of(scene.dtype)
            crops = {
                kind: draw_crops(random, pixels.shape[1], pixels.shape[2], self.config.crops, kind)
                for kind in ("global", "local")
            }
            return Sample(pixels, low.astype(np.float32), high.astype(np.float32), crops, bad)
        if not bad:
            raise DataError("no window with a valid pixel was found in any image")
        raise DataError(f"no image is readable any more; the first is {printable(bad[0][0])}: {bad[0][1]}")

    def _read(self, scene: Scene, random: np.random.Generator) -> np.ndarray | None:
        """A window of the scene; one with too many missing pixels is drawn again, the best one is kept.

        None when not one of the windows drawn has a valid pixel.
        """
        data = self.config.data
        height, width = min(scene.height, data.window_px), min(scene.width, data.window_px)
        movable = (height, width) != (scene.height, scene.width)
        windows = (
            (
                int(random.integers(0, scene.height - height + 1)),
                int(random.integers(0, scene.width - width + 1)),
                height,
                width,
            )
            for _ in range(_WINDOW_DRAWS if movable else 1)
        )
        best, best_share = None, 1.0
        for pixels, valid in read_windows(
            scene, windows, bands=data.bands, in_bands=self.config.model.in_bands, nodata=data.nodata
        ):
            missing = 1 - float(valid.mean())
            if missing < best_share:
                best, best_share = pixels, missing
            if missing <= data.max_nodata_share:
                break
        return best


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples -> one buffer and crop-major tables: crop c of image i is row c * images + i."""
    sizes = [sample.pixels.nbytes for sample in samples]
    starts = np.cumsum([0] + [-(-size // _ALIGN) * _ALIGN for size in sizes])
    buffer = np.zeros(int(starts[-1]), np.uint8)
    for sample, start, size in zip(samples, starts, sizes, strict=False):
        buffer[start : start + size] = np.ascontiguousarray(sample.pixels).reshape(-1).view(np.uint8)
    codes = {np.dtype(np.uint8): 0, np.dtype(np.uint16): 1, np.dtype(np.float32): 2}
    tables = []
    for kind in ("global", "local"):
        count = len(samples[0].crops[kind]["box"])
        if count:
            stacked = {
                name: torch.from_numpy(np.stack([s.crops[kind][name] for s in samples], axis=1)).flatten(0, 1)
                for name in samples[0].crops[kind]
            }
            image = torch.arange(len(samples)).repeat(count)
            tables.append(CropTable(image=image, **stacked))
    return Batch(
        buffer=torch.from_numpy(buffer),
        offsets=torch.from_numpy(starts[:-1].astype(np.int64)),
        shapes=torch.tensor([s.pixels.shape for s in samples]),
        dtypes=torch.tensor([codes[s.pixels.dtype] for s in samples]),
        low=torch.from_numpy(np.stack([s.low for s in samples])),
        high=torch.from_numpy(np.stack([s.high for s in samples])),
        tables=tables,
        bad=[entry for s in samples for entry in s.bad],
    )


class StreamSampler:
    """Positions of each forward pass of one rank, from `start_step` on.

    Step s takes positions [s, s + 1) x whole batch; within it, part p of rank r takes images
    [p * ranks + r, + 1) x batch_size. So the images of a step do not depend on how they are shared out.
    """

    def __init__(self, config: Config, start_step: int, total_steps: int, rank: int, ranks: int) -> None:
        self.batch_size, self.accumulate = config.run.batch_size, config.run.accumulate
        self.steps, self.rank, self.ranks = range(start_step, total_steps), rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        parts = self.accumulate * self.ranks
        for step in self.steps:
            for part in range(self.accumulate):
                start = (step * parts + part * self.ranks + self.rank) * self.batch_size
                yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate


def make_loader(
    dataset: WindowDataset,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    ranks: int = 1,
    pin: bool = False,
) -> Iterator[Batch]:
    """Batches of one rank in order, one per forward pass. DataError when no image is readable any more."""
    config = dataset.config
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=StreamSampler(config, start_step, total_steps, rank, ranks),
        collate_fn=collate,
        num_workers=config.data.workers,
        pin_memory=pin,
        prefetch_factor=2 if config.data.workers else None,
    )
    try:
        yield from loader
    except DataError as error:
        # A worker's exception arrives with its traceback before the sentence.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix(f"{_DATA_ERROR}: ")) from None
