"""Images to features: the teacher's class token of tiles cut from scenes."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pera_fast.config import Config, ConfigError
from pera_fast.data.sources import DataError, Scene, UnreadableImage, printable, read_windows
from pera_fast.data.statistics import Statistics

_THREADS = min(8, os.cpu_count() or 1)
_MAX_TILES_PER_TASK = 64  # bounds what the decoders hold in memory ahead of the network


@dataclass(frozen=True)
class Tile:
    """A window of a scene, in pixels, and the class it belongs to."""

    scene: Scene
    top: int
    left: int
    height: int
    width: int
    label: str | None

    @classmethod
    def whole(cls, scene: Scene, label: str | None = None) -> Tile:
        """All of a scene as one tile."""
        return cls(scene, 0, 0, scene.height, scene.width, label)


class Features(NamedTuple):
    """The tiles that could be read, in the order given."""

    rows: Tensor  # float32 [n, ...], on the CPU: the network's first output of each
    labels: list[str]  # [n], "" for tiles without one
    bad: list[tuple[str, str]]  # (path, reason) of each tile that could not be read


def choose_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.

    ConfigError for another name, or for cuda without a GPU.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device: expected a machine with a CUDA GPU, got none that this torch can use")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def to_unit(pixels: np.ndarray, dtype: str, statistics: Statistics) -> Tensor:
    """Source values [..., C, H, W] of the named dtype to float32 in 0..1; DataError if it has no scale."""
    low, high = (torch.from_numpy(limit).float()[:, None, None] for limit in statistics.scale_of(dtype))
    image = torch.from_numpy(pixels.astype(np.float32))
    return image.sub_(low).div_(high - low).clamp_(0, 1)  # in its place: images may be large


def normalise(image: Tensor, statistics: Statistics, config: Config) -> Tensor:
    """Subtract the mean and divide by the deviation of each band, as in training. [..., C, H, W] -> the same."""
    mean = torch.tensor(config.data.mean or statistics.mean, dtype=image.dtype)[:, None, None]
    std = torch.tensor(config.data.std or statistics.std, dtype=image.dtype)[:, None, None]
    return (image - mean) / std


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear, as training cuts its crops. [C, H, W] -> [C, height, width]."""
    size = (height, width)
    return F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def to_input(pixels: np.ndarray, dtype: str, statistics: Statistics, config: Config, px: int) -> Tensor:
    """What the network sees of a tile: source values [C, H, W] -> normalised float32 [C, px, px].

    The whole tile becomes a square, whatever its shape. DataError for a dtype without a scale.
    """
    return normalise(resize(to_unit(pixels, dtype, statistics), px, px), statistics, config)


def extract(
    backbone: nn.Module,
    tiles: Sequence[Tile],
    config: Config,
    statistics: Statistics,
    device: torch.device,
    batch_size: int = 64,
    progress: bool = False,
) -> Features:
    """The class token of every readable tile, resized to the size of a global crop, in float32 throughout.

    backbone: a VisionTransformer, or another module whose first output is wanted; it is moved to `device`.
    DataError when the statistics have no scale for a tile's dtype, or what comes out is not finite.
    """
    backbone = backbone.to(device)
    rows: list[Tensor] = []
    seen: list[Tile] = []
    bad: list[tuple[str, str]] = []
    waiting: list[Tensor] = []

    def flush() -> None:
        nonlocal batch_size
        while waiting:
            few = waiting[:batch_size]
            try:
                # bfloat16 here would make the neighbours of close calls depend on the machine.
                with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                    rows.append(backbone(torch.stack(few).to(device))[0].float().cpu())
                del waiting[: len(few)]
            except torch.OutOfMemoryError:  # a training step beside it may have left little
                if batch_size == 1:
                    raise
                batch_size //= 2

    bar = tqdm(total=len(tiles), unit="tile", disable=not progress, leave=False)
    for tile, image in _inputs(tiles, config, statistics):
        bar.update()
        if isinstance(image, UnreadableImage):
            bad.append((image.path, image.reason))
            continue
        waiting.append(image)
        seen.append(tile)
        if len(waiting) >= batch_size:
            flush()
    if waiting:
        flush()
    bar.close()
    found = torch.cat(rows) if rows else torch.empty(0, config.model.embed_dim)
    for row, tile in zip(found, seen, strict=True):
        if not bool(row.isfinite().all()):
            raise DataError(f"the network's features of {printable(tile.scene.path)} are not finite")
    return Features(found, [tile.label or "" for tile in seen], bad)


def _inputs(
    tiles: Sequence[Tile], config: Config, statistics: Statistics
) -> Iterator[tuple[Tile, Tensor | UnreadableImage]]:
    """Every tile in order with its network input, or why it has none; decoded a few scenes ahead."""
    pending: deque[tuple[list[Tile], Future[list[Tensor | UnreadableImage]]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for task in _tasks(tiles):
            pending.append((task, pool.submit(_read, task, config, statistics)))
            if len(pending) > 2 * _THREADS:
                oldest, future = pending.popleft()
                yield from zip(oldest, future.result(), strict=True)
        for oldest, future in pending:
            yield from zip(oldest, future.result(), strict=True)


def _tasks(tiles: Sequence[Tile]) -> Iterator[list[Tile]]:
    """Runs of tiles of one scene, so that it is opened or decoded once for all of them."""
    for _, run in groupby(tiles, key=lambda tile: tile.scene):
        same = list(run)
        for start in range(0, len(same), _MAX_TILES_PER_TASK):
            yield same[start : start + _MAX_TILES_PER_TASK]


def _read(tiles: list[Tile], config: Config, statistics: Statistics) -> list[Tensor | UnreadableImage]:
    """Inputs of tiles of one scene; after the first tile that cannot be read, all the rest fail too."""
    scene, data = tiles[0].scene, config.data
    windows = [(tile.top, tile.left, tile.height, tile.width) for tile in tiles]
    found: list[Tensor | UnreadableImage] = []
    try:
        for pixels, _ in read_windows(
            scene, windows, bands=data.bands, in_bands=config.model.in_bands, nodata=data.nodata
        ):
            found.append(to_input(pixels, scene.dtype, statistics, config, config.crops.global_px))
    except UnreadableImage as error:
        found += [error] * (len(tiles) - len(found))
    return found
