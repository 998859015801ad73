"""Finding and reading images: every kind of file, every kind of damage."""

from __future__ import annotations

import io
import logging
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from pera_fast.data import sources
from pera_fast.data.sources import (
    DataError,
    Scene,
    UnreadableImage,
    list_images,
    open_scene,
    read_window,
    read_windows,
    scan,
)

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
DEMO = Path(sources.__file__).parents[1] / "demo"
RNG = np.random.default_rng(7)


def noise(*shape: int, dtype: str = "uint8", high: int = 256) -> np.ndarray:
    return RNG.integers(0, high, shape).astype(dtype)


def write_tiff(path: Path, bands: np.ndarray, **profile) -> Path:
    """Write [C, H, W]; colour interpretation through `colorinterp`, palette through `colormap`."""
    meaning, palette = profile.pop("colorinterp", None), profile.pop("colormap", None)
    count, height, width = bands.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype, **profile
    ) as dataset:
        if meaning:
            dataset.colorinterp = meaning
        if palette:
            dataset.write_colormap(1, palette)
        dataset.write(bands)
    return path


def save(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def read_all(path: Path, in_bands: int = 3, **options) -> tuple[np.ndarray, np.ndarray]:
    scene = open_scene(path)
    options = {"bands": None, **options}
    pixels, valid = read_window(scene, 0, 0, scene.height, scene.width, in_bands=in_bands, **options)
    assert pixels.shape == (in_bands, scene.height, scene.width) and str(pixels.dtype) == scene.dtype
    assert valid.shape == pixels.shape[1:] and valid.dtype == bool
    assert pixels.flags.c_contiguous
    return pixels, valid


def summary(scene: Scene) -> tuple:
    return scene.height, scene.width, scene.num_bands, scene.dtype


# Finding files


def test_list_images_is_sorted_deep_and_ignores_case(tmp_path: Path) -> None:
    names = ["b.JPG", "a/z.tif", "a/b/c/d.TIFF", "a/b.jpeg", "B.PNG", "x.jpg/inside.png"]
    for name in [*names, "notes.txt", ".hidden.jpg", "._b.jpg", ".cache/a.jpg", "a/jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty.tif").mkdir()
    assert list_images(tmp_path) == sorted(str(tmp_path / name) for name in names)
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_list_images_takes_one_file(tmp_path: Path) -> None:
    path = save(tmp_path / "one.PNG", noise(4, 5, 3))
    assert list_images(path) == [str(path)]


def test_symlinks_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "data/real").mkdir(parents=True)
    (tmp_path / "data/real/a.jpg").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.jpg").touch()
    (tmp_path / "data/real/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/again").symlink_to(tmp_path / "data/real")
    (tmp_path / "data/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/self.jpg").symlink_to(tmp_path / "data/self.jpg")
    (tmp_path / "data/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = [os.path.relpath(path, tmp_path / "data") for path in list_images(tmp_path / "data")]
    assert found == ["gone.jpg", "other/b.jpg", "real/a.jpg", "self.jpg"]
    for name in ("gone.jpg", "self.jpg"):
        with pytest.raises(UnreadableImage):
            open_scene(tmp_path / "data" / name)


def test_pipes_are_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.jpg").touch()
    assert [os.path.basename(path) for path in list_images(tmp_path)] == ["a.jpg"]


@pytest.mark.parametrize("suffix", [b"jpg", b"tif"])
def test_names_that_are_not_utf8(tmp_path: Path, suffix: bytes, caplog: pytest.LogCaptureFixture) -> None:
    good = write_tiff(tmp_path / "x.tif", noise(3, 8, 9)) if suffix == b"tif" else tmp_path / "x.jpg"
    if suffix == b"jpg":
        save(good, noise(8, 9, 3))
    odd = os.fsencode(tmp_path) + b"/caf\xe9." + suffix
    try:
        os.rename(good, odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    Path(tmp_path / "bad.jpg").touch()
    index = scan(tmp_path, max_bad_share=0.5)
    assert summary(index.scenes[0]) == (8, 9, 3, "uint8")
    read_all(Path(index.scenes[0].path))
    os.truncate(odd, 0)
    with pytest.raises(DataError) as caught:
        scan(tmp_path)
    str(caught.value).encode()
    caplog.text.encode()


@pytest.mark.parametrize("name", ["scene#1.tif", "a?b.tif", "https:x.tif", "a!b.tif", "r 100%.tif", "é.tif"])
def test_names_are_never_taken_for_addresses(tmp_path: Path, name: str) -> None:
    bands = noise(3, 6, 7)
    pixels, _ = read_all(write_tiff(tmp_path / "x.tif", bands).rename(tmp_path / name))
    np.testing.assert_array_equal(pixels, bands)


def test_missing_wrong_and_empty_roots(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("nowhere", "No such file"),
        ("notes.txt", "neither a folder"),
        ("empty", "no image"),
        ("a\0b", "cannot open"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            list_images(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# Scanning


def test_scan_reports_bad_files_and_keeps_the_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(20):
        save(tmp_path / f"{number:02}.png", noise(3, 4 + number))
    (tmp_path / "05.png").write_bytes(b"")
    (tmp_path / "07.png").write_text("not an image at all")
    with caplog.at_level(logging.WARNING, "pera_fast"):
        index = scan(tmp_path, max_bad_share=0.1)
    assert [scene.width for scene in index.scenes] == [4 + n for n in range(20) if n not in (5, 7)]
    assert [(os.path.basename(path), reason) for path, reason in index.bad] == [
        ("05.png", "empty file"),
        ("07.png", "not a JPEG, PNG or TIFF file"),
    ]
    for path, reason in index.bad:
        assert f"{path}: {reason}" in caplog.text
    with pytest.raises(DataError, match=r"only 18 of the 20 .*at most 5%.*05\.png: empty file"):
        scan(tmp_path, max_bad_share=0.05)
    with pytest.raises(ValueError, match="max_bad_share"):
        scan(tmp_path, max_bad_share=10)


def test_scan_with_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match="none of the 1 images .* empty file"):
        scan(tmp_path, max_bad_share=1.0)


def test_scan_crosses_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_HEADER_BATCH", 3)
    for number in range(10):
        save(tmp_path / f"{number}.png", noise(3, 4 + number))
    assert [scene.width for scene in scan(tmp_path).scenes] == list(range(4, 14))


def test_demo_scenes() -> None:
    index = scan(DEMO)
    found = {os.path.basename(scene.path): summary(scene) for scene in index.scenes}
    assert not index.bad
    assert found == {
        "landsat8_224077.tif": (768, 768, 3, "uint16"),
        "landsat_rmnp.jpg": (373, 485, 3, "uint8"),
        "neon_osbs.tif": (400, 400, 3, "uint8"),
        "neon_soap.jpg": (400, 800, 3, "uint8"),
        "neon_yell_forest.jpg": (1024, 1024, 3, "uint8"),
        "neon_yell_open.jpg": (1024, 1024, 3, "uint8"),
        "sentinel2_6band.tif": (200, 300, 6, "uint16"),
    }
    for scene in index.scenes:
        pixels, valid = read_all(Path(scene.path))
        assert valid.all() and pixels.std() > 1


# GeoTIFF


def test_tiled_tiff_windows_equal_the_full_array(tmp_path: Path) -> None:
    bands = noise(4, 150, 230, dtype="uint16", high=65536)
    path = write_tiff(tmp_path / "a.tif", bands, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    scene = open_scene(path)
    assert summary(scene) == (150, 230, 4, "uint16")
    windows = [(0, 0, 150, 230), (149, 229, 1, 1), (60, 60, 10, 10), (3, 100, 140, 17), (0, 0, 1, 230)]
    several = list(read_windows(scene, windows, bands=(4, 1), in_bands=2))
    for (top, left, height, width), (pixels, valid) in zip(windows, several, strict=True):
        expected = bands[[3, 0], top : top + height, left : left + width]
        np.testing.assert_array_equal(pixels, expected)
        single, _ = read_window(scene, top, left, height, width, bands=(4, 1), in_bands=2)
        np.testing.assert_array_equal(single, expected)
        assert valid.all()


def test_six_bands_with_nodata_tag(tmp_path: Path) -> None:
    bands = noise(6, 20, 30, dtype="uint16", high=5000) + np.uint16(1)
    bands[:, :4] = 0
    bands[1, 10, 10] = 0
    path = write_tiff(tmp_path / "a.tif", bands, nodata=0, photometric="minisblack")
    assert summary(open_scene(path)) == (20, 30, 6, "uint16")
    pixels, valid = read_all(path, 6)
    np.testing.assert_array_equal(pixels, bands)
    np.testing.assert_array_equal(valid, (bands != 0).all(axis=0))
    pixels, valid = read_all(path, 3, bands=(6, 4, 1))
    np.testing.assert_array_equal(pixels, bands[[5, 3, 0]])
    assert valid[10, 10] and not valid[3].any()  # band 2 was not asked for
    value = float(bands[0, 19, 29])
    _, valid = read_all(path, 1, bands=(1,), nodata=value)  # takes the place of the tag
    np.testing.assert_array_equal(valid, bands[0] != value)


@pytest.mark.parametrize("nodata", [-9999.0, 0.1, float("nan"), -3.4028234663852886e38])
def test_float_with_nan_and_nodata(tmp_path: Path, nodata: float) -> None:
    bands = RNG.normal(size=(3, 12, 14)).astype("float32")
    bands[0, 0, 0], bands[1, 1, 1], bands[2, 2, 2], bands[0, 3] = np.nan, np.inf, -np.inf, nodata
    path = write_tiff(tmp_path / "a.tif", bands, nodata=nodata)
    pixels, valid = read_all(path)
    assert np.isfinite(pixels).all()
    expected = np.ones((12, 14), dtype=bool)
    expected[0, 0] = expected[1, 1] = expected[2, 2] = expected[3] = False
    np.testing.assert_array_equal(valid, expected)
    np.testing.assert_array_equal(pixels[:, expected], bands[:, expected])
    assert pixels[0, 0, 0] == pixels[1, 1, 1] == pixels[0, 3, 3] == 0
    assert pixels[1, 0, 0] == bands[1, 0, 0]


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "int64", "uint64", "float64"])
def test_other_types_are_read_as_float32(tmp_path: Path, dtype: str) -> None:
    bands = noise(2, 8, 9, high=100).astype(dtype)
    bands[0, 0, 0] = 101
    path = write_tiff(tmp_path / "a.tif", bands, nodata=101)
    pixels, valid = read_all(path, 2)
    assert pixels.dtype == np.float32 and not valid[0, 0] and valid.sum() == 71
    np.testing.assert_array_equal(pixels[:, valid], bands[:, valid])


def test_float64_beyond_float32_is_invalid(tmp_path: Path) -> None:
    bands = np.ones((1, 4, 4))
    bands[0, 0, 0], bands[0, 0, 1] = 1e300, -1.7976931348623157e308
    pixels, valid = read_all(write_tiff(tmp_path / "a.tif", bands, nodata=-1.7976931348623157e308), 1)
    assert valid.sum() == 14 and np.isfinite(pixels).all()


def test_nodata_that_the_type_cannot_hold(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", noise(3, 8, 8))
    for nodata in (-9999.0, 0.5, 1e30, float("nan"), float("inf")):
        assert read_all(path, nodata=nodata)[1].all()


def test_complex_tiff_is_unreadable(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.ones((1, 4, 4), dtype="complex64"))
    with pytest.raises(UnreadableImage, match="unsupported pixel type complex64"):
        open_scene(path)


def test_tiff_alpha_hides_unless_asked_for(tmp_path: Path) -> None:
    bands = noise(4, 9, 8)
    bands[3] = RNG.integers(0, 2, (9, 8)) * 200
    meaning = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    path = write_tiff(tmp_path / "a.tif", bands, colorinterp=meaning)
    assert open_scene(path).num_bands == 3
    pixels, valid = read_all(path)
    np.testing.assert_array_equal(pixels, bands[:3])
    np.testing.assert_array_equal(valid, bands[3] != 0)
    with pytest.raises(UnreadableImage, match="4 bands asked for, the image has 3 .*alpha"):
        read_all(path, 4)
    pixels, valid = read_all(path, 4, bands=(4, 1, 2, 3))
    np.testing.assert_array_equal(pixels, bands[[3, 0, 1, 2]])
    assert valid.all()


def test_tiff_mask_band(tmp_path: Path) -> None:
    mask = RNG.integers(0, 2, (40, 30)).astype(bool)
    path = tmp_path / "a.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_tiff(path, noise(3, 40, 30))
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(mask)
    scene = open_scene(path)
    _, valid = read_window(scene, 5, 6, 30, 20, bands=None, in_bands=3)
    np.testing.assert_array_equal(valid, mask[5:35, 6:26])


@pytest.mark.parametrize("nodata", [None, 2])
def test_tiff_palette_becomes_rgb(tmp_path: Path, nodata: int | None) -> None:
    index = noise(1, 10, 12, high=4)
    palette = {0: (10, 20, 30, 255), 1: (255, 0, 0, 255), 2: (0, 255, 0, 255), 3: (1, 2, 3, 255)}
    path = write_tiff(
        tmp_path / "a.tif",
        index,
        photometric="palette",
        colormap=palette,
        **({"nodata": nodata} if nodata else {}),
    )
    assert open_scene(path).num_bands == 3 and open_scene(path).dtype == "uint8"
    expected = np.array([palette[value][:3] for value in range(4)], dtype=np.uint8)[index[0]]
    pixels, valid = read_all(path)
    np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(valid, index[0] != 2 if nodata else np.ones_like(valid))
    pixels, _ = read_all(path, 2, bands=(3, 1))
    np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1)[[2, 0]])


def test_big_tiff_and_strips(tmp_path: Path) -> None:
    bands = noise(3, 50, 60, dtype="uint16", high=4096)
    path = write_tiff(tmp_path / "a.tif", bands, BIGTIFF="YES", interleave="pixel", compress="lzw")
    np.testing.assert_array_equal(read_all(path)[0], bands)


def test_reading_warns_of_nothing(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", noise(3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_all(path)


# Bands


def test_band_choice(tmp_path: Path) -> None:
    grey, rgb = noise(5, 6), noise(5, 6, 3)
    one, three = save(tmp_path / "g.png", grey), save(tmp_path / "c.png", rgb)
    np.testing.assert_array_equal(read_all(one, 3)[0], np.stack([grey] * 3))
    np.testing.assert_array_equal(read_all(one, 2, bands=(1, 1))[0], np.stack([grey] * 2))
    np.testing.assert_array_equal(read_all(three, 2, bands=(3, 1))[0], rgb.transpose(2, 0, 1)[[2, 0]])
    np.testing.assert_array_equal(read_all(three, 1)[0], rgb.transpose(2, 0, 1)[:1])
    with pytest.raises(UnreadableImage, match="6 bands asked for, the image has 3"):
        read_all(three, 6)
    with pytest.raises(UnreadableImage, match="band 4 asked for, the image has 3"):
        read_all(three, 3, bands=(4, 3, 2))
    two = write_tiff(tmp_path / "two.tif", noise(2, 4, 4), photometric="minisblack")
    with pytest.raises(UnreadableImage, match="3 bands asked for, the image has 2"):
        read_all(two)
    for in_bands, bands, words in ((0, None, "in_bands"), (3, (1, 2), "bands"), (2, (0, 1), "bands")):
        with pytest.raises(ValueError, match=words):
            read_all(three, in_bands, bands=bands)


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg"])
@pytest.mark.parametrize(
    ("window", "name"),
    [
        ((-1, 0, 4, 4), "top"),
        ((0, -1, 4, 4), "left"),
        ((5, 0, 4, 4), "top"),
        ((0, 6, 4, 4), "left"),
        ((0, 0, 0, 4), "height"),
        ((0, 0, 4, -2), "width"),
    ],
)
def test_window_outside_the_image(tmp_path: Path, suffix: str, window: tuple, name: str) -> None:
    scene = open_scene(save(tmp_path / f"a.{suffix}", noise(8, 9, 3)))
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        read_window(scene, *window, bands=None, in_bands=3)


@pytest.mark.parametrize("crop_pixels", [0, 2**24])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pillow_windows_equal_the_full_image(
    tmp_path: Path, suffix: str, crop_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CROP_PIXELS", crop_pixels)
    path = save(tmp_path / f"a.{suffix}", noise(40, 50, 3))
    scene = open_scene(path)
    full = np.asarray(Image.open(path)).transpose(2, 0, 1)
    windows = [(0, 0, 40, 50), (39, 49, 1, 1), (7, 9, 20, 30)]
    several = read_windows(scene, windows, bands=None, in_bands=3)
    for (top, left, height, width), (pixels, _) in zip(windows, several, strict=True):
        np.testing.assert_array_equal(pixels, full[:, top : top + height, left : left + width])


# PNG and JPEG modes


def test_png_grey_8_and_16_bit(tmp_path: Path) -> None:
    grey = noise(7, 9)
    path = save(tmp_path / "a.png", grey)
    assert summary(open_scene(path)) == (7, 9, 1, "uint8")
    np.testing.assert_array_equal(read_all(path, 1)[0][0], grey)
    deep = noise(7, 9, dtype="uint16", high=65536)
    path = save(tmp_path / "b.png", deep)
    assert summary(open_scene(path)) == (7, 9, 1, "uint16")
    np.testing.assert_array_equal(read_all(path, 3)[0], np.stack([deep] * 3))
    scene = open_scene(path)
    np.testing.assert_array_equal(
        read_window(scene, 2, 3, 4, 5, bands=None, in_bands=1)[0][0], deep[2:6, 3:8]
    )


def test_png_16_bit_rgba(tmp_path: Path) -> None:
    bands = noise(4, 7, 9, dtype="uint16", high=65536)
    bands[3] = RNG.integers(0, 2, (7, 9)) * 65535
    path = tmp_path / "a.png"
    with rasterio.open(path, "w", driver="PNG", count=4, height=7, width=9, dtype="uint16") as dataset:
        dataset.write(bands)
    assert summary(open_scene(path)) == (7, 9, 3, "uint16")
    pixels, valid = read_all(path)
    np.testing.assert_array_equal(pixels, bands[:3])
    np.testing.assert_array_equal(valid, bands[3] != 0)


def test_png_one_bit_is_black_and_white(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(7, 9), "1")
    assert open_scene(path).num_bands == 1
    assert set(np.unique(read_all(path, 1)[0])) == {0, 255}


def test_alpha_is_dropped_and_hides(tmp_path: Path) -> None:
    rgba = noise(8, 9, 4)
    rgba[..., 3] = RNG.integers(0, 3, (8, 9)) * 100
    path = save(tmp_path / "rgba.png", rgba)
    assert open_scene(path).num_bands == 3
    pixels, valid = read_all(path)
    np.testing.assert_array_equal(pixels, rgba[..., :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(valid, rgba[..., 3] != 0)
    path = tmp_path / "la.png"
    Image.merge("LA", [Image.fromarray(rgba[..., 0]), Image.fromarray(rgba[..., 3])]).save(path)
    assert open_scene(path).num_bands == 1
    pixels, valid = read_all(path, 1)
    np.testing.assert_array_equal(pixels[0], rgba[..., 0])
    np.testing.assert_array_equal(valid, rgba[..., 3] != 0)


def test_png_colour_key_hides(tmp_path: Path) -> None:
    grey = noise(8, 9, high=4)
    path = save(tmp_path / "l.png", grey, transparency=2)
    pixels, valid = read_all(path, 1)
    np.testing.assert_array_equal(pixels[0], grey)
    np.testing.assert_array_equal(valid, grey != 2)
    rgb = np.stack([grey, grey, np.zeros_like(grey)], -1)
    _, valid = read_all(save(tmp_path / "rgb.png", rgb, transparency=(3, 3, 0)))
    np.testing.assert_array_equal(valid, grey != 3)


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128, 255])])
def test_png_palette_becomes_rgb(tmp_path: Path, transparency: int | bytes | None) -> None:
    index = noise(8, 9, high=4)
    colours = noise(4, 3)
    image = Image.fromarray(index).convert("L")
    image.putpalette(colours.ravel().tolist())
    image.save(tmp_path / "p.png", **({} if transparency is None else {"transparency": transparency}))
    assert Image.open(tmp_path / "p.png").mode == "P"
    assert open_scene(tmp_path / "p.png").num_bands == 3
    pixels, valid = read_all(tmp_path / "p.png")
    np.testing.assert_array_equal(pixels, colours[index].transpose(2, 0, 1))
    np.testing.assert_array_equal(valid, np.ones_like(valid) if transparency is None else index != 1)


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    colour = np.zeros((16, 16, 3), dtype=np.uint8) + np.array([200, 100, 50], dtype=np.uint8)
    path = save(tmp_path / "a.jpg", colour, "CMYK", quality=95)
    assert summary(open_scene(path)) == (16, 16, 3, "uint8")
    assert np.abs(read_all(path)[0].mean(axis=(1, 2)) - [200, 100, 50]).max() < 4


def test_grey_jpeg_and_nodata(tmp_path: Path) -> None:
    grey = np.full((16, 16), 200, dtype=np.uint8)
    grey[:8] = 0
    path = save(tmp_path / "a.JPEG", grey, quality=100)
    assert open_scene(path).num_bands == 1
    _, valid = read_all(path, nodata=0)
    np.testing.assert_array_equal(valid, grey != 0)


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", noise(8, 20, 3), exif=exif)
    assert open_scene(path).height == 8 and read_all(path)[0].shape == (3, 8, 20)


def test_content_counts_not_extension(tmp_path: Path) -> None:
    rgb = noise(8, 9, 3)
    path = save(tmp_path / "a.png", rgb).rename(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_all(path)[0], rgb.transpose(2, 0, 1))
    path = write_tiff(tmp_path / "b.tif", rgb.transpose(2, 0, 1)).rename(tmp_path / "b.jpg")
    np.testing.assert_array_equal(read_all(path)[0], rgb.transpose(2, 0, 1))


# Damage


def good_file(kind: str, folder: Path) -> Path:
    rgb = noise(64, 80, 3)
    if kind == "png":
        return save(folder / "a.png", rgb)
    if kind == "png16":
        return save(folder / "a.png", noise(64, 80, dtype="uint16", high=65536))
    if kind.startswith("jpg"):
        return save(folder / "a.jpg", rgb, quality=90, progressive=kind == "jpg progressive")
    options = {
        "tif": {},
        "tif deflate": {"compress": "deflate"},
        "tif tiled lzw": {"compress": "lzw", "tiled": True, "blockxsize": 16, "blockysize": 16},
        "tif jpeg": {"compress": "jpeg", "photometric": "ycbcr", "interleave": "pixel"},
    }[kind]
    return write_tiff(folder / "a.tif", rgb.transpose(2, 0, 1), **options)


KINDS = ["jpg", "jpg progressive", "png", "png16", "tif", "tif deflate", "tif tiled lzw", "tif jpeg"]


HEADER_CUTS = [0, 1, 2, 3, 4, 8, 16, 20, 28, 29, 33, 40, 100, 200]
# Not all kinds can be caught with zeros for a tail: TIFF has no checksum, and zeros are fine pixels there.
DAMAGE = [("cut", kind) for kind in KINDS] + [("zeros", kind) for kind in [*KINDS[:4], "tif deflate"]]


@pytest.mark.parametrize(("tail", "kind"), DAMAGE)
def test_truncated_files_are_errors(tmp_path: Path, kind: str, tail: str) -> None:
    """At every cut the result is an error, or the whole image where nothing of it was lost."""
    path = good_file(kind, tmp_path)
    whole = path.read_bytes()
    in_bands = 1 if kind == "png16" else 3
    expected, _ = read_all(path, in_bands)
    size = len(whole)
    cuts = {*HEADER_CUTS, size // 4, size // 2, size * 9 // 10, size - 40}
    if tail == "cut":
        cuts |= {size - 13, size - 2, size - 1}
    for cut in sorted(cuts):
        filler = bytes(size - cut) if tail == "zeros" else b""
        path.write_bytes(whole[:cut] + filler)
        try:
            pixels, _ = read_all(path, in_bands)
        except UnreadableImage as error:
            assert error.path == str(path) and error.reason and "\n" not in error.reason
        else:
            np.testing.assert_array_equal(pixels, expected, err_msg=f"{kind} cut at {cut} of {size}")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, kind: str) -> None:
    path = good_file(kind, tmp_path)
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(3)
    for round_ in range(60):
        damaged = whole.copy()
        limit = min(400, len(whole)) if round_ % 2 else len(whole)
        damaged[rng.integers(0, limit, 5)] = rng.integers(0, 256, 5)
        path.write_bytes(damaged.tobytes())
        try:
            scene = open_scene(path)
            size = min(scene.height, 64), min(scene.width, 64)
            read_window(scene, 0, 0, *size, bands=None, in_bands=1)
        except UnreadableImage as error:
            assert error.reason


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jpg", b"", "empty file"),
        ("a.tif", b"", "empty file"),
        ("a.jpg", b"just some text, long enough for every magic number", "not a JPEG, PNG or TIFF"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "truncated PNG header"),
        ("a.tif", b'<VRTDataset rasterXSize="4" rasterYSize="4"/>', "not a JPEG, PNG or TIFF"),
    ],
)
def test_files_that_are_no_images(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=words):
        open_scene(tmp_path / name)


def test_images_without_pixels(tmp_path: Path) -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 0, 9, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(head + bytes(12))
    with pytest.raises(UnreadableImage, match="image of 0x9 pixels|image of 9x0 pixels"):
        open_scene(tmp_path / "a.png")


@pytest.mark.parametrize("nodata", [0, None])
def test_tiles_that_were_never_written(tmp_path: Path, nodata: int | None) -> None:
    """Of a sparse GeoTIFF: missing pixels where the file has a nodata value, zeros as GDAL says where it has none."""
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "sparse_ok": True, "nodata": nodata}
    tile = noise(3, 64, 64, high=255) + np.uint8(1)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=3, height=128, width=128, dtype="uint8", **options
    ) as file:
        file.write(tile, window=Window(64, 0, 64, 64))
    pixels, valid = read_all(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels[:, :64, 64:], tile)
    assert valid[:64, 64:].all() and not pixels[:, 64:].any()
    assert valid[64:].all() == (nodata is None) and valid[64:].any() == (nodata is None)


def test_band_counts_may_change_from_file_to_file(tmp_path: Path) -> None:
    for count in (1, 2, 3, 4):
        write_tiff(tmp_path / f"{count}.tif", noise(count, 8, 8))
    scenes = scan(tmp_path).scenes
    assert [scene.num_bands for scene in scenes] == [1, 2, 3, 3]  # the fourth of four uint8 bands is alpha
    for scene in scenes:
        if scene.num_bands == 2:
            with pytest.raises(UnreadableImage, match="3 bands asked for, the image has 2"):
                read_window(scene, 0, 0, 8, 8, bands=None, in_bands=3)
        else:  # a single band is taken for all three
            assert read_window(scene, 0, 0, 8, 8, bands=None, in_bands=3)[0].shape == (3, 8, 8)


def test_decompression_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(head + bytes(100))
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(buffer, "jpeg")
    jpeg = bytearray(buffer.getvalue())
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    (tmp_path / "bomb.jpg").write_bytes(bytes(jpeg))
    for name, size in (("bomb.png", "60000x60000"), ("bomb.jpg", "65500x65500")):
        with pytest.raises(UnreadableImage, match=f"{size} pixels are more than"):
            open_scene(tmp_path / name)


def test_tiff_with_an_enormous_tile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "a.tif", noise(1, 64, 64), tiled=True, blockxsize=32, blockysize=64)
    monkeypatch.setattr(sources, "MAX_DECODED_PIXELS", 2047)
    with pytest.raises(UnreadableImage, match="one block holds 32x64 pixels"):
        open_scene(path)
    monkeypatch.setattr(sources, "MAX_DECODED_PIXELS", 2048)
    assert open_scene(path).height == 64  # only blocks count, not the whole


def test_large_image_below_the_limit_is_no_bomb(tmp_path: Path) -> None:
    """Pillow alone refuses more than 179 million pixels: less than many aerial mosaics have."""
    Image.new("L", (14000, 13000)).save(tmp_path / "a.png", compress_level=1)
    scene = open_scene(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, _ = read_window(scene, 12990, 13990, 10, 10, bands=None, in_bands=1)
    assert pixels.shape == (1, 10, 10)


def test_file_that_changed_or_vanished(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(8, 9, 3))
    scene = open_scene(path)
    save(path, noise(20, 20, 3))
    with pytest.raises(UnreadableImage, match="changed since"):
        read_window(scene, 0, 0, 8, 9, bands=None, in_bands=3)
    path.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        read_window(scene, 0, 0, 8, 9, bands=None, in_bands=3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_without_permission(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(8, 9, 3))
    path.chmod(0)
    with pytest.raises(UnreadableImage, match="Permission denied"):
        open_scene(path)


def test_any_decoder_failure_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.jpg", noise(8, 9, 3))
    scene = open_scene(path)
    for failure in (MemoryError(), SyntaxError("broken"), struct.error("short"), OSError("disk"), KeyError()):

        def fail(*_: object, failure: Exception = failure) -> None:
            raise failure

        monkeypatch.setattr(sources, "_open_pillow", fail)
        monkeypatch.setattr(sources, "simplejpeg", None)
        with pytest.raises(UnreadableImage) as caught:
            read_window(scene, 0, 0, 8, 9, bands=None, in_bands=3)
        assert caught.value.__cause__ is failure and caught.value.reason


def jpeg_cases(folder: Path) -> dict[str, bytes]:
    """JPEGs of all kinds, whole and damaged."""
    photo = Image.open(sources.__file__.replace("data/sources.py", "demo/neon_soap.jpg")).convert("RGB")
    photo = photo.crop((3, 5, 203, 130))
    cases = {}
    for name, image, options in (
        ("420", photo, {}),
        ("444", photo, {"subsampling": 0}),
        ("422", photo, {"subsampling": 1}),
        ("progressive", photo, {"progressive": True}),
        ("grey", photo.convert("L"), {}),
        ("cmyk", photo.convert("CMYK"), {}),
        ("rgb", photo, {"keep_rgb": True}),
    ):
        image.save(folder / "case.jpg", quality=90, **options)
        cases[name] = (folder / "case.jpg").read_bytes()
    whole = cases["420"]
    random = np.random.default_rng(0)
    for i in range(60):
        damaged = bytearray(whole)
        for place in random.integers(2, len(whole), 1 + i % 5):
            damaged[place] = random.integers(256)
        cases[f"damaged {i}"] = bytes(damaged)
    cases["cut"] = whole[: len(whole) // 2]
    cases["cut, with end marker"] = whole[: len(whole) // 2] + b"\xff\xd9"
    cases["junk behind"] = whole + b"junk"
    return cases


def test_simplejpeg_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pixels as Pillow's, and the same refusals."""
    quick = pytest.importorskip("simplejpeg")

    def outcome(path: Path) -> np.ndarray | str:
        try:
            with warnings.catch_warnings(action="ignore"):
                return read_all(path)[0]
        except UnreadableImage as error:
            return error.reason

    read_by_it = 0
    for name, data in jpeg_cases(tmp_path).items():
        path = tmp_path / "case.jpg"
        path.write_bytes(data)
        results = []
        for module in (quick, None):
            monkeypatch.setattr(sources, "simplejpeg", module)
            results.append(outcome(path))
        if isinstance(results[0], str):
            assert results[0] == results[1], name
        else:
            assert np.array_equal(*results), name
            monkeypatch.setattr(sources, "simplejpeg", quick)
            read_by_it += sources._decode_simplejpeg(data, name) is not None
    assert read_by_it >= 6


def test_jpeg_beyond_the_limit_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.jpg", noise(8, 9, 3))
    monkeypatch.setattr(sources, "MAX_DECODED_PIXELS", 71)
    with pytest.raises(UnreadableImage, match="71 that are decoded at once"):
        sources._decode(str(path), None, "JPEG")


def test_unreadable_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a/b.jpg", "empty file")))
    assert (error.path, error.reason, str(error)) == ("a/b.jpg", "empty file", "a/b.jpg: empty file")


def test_window_reads_do_not_load_the_scene(tmp_path: Path) -> None:
    """A sparse 40000 x 40000 scene (4.8 GB unpacked) is read by window in a moment."""
    path = tmp_path / "big.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=3, width=40000, height=40000, dtype="uint8",
        tiled=True, compress="deflate", SPARSE_OK=True,
    ) as dataset:  # fmt: skip
        dataset.write(np.full((3, 16, 16), 9, dtype=np.uint8), window=Window(30000, 20000, 16, 16))
    pixels, _ = read_window(open_scene(path), 19990, 30000, 32, 16, bands=None, in_bands=3)
    assert pixels[:, 10:26].min() == 9 and pixels[:, :10].max() == 0
