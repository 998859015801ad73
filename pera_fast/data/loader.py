"""From an index of scenes to batches: which image when, its window, its crops. Workers only decode.

Everything random about a sample follows from (seed, epoch, sample), so the stream of images is the same
for any number of workers, ranks and parts, and a run goes on from a step number alone.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pera_fast.config import Config
from pera_fast.data.crops import draw_crops
from pera_fast.data.index import dtype_codes, window_counts
from pera_fast.data.sources import DataError, Scene, SceneIndex, UnreadableImage, printable, read_windows
from pera_fast.data.statistics import Statistics
from pera_fast.reference import PIXEL_DTYPES, CropTable, SourceImages

_log = logging.getLogger("pera_fast")
_ALIGN = 16  # bytes; everything in a batch's buffer starts where any dtype may be viewed
# Images that a worker hands over at once, so that what waits on the host does not grow with workers times batch. The
# buffer of 32 RGB windows of 512 px stays below 32 MiB, glibc's largest mmap threshold: its memory is used again.
_PIECE = 32
_WINDOW_DRAWS = 10
_EMPTY_DRAWS = 10  # scenes in a row without a window that shows enough
_SCENE_DRAWS = 1000  # then the data are gone, and going through millions more of them would look like a hang
_GRACE = 60  # seconds a worker goes on for after SIGTERM
_DATA_ERROR = f"{DataError.__module__}.{DataError.__qualname__}"  # as a traceback names it


class Sample(NamedTuple):
    """One decoded window with its crop pairs."""

    pixels: np.ndarray  # uint8, uint16 or float32 [C, H, W]
    low: np.ndarray  # float32 [C], the value that becomes 0
    high: np.ndarray  # float32 [C], the value that becomes 1
    crops: dict[str, dict[str, np.ndarray]]  # "global", "local" -> arrays of CropTable
    bad: list[tuple[str, str]]  # (path, reason) of images that were skipped on the way


class Field(NamedTuple):
    """Where one array of a batch lies in its buffer."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Batch:
    """Source images of any size and dtype, and the crops to cut from them, all in one buffer.

    One buffer is one block of memory to pass between processes, to pin and to copy to a device.
    """

    buffer: Tensor  # uint8 [bytes]: the images, then the fields
    fields: dict[str, Field]
    bad: list[tuple[str, str]]  # (path, reason) of images that were skipped on the way

    @property
    def images(self) -> SourceImages:
        return SourceImages(self.buffer, *(self._view(name) for name in SourceImages._fields[1:]))

    @property
    def tables(self) -> list[CropTable]:
        """Crops of each kind, global and then local ones if there are any; crop-major."""
        kinds = [kind for kind in ("global", "local") if f"{kind}.image" in self.fields]
        return [CropTable(*(self._view(f"{kind}.{name}") for name in CropTable._fields)) for kind in kinds]

    def _view(self, name: str) -> Tensor:
        start, shape, dtype = self.fields[name]
        return self.buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def __len__(self) -> int:
        """Images."""
        return self.fields["offsets"].shape[0]

    def pin_memory(self) -> Batch:
        return Batch(self.buffer.pin_memory(), self.fields, self.bad)

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; from pinned memory without waiting for it."""
        return Batch(self.buffer.to(device, non_blocking=True), self.fields, self.bad)


class WindowDataset(Dataset[Sample]):
    """Position in the endless stream of shuffled epochs -> Sample.

    A scene larger than the window counts as often per epoch as windows fit, each time at a random place.
    """

    def __init__(self, index: SceneIndex, statistics: Statistics, config: Config) -> None:
        self.scenes, self.statistics, self.config = index.scenes, statistics, config
        self.ends = np.cumsum(window_counts(self.scenes, config.data.window_px))
        self._check_dtypes()
        self._order: tuple[int, np.ndarray] | None = None
        self._has_warned = False

    def __len__(self) -> int:
        """Windows per epoch."""
        return int(self.ends[-1])

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order of samples, int64 [len(self)]."""
        if self._order is None or self._order[0] != epoch:
            shuffled = np.random.default_rng([self.config.run.seed, epoch]).permutation(len(self))
            self._order = (epoch, shuffled)
        return self._order[1]

    def _check_dtypes(self) -> None:
        """DataError where more images are of a dtype that nothing is known of than may be bad."""
        dtypes, codes = dtype_codes(self.scenes)
        for code, dtype in enumerate(dtypes):
            try:
                self.statistics.scale_of(dtype)
            except DataError as error:
                those = np.flatnonzero(codes == code)
                if len(those) > self.config.data.max_bad_share * len(self.scenes):
                    first = printable(self.scenes[int(those[0])].path)
                    raise DataError(
                        f"{error}; {len(those)} of {len(self.scenes)} images are of it, the first is {first}"
                    ) from None

    def __getitem__(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self))
        bad: list[tuple[str, str]] = []
        best: tuple[float, Scene, np.ndarray, tuple[np.ndarray, np.ndarray], np.random.Generator] | None = (
            None
        )
        empty = 0
        # The next scene in the epoch's order stands in for one that cannot be read or shows too little.
        for tries in range(min(len(self), _SCENE_DRAWS)):
            if best is not None and empty == _EMPTY_DRAWS:
                break
            sample = int(self.order(epoch)[(place + tries) % len(self)])
            scene = self.scenes[int(np.searchsorted(self.ends, sample, side="right"))]
            random = np.random.default_rng([self.config.run.seed, epoch, sample])
            try:
                scale = self.statistics.scale_of(scene.dtype)
                pixels, missing = self._read(scene, random)
            except (UnreadableImage, DataError) as error:
                bad.append((scene.path, error.reason if isinstance(error, UnreadableImage) else str(error)))
                continue
            empty += 1  # bad luck in a scene that is mostly empty, not a bad file
            if pixels is not None and (best is None or missing < best[0]):
                best = missing, scene, pixels, scale, random
                if missing <= self.config.data.max_nodata_share:
                    break
        if best is None:
            if not bad:
                raise DataError(f"no window with a valid pixel was found in {tries + 1} draws")
            raise DataError(
                f"no image is readable any more; the first is {printable(bad[0][0])}: {bad[0][1]}"
            )
        missing, scene, pixels, (low, high), random = best
        if missing > self.config.data.max_nodata_share and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "no window of %d images in a row is below max_nodata_share = %g: the best is taken, with %.2f, of %s",
                empty, self.config.data.max_nodata_share, missing, printable(scene.path),
            )  # fmt: skip
        crops = {
            kind: draw_crops(random, pixels.shape[1], pixels.shape[2], self.config.crops, kind)
            for kind in ("global", "local")
        }
        return Sample(pixels, low.astype(np.float32), high.astype(np.float32), crops, bad)

    def _read(self, scene: Scene, random: np.random.Generator) -> tuple[np.ndarray | None, float]:
        """A window of the scene and its share of missing pixels: one with too many is drawn again, the best is kept.

        None, 1 when not one of the windows drawn has a valid pixel.
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
            missing = 1 - np.count_nonzero(valid) / valid.size
            if missing < best_share:
                best, best_share = pixels, missing
            if missing <= data.max_nodata_share:
                break
        return best, best_share


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples -> one buffer; tables are crop-major: crop c of image i is row c * images + i."""
    codes = {np.dtype(str(dtype).removeprefix("torch.")): code for code, dtype in enumerate(PIXEL_DTYPES)}
    pixels = [np.ascontiguousarray(sample.pixels) for sample in samples]
    starts = np.cumsum([0] + [_aligned(array.nbytes) for array in pixels])
    arrays: dict[str, np.ndarray] = {
        "offsets": starts[:-1].astype(np.int64),
        "shapes": np.array([array.shape for array in pixels], np.int64),
        "dtypes": np.array([codes[array.dtype] for array in pixels], np.int64),
        "low": np.stack([sample.low for sample in samples]),
        "high": np.stack([sample.high for sample in samples]),
    }
    for kind, first in samples[0].crops.items():
        count = len(first["box"])
        if count:
            arrays[f"{kind}.image"] = np.tile(np.arange(len(samples)), count)
        for name in first if count else ():
            by_crop = np.stack([sample.crops[kind][name] for sample in samples], axis=1)
            arrays[f"{kind}.{name}"] = by_crop.reshape(-1, *by_crop.shape[2:])
    fields, end = _lay_out(arrays, int(starts[-1]))
    buffer = np.zeros(end, np.uint8)
    places = [*starts[:-1], *(field.start for field in fields.values())]
    _write(buffer, places, [*pixels, *arrays.values()])
    return Batch(torch.from_numpy(buffer), fields, [entry for sample in samples for entry in sample.bad])


def join(pieces: Sequence[Batch], device: torch.device | None = None) -> Batch:
    """Batches on the CPU -> one on `device` (default: the CPU), to the byte what `collate` makes of all their samples.

    On a GPU, from pinned memory without waiting for the copies.
    """
    on_gpu = device is not None and device.type == "cuda"
    if len(pieces) == 1:
        return pieces[0].to(device) if device is not None and on_gpu else pieces[0]
    ends = np.cumsum([0] + [piece.fields["offsets"].start for piece in pieces])  # of the images
    firsts = np.cumsum([0] + [len(piece) for piece in pieces])
    arrays: dict[str, np.ndarray] = {}
    for name, (_, shape, _) in pieces[0].fields.items():
        # [crops, images of the piece, ...]; what is said of images as if of one crop.
        parts = [piece._view(name).numpy().reshape(-1, len(piece), *shape[1:]) for piece in pieces]
        if name == "offsets":
            parts = [part + end for part, end in zip(parts, ends[:-1], strict=True)]
        elif name.endswith(".image"):
            parts = [part + first for part, first in zip(parts, firsts[:-1], strict=True)]
        arrays[name] = np.concatenate(parts, axis=1).reshape(-1, *shape[1:])
    images_end = int(ends[-1])
    fields, end = _lay_out(arrays, images_end)
    rest = torch.zeros(end - images_end, dtype=torch.uint8, pin_memory=on_gpu)
    _write(rest.numpy(), [field.start - images_end for field in fields.values()], arrays.values())
    buffer = torch.empty(end, dtype=torch.uint8, device=device)
    for piece, start, stop in zip(pieces, ends[:-1], ends[1:], strict=True):
        buffer[start:stop].copy_(piece.buffer[: stop - start], non_blocking=True)
    buffer[images_end:].copy_(rest, non_blocking=True)
    return Batch(buffer, fields, [entry for piece in pieces for entry in piece.bad])


def _lay_out(arrays: dict[str, np.ndarray], end: int) -> tuple[dict[str, Field], int]:
    """Where arrays lie one after another from byte `end` on, and where they end."""
    fields = {}
    for name, array in arrays.items():
        fields[name] = Field(end, array.shape, torch.from_numpy(array).dtype)
        end += _aligned(array.nbytes)
    return fields, end


def _write(buffer: np.ndarray, starts: Iterable[int], arrays: Iterable[np.ndarray]) -> None:
    for start, array in zip(starts, arrays, strict=True):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


class StreamSampler:
    """Positions of each forward pass of one rank, for `steps` steps from position `first` on.

    Each step takes the next whole batch of positions; within it, part p of rank r takes images
    [p * ranks + r, + 1) x batch_size. So the images of a step do not depend on how they are shared out.
    """

    def __init__(self, config: Config, first: int, steps: int, rank: int, ranks: int) -> None:
        self.batch_size, self.accumulate = config.run.images, config.run.accumulate
        self.first, self.steps, self.rank, self.ranks = first, steps, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        parts = self.accumulate * self.ranks
        for step in range(self.steps):
            for part in range(self.accumulate):
                start = self.first + (step * parts + part * self.ranks + self.rank) * self.batch_size
                yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return self.steps * self.accumulate


def make_loader(
    dataset: WindowDataset,
    first: int,
    steps: int,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """Batches of one rank on `device` (default: the CPU) in order, one per forward pass; see StreamSampler.

    DataError when no image is readable any more.
    """
    config = dataset.config
    on_gpu = device is not None and device.type == "cuda"
    workers, starts = config.data.num_workers, range(0, config.run.images, _PIECE)
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=(
            positions[start : start + _PIECE]
            for positions in StreamSampler(config, first, steps, rank, ranks)
            for start in starts
        ),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=on_gpu,
        # A forward pass ahead at least, or workers would stand still while a long one is computed.
        prefetch_factor=max(2, -(-len(starts) // workers)) if workers else None,
        worker_init_fn=_outlive_signals,
    )
    passes = _grouped(loader, len(starts))
    try:
        yield from copied_ahead(passes, device) if on_gpu and device else map(join, passes)
    except DataError as error:
        # A worker's exception arrives with its traceback before the sentence.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix(f"{_DATA_ERROR}: ")) from None


def _grouped(pieces: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    iterator = iter(pieces)
    for first in iterator:
        yield [first, *islice(iterator, count - 1)]


def _outlive_signals(_: int) -> None:
    """A scheduler's signals reach every process; who trains decides what to do, and needs data to finish its step.

    Not for ever: a worker that is stuck, or that nobody closed, is ended by SIGTERM, too.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))


def copied_ahead(passes: Iterable[list[Batch]], device: torch.device) -> Iterator[Batch]:
    """The pieces of each forward pass joined on a GPU, on a stream of its own while the one before is being used."""
    copies = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for pieces in passes:
        with torch.cuda.stream(copies):
            following = join(pieces, device)
        del pieces  # pinned memory, free for what is read next
        if ahead is not None:
            yield ahead
        # From here on the caller's work waits for the copy, and the copy's memory for the caller's work.
        current = torch.cuda.current_stream(device)
        current.wait_stream(copies)
        following.buffer.record_stream(current)
        ahead = following
    if ahead is not None:
        yield ahead
