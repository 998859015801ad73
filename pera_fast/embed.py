"""What the network sees, as a map: `python -m pera_fast.embed SCENE.tif --checkpoint RUN --out emb.tif`.

    scene     overlapping tiles ──► patch tokens ──► (PCA) ──► blended, row by row ──► Cloud-Optimised GeoTIFF
    folder    whole images, resized to a training crop ──► class tokens ──► Parquet

Nothing is held but some rows of the map, as wide as the scene, a tile and a block high. On disk, a map needs
about three times its size in float32 until it is complete.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import rasterio
import rasterio.shutil
import torch
import tyro
from PIL import Image
from rasterio import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window
from torch import Tensor
from tqdm import tqdm

import pera_fast
from pera_fast import _cli
from pera_fast.backbone import Backbone, load_backbone
from pera_fast.config import ConfigError
from pera_fast.data import shards
from pera_fast.data.sources import (
    DataError,
    Scene,
    UnreadableImage,
    open_scene,
    printable,
    read_windows,
    scan,
)
from pera_fast.features import Tile, extract
from pera_fast.files import one_line, whole

_log = logging.getLogger("pera_fast")

Dtype = Literal["float32", "float16", "int8"]

_INT8_NODATA = -128
_GDAL_OPTIONS = {
    "GDAL_CACHEMAX": 2**28,  # bytes; by default a twentieth of the machine's memory
    "GDAL_PAM_ENABLED": "NO",  # no .aux.xml beside the map
    "GDAL_VALIDATE_CREATION_OPTIONS": "NO",  # or GDAL warns of blocks of less than 128 px
}
_BLOCK_BYTES = 2**23  # of a block of the map, all bands; a reader takes no less
_PCA_TILES, _PCA_TOKENS = 64, 256  # to fit on: tiles with data, patches of each
_QUICKLOOK_PX = 1024
_QUICKLOOK_VALUES = 2**24  # that its colours are fitted on
_ROW_GROUP = 1024  # images per row group of a Parquet file


# --- where the tiles lie --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles that cover a map; everything in patches.

    height, width: of the map. tile: (height, width) of every tile. tops, lefts: where they begin; tiles are counted
    row by row.
    """

    height: int
    width: int
    tile: tuple[int, int]
    tops: list[int]
    lefts: list[int]

    @classmethod
    def over(cls, scene: Scene, patch_px: int, tile_px: int, overlap: float) -> Tiling:
        """Every whole patch of the scene, from its upper left corner; what is left over at its right and lower edge,
        less than a patch, is not mapped.

        A tile is no larger than the scene, and the last one of a row or column lies against the edge: all are whole.
        DataError for a scene without a whole patch.
        """
        height, width = scene.height // patch_px, scene.width // patch_px
        if min(height, width) < 1:
            raise DataError(
                f"{printable(scene.path)}: expected at least one patch of {patch_px}x{patch_px} pixels, got an image "
                f"of {scene.width}x{scene.height}"
            )
        tile = min(tile_px // patch_px, height), min(tile_px // patch_px, width)
        tops, lefts = (_starts(n, side, overlap) for n, side in zip((height, width), tile, strict=True))
        return cls(height, width, tile, tops, lefts)

    def windows(self, patch_px: int) -> list[tuple[int, int, int, int]]:
        """(top, left, height, width) of every tile in pixels of the scene."""
        high, wide = self.tile
        return [
            (top * patch_px, left * patch_px, high * patch_px, wide * patch_px)
            for top in self.tops
            for left in self.lefts
        ]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    step = max(1, round(tile * (1 - overlap)))
    return [*range(0, length - tile, step), length - tile]


def blend_weights(starts: list[int], tile: int, length: int) -> np.ndarray:
    """How much each tile counts at each of its patches along one axis: float32 [tiles, tile].

    A raised cosine sin²(π (i + ½) / tile), small at the tile's ends, where the network saw one side only, divided by
    the sum over all tiles that cover a place: at every place the weights sum to 1.
    """
    ramp = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + tile] += ramp
    return np.stack([ramp / total[start : start + tile] for start in starts]).astype(np.float32)


def blend(tiling: Tiling, tiles: Iterator[np.ndarray], block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Sum weighted tiles, float32 [tile height, tile width, K] each, to the rows of the map, from top to bottom.

    Yields (top, rows [n, width, K]) as soon as no further tile covers them, n a multiple of `block` but for the last.
    Holds block + tile height rows. NaN stays NaN.
    """
    high, wide = tiling.tile
    down = blend_weights(tiling.tops, high, tiling.height)
    across = blend_weights(tiling.lefts, wide, tiling.width)
    rows, top = np.empty(0, np.float32), 0
    for start, end, vertical in zip(tiling.tops, [*tiling.tops[1:], None], down, strict=True):
        for left, horizontal in zip(tiling.lefts, across, strict=True):
            tokens = next(tiles)
            if not rows.size:
                rows = np.zeros((block + high, tiling.width, tokens.shape[-1]), np.float32)
            place = rows[start - top : start - top + high, left : left + wide]
            place += tokens * (vertical[:, None] * horizontal)[..., None]
        count = tiling.height - top if end is None else (end - top) // block * block
        if count:
            yield top, rows[:count]
            rows[: len(rows) - count] = rows[count:].copy()
            rows[len(rows) - count :] = 0
            top += count


# --- from pixels to tokens ------------------------------------------------------------------------------

_Batch = tuple[Tensor, np.ndarray]


def _tile_tokens(
    backbone: Backbone, scene: Scene, windows: list[tuple[int, int, int, int]], batch_size: int
) -> Generator[np.ndarray, None, None]:
    """Patch tokens float32 [height, width, D] of every window, NaN where a patch lacks data."""
    device = backbone.device
    with closing(_ahead(_batches(backbone, scene, windows, batch_size))) as batches:
        for images, valid in batches:
            tokens = np.full((*valid.shape, backbone.dim), np.nan, np.float32)
            seen = np.flatnonzero(valid.any((1, 2)))  # a tile without data need not be looked at
            if seen.size:
                # In float32, as evaluation extracts its features: what is near what must not depend on the machine.
                with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                    found = backbone(images[seen])[1].float().cpu().numpy()
                if not np.isfinite(found).all():
                    raise DataError(f"the network's features of {printable(scene.path)} are not finite")
                tokens[seen] = found.reshape(len(seen), *valid.shape[1:], -1)
            tokens[~valid] = np.nan
            yield from tokens


def _batches(
    backbone: Backbone, scene: Scene, windows: list[tuple[int, int, int, int]], batch_size: int
) -> Generator[_Batch, None, None]:
    """Network inputs [n, C, height, width] with missing pixels at the mean, and which patches count [n, h, w] bool.

    A patch counts if no larger share of its pixels is missing than training allowed in a window.
    """
    data, patch_px = backbone.config.data, backbone.patch_px
    in_bands = backbone.config.model.in_bands
    read = read_windows(scene, windows, bands=data.bands, in_bands=in_bands, nodata=data.nodata)
    while batch := list(islice(read, batch_size)):
        images = torch.stack([backbone.preprocess(pixels) for pixels, _ in batch])
        missing = ~np.stack([valid for _, valid in batch])
        images.masked_fill_(torch.from_numpy(missing)[:, None], 0)  # the mean, after normalisation
        n, height, width = missing.shape
        patches = missing.reshape(n, height // patch_px, patch_px, width // patch_px, patch_px)
        missing_share = patches.mean((2, 4))
        yield images, (missing_share <= data.max_nodata_share) & (missing_share < 1)


def _ahead(batches: Generator[_Batch, None, None]) -> Generator[_Batch, None, None]:
    """The same, the next one being read while the last is worked on."""
    with ThreadPoolExecutor(1) as reader:
        try:
            following = reader.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = reader.submit(next, batches, None)
                yield batch
        finally:
            reader.submit(batches.close)  # there, since rasterio keeps GDAL's settings by thread


class Projection(NamedTuple):
    """Principal components of patch tokens."""

    mean: np.ndarray  # float32 [D]
    components: np.ndarray  # float32 [K, D]
    explained_variance_ratio: np.ndarray  # [K]

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [..., D] -> [..., K]; NaN stays NaN."""
        with np.errstate(invalid="ignore"):
            return (tokens - self.mean) @ self.components.T

    def describe(self, raster: Any) -> None:
        """Put it into a map's tags, so that another scene can be projected likewise."""
        raster.update_tags(pca_mean=_text(self.mean))
        for band, (ratio, row) in enumerate(
            zip(self.explained_variance_ratio, self.components, strict=True), 1
        ):
            raster.update_tags(band, explained_variance_ratio=f"{ratio:.6g}", component=_text(row))


def _text(vector: np.ndarray) -> str:
    return " ".join(f"{value:.9g}" for value in vector)  # nine digits give a float32 back to the bit


def fit_pca(tokens: np.ndarray, k: int) -> Projection:
    """The k directions of greatest variance of tokens [n, D], n > k, in float64."""
    from sklearn.decomposition import PCA  # takes a second

    pca = PCA(k, random_state=0).fit(tokens.astype(np.float64))
    mean, components = pca.mean_.astype(np.float32), pca.components_.astype(np.float32)
    return Projection(mean, components, pca.explained_variance_ratio_)


def _fit_pca_on_scene(
    backbone: Backbone, scene: Scene, tiling: Tiling, k: int, batch_size: int
) -> Projection:
    """PCA of up to 64 x 256 patches with data, out of tiles drawn with a fixed seed."""
    random = np.random.default_rng(0)
    windows = tiling.windows(backbone.patch_px)
    windows = [windows[i] for i in random.permutation(len(windows))]
    rows: list[np.ndarray] = []
    with closing(_tile_tokens(backbone, scene, windows, batch_size)) as tiles:
        for tokens in tiles:
            known = tokens[~np.isnan(tokens[..., 0])]
            if len(known):
                rows.append(random.permutation(known)[:_PCA_TOKENS])
            if len(rows) == _PCA_TILES:
                break
    count = sum(map(len, rows))
    if not count:
        raise _no_data(scene)
    if k >= count:
        raise DataError(f"pca: expected fewer components than the {count} patches to fit them on, got {k}")
    pca = fit_pca(np.concatenate(rows), k)
    _log.info("%d components hold %.1f %% of the variance", k, 100 * pca.explained_variance_ratio.sum())
    return pca


def _no_data(scene: Scene) -> DataError:
    return DataError(f"{printable(scene.path)}: expected patches with data, got missing pixels only")


# --- a scene to a map -----------------------------------------------------------------------------------


def embed_scene(
    backbone: Backbone,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pca: int | None = None,
    dtype: Dtype = "float32",
    tile_px: int | None = None,
    overlap: float = 0.25,
    batch_size: int = 16,
    tags: dict[str, str] | None = None,
    progress: bool = False,
) -> None:
    """Write the patch tokens of a scene as a Cloud-Optimised GeoTIFF, one pixel per patch, whole or not at all.

    pca: number of principal components in place of the D features. dtype: of the bands; float16: rounded to half
    precision, in a float32 file that is smaller for it; int8 comes with a scale and an offset per band, value =
    scale · stored + offset. tile_px: side of a tile, a multiple of patch_px; default: of a training crop. overlap:
    share of a tile's side that the next one repeats, from 0 to below 1. tags: more metadata.

    CRS and transform are the scene's, a pixel of the map being patch_px pixels of the scene; ground control points are
    carried over, RPCs are not. A patch that lacks more than the config's max_nodata_share of its pixels is nodata: NaN,
    -128 in int8. Missing pixels of other patches are shown to the network as the mean.

    ConfigError for settings that do not fit, DataError when the scene cannot be read or the map not written.
    """
    tile_px = backbone.config.crops.global_px if tile_px is None else tile_px
    _check_settings(backbone, pca, tile_px, overlap, batch_size)
    with _gdal(), _readable(path):
        scene = open_scene(path)
        backbone.statistics.scale_of(scene.dtype)  # before any work
        tiling = Tiling.over(scene, backbone.patch_px, tile_px, overlap)
        place = _georeference(scene.path, backbone.patch_px)
        with whole(out) as partial:
            project = None if pca is None else _fit_pca_on_scene(backbone, scene, tiling, pca, batch_size)
            tiles = _tile_tokens(backbone, scene, tiling.windows(backbone.patch_px), batch_size)
            total = len(tiling.tops) * len(tiling.lefts)
            with closing(tiles), tqdm(total=total, unit="tile", disable=not progress, leave=False) as bar:
                layout = _Layout.of(tiling, pca or backbone.dim, dtype, place)
                raw = partial.with_name("raw.tif")
                low, high, size = layout.write(
                    raw, blend(tiling, _projected(tiles, project, bar), layout.block)
                )
            if (low > high).any():
                raise _no_data(scene)
            settings = {"tile_px": str(tile_px), "overlap": f"{overlap:g}"}
            if dtype == "int8":
                layout.check(raw, size)
                raw, size = layout.to_int8(raw, raw.with_name("int8.tif"), low, high)
            layout.finish(raw, partial, (tags or {}) | settings, project)
            layout.check(partial, size)
    _log.info("wrote %s: %d x %d patches, %d bands", out, tiling.width, tiling.height, layout.count)


def _projected(tiles: Iterator[np.ndarray], project: Projection | None, bar: Any) -> Iterator[np.ndarray]:
    # The weights of a place sum to 1, so that projecting before blending is the same, and blends fewer numbers.
    for tokens in tiles:
        bar.update()
        yield tokens if project is None else project(tokens)


@dataclass(frozen=True)
class _Layout:
    """How a map lies on disk."""

    height: int
    width: int
    count: int
    dtype: Dtype
    block: int
    place: dict[str, Any]

    @classmethod
    def of(cls, tiling: Tiling, count: int, dtype: Dtype, place: dict[str, Any]) -> _Layout:
        """Blocks are as large as they can be, since one of a COG holds all bands: 512 px for 8 bands, 32 for 768."""
        block = next((b for b in (512, 256, 128, 64, 32) if b * b * count * 4 <= _BLOCK_BYTES), 16)
        return cls(tiling.height, tiling.width, count, dtype, block, place)

    def profile(self, dtype: str, nodata: float) -> dict[str, Any]:
        """Of a file that is written row by row, but from which GDAL makes overviews band by band: in a tenth of the
        time, for 160 bands, that it takes from a file with interleaved bands."""
        return {
            "driver": "GTiff", "BIGTIFF": "YES", "interleave": "band", "tiled": False, "blockysize": self.block,
            "height": self.height, "width": self.width, "count": self.count, "dtype": dtype, "nodata": nodata,
        } | self.place  # fmt: skip

    def write(
        self, path: Path, parts: Iterable[tuple[int, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Write rows (top, [n, width, count]) as float32; the least and greatest value of each band, and `_size`."""
        size = 0.0
        low, high = np.full(self.count, np.inf, np.float32), np.full(self.count, -np.inf, np.float32)
        with rasterio.open(path, "w", **self.profile("float32", math.nan)) as raster:
            for top, rows in parts:
                if self.dtype == "float16":
                    # Stored as float32, of which the zeros compress: with NBITS=16 GDAL 3.10 cuts off where it should
                    # round, and fills the tiles at the edge with whatever its memory held before.
                    rows = rows.astype(np.float16).astype(np.float32)
                low = np.fmin(low, np.fmin.reduce(rows, axis=(0, 1)))
                high = np.fmax(high, np.fmax.reduce(rows, axis=(0, 1)))
                size += _size(rows)
                raster.write(rows.transpose(2, 0, 1), window=Window(0, top, self.width, len(rows)))
        return low, high, size

    def finish(self, raw: Path, cog: Path, tags: dict[str, str], project: Projection | None) -> None:
        """Overviews, metadata, and the order of bytes that makes a GeoTIFF cloud-optimised."""
        levels = math.ceil(math.log2(max(self.height, self.width) / self.block))
        with (
            rasterio.Env(GDAL_TIFF_OVR_BLOCKSIZE=max(64, self.block)),
            rasterio.open(raw, "r+") as raster,
        ):
            if levels > 0:
                raster.build_overviews([2**i for i in range(1, levels + 1)], Resampling.average)
            raster.update_tags(**tags)
            if project is not None:
                project.describe(raster)
        rasterio.shutil.copy(
            raw, cog, driver="COG", BLOCKSIZE=self.block, COMPRESS="DEFLATE", PREDICTOR="YES", BIGTIFF="IF_SAFER",
            NUM_THREADS="ALL_CPUS",
        )  # fmt: skip

    def rows(self, raster: Any) -> Iterator[tuple[Window, np.ndarray]]:
        """All of an open map, a row of blocks at a time, as stored [count, n, width]."""
        for top in range(0, self.height, self.block):
            window = Window(0, top, self.width, min(self.block, self.height - top))
            yield window, raster.read(window=window)

    def check(self, path: Path, size: float) -> None:
        """OSError if a file does not hold what was written: GDAL keeps quiet when the disk is full as it closes one."""
        with rasterio.open(path) as raster:
            found = sum(_size(stored) for _, stored in self.rows(raster))
        if not math.isclose(found, size, rel_tol=1e-9):
            raise OSError("not all that was written can be read back")

    def to_int8(self, raw: Path, packed: Path, low: np.ndarray, high: np.ndarray) -> tuple[Path, float]:
        """The float32 file in 255 steps from each band's least to its greatest value; its path and its `_size`."""
        scale, offset = (high - low) / 254, (high + low) / 2
        scale[scale == 0] = 1
        size = 0.0
        with (
            rasterio.open(raw) as source,
            rasterio.open(packed, "w", **self.profile("int8", _INT8_NODATA)) as target,
        ):
            for window, steps in self.rows(source):
                steps -= offset[:, None, None]
                steps /= scale[:, None, None]
                np.clip(np.rint(steps, out=steps), -127, 127, out=steps)
                steps[np.isnan(steps)] = _INT8_NODATA
                size += _size(steps)
                target.write(steps.astype(np.int8), window=window)
            target.scales, target.offsets = scale.tolist(), offset.tolist()
        return packed, size


def _size(stored: np.ndarray) -> float:
    """The sum of all absolute values, which changes when a part goes missing."""
    return float(np.nansum(np.abs(stored, dtype=np.float32), dtype=np.float64))


def _georeference(path: str, patch_px: int) -> dict[str, Any]:
    """CRS with transform or ground control points of the map, as rasterio takes them; {} if the scene has none."""
    # Of a JPEG or PNG it lies in a file beside it, which GDAL reads where it may.
    with rasterio.Env(GDAL_PAM_ENABLED="YES"), rasterio.open(Path(path)) as scene:
        points, crs = scene.gcps
        if points:
            scaled = [GroundControlPoint(p.row / patch_px, p.col / patch_px, p.x, p.y, p.z) for p in points]
            return {"gcps": scaled, "crs": crs or CRS()}
        place = {} if scene.crs is None else {"crs": scene.crs}
        if not scene.transform.is_identity:
            a, b, c, d, e, f = scene.transform[:6]
            place["transform"] = Affine(a * patch_px, b * patch_px, c, d * patch_px, e * patch_px, f)
        return place


@contextmanager
def _gdal() -> Iterator[None]:
    """GDAL's settings for maps, and no warning of every scene without georeference."""
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    with rasterio.Env(**_GDAL_OPTIONS):
        yield


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except UnreadableImage as error:
        raise DataError(f"cannot read {error}") from None
    except RasterioError as error:
        raise DataError(f"cannot read {printable(path)}: {one_line(error)}") from None


# --- a map to a picture ---------------------------------------------------------------------------------


def write_quicklook(path: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    """Draw a map's first three principal components as red, green and blue, at most 1024 px a side; nodata is clear.

    Each is stretched from its 2nd to its 98th percentile. Reads an overview, block by block. DataError when the map
    cannot be read or the picture not written.
    """
    with (
        whole(png) as partial,
        _gdal(),
        _overview(path, _QUICKLOOK_PX) as raster,
        _overview(path, math.isqrt(_QUICKLOOK_VALUES // raster.count)) as coarse,
    ):
        scale = _scale(path)
        sample = np.concatenate([values[~np.isnan(values[..., 0])] for _, values in _blocks(coarse, *scale)])
        k = min(3, raster.count, len(sample) - 1)
        project = fit_pca(sample, k) if k > 0 else None
        low, high = np.percentile(project(sample), (2, 98), axis=0) if project else (0.0, 1.0)
        picture = np.zeros((*raster.shape, 4), np.uint8)
        for window, values in _blocks(raster, *scale):
            place = picture[window.toslices()]
            place[..., 3] = np.where(np.isnan(values[..., 0]), 0, 255)
            if project is not None:
                share = (project(values) - low) / np.maximum(high - low, 1e-12)
                colours = np.nan_to_num(share).clip(0, 1) * 255
                place[..., :3] = colours.round()[..., np.minimum(range(3), k - 1)]
        Image.fromarray(picture).save(partial, "PNG")


def _overview(path: str | os.PathLike[str], most_px: int) -> Any:
    """A map opened at its finest resolution with at most `most_px` a side, or else at its coarsest."""
    with rasterio.open(path) as raster:
        factors = [1, *raster.overviews(1)]
        fits = (max(raster.shape) <= factor * most_px for factor in factors)
        level = next((i for i, fit in enumerate(fits) if fit), len(factors) - 1)
    return rasterio.open(path, **({"overview_level": level - 1} if level else {}))


def _scale(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of a map's bands, float32 [K] each; its overviews are stored alike, but do not say so."""
    with rasterio.open(path) as raster:
        return np.array(raster.scales, np.float32), np.array(raster.offsets, np.float32)


def _blocks(raster: Any, scale: np.ndarray, offset: np.ndarray) -> Iterator[tuple[Window, np.ndarray]]:
    """Every block of an open map: where it lies, and its values float32 [n, m, K], NaN for nodata."""
    for _, window in raster.block_windows(1):
        stored = raster.read(window=window).transpose(1, 2, 0)
        values = stored * scale + offset
        if stored.dtype == np.int8:
            values[stored == _INT8_NODATA] = np.nan
        yield window, values


# --- a folder to a table --------------------------------------------------------------------------------


def embed_folder(
    backbone: Backbone,
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int = 16,
    tags: dict[str, str] | None = None,
    progress: bool = False,
) -> int:
    """Write the class token of every image under `folder`, tar shards included, as Parquet; how many were skipped.

    Columns: path (string) and features (fixed_size_list of `dtype`, D of them), in the order of the paths. An image is
    shown to the network whole, resized to a training crop. Those that cannot be read are named in the log and left out.
    DataError when none can be, or nothing be written.
    """
    _check_batch_size(batch_size)
    import pyarrow as pa
    import pyarrow.parquet as pq

    scenes, bad = (index := scan(folder, max_bad_share=1)).scenes, index.bad
    for stored in sorted({scene.dtype for scene in scenes}):
        backbone.statistics.scale_of(stored)
    kind = pa.from_numpy_dtype(dtype)
    schema = pa.schema({"path": pa.string(), "features": pa.list_(kind, backbone.dim)}, metadata=tags)
    skipped = len(bad)
    with (
        whole(out) as partial,
        pq.ParquetWriter(partial, schema) as table,
        tqdm(total=len(scenes), unit="image", disable=not progress, leave=False) as bar,
    ):
        for start in range(0, len(scenes), _ROW_GROUP):
            group = [Tile.whole(s, printable(s.path)) for s in scenes[start : start + _ROW_GROUP]]
            device = backbone.device
            found = extract(backbone.vit, group, backbone.config, backbone.statistics, device, batch_size)
            for path, reason in found.bad:
                _log.warning("skipped %s: %s", printable(path), reason)
            skipped += len(found.bad)
            values = pa.array(found.rows.numpy().astype(dtype).ravel(), kind)
            features = pa.FixedSizeListArray.from_arrays(values, backbone.dim)
            table.write_batch(pa.record_batch([pa.array(found.labels, pa.string()), features], schema=schema))
            bar.update(len(group))
        if skipped == len(scenes) + len(bad):
            raise DataError(f"no image under {printable(folder)} can be read")
    _log.info("wrote %s: %d images, %d skipped", out, len(scenes) + len(bad) - skipped, skipped)
    return skipped


# --- command --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Map a scene's patch features to a GeoTIFF, or write the class tokens of a folder's images as Parquet."""

    scene: Annotated[str, tyro.conf.Positional]
    """GeoTIFF, or any other image, to map; or a folder or tar shard of images for a table."""
    checkpoint: str
    """A run folder (its newest checkpoint is taken), one checkpoint, or a file of `pera_fast.export`."""
    out: str
    """Cloud-Optimised GeoTIFF to write, one pixel per patch; Parquet for a folder."""
    pca: int | None = None
    """Principal components to write in place of all features."""
    dtype: Dtype = "float32"
    """Of the bands; float16: rounded to it, in a float32 file that is smaller for it; int8 has a scale and an offset
    per band in the file's tags."""
    tile_px: int | None = None
    """Side of the tiles the network is shown. Default: of a training crop."""
    overlap: float = 0.25
    """Share of a tile's side that the next tile repeats."""
    batch_size: int = 16
    """Tiles or images in one pass."""
    quicklook: str | None = None
    """Also draw the map's three main components as a PNG."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto takes a GPU if there is one."""


def main(args: Args) -> None:
    """Run the command. Raises ConfigError and DataError for what the user can put right."""
    is_folder = os.path.isdir(args.scene) or args.scene.lower().endswith(
        (*shards.EXTENSIONS, *shards.COMPRESSED)
    )
    _check_files(args, is_folder)
    backbone = load_backbone(args.checkpoint, args.device)
    tags = provenance(backbone, args.checkpoint)
    if is_folder:
        dtype: Any = args.dtype
        embed_folder(
            backbone, args.scene, args.out, dtype=dtype, batch_size=args.batch_size, tags=tags, progress=True
        )
        return
    embed_scene(
        backbone, args.scene, args.out, pca=args.pca, dtype=args.dtype, tile_px=args.tile_px, overlap=args.overlap,
        batch_size=args.batch_size, tags=tags, progress=True,
    )  # fmt: skip
    if args.quicklook is not None:
        write_quicklook(args.out, args.quicklook)


def provenance(backbone: Backbone, checkpoint: str | os.PathLike[str]) -> dict[str, str]:
    """Where features come from, for a file's metadata. Of the checkpoint its name alone: folders are the user's own."""
    return {
        "pera_fast": pera_fast.__version__,
        "checkpoint": printable(Path(checkpoint).resolve().name),
        "step": str(backbone.step),
        "patch_px": str(backbone.patch_px),
        "bands": " ".join(map(str, backbone.bands)),
    }


def _check_files(args: Args, is_folder: bool) -> None:
    if not is_folder and not os.path.exists(args.scene):
        raise DataError(
            f"scene: expected an image or a folder of images, got {printable(args.scene)}, which is not there"
        )
    _cli.check_files([args.scene, args.checkpoint], out=args.out, quicklook=args.quicklook)
    for path in (args.out, args.quicklook or "", "" if is_folder else args.scene):
        if printable(path) != path:
            raise ConfigError(f"scene, out, quicklook: expected names in UTF-8, got {printable(path)}")
    if is_folder:
        for name, given in {
            "pca": args.pca is not None, "tile_px": args.tile_px is not None, "quicklook": args.quicklook is not None,
            "dtype": args.dtype == "int8",
        }.items():  # fmt: skip
            if given:
                raise ConfigError(
                    f"{name}: expected one scene to map, got the folder {printable(args.scene)}"
                )


def _check_settings(
    backbone: Backbone, pca: int | None, tile_px: int, overlap: float, batch_size: int
) -> None:
    if pca is not None and not 1 <= pca <= backbone.dim:
        raise ConfigError(
            f"pca: expected from 1 to {backbone.dim} components, as many as features, got {pca}"
        )
    if tile_px < 1 or tile_px % backbone.patch_px:
        raise ConfigError(f"tile_px: expected a multiple of patch_px = {backbone.patch_px}, got {tile_px}")
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap: expected a share from 0 to below 1, got {overlap:g}")
    _check_batch_size(batch_size)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected a whole number of at least 1, got {batch_size}")


if __name__ == "__main__":
    _cli.run(lambda: main(_cli.ask(lambda: tyro.cli(Args, prog="pera_fast.embed"))))
