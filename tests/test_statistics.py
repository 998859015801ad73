"""Statistics against direct numpy computation, their file format, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import python_path
from PIL import Image

import pera_fast.data.statistics as statistics_module
from pera_fast.data import sources
from pera_fast.data.sources import DataError, Scene, open_scene, scan
from pera_fast.data.statistics import Statistics, compute_statistics, plan_windows

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
ROOT = Path(sources.__file__).parents[2]
DEMO = ROOT / "pera_fast/demo"
RNG = np.random.default_rng(11)


def tiff(path: Path, bands: np.ndarray, **profile) -> Scene:
    count, height, width = bands.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype, **profile
    ) as dataset:
        dataset.write(bands)
    return open_scene(path)


def direct(bands: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, ...]:
    """low, high, mean, std of [C, H, W] by the definition, in float64."""
    values = bands[:, valid].astype(np.float64)
    low, high = np.percentile(values, [0.5, 99.5], axis=1)
    high = np.where(high > low, high, low + 1)
    scaled = np.clip((values - low[:, None]) / (high - low)[:, None], 0, 1)
    return low, high, scaled.mean(axis=1), scaled.std(axis=1)


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int16"])
def test_full_coverage_equals_numpy(tmp_path: Path, dtype: str) -> None:
    bands = (RNG.gamma(2.0, 700.0, (3, 90, 130)) - (500 if dtype == "int16" else 0)).astype(dtype)
    bands[:, :20, :30] = 7
    scene = tiff(tmp_path / "a.tif", bands, nodata=7)
    valid = (bands != 7).all(axis=0)
    found = compute_statistics([scene], bands=None, in_bands=3, window_px=32)
    assert found.num_windows == 15 and found.num_pixels == valid.sum()
    low, high, mean, std = direct(bands, valid)
    name = "uint16" if dtype == "uint16" else "float32"
    for value, expected in zip(
        (*found.scale_of(name), found.mean, found.std), (low, high, mean, std), strict=True
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)


def test_uint8_keeps_its_range(tmp_path: Path) -> None:
    rgb = RNG.integers(90, 120, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    found = compute_statistics([open_scene(tmp_path / "a.png")], bands=(3, 1), in_bands=2)
    low, high = found.scale_of("uint8")
    np.testing.assert_array_equal([low, high], [[0, 0], [255, 255]])
    chosen = rgb[..., [2, 0]].reshape(-1, 2) / 255
    np.testing.assert_allclose(found.mean, chosen.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.std, chosen.std(axis=0), atol=1e-6)


def test_dtypes_weigh_by_valid_pixels(tmp_path: Path) -> None:
    small = RNG.integers(0, 256, (1, 20, 30)).astype(np.uint8)
    deep = RNG.integers(100, 4000, (1, 60, 50)).astype(np.uint16)
    scenes = [tiff(tmp_path / "a.tif", small), tiff(tmp_path / "b.tif", deep)]
    found = compute_statistics(scenes, bands=None, in_bands=1)
    low, high, _, _ = direct(deep, np.ones((60, 50), dtype=bool))
    scaled = np.concatenate([small.ravel() / 255, np.clip((deep.ravel() - low) / (high - low), 0, 1)])
    np.testing.assert_allclose(found.mean, scaled.mean(), atol=1e-6)
    np.testing.assert_allclose(found.std, scaled.std(), atol=1e-6)


def test_constant_band_has_a_usable_scale(tmp_path: Path) -> None:
    bands = np.stack([np.full((9, 9), 40), np.arange(81).reshape(9, 9)]).astype(np.uint16)
    found = compute_statistics([tiff(tmp_path / "a.tif", bands)], bands=None, in_bands=2)
    low, high = found.scale_of("uint16")
    assert (low[0], high[0], found.mean[0], found.std[0]) == (40, 41, 0, 1)


def test_float_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bands = RNG.normal(size=(2, 200, 200)).astype(np.float32)
    scene = tiff(tmp_path / "a.tif", bands)
    monkeypatch.setattr(statistics_module, "_FLOAT_SAMPLES", 20000)
    found = compute_statistics([scene], bands=None, in_bands=2, window_px=50)
    assert found.num_pixels == 40000
    _, _, mean, std = direct(bands, np.ones((200, 200), dtype=bool))
    np.testing.assert_allclose(found.mean, mean, atol=0.02)
    np.testing.assert_allclose(found.std, std, atol=0.02)


def test_a_window_of_floats_counts_by_its_valid_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One full of 0, and one of 10 of which an eighth is valid."""
    bands = np.stack([np.zeros((64, 64)), np.full((64, 64), 10.0)]).astype(np.float32)
    bands[1, 8:] = np.nan
    scenes = [tiff(tmp_path / f"{i}.tif", band[None]) for i, band in enumerate(bands)]
    monkeypatch.setattr(statistics_module, "_FLOAT_SAMPLES", 1024)
    found = compute_statistics(scenes, bands=None, in_bands=1, window_px=64)
    low, high = found.scale_of("float32")
    np.testing.assert_allclose(low + found.mean * (high - low), 10 / 9, rtol=0.02)


def test_same_seed_same_result() -> None:
    scenes = scan(DEMO).scenes
    runs = [
        compute_statistics(scenes, bands=None, in_bands=3, max_windows=9, window_px=64, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0].num_windows == 9


def test_sample_of_the_demo_scenes_is_near_the_whole() -> None:
    scenes = scan(DEMO).scenes
    whole = compute_statistics(scenes, bands=None, in_bands=3)
    sample = compute_statistics(scenes, bands=None, in_bands=3, max_windows=60, window_px=64)
    np.testing.assert_allclose(sample.mean, whole.mean, atol=0.05)
    np.testing.assert_allclose(sample.std, whole.std, atol=0.05)


@pytest.mark.parametrize("max_windows", [1, 3, 5, 6, 20, 61, 62, 1000])
def test_plan_spreads_over_all_scenes(max_windows: int) -> None:
    sizes = [(10, 10), (100, 230), (64, 65), (300, 300), (1, 7)]
    scenes = [Scene(f"{n}.tif", height, width, 3, "uint8") for n, (height, width) in enumerate(sizes)]
    plan = plan_windows(scenes, max_windows, 64, seed=0)
    cells = 1 + 8 + 2 + 25 + 1
    assert sum(len(windows) for _, windows in plan) == min(max_windows, cells)
    assert len(plan) == min(max_windows, len(scenes))
    assert [scene.path for scene, _ in plan] == sorted(scene.path for scene, _ in plan)
    for scene, windows in plan:
        cover = np.zeros((scene.height, scene.width), dtype=int)
        for top, left, height, width in windows:
            assert 0 < height <= 64 and 0 < width <= 64
            cover[top : top + height, left : left + width] += 1
        assert cover.max() == 1
        assert max_windows < cells or cover.min() == 1


def test_plan_reaches_every_dtype() -> None:
    rare = {700: "uint16", 3: "float32", 4: "float32"}
    scenes = [Scene(f"{n:04}", 50, 50, 3, rare.get(n, "uint8")) for n in range(1000)]
    for seed in range(5):
        picked = [scene for scene, _ in plan_windows(scenes, 20, 64, seed)]
        assert len(picked) == 20 and picked == sorted(picked, key=lambda scene: scene.path)
        assert sorted(scene.dtype for scene in picked if scene.dtype != "uint8") == sorted(rare.values())
    assert len(plan_windows(scenes, 2, 64, 0)) == 2


def test_unreadable_images_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(tmp_path / f"{number}.jpg")
    scenes = scan(tmp_path).scenes
    whole = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(whole[: len(whole) // 2])
    found = compute_statistics(scenes, bands=None, in_bands=3)
    assert found.num_windows == 3 and found.num_pixels == 3 * 64 * 64
    assert "skipped 1 of 4 images" in caplog.text and "2.jpg" in caplog.text


def test_nothing_valid_is_an_error(tmp_path: Path) -> None:
    scene = tiff(tmp_path / "a.tif", np.zeros((3, 8, 8), dtype=np.uint16), nodata=0)
    with pytest.raises(DataError, match=r"no valid pixel .*a\.tif"):
        compute_statistics([scene], bands=None, in_bands=3)
    with pytest.raises(DataError, match="no image"):
        compute_statistics([], bands=None, in_bands=3)
    with pytest.raises(DataError, match="no image could be read .*6 bands asked for, the image has 3"):
        compute_statistics([scene], bands=None, in_bands=6)
    with pytest.raises(ValueError, match="max_windows"):
        compute_statistics([scene], bands=None, in_bands=3, max_windows=0)


# File format

EXAMPLE = Statistics(
    low={"uint8": (0.0, 0.0), "uint16": (0.1, 3.0)},
    high={"uint8": (255.0, 255.0), "uint16": (4000.7, 1e4)},
    mean=(0.1, 1 / 3),
    std=(0.2, 0.25),
    num_windows=3,
    num_pixels=70,
)


def test_json_round_trip() -> None:
    assert Statistics.from_json(EXAMPLE.to_json()) == EXAMPLE
    assert EXAMPLE.scale_of("uint16")[1].tolist() == [4000.7, 1e4]
    with pytest.raises(DataError, match="no scale for float32 images, only for uint16, uint8"):
        EXAMPLE.scale_of("float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": 1}, "unknown keys: extra"),
        ({"mean": None}, "mean"),
        ({"mean": []}, "mean"),
        ({"std": [1.0]}, "std"),
        ({"std": [1.0, "2"]}, "std"),
        ({"std": [1.0, float("nan")]}, "std"),
        ({"std": [1.0, True]}, "std"),
        ({"low": [1, 2]}, "low"),
        ({"high": {"uint8": [255, 255]}}, "high"),
        ({"num_pixels": 1.5}, "num_pixels"),
        ({"num_windows": -1}, "num_windows"),
    ],
)
def test_from_json_is_strict(change: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Statistics.from_json(json.dumps({**dataclasses.asdict(EXAMPLE), **change}))


def test_from_json_refuses_other_text() -> None:
    values = dataclasses.asdict(EXAMPLE)
    del values["std"]
    for text, words in ((json.dumps(values), "missing keys: std"), ("{", "not JSON"), ("[]", "JSON object")):
        with pytest.raises(DataError, match=words):
            Statistics.from_json(text)


# The command


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pera_fast.stats", *map(str, arguments)],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": python_path(ROOT)},
    )  # fmt: skip


def test_command_prints_json_and_table(tmp_path: Path) -> None:
    out = tmp_path / "stats.json"
    done = command(
        DEMO / "sentinel2_6band.tif", "--bands", "4", "3", "2", "--max-windows", "2", "--nodata", "-9999",
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = Statistics.from_json(done.stdout)
    assert printed == Statistics.from_json(out.read_text()) and len(printed.mean) == 3
    scene = open_scene(DEMO / "sentinel2_6band.tif")
    assert printed == compute_statistics([scene], bands=(4, 3, 2), in_bands=3, max_windows=2)
    assert "uint16 range" in done.stderr and "60000 valid pixels in 2 windows" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "cannot open nowhere: No such file"),
        ([DEMO, "--in-bands", "7"], "no image could be read"),
        ([DEMO, "--bands", "1", "2", "--in-bands", "3"], "--bands: expected 3 band numbers"),
        ([DEMO / "neon_osbs.tif", "--out", "nowhere/x.json"], "out: expected a file in a folder that exists"),
        (
            [DEMO / "neon_osbs.tif", "--out", DEMO / "neon_osbs.tif"],
            "out: expected a file that nothing else is read",
        ),
        (
            [DEMO, "--in-bands", "6", "--bands", "6", "5", "4", "3", "2", "1"],
            "more than max_bad_share = 0.1 allows",
        ),
        ([DEMO, "--bandz", "1"], "bandz"),
    ],
)
def test_command_faults_are_one_sentence(arguments: list, words: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    if "bandz" not in words:
        assert done.stderr.splitlines()[-1].startswith("error: ")
