"""Embedding maps: blending against the whole array, georeference, nodata, number formats, tables, errors, memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import rasterio.shutil
import torch
from conftest import run_here, run_module, tiny_config
from PIL import Image
from rasterio import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.windows import Window
from sklearn.decomposition import PCA

from pera_fast import _cli, embed
from pera_fast.backbone import Backbone, save_backbone
from pera_fast.config import Config
from pera_fast.data.sources import DataError, open_scene
from pera_fast.data.statistics import Statistics
from pera_fast.features import Tile, extract
from pera_fast.model.vit import VisionTransformer

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
CONFIG = tiny_config()
PATCH, TILE, D = (
    CONFIG.model.patch_px,
    CONFIG.crops.global_px // CONFIG.model.patch_px,
    CONFIG.model.embed_dim,
)
UTM = {"crs": "EPSG:32632", "transform": Affine(10, 0, 500_000, 0, -10, 5_200_000)}


def network(config: Config = CONFIG) -> Backbone:
    """Random weights, large enough that a token tells what is in its patch."""
    bands = config.model.in_bands
    low = {"uint8": (0.0,) * bands, "uint16": (100.0,) * bands, "float32": (-1.0,) * bands}
    high = {"uint8": (255.0,) * bands, "uint16": (4000.0,) * bands, "float32": (1.0,) * bands}
    statistics = Statistics(low, high, (0.4, 0.5, 0.6, 0.7)[:bands], (0.2, 0.25, 0.3, 0.35)[:bands], 1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = VisionTransformer(config.model, config.crops.global_px)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Backbone(vit, config, statistics, step=7)


NETWORK = network()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    save_backbone(NETWORK, path)
    return path


def noise(height: int, width: int, bands: int = 3, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """[bands, height, width]: colours that change slowly, with noise on them."""
    random = np.random.default_rng(seed)
    coarse = random.integers(20, 200, (bands, height // 12 + 1, width // 12 + 1)).repeat(12, 1).repeat(12, 2)
    return (coarse[:, :height, :width] + random.integers(0, 50, (bands, height, width))).astype(dtype)


def write(path: Path, pixels: np.ndarray, **profile: Any) -> Path:
    bands, height, width = pixels.shape
    with rasterio.open(path, "w", "GTiff", width, height, bands, dtype=pixels.dtype.name, **profile) as file:
        file.write(pixels)
    return path


def read(path: Path) -> np.ndarray:
    """What a map says: float [height, width, K], scaled, NaN for nodata."""
    with rasterio.open(path) as file:
        stored = file.read()
        values = stored * np.array(file.scales)[:, None, None] + np.array(file.offsets)[:, None, None]
        values[stored == file.nodata] = np.nan
    return values.transpose(1, 2, 0)


def direct(pixels: np.ndarray, backbone: Backbone = NETWORK) -> np.ndarray:
    """Tokens [height, width, D] of the network's own forward pass over one array of whole patches."""
    with torch.inference_mode():
        tokens = backbone(backbone.preprocess(pixels)[None])[1][0].numpy()
    return tokens.reshape(pixels.shape[1] // PATCH, pixels.shape[2] // PATCH, -1)


def reference(pixels: np.ndarray, overlap: float, tile: int = TILE) -> np.ndarray:
    """The map as it is defined: all tiles, all weights, one division, in float64."""
    height, width = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
    high, wide = min(tile, height), min(tile, width)
    total, weights = np.zeros((height, width, D)), np.zeros((height, width, 1))

    def places(length: int, side: int) -> list[int]:
        found, at = [], 0
        while at + side < length:
            found.append(at)
            at += max(1, round(side * (1 - overlap)))
        return [*found, length - side]

    def ramp(side: int) -> np.ndarray:
        return np.array([(1 - np.cos(2 * np.pi * (i + 0.5) / side)) / 2 for i in range(side)])

    weight = (ramp(high)[:, None] * ramp(wide)[None])[..., None]
    for top in places(height, high):
        for left in places(width, wide):
            window = pixels[:, top * PATCH : (top + high) * PATCH, left * PATCH : (left + wide) * PATCH]
            total[top : top + high, left : left + wide] += weight * direct(window)
            weights[top : top + high, left : left + wide] += weight
    return total / weights


# --- values ---------------------------------------------------------------------------------------------


def test_scene_of_one_tile_is_what_the_network_says(tmp_path: Path) -> None:
    pixels = noise(TILE * PATCH, TILE * PATCH)
    embed.embed_scene(NETWORK, write(tmp_path / "a.tif", pixels), tmp_path / "map.tif")
    np.testing.assert_array_equal(read(tmp_path / "map.tif"), direct(pixels))


@pytest.mark.parametrize(
    ("height", "width", "overlap", "batch_size"),
    [(101, 77, 0.0, 1), (101, 77, 0.25, 3), (64, 150, 0.5, 16), (97, 88, 0.85, 7), (40, 200, 0.4, 5)],
)
def test_tiles_are_blended_as_defined(
    tmp_path: Path, height: int, width: int, overlap: float, batch_size: int
) -> None:
    pixels = noise(height, width)
    scene = write(tmp_path / "a.tif", pixels)
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif", overlap=overlap, batch_size=batch_size)
    found = read(tmp_path / "map.tif")
    assert found.shape == (height // PATCH, width // PATCH, D)
    np.testing.assert_allclose(found, reference(pixels, overlap), atol=2e-5)


def test_tiles_of_another_size(tmp_path: Path) -> None:
    pixels = noise(90, 120)
    embed.embed_scene(NETWORK, write(tmp_path / "a.tif", pixels), tmp_path / "map.tif", tile_px=56)
    np.testing.assert_allclose(read(tmp_path / "map.tif"), reference(pixels, 0.25, tile=7), atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(19, 30), (8, 8), (31, 100), (100, 15)])
def test_scene_smaller_than_a_tile_is_one(tmp_path: Path, height: int, width: int) -> None:
    pixels = noise(height, width)
    embed.embed_scene(NETWORK, write(tmp_path / "a.tif", pixels), tmp_path / "map.tif")
    np.testing.assert_allclose(read(tmp_path / "map.tif"), reference(pixels, 0.25), atol=2e-5)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(("height", "step"), [(23, 0.2), (23, 0.6), (9, 0.0), (5, 0.0)])
def test_rows_come_in_whole_blocks_and_sum_up(block: int, height: int, step: float) -> None:
    """What is held back and what is handed on never mixes, whatever the height of a block."""
    tops, lefts = embed._starts(height, 5, step), embed._starts(11, 4, 0.5)
    tiling = embed.Tiling(height, 11, (5, 4), tops, lefts)
    random = np.random.default_rng(0)
    tiles = [random.normal(size=(5, 4, 3)).astype(np.float32) for _ in range(len(tops) * len(lefts))]
    total, weights = np.zeros((height, 11, 3)), np.zeros((height, 11, 1))
    ramp = [np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (5, 4)]
    weight = (ramp[0][:, None] * ramp[1])[..., None]
    places = [(top, left) for top in tops for left in lefts]
    for (top, left), tile in zip(places, tiles, strict=True):
        total[top : top + 5, left : left + 4] += weight * tile
        weights[top : top + 5, left : left + 4] += weight
    parts = [(top, rows.copy()) for top, rows in embed.blend(tiling, iter(tiles), block)]
    assert [top for top, _ in parts] == list(np.cumsum([0, *(len(rows) for _, rows in parts[:-1])]))
    assert all(len(rows) % block == 0 for _, rows in parts[:-1])
    np.testing.assert_allclose(np.concatenate([rows for _, rows in parts]), total / weights, atol=1e-5)


def test_weights_sum_to_one_and_fall_to_the_ends() -> None:
    weights = embed.blend_weights(starts := embed._starts(50, 8, 0.5), 8, 50)
    total = np.zeros(50)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + 8] += row
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert weights.dtype == np.float32 and (weights > 0).all()
    assert (np.diff(weights[3])[:3] > 0).all() and (np.diff(weights[3])[4:] < 0).all()


def test_16_bit_bands_in_the_order_they_were_trained_on(tmp_path: Path) -> None:
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, in_bands=4),
        data=replace(CONFIG.data, bands=(4, 2, 1, 5)),
    )
    backbone = network(config)
    pixels = noise(80, 80, bands=5, dtype="uint16") * 16
    embed.embed_scene(backbone, write(tmp_path / "a.tif", pixels), tmp_path / "map.tif", overlap=0)
    found = read(tmp_path / "map.tif")
    np.testing.assert_allclose(found[:5, :5], direct(pixels[[3, 1, 0, 4], :40, :40], backbone), atol=1e-5)
    assert embed.provenance(backbone, "runs/mine")["bands"] == "4 2 1 5"


# --- where it is, and how it is stored ------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_a_pixel_of_the_map_is_a_patch_of_the_scene(tmp_path: Path, turned: bool) -> None:
    transform = Affine(8, 3, 500_000, 3, -8, 5_200_000) if turned else UTM["transform"]
    scene = write(tmp_path / "a.tif", noise(101, 77), crs="EPSG:32632", transform=transform)
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif")
    with rasterio.open(scene) as source, rasterio.open(tmp_path / "map.tif") as found:
        assert found.crs == source.crs == CRS.from_epsg(32632)
        assert found.shape == (12, 9)
        assert found.xy(0, 0, offset="ul") == source.xy(0, 0, offset="ul")
        assert found.xy(11, 8, offset="ul") == source.xy(11 * PATCH, 8 * PATCH, offset="ul")
        if not turned:
            assert found.bounds == (500_000, 5_200_000 - 960, 500_000 + 720, 5_200_000)


def test_what_is_bright_in_the_scene_is_where_the_map_says(tmp_path: Path) -> None:
    """A patch unlike the others, found again by its coordinates."""
    pixels = np.full((3, 120, 160), 90, np.uint8)
    pixels[:, 72:80, 104:112] = noise(8, 8)
    embed.embed_scene(NETWORK, write(tmp_path / "a.tif", pixels, **UTM), tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as file:
        row, column = file.index(500_000 + 10 * 108, 5_200_000 - 10 * 76)
    plain = np.full_like(pixels, 90)
    embed.embed_scene(NETWORK, write(tmp_path / "b.tif", plain, **UTM), tmp_path / "plain.tif")
    change = np.abs(read(tmp_path / "map.tif") - read(tmp_path / "plain.tif")).sum(-1)
    assert np.unravel_index(change.argmax(), change.shape) == (row, column) == (9, 13)


def test_ground_control_points_are_carried_over(tmp_path: Path) -> None:
    points = [GroundControlPoint(r, c, 10 + c / 100, 50 - r / 100) for r, c in ((0, 0), (0, 80), (40, 0))]
    scene = write(tmp_path / "a.tif", noise(48, 80), gcps=points, crs="EPSG:4326")
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as file:
        found, crs = file.gcps
    assert crs == CRS.from_epsg(4326)
    assert [(p.row, p.col, p.x, p.y) for p in found] == [
        (p.row / PATCH, p.col / PATCH, p.x, p.y) for p in points
    ]


def test_ground_control_points_without_a_crs(tmp_path: Path) -> None:
    points = [GroundControlPoint(r, c, 10 + c / 100, 50 - r / 100) for r, c in ((0, 0), (0, 80), (40, 0))]
    scene = write(tmp_path / "a.tif", noise(48, 80), gcps=points, crs=CRS())
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as file:
        assert [(p.row, p.col, p.x) for p in file.gcps[0]] == [
            (p.row / PATCH, p.col / PATCH, p.x) for p in points
        ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_file_is_a_cog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setattr(embed, "_BLOCK_BYTES", 1)  # the smallest blocks: several rows of them, and overviews
    pixels = noise(400, 304)
    pixels[:, :64, :64] = 0
    scene = write(tmp_path / "a.tif", pixels, nodata=0, **UTM)
    tags = embed.provenance(NETWORK, tmp_path / "run")
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif", dtype=dtype, tags=tags)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        scale, offset = np.array(file.scales), np.array(file.offsets)
        assert file.profile["tiled"] and file.block_shapes == [(16, 16)] * D
        assert (file.shape, file.count, file.overviews(1)) == ((50, 38), D, [2, 4])
        assert file.dtypes == ("int8" if dtype == "int8" else "float32",) * D
        assert {k: v for k, v in file.tags().items() if k != "AREA_OR_POINT"} == {
            "pera_fast": "0.1.0", "checkpoint": "run", "step": "7", "patch_px": "8", "bands": "1 2 3",
            "tile_px": "40", "overlap": "0.25",
        }  # fmt: skip
    whole = read(tmp_path / "map.tif")
    assert np.isnan(whole[:8, :8]).all() and not np.isnan(whole[8:]).any()
    with rasterio.open(tmp_path / "map.tif", overview_level=0) as file:
        half = file.read().transpose(1, 2, 0) * scale + offset
    mean = whole[8:].reshape(21, 2, 19, 2, D).mean((1, 3))
    np.testing.assert_allclose(half[4:], mean, atol=0.03 if dtype == "int8" else 2e-3)
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("a.tif", "map.tif")] == []
    # Nothing but the map is in it: a second one is the same byte for byte.
    before = (tmp_path / "map.tif").read_bytes()
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif", dtype=dtype, tags=tags)
    assert (tmp_path / "map.tif").read_bytes() == before


def test_int8_is_within_half_a_step_and_float16_is_rounded(tmp_path: Path) -> None:
    pixels = noise(120, 100)
    pixels[:, :8, :8] = 0
    scene = write(tmp_path / "a.tif", pixels, nodata=0)
    maps = {}
    for dtype in ("float32", "float16", "int8"):
        embed.embed_scene(NETWORK, scene, tmp_path / dtype, dtype=dtype)  # type: ignore[arg-type]
        maps[dtype] = read(tmp_path / dtype)
    exact = maps["float32"].astype(np.float32)
    np.testing.assert_array_equal(maps["float16"], exact.astype(np.float16))
    assert (tmp_path / "float16").stat().st_size < 0.8 * (tmp_path / "float32").stat().st_size
    with rasterio.open(tmp_path / "int8") as file:
        stored, steps = file.read(), np.array(file.scales)
    assert stored.dtype == np.int8 and file.nodata == -128
    assert (np.abs(maps["int8"] - exact)[1:] <= steps * 0.501).all()
    assert {-127, 127} <= set(stored[0].flat)  # the whole range is used
    for found in maps.values():
        assert np.isnan(found[0, 0]).all() and np.isnan(found).sum() == D
    assert (tmp_path / "int8").stat().st_size < 0.5 * (tmp_path / "float32").stat().st_size


def test_a_band_without_variance_is_exact_in_int8(tmp_path: Path) -> None:
    backbone = network()
    with torch.no_grad():
        backbone.vit.norm.weight[3], backbone.vit.norm.bias[3] = 0, 0.75
    scene = write(tmp_path / "a.tif", noise(40, 40))
    embed.embed_scene(backbone, scene, tmp_path / "map.tif", dtype="int8")
    np.testing.assert_array_equal(read(tmp_path / "map.tif")[..., 3], 0.75)


# --- missing pixels -------------------------------------------------------------------------------------


def test_a_patch_without_a_pixel_is_nodata_whatever_may_be_missing(tmp_path: Path) -> None:
    pixels = noise(80, 80)
    pixels[:, :, 40:] = 0
    pixels[:, 0, 40] = 1  # of one there is a pixel
    scene = write(tmp_path / "a.tif", pixels, nodata=0)
    config = replace(NETWORK.config, data=replace(NETWORK.config.data, max_nodata_share=1.0))
    embed.embed_scene(Backbone(NETWORK.vit, config, NETWORK.statistics, 0), scene, tmp_path / "map.tif")
    expected = np.zeros((10, 10), bool)
    expected[:, 5:] = True
    expected[0, 5] = False
    np.testing.assert_array_equal(np.isnan(read(tmp_path / "map.tif")).any(-1), expected)


def test_patches_with_too_many_missing_pixels_are_nodata(tmp_path: Path) -> None:
    """3 of 64 pixels are 4.7 %, under the 5 % that training allows; 4 are 6.3 %."""
    pixels = noise(80, 80)
    pixels[:, 0, :3] = 0
    pixels[:, 16, 16:20] = 0
    pixels[:, 40:, 72:] = 0
    scene = write(tmp_path / "a.tif", pixels, nodata=0)
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif")
    missing = np.isnan(read(tmp_path / "map.tif"))
    expected = np.zeros((10, 10), bool)
    expected[2, 2] = expected[5:, 9] = True
    np.testing.assert_array_equal(missing, np.broadcast_to(expected[..., None], missing.shape))
    with rasterio.open(tmp_path / "map.tif") as file:
        assert np.isnan(file.nodata)
        np.testing.assert_array_equal(file.read_masks(1) == 0, expected)


def test_missing_pixels_say_nothing(tmp_path: Path) -> None:
    """Whatever lies under a transparent pixel, the map is that of a scene whose pixels there are the mean."""
    hidden = np.random.default_rng(1).random((80, 80)) < 0.02
    hidden[30:44, 30:44] = True
    maps = []
    for seed, under in enumerate((0, 255)):
        pixels = noise(80, 80)
        pixels[:, hidden] = under
        rgba = np.concatenate((pixels, np.where(hidden, 0, 255)[None].astype(np.uint8))).transpose(1, 2, 0)
        Image.fromarray(rgba).save(tmp_path / f"{seed}.png")
        embed.embed_scene(NETWORK, tmp_path / f"{seed}.png", tmp_path / "map.tif")
        maps.append(read(tmp_path / "map.tif"))
    np.testing.assert_array_equal(*maps)
    filled = (noise(80, 80) / 255 * 2 - 1).astype(np.float32)
    filled[:, hidden] = np.nan
    scene = write(tmp_path / "a.tif", filled)
    embed.embed_scene(NETWORK, scene, tmp_path / "nan.tif")
    mean = np.array(NETWORK.statistics.mean)[:, None]
    filled[:, hidden] = 2 * mean - 1
    embed.embed_scene(NETWORK, write(tmp_path / "b.tif", filled), tmp_path / "mean.tif")
    known = ~np.isnan(read(tmp_path / "nan.tif"))
    assert 0.5 < known.mean() < 1
    np.testing.assert_allclose(
        read(tmp_path / "nan.tif")[known], read(tmp_path / "mean.tif")[known], atol=1e-4
    )


def test_tiles_without_data_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(40, 400)
    pixels[:, :, 40:360] = 0
    seen = []
    original = Backbone.forward
    monkeypatch.setattr(
        Backbone, "forward", lambda self, images: (seen.append(len(images)), original(self, images))[1]
    )
    scene = write(tmp_path / "a.tif", pixels, nodata=0)
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif", overlap=0, batch_size=4)
    assert sum(seen) == 2
    found = read(tmp_path / "map.tif")
    np.testing.assert_allclose(found[:, :5], direct(pixels[:, :, :40]), atol=1e-5)
    assert np.isnan(found[:, 5:45]).all() and not np.isnan(found[:, 45:]).any()


@pytest.mark.parametrize("pca", [None, 2])
def test_a_scene_of_missing_pixels_is_an_error(tmp_path: Path, pca: int | None) -> None:
    scene = write(tmp_path / "a.tif", np.zeros((3, 50, 50), np.uint8), nodata=0)
    with pytest.raises(DataError, match=r"a\.tif: expected patches with data"):
        embed.embed_scene(NETWORK, scene, tmp_path / "map.tif", pca=pca)
    assert os.listdir(tmp_path) == ["a.tif"]


# --- components and pictures ----------------------------------------------------------------------------


def test_pca_bands_are_the_whole_map_projected(tmp_path: Path) -> None:
    """Few enough patches that all of them are fitted on."""
    pixels = noise(200, 120)
    pixels[:, :30, :30] = 0
    scene = write(tmp_path / "a.tif", pixels, nodata=0, **UTM)
    embed.embed_scene(NETWORK, scene, tmp_path / "all.tif", overlap=0)
    embed.embed_scene(NETWORK, scene, tmp_path / "pca.tif", overlap=0, pca=4)
    tokens, found = read(tmp_path / "all.tif"), read(tmp_path / "pca.tif")
    known = ~np.isnan(tokens[..., 0])
    assert found.shape == (25, 15, 4)
    np.testing.assert_array_equal(~np.isnan(found[..., 0]), known)
    pca = PCA(4, svd_solver="full").fit(tokens[known])
    with rasterio.open(tmp_path / "pca.tif") as file:
        ratios = [float(file.tags(band)["explained_variance_ratio"]) for band in file.indexes]
        mean = np.array(file.tags()["pca_mean"].split(), np.float64)
        components = np.array([file.tags(band)["component"].split() for band in file.indexes], np.float64)
    np.testing.assert_allclose(ratios, pca.explained_variance_ratio_, rtol=1e-4)
    np.testing.assert_allclose(found[known], pca.transform(tokens[known]), atol=1e-4)
    np.testing.assert_allclose(found[known], (tokens[known] - mean) @ components.T, atol=1e-5)


def test_pca_is_projected_before_blending_with_the_same_result(tmp_path: Path) -> None:
    scene = write(tmp_path / "a.tif", noise(101, 120))
    embed.embed_scene(NETWORK, scene, tmp_path / "all.tif", overlap=0.5)
    for name in ("pca.tif", "again.tif"):
        embed.embed_scene(NETWORK, scene, tmp_path / name, overlap=0.5, pca=3, dtype="float32")
    with rasterio.open(tmp_path / "pca.tif") as file:
        mean = np.array(file.tags()["pca_mean"].split(), np.float64)
        components = np.array([file.tags(band)["component"].split() for band in file.indexes], np.float64)
    expected = (read(tmp_path / "all.tif") - mean) @ components.T
    np.testing.assert_allclose(read(tmp_path / "pca.tif"), expected, atol=1e-5)
    assert (tmp_path / "pca.tif").read_bytes() == (tmp_path / "again.tif").read_bytes()


def test_pca_is_fitted_on_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_PCA_TILES", 3)
    monkeypatch.setattr(embed, "_PCA_TOKENS", 10)
    fitted: list[int] = []
    fit = embed.fit_pca
    monkeypatch.setattr(embed, "fit_pca", lambda tokens, k: (fitted.append(len(tokens)), fit(tokens, k))[1])
    pixels = noise(200, 200)
    pixels[:, :120] = 0  # tiles without data do not count
    embed.embed_scene(
        NETWORK, write(tmp_path / "a.tif", pixels, nodata=0), tmp_path / "map.tif", pca=2, overlap=0
    )
    assert fitted == [30]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_quicklook_shows_the_main_components(tmp_path: Path, dtype: Any) -> None:
    """Two kinds of ground are two colours; what has no data is clear."""
    pixels = noise(160, 240)
    pixels[:, :, 120:] = noise(160, 120, seed=5) // 8
    pixels[:, :40, :40] = 0
    scene = write(tmp_path / "a.tif", pixels, nodata=0)
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif", dtype=dtype)
    embed.write_quicklook(tmp_path / "map.tif", tmp_path / "look.png")
    picture = np.array(Image.open(tmp_path / "look.png"))
    assert picture.shape == (20, 30, 4) and picture.dtype == np.uint8
    missing = np.isnan(read(tmp_path / "map.tif")[..., 0])
    np.testing.assert_array_equal(picture[..., 3] == 0, missing)
    assert set(np.unique(picture[..., 3])) == {0, 255} and (picture[missing] == 0).all()
    values = read(tmp_path / "map.tif")
    first = PCA(3).fit(values[~missing]).transform(values[~missing])[:, 0]
    red = picture[~missing][:, 0].astype(float)
    assert abs(np.corrcoef(first, red)[0, 1]) > 0.95
    left, right = picture[6:, :13, 0].mean(), picture[6:, 17:, 0].mean()
    assert abs(left - right) > 60


def test_quicklook_of_a_large_map_is_an_overview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(embed, "_QUICKLOOK_PX", 20)
    scene = write(tmp_path / "a.tif", noise(400, 300))
    pictures = []
    for dtype in ("float32", "int8"):
        embed.embed_scene(NETWORK, scene, tmp_path / "map.tif", overlap=0, dtype=dtype)  # type: ignore[arg-type]
        embed.write_quicklook(tmp_path / "map.tif", tmp_path / "look.png")
        pictures.append(np.array(Image.open(tmp_path / "look.png"), float))
    assert pictures[0].shape == (13, 10, 4) and pictures[0][..., :3].std() > 29
    np.testing.assert_allclose(*pictures, atol=15)  # an overview's bands have the scale of the map's


@pytest.mark.parametrize("pca", [1, 2])
def test_quicklook_of_few_bands_and_of_one_patch(tmp_path: Path, pca: int) -> None:
    scene = write(tmp_path / "a.tif", noise(80, 64))
    embed.embed_scene(NETWORK, scene, tmp_path / "map.tif", pca=pca)
    embed.write_quicklook(tmp_path / "map.tif", tmp_path / "look.png")
    picture = np.array(Image.open(tmp_path / "look.png"))
    assert (picture[..., pca - 1] == picture[..., 2]).all() and picture[..., 0].std() > 30
    embed.embed_scene(NETWORK, write(tmp_path / "b.tif", noise(8, 8)), tmp_path / "one.tif")
    embed.write_quicklook(tmp_path / "one.tif", tmp_path / "one.png")
    assert np.array(Image.open(tmp_path / "one.png")).tolist() == [[[0, 0, 0, 255]]]


# --- other images ---------------------------------------------------------------------------------------


def test_jpeg_and_png_without_and_with_a_world_file(tmp_path: Path, saved: Path) -> None:
    Image.fromarray(noise(50, 90).transpose(1, 2, 0)).save(tmp_path / "a.jpg", quality=90)
    Image.fromarray(noise(50, 90).transpose(1, 2, 0)).save(tmp_path / "a.png")
    for name in ("a.jpg", "a.png"):
        done = run_module(
            "pera_fast.embed", tmp_path / name, "--checkpoint", saved, "--out", tmp_path / "map.tif",
            "--device", "cpu", PYTHONWARNINGS="default::UserWarning",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "arning" not in done.stderr
        pixels = np.array(Image.open(tmp_path / name)).transpose(2, 0, 1)
        np.testing.assert_allclose(read(tmp_path / "map.tif"), reference(pixels, 0.25), atol=2e-5)
        with rasterio.open(tmp_path / "map.tif") as file:
            assert file.crs is None and file.transform.is_identity
    (tmp_path / "a.jgw").write_text("2\n0\n0\n-2\n1001\n1999\n")  # the upper left pixel's centre
    embed.embed_scene(NETWORK, tmp_path / "a.jpg", tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.transform == Affine(16, 0, 1000, 0, -16, 2000)


# --- tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_folder_becomes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: Any
) -> None:
    monkeypatch.setattr(embed, "_ROW_GROUP", 3)
    monkeypatch.setattr(embed._log, "propagate", True)
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for i in range(7):
        pixels = noise(30 + 5 * i, 50, seed=i).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / ("deep" if i % 2 else ".") / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:500])  # the header is whole
    with tarfile.open(folder / "shard.tar", "w") as shard:
        stream = io.BytesIO()
        Image.fromarray(noise(33, 44, seed=9).transpose(1, 2, 0)).save(stream, "PNG")
        member = tarfile.TarInfo("in.png")
        member.size = stream.tell()
        stream.seek(0)
        shard.addfile(member, stream)
    tags = embed.provenance(NETWORK, "runs/mine/")
    with caplog.at_level("INFO", "pera_fast"):
        assert (
            embed.embed_folder(NETWORK, folder, tmp_path / "a.parquet", dtype=dtype, batch_size=2, tags=tags)
            == 2
        )
    assert "7 images, 2 skipped" in caplog.text and "2.png" in caplog.text and "broken.jpg" in caplog.text
    table = pq.read_table(tmp_path / "a.parquet")
    width = "halffloat" if dtype == "float16" else "float"
    assert str(table.schema.field("path").type) == "string"
    assert (
        str(table.schema.field("features").type).startswith(f"fixed_size_list<element: {width}")
        or str(table.schema.field("features").type) == f"fixed_size_list<item: {width}>[{D}]"
    )
    assert table.schema.field("features").type.list_size == D
    assert {k.decode(): v.decode() for k, v in table.schema.metadata.items()} == tags
    assert tags["checkpoint"] == "mine"
    single = [folder / n for n in ("0.png", "4.png", "6.png", "deep/1.png", "deep/3.png", "deep/5.png")]
    assert table["path"].to_pylist() == [str(p) for p in [*single, folder / "shard.tar/in.png"]]
    tiles = [Tile.whole(open_scene(p)) for p in single]
    expected = extract(NETWORK.vit, tiles, CONFIG, NETWORK.statistics, torch.device("cpu")).rows.numpy()
    found = np.stack(table["features"].to_numpy())
    np.testing.assert_allclose(found[:-1], expected, atol=2e-3 if dtype == "float16" else 1e-5)
    assert sorted(os.listdir(tmp_path)) == ["a.parquet", "images"]


def test_folder_whose_pixels_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(noise(60, 60).transpose(1, 2, 0)).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:300])
    with pytest.raises(DataError, match="no image under .*images can be read"):
        embed.embed_folder(NETWORK, folder, tmp_path / "a.parquet")
    assert os.listdir(tmp_path) == ["images"]


# --- the command, and what can go wrong -----------------------------------------------------------------


def test_command(tmp_path: Path, saved: Path) -> None:
    scene = write(tmp_path / "a.tif", noise(120, 130), **UTM)
    out, look = tmp_path / "map.tif", tmp_path / "look.png"
    done = run_here(
        "pera_fast.embed", scene, "--checkpoint", saved, "--out", out, "--pca", 3, "--dtype", "int8", "--overlap",
        0.5, "--tile-px", 48, "--batch-size", 4, "--quicklook", look, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "0/20 [" in done.stderr and f"wrote {out}: 16 x 15 patches, 3 bands" in done.stderr
    embed.embed_scene(
        NETWORK, scene, tmp_path / "b.tif", pca=3, dtype="int8", overlap=0.5, tile_px=48, batch_size=4,
        tags=embed.provenance(NETWORK, saved),
    )  # fmt: skip
    with rasterio.open(out) as file, rasterio.open(tmp_path / "b.tif") as other:
        assert file.tags() == other.tags() and file.profile == other.profile
        assert file.tags()["checkpoint"] == "net.safetensors"
        assert str(tmp_path) not in str(file.tags())
    np.testing.assert_allclose(read(out), read(tmp_path / "b.tif"), atol=0.1)
    assert Image.open(look).size == (16, 15)
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(noise(60, 60).transpose(1, 2, 0)).save(folder / "a.png")
    done = run_here("pera_fast.embed", folder, "--checkpoint", saved, "--out", tmp_path / "a.parquet")
    assert done.returncode == 0 and "1 images, 0 skipped" in done.stderr, done.stderr
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 1


def test_errors_are_one_sentence(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = write(tmp_path / "a.tif", noise(60, 60)), tmp_path / "map.tif"
    folder, gone = tmp_path / "folder", tmp_path / "gone"
    folder.mkdir()
    (tmp_path / "text.tif").write_text("no image")
    write(tmp_path / "two.tif", noise(60, 60, bands=2))
    write(tmp_path / "narrow.tif", noise(60, 7))
    write(tmp_path / "deep.tif", noise(60, 60, dtype="int16").astype("int16"))
    before = sorted(os.listdir(tmp_path))
    cases: list[tuple[list[object], str]] = [
        ([good, "--checkpoint", gone], f"checkpoint: expected a checkpoint or a run with one, got {gone}"),
        ([gone, "--checkpoint", saved], f"scene: expected an image or a folder of images, got {gone}"),
        ([good, "--checkpoint", saved, "--pca", 33], "pca: expected from 1 to 32 components, as many as"),
        ([good, "--checkpoint", saved, "--pca", 0], "pca: expected from 1 to 32 components"),
        ([good, "--checkpoint", saved, "--tile-px", 20], "tile_px: expected a multiple of patch_px = 8, got 20"),
        ([good, "--checkpoint", saved, "--overlap", 1], "overlap: expected a share from 0 to below 1, got 1"),
        ([good, "--checkpoint", saved, "--batch-size", 0], "batch_size: expected a whole number of at least 1, got 0"),
        ([good, "--checkpoint", saved, "--quicklook", out], "quicklook: expected a file that nothing else"),
        ([tmp_path / "text.tif", "--checkpoint", saved], "cannot read"),
        ([tmp_path / "two.tif", "--checkpoint", saved], "two.tif: 3 bands asked for, the image has 2"),
        ([tmp_path / "narrow.tif", "--checkpoint", saved], "one patch of 8x8 pixels, got an image of 7x60"),
        ([folder, "--checkpoint", saved], "found under"),
        ([folder, "--checkpoint", saved, "--pca", 3], f"pca: expected one scene to map, got the folder {folder}"),
        ([folder, "--checkpoint", saved, "--dtype", "int8"], "dtype: expected one scene to map, got the folder"),
        ([folder, "--checkpoint", saved, "--batch-size", 0], "batch_size: expected a whole number of at least 1"),
    ]  # fmt: skip
    for arguments, sentence in cases:
        assert sentence in fails([*arguments, "--out", out], monkeypatch, capsys)
    for target, sentence in (
        (gone / "map.tif", f"out: expected a file in a folder that exists, got {gone / 'map.tif'}"),
        (folder, f"out: expected a file to write, got the folder {folder}"),
        (good, f"out: expected a file that nothing else is read from or written to, got {good}"),
        (saved, "out: expected a file that nothing else"),
    ):
        assert sentence in fails([good, "--checkpoint", saved, "--out", target], monkeypatch, capsys)
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(folder) == []


def fails(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the command says when it ends with an error, of which it has to be one line."""
    args = embed.tyro.cli(embed.Args, args=[*map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        _cli.run(lambda: embed.main(args))
    said = capsys.readouterr().err.split("\r")[-1].strip()
    assert stopped.value.code == 2 and said.startswith("error: ") and "\n" not in said, said
    return said


def test_a_dtype_without_scale_is_told_before_any_work(tmp_path: Path) -> None:
    backbone = network()
    backbone.statistics.low.pop("uint16"), backbone.statistics.high.pop("uint16")
    scene = write(tmp_path / "a.tif", noise(60, 60, dtype="uint16"))
    with pytest.raises(DataError, match="no scale for uint16 images"):
        embed.embed_scene(backbone, scene, tmp_path / "map.tif")
    with pytest.raises(DataError, match="no scale for uint16 images"):
        embed.embed_folder(backbone, tmp_path, tmp_path / "a.parquet")


def test_a_run_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the scene, in the network, and while the map is written."""
    scene = write(tmp_path / "a.tif", noise(200, 200), tiled=True, blockxsize=16, blockysize=16)
    out = tmp_path / "map.tif"
    out.write_text("what was there")
    cut = tmp_path / "cut.tif"
    cut.write_bytes(scene.read_bytes()[:60_000])
    with pytest.raises(DataError, match=r"cannot read .*cut\.tif"):
        embed.embed_scene(NETWORK, cut, out)

    broken = network()
    with torch.no_grad():
        broken.vit.norm.bias[0] = torch.nan
    with pytest.raises(DataError, match="are not finite"):
        embed.embed_scene(broken, scene, out, pca=2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rasterio.shutil, "copy", full)
    with pytest.raises(DataError, match=r"cannot write .*map\.tif: No space left on device"):
        embed.embed_scene(NETWORK, scene, out)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Backbone, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed.embed_scene(NETWORK, scene, out)
    assert sorted(os.listdir(tmp_path)) == ["a.tif", "cut.tif", "map.tif"]
    assert out.read_text() == "what was there"


@pytest.mark.parametrize("step", ["embed._Layout.write", "embed._Layout.finish", "rasterio.shutil.copy"])
def test_a_full_disk_is_an_error_and_no_map(tmp_path: Path, saved: Path, step: str) -> None:
    """From that step on files may not grow beyond 50 KB."""
    scene = write(tmp_path / "a.tif", noise(320, 320))
    code = f"""
import resource, signal
import rasterio.shutil
from pera_fast import _cli, embed

def limited(*args, step={step}, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return step(*args, **options)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
{step} = limited
_cli.run(lambda: embed.main(embed.tyro.cli(embed.Args)))
"""
    arguments = [scene, "--checkpoint", saved, "--out", tmp_path / "map.tif", "--device", "cpu"]
    done = python(code, *arguments)
    assert done.returncode == 2 and "error: cannot write" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["a.tif"]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


# --- memory ---------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_scene(tmp_path: Path) -> None:
    """20000 x 20000 pixels in three bands, 1.2 GB as stored and 4.8 GB as the network takes them, in under 2 GB."""
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, patch_px=50, depth=1),
        crops=replace(CONFIG.crops, global_px=500, local_px=150),
    )
    save_backbone(network(config), tmp_path / "net.safetensors")
    scene, side, step = tmp_path / "large.tif", 20_000, 1024
    random = np.random.default_rng(0)
    with rasterio.open(
        scene, "w", "GTiff", side, side, 3, dtype="uint8", tiled=True, blockxsize=512, blockysize=512,
        interleave="pixel", compress="deflate", zlevel=1, **UTM,
    ) as file:  # fmt: skip
        for top in range(0, side, step):
            for left in range(0, side, step):
                height, width = min(step, side - top), min(step, side - left)
                block = np.full((3, height, width), random.integers(1, 255), np.uint8)
                block[:, :200, :200] = random.integers(0, 255, (3, 200, 200))
                file.write(block, window=Window(left, top, width, height))
    code = (
        "from pera_fast import _cli, embed\n"
        "_cli.run(lambda: embed.main(embed.tyro.cli(embed.Args)))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    arguments = [
        scene, "--checkpoint", tmp_path / "net.safetensors", "--out", tmp_path / "map.tif", "--device", "cpu",
        "--quicklook", tmp_path / "look.png", "--overlap", 0.1,
    ]  # fmt: skip
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) * 1024 < 2e9, f"{int(done.stdout) / 1e6:.2f} GB"
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.shape == (400, 400) and file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.bounds == (500_000, 5_000_000, 700_000, 5_200_000)
