"""Scaling and normalisation constants of a data set, from a sample of windows.

Pixels of dtype d are scaled to [0, 1] by clip((x - low[d]) / (high[d] - low[d]), 0, 1); `mean` and `std`
are those of the scaled values. 8-bit images keep 0..255. Other dtypes take the 0.5th and 99.5th percentile
of each band: 12-bit sensors fill a fraction of 16 bits, and a few glints would stretch a min-max range.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pera_fast.config import ConfigError
from pera_fast.data.index import dtype_codes
from pera_fast.data.sources import DataError, Scene, UnreadableImage, printable, read_windows

LOG = logging.getLogger("pera_fast")

LOW_QUANTILE, HIGH_QUANTILE = 0.005, 0.995
_HISTOGRAM_BINS = {"uint8": 2**8, "uint16": 2**16}
_FLOAT_SAMPLES = 2**24  # float values kept in memory (64 MiB); integers are counted exactly
_SCENES_PER_DTYPE = 8  # at least this many (or all) are sampled of each dtype, if the budget allows
_CONSTANT_STD = 1e-6  # a band with less spread than this is constant


@dataclass(frozen=True)
class Statistics:
    """Scaling range per dtype name and band, mean and std per band of the scaled values.

    `num_windows` and `num_pixels` (valid pixels) say how much data they rest on.
    """

    low: dict[str, tuple[float, ...]]
    high: dict[str, tuple[float, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_windows: int
    num_pixels: int

    def scale_of(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each [C] float64. Raises DataError if no image of this dtype was sampled."""
        if dtype not in self.low:
            known = ", ".join(sorted(self.low))
            raise DataError(f"the statistics have no scale for {dtype} images, only for {known}")
        return np.array(self.low[dtype]), np.array(self.high[dtype])

    def to_json(self) -> str:
        """Indented JSON text; floats survive the round trip exactly."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def read(cls, path: str | os.PathLike[str], in_bands: int) -> Statistics:
        """Of a file of `pera_fast.stats`. ConfigError when it cannot be read, DataError as `from_json`."""
        where = printable(path)
        try:
            found = cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"stats: cannot read {where}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"stats: expected a JSON file of pera_fast.stats, got {where}") from None
        if len(found.mean) != in_bands:
            raise ConfigError(
                f"stats: expected statistics of in_bands = {in_bands} bands, got {len(found.mean)} in {where}"
            )
        return found

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """Inverse of `to_json`. Raises DataError on anything but the exact keys and kinds of value."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"the statistics are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError("the statistics are not a JSON object")
        _check_keys(values)
        bands = len(values["mean"]) if isinstance(values["mean"], list) else 0
        if not bands:
            raise DataError("statistics, mean: expected a list with one number per band")
        low = _scales_from(values, "low", bands)
        high = _scales_from(values, "high", bands, list(values["low"]))
        for dtype in low:
            if not all(np.float32(a) < np.float32(b) for a, b in zip(low[dtype], high[dtype], strict=True)):
                raise DataError(f"statistics, high.{dtype}: expected numbers above those of low.{dtype}")
        std = _floats_from(values["std"], "std", bands)
        if min(std) <= 0:
            raise DataError(f"statistics, std: expected numbers above 0, got {values['std']!r}")
        return cls(
            low=low,
            high=high,
            mean=_floats_from(values["mean"], "mean", bands),
            std=std,
            num_windows=_count_from(values, "num_windows"),
            num_pixels=_count_from(values, "num_pixels"),
        )


def _check_keys(values: dict[str, Any]) -> None:
    expected = {field.name for field in fields(Statistics)}
    for what, names in (("unknown", values.keys() - expected), ("missing", expected - values.keys())):
        if names:
            raise DataError(f"the statistics have {what} keys: {', '.join(sorted(names))}")


def _floats_from(value: Any, name: str, bands: int) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else []
    fine = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    if len(numbers) != bands or not fine:
        raise DataError(f"statistics, {name}: expected a list of {bands} numbers, got {value!r}")
    return tuple(float(number) for number in numbers)


def _scales_from(
    values: dict[str, Any], name: str, bands: int, dtypes: list[str] | None = None
) -> dict[str, tuple[float, ...]]:
    table = values[name]
    if not isinstance(table, dict) or (dtypes is not None and set(table) != set(dtypes)):
        raise DataError(f"statistics, {name}: expected one list per dtype, the same dtypes in low and high")
    return {dtype: _floats_from(numbers, f"{name}.{dtype}", bands) for dtype, numbers in table.items()}


def _count_from(values: dict[str, Any], name: str) -> int:
    if type(values[name]) is not int or values[name] < 0:
        raise DataError(f"statistics, {name}: expected a count, got {values[name]!r}")
    return int(values[name])


# Which windows


def plan_windows(
    scenes: Sequence[Scene], max_windows: int, window_px: int, seed: int
) -> list[tuple[Scene, list[tuple[int, int, int, int]]]]:
    """A seeded sample of at most `max_windows` (top, left, height, width), grouped by scene in given order.

    Each scene is divided evenly into cells of at most window_px x window_px. With more scenes than windows,
    a random cell of randomly chosen scenes; else one cell of each scene and the rest of the budget at random
    among all other cells, that is by area. A budget that reaches covers every pixel once.
    """
    rng = np.random.default_rng(seed)
    if len(scenes) > max_windows:
        scenes = _draw_scenes(scenes, max_windows, rng)
    grids = [(-(-scene.height // window_px), -(-scene.width // window_px)) for scene in scenes]
    cells = np.array([rows * columns for rows, columns in grids], dtype=np.int64)
    first = rng.integers(cells)
    chosen = [[int(cell)] for cell in first]
    ends = np.cumsum(cells - 1)  # the other cells of all scenes, numbered through
    others = int(ends[-1])
    for number in rng.choice(others, size=min(max_windows - len(scenes), others), replace=False):
        index = int(np.searchsorted(ends, number, side="right"))
        cell = int(number - (ends[index] - (cells[index] - 1)))
        chosen[index].append(cell + (cell >= first[index]))
    return [
        (scene, [_cell_window(scene, grid, cell) for cell in sorted(picked)])
        for scene, grid, picked in zip(scenes, grids, chosen, strict=True)
    ]


def _draw_scenes(scenes: Sequence[Scene], count: int, rng: np.random.Generator) -> list[Scene]:
    """`count` of the scenes at random, in their order, a few of each dtype: a rare one needs a scale too."""
    order = rng.permutation(len(scenes))
    names, codes = dtype_codes(scenes)
    quota = min(_SCENES_PER_DTYPE, count // len(names))
    sure = np.concatenate([order[codes[order] == names.index(name)][:quota] for name in sorted(names)])
    rest = order[~np.isin(order, sure)]
    return [scenes[int(index)] for index in sorted(np.concatenate((sure, rest))[:count])]


def _cell_window(scene: Scene, grid: tuple[int, int], cell: int) -> tuple[int, int, int, int]:
    row, column = divmod(cell, grid[1])
    top, bottom = (scene.height * edge // grid[0] for edge in (row, row + 1))
    left, right = (scene.width * edge // grid[1] for edge in (column, column + 1))
    return top, left, bottom - top, right - left


# Counting


class _Counts:
    """Values of one integer dtype as exact histograms [C, bins]."""

    def __init__(self, in_bands: int, dtype: str) -> None:
        self.bins = np.zeros((in_bands, _HISTOGRAM_BINS[dtype]), dtype=np.int64)
        self.num_pixels = 0

    def add(self, values: np.ndarray) -> None:
        """values: [C, N] of valid pixels."""
        self.num_pixels += values.shape[1]
        for band, row in enumerate(values):
            self.bins[band] += np.bincount(row, minlength=self.bins.shape[1])

    def values_and_weights(self, band: int) -> tuple[np.ndarray, np.ndarray]:
        """Distinct values in ascending order and how often each occurred, both float64."""
        present = np.flatnonzero(self.bins[band])
        return present.astype(np.float64), self.bins[band, present].astype(np.float64)


class _Samples:
    """Float values [C, N], a share of each window's pixels, drawn at random: a window counts by its valid pixels."""

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self.rng = np.random.default_rng(seed)
        self.kept: list[np.ndarray] = []
        self.num_pixels = 0

    def add(self, values: np.ndarray) -> None:
        self.num_pixels += values.shape[1]
        if self.share < 1:
            count = math.ceil(self.share * values.shape[1])
            values = values[:, self.rng.choice(values.shape[1], count, replace=False)]
        self.kept.append(values)

    def values_and_weights(self, band: int) -> tuple[np.ndarray, np.ndarray]:
        values = np.sort(np.concatenate([part[band] for part in self.kept])).astype(np.float64)
        return values, np.ones(len(values))


def _quantile(values: np.ndarray, weights: np.ndarray, quantile: float) -> float:
    """numpy.quantile (linear interpolation) of ascending `values`, each repeated `weights` times."""
    ends = np.cumsum(weights)
    position = quantile * (ends[-1] - 1)
    below, above = np.searchsorted(ends, [math.floor(position), math.ceil(position)], side="right")
    fraction = position - math.floor(position)
    return float(values[below] + fraction * (values[above] - values[below]))


def _range_of(tally: _Counts | _Samples, dtype: str, band: int) -> tuple[float, float]:
    if dtype == "uint8":
        return 0.0, 255.0
    values, weights = tally.values_and_weights(band)
    low, high = (_quantile(values, weights, share) for share in (LOW_QUANTILE, HIGH_QUANTILE))
    # float32 is what images are scaled in: two limits that are one number there would divide by 0.
    return low, (high if np.float32(high) > np.float32(low) else low + max(1.0, 1e-6 * abs(low)))


def _moments(tally: _Counts | _Samples, band: int, low: float, high: float) -> tuple[float, float]:
    """Mean and mean square of the scaled values of one band."""
    values, weights = tally.values_and_weights(band)
    scaled = np.clip((values - low) / (high - low), 0.0, 1.0)
    total = weights.sum()
    return float((weights * scaled).sum() / total), float((weights * scaled**2).sum() / total)


# The whole


def compute_statistics(
    scenes: Sequence[Scene],
    *,
    bands: tuple[int, ...] | None,
    in_bands: int,
    nodata: float | None = None,
    max_windows: int = 512,
    window_px: int = 256,
    seed: int = 0,
    max_bad_share: float = 1.0,
) -> Statistics:
    """Scale, mean and std per band over the valid pixels of a seeded sample of windows (`plan_windows`).

    `bands`, `in_bands` and `nodata` as in `read_window`. The same scenes and seed give the same result.
    Integer images are counted exactly; float images keep a bounded random sample. Different dtypes weigh by
    their valid pixels. A constant band gets high = low + 1, and std 1 so that dividing by it is harmless.

    Raises DataError if there is no valid pixel at all, or more than max_bad_share of the images cannot be read.
    """
    for name, value in (("max_windows", max_windows), ("window_px", window_px)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not scenes:
        raise DataError("no image to compute statistics from")
    plan = plan_windows(scenes, max_windows, window_px, seed)
    share = _FLOAT_SAMPLES / (in_bands * window_px**2 * sum(len(windows) for _, windows in plan))
    tallies: dict[str, _Counts | _Samples] = {}
    num_windows = 0
    failures: list[UnreadableImage] = []
    for scene, windows in plan:
        try:
            for pixels, valid in read_windows(scene, windows, bands=bands, in_bands=in_bands, nodata=nodata):
                num_windows += 1
                if not valid.any():
                    continue
                if scene.dtype not in tallies:
                    integer = scene.dtype in _HISTOGRAM_BINS
                    tallies[scene.dtype] = (
                        _Counts(in_bands, scene.dtype) if integer else _Samples(share, seed)
                    )
                tallies[scene.dtype].add(pixels[:, valid])
        except UnreadableImage as error:
            failures.append(error)
    if failures:
        LOG.warning("statistics: skipped %d of %d images, first %s", len(failures), len(plan), failures[0])
    if not tallies:
        raise DataError(_nothing_valid(scenes[0], num_windows, failures))
    if len(failures) > max_bad_share * len(plan):
        raise DataError(
            f"{len(failures)} of {len(plan)} images cannot be read, more than max_bad_share = {max_bad_share:g} "
            f"allows; the first is {failures[0]}"
        )
    return _summary(tallies, in_bands, num_windows)


def _nothing_valid(scene: Scene, num_windows: int, failures: list[UnreadableImage]) -> str:
    if failures:
        return f"no image could be read for the statistics; the first failure is {failures[0]}"
    first = f"the first image is {printable(scene.path)}"
    return f"no valid pixel in {num_windows} sampled windows: all of it is nodata; {first}"


def _summary(tallies: dict[str, _Counts | _Samples], in_bands: int, num_windows: int) -> Statistics:
    low: dict[str, tuple[float, ...]] = {"uint8": (0.0,) * in_bands}
    high: dict[str, tuple[float, ...]] = {"uint8": (255.0,) * in_bands}
    for dtype, tally in sorted(tallies.items()):
        ranges = [_range_of(tally, dtype, band) for band in range(in_bands)]
        low[dtype] = tuple(lower for lower, _ in ranges)
        high[dtype] = tuple(upper for _, upper in ranges)
    num_pixels = sum(tally.num_pixels for tally in tallies.values())
    moments = np.zeros((in_bands, 2))
    for dtype, tally in sorted(tallies.items()):
        for band in range(in_bands):
            share = tally.num_pixels / num_pixels
            moments[band] += share * np.array(_moments(tally, band, low[dtype][band], high[dtype][band]))
    mean = moments[:, 0]
    # Mean square minus squared mean loses no digit that matters: the values are in [0, 1], the sums float64.
    std = np.sqrt(np.maximum(moments[:, 1] - mean**2, 0.0))
    std = np.where(std < _CONSTANT_STD, 1.0, std)
    return Statistics(low, high, tuple(mean.tolist()), tuple(std.tolist()), num_windows, num_pixels)
