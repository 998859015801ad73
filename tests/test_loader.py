"""The stream of samples: deterministic, complete, and unmoved by workers, ranks and broken files."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from pera_fast.config import Config, CropConfig
from pera_fast.data import loader
from pera_fast.data.crops import draw_box, draw_crops
from pera_fast.data.loader import Batch, Sample, StreamSampler, WindowDataset, collate, join, make_loader
from pera_fast.data.sources import DataError, Scene, SceneIndex, scan
from pera_fast.data.statistics import compute_statistics


def dataset(folder: Path, config: Config | None = None) -> WindowDataset:
    config = config or tiny_config()
    index = scan(folder)
    return WindowDataset(index, compute_statistics(index.scenes, bands=None, in_bands=3), config)


def assert_equal(a: Batch, b: Batch) -> None:
    assert torch.equal(a.buffer, b.buffer) and a.fields == b.fields
    for x, y in zip(a.tables, b.tables, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


def test_workers_change_nothing(image_folder: Path) -> None:
    config = tiny_config()
    alone = dataset(image_folder, config)
    crowd = dataset(image_folder, replace(config, data=replace(config.data, workers=2)))
    for a, b in zip(make_loader(alone, 0, 5), make_loader(crowd, 0, 5), strict=True):
        assert_equal(a, b)


def drawn_samples(count: int, num_local: int) -> list[Sample]:
    """Images of several dtypes, of sizes that fill no multiple of 16 bytes."""
    random, crops = np.random.default_rng(0), CropConfig(num_local=num_local)
    samples = []
    for i in range(count):
        height, width = random.integers(20, 60, 2).tolist()
        pixels = random.integers(0, 255, (3, height, width)).astype(("uint8", "uint16", "float32")[i % 3])
        low, high = random.random((2, 3), np.float32)
        drawn = {kind: draw_crops(random, height, width, crops, kind) for kind in ("global", "local")}
        samples.append(Sample(pixels, low, high, drawn, [(f"{i}.png", "cut off")] if i % 2 else []))
    return samples


@pytest.mark.parametrize("num_local", [0, 2])
@pytest.mark.parametrize("sizes", [(7,), (4, 4), (3, 3, 1), (1, 1, 1, 1, 1)])
def test_joined_pieces_are_the_batch_of_all_samples(sizes: tuple[int, ...], num_local: int) -> None:
    samples = drawn_samples(sum(sizes), num_local)
    starts = np.cumsum([0, *sizes])
    pieces = [collate(samples[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    whole, joined = collate(samples), join(pieces)
    assert_equal(whole, joined)
    assert joined.bad == whole.bad and len(joined) == len(samples)
    for sample, image in zip(samples, joined.images.views(), strict=True):
        assert np.array_equal(image.numpy(), sample.pixels)
    assert len(pieces) > 1 or joined is pieces[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_pieces_of_a_forward_pass(
    image_folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(batch_size=8, accumulate=2)
    config = replace(config, data=replace(config.data, workers=workers))
    data = dataset(image_folder, config)
    whole = [list(make_loader(data, 5, 3, rank, 2)) for rank in range(2)]
    seen: list[int] = []
    monkeypatch.setattr(loader, "_PIECE", 3)
    monkeypatch.setattr(loader, "collate", lambda samples: seen.append(len(samples)) or collate(samples))
    pieces = [list(make_loader(data, 5, 3, rank, 2)) for rank in range(2)]
    assert seen == ([] if workers else [3, 3, 2] * 12)
    for a, b in zip(sum(whole, []), sum(pieces, []), strict=True):
        assert_equal(a, b)


def test_a_later_start_continues_the_stream(image_folder: Path) -> None:
    data = dataset(image_folder)
    straight = list(make_loader(data, 0, 6))
    for a, b in zip(straight[4:], make_loader(data, 16, 2), strict=True):
        assert_equal(a, b)


def test_ranks_and_parts_share_out_the_same_positions() -> None:
    whole = list(StreamSampler(tiny_config(batch_size=8), 0, 3, 0, 1))
    for config, ranks in ((tiny_config(batch_size=4), 2), (tiny_config(batch_size=2, accumulate=2), 2)):
        parts = [list(StreamSampler(config, 0, 3, rank, ranks)) for rank in range(ranks)]
        for step in range(3):
            count = config.run.accumulate
            mine = [parts[r][step * count + p] for p in range(count) for r in range(ranks)]
            assert sum(mine, []) == whole[step]


def test_every_window_once_per_epoch_in_another_order(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    Image.new("RGB", (200, 130)).save(tmp_path / "large.png")  # 64 px windows: 4 x 3
    data = dataset(tmp_path)
    assert len(data) == 1 + 12
    first, second = data.order(0).tolist(), data.order(1).tolist()
    assert sorted(first) == sorted(second) == list(range(13)) and first != second


def test_large_scene_is_read_by_window(tmp_path: Path) -> None:
    Image.new("RGB", (200, 130)).save(tmp_path / "large.png")
    data = dataset(tmp_path)
    assert all(data[i].pixels.shape == (3, 64, 64) for i in range(5))


def test_nodata_windows_are_drawn_again(tmp_path: Path) -> None:
    import rasterio

    pixels = np.full((3, 64, 640), 9, np.uint8)
    pixels[:, :, :448] = 0  # 70 % missing
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", height=64, width=640, count=3, dtype="uint8", nodata=0
    ) as file:
        file.write(pixels)
    data = dataset(tmp_path)
    missing = [float((data[i].pixels == 0).mean()) for i in range(40)]
    assert np.mean([m <= 0.05 for m in missing]) > 0.8 and max(missing) < 1


def with_missing(path: Path, share: float, size: int = 64) -> None:
    """A scene of which that share of the rows is missing."""
    import rasterio

    pixels = np.full((3, size, size), 9, np.uint8)
    pixels[:, : round(share * size)] = 0
    with rasterio.open(
        path, "w", driver="GTiff", height=size, width=size, count=3, dtype="uint8", nodata=0
    ) as file:
        file.write(pixels)


def test_the_next_scene_stands_in_for_one_that_shows_too_little(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(6):
        with_missing(tmp_path / f"{i}.tif", 0.9 if i % 2 else 0.0)
    assert all((dataset(tmp_path)[i].pixels != 0).all() for i in range(12))
    assert not caplog.text


def test_where_no_scene_shows_enough_the_best_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(12):
        with_missing(tmp_path / f"{i:02}.tif", 0.5 if i % 2 else 0.8)
    data = dataset(tmp_path)
    missing = [float((data[i].pixels == 0).mean()) for i in range(12)]
    assert missing == [0.5] * 12
    assert caplog.text.count("no window of 10 images in a row is below max_nodata_share = 0.05") == 1


def test_a_file_of_a_dtype_that_nothing_is_known_of_is_a_bad_file(tmp_path: Path) -> None:
    for i in range(11):
        Image.new("RGB", (64, 64), (i, i, i)).save(tmp_path / f"{i:02}.png")
    Image.fromarray(np.full((64, 64), 7, np.uint16)).save(tmp_path / "deep.tif")
    index = scan(tmp_path)
    statistics = compute_statistics(index.scenes[:11], bands=None, in_bands=3)
    data = WindowDataset(index, statistics, tiny_config())
    reason = "the statistics have no scale for uint16 images, only for uint8"
    assert {entry for i in range(12) for entry in data[i].bad} == {(str(tmp_path / "deep.tif"), reason)}
    few = tiny_config()
    few = replace(few, data=replace(few.data, max_bad_share=0.05))
    with pytest.raises(DataError, match=f"{reason}; 1 of 12 images are of it, the first is .*deep.tif"):
        WindowDataset(index, statistics, few)


def test_empty_windows_are_not_bad_files(tmp_path: Path) -> None:
    import rasterio

    pixels = np.zeros((3, 64, 6400), np.uint8)
    pixels[:, :, :64] = 9  # one window in a hundred shows anything
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", height=64, width=6400, count=3, dtype="uint8", nodata=0
    ) as file:
        file.write(pixels)
    Image.new("RGB", (64, 64), (5, 5, 5)).save(tmp_path / "other.png")
    samples = [dataset(tmp_path)[i] for i in range(60)]
    assert all(s.bad == [] and s.pixels.max() > 0 for s in samples)


def test_a_file_that_goes_bad_is_replaced_and_named(image_folder: Path) -> None:
    data = dataset(image_folder)
    (image_folder / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    batches = list(make_loader(data, 0, 3))
    assert {path for b in batches for path, _ in b.bad} == {str(image_folder / "03.png")}
    assert all(len(b) == 4 for b in batches)
    for path in image_folder.iterdir():
        path.write_bytes(b"")
    for workers in (0, 1):
        data.config = replace(data.config, data=replace(data.config.data, workers=workers))
        with pytest.raises(DataError, match=r"^no image is readable any more; the first is .*png: [^\n]*$"):
            next(make_loader(data, 0, 1))


def test_data_that_are_gone_are_given_up_soon(image_folder: Path) -> None:
    """As where a disk with millions of images is taken away."""
    gone = [Scene(f"/gone/{i}.png", 64, 64, 3, "uint8") for i in range(100_000)]
    data = dataset(image_folder)
    everything = WindowDataset(SceneIndex(gone, []), data.statistics, data.config)
    started = time.perf_counter()
    with pytest.raises(DataError, match="no image is readable any more"):
        everything[5]
    assert time.perf_counter() - started < 10


def test_a_worker_that_is_stuck_is_ended(image_folder: Path) -> None:
    """SIGTERM lets it go on for a while only, or a process that ends would wait for it for ever."""
    code = (
        "import os, signal, time, pera_fast.data.loader as loader\n"
        "loader._GRACE = 1\n"
        "loader._outlive_signals(0)\n"
        "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('goes on', flush=True)\n"
        "while True: time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "goes on\n" and done.returncode == -signal.SIGALRM


def test_mixed_dtypes_keep_their_values(tmp_path: Path) -> None:
    import rasterio

    Image.new("RGB", (40, 40), (10, 20, 30)).save(tmp_path / "a.png")
    for name, dtype, value in (("b.tif", "uint16", 40000), ("c.tif", "float32", 0.25)):
        with rasterio.open(
            tmp_path / name, "w", driver="GTiff", height=30, width=50, count=3, dtype=dtype
        ) as file:
            file.write(np.full((3, 30, 50), value, dtype))
    data = dataset(tmp_path, tiny_config(batch_size=3))
    images = next(make_loader(data, 0, 1)).images.views()
    values = {image.dtype: image.double().flatten()[0].item() for image in images}
    assert values == {torch.uint8: 10, torch.uint16: 40000, torch.float32: 0.25}


def test_statistics_must_cover_every_dtype(tmp_path: Path, image_folder: Path) -> None:
    import rasterio

    statistics = dataset(image_folder).statistics
    with rasterio.open(
        tmp_path / "x.tif", "w", driver="GTiff", height=9, width=9, count=3, dtype="uint16"
    ) as file:
        file.write(np.ones((3, 9, 9), np.uint16))
    with pytest.raises(DataError, match="no scale for uint16"):
        WindowDataset(scan(tmp_path / "x.tif"), statistics, tiny_config())


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (37, 41), (512, 512)])
def test_boxes_lie_inside(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for area in ((0.4, 1.0), (0.05, 0.4)):
        for _ in range(200):
            top, left, height, width = draw_box(random, *size, area, (0.75, 1.33))
            assert min(top, left) >= 0 and min(height, width) >= 1
            assert top + height <= size[0] and left + width <= size[1]


def test_crop_statistics() -> None:
    random, config = np.random.default_rng(0), CropConfig(num_global=4000)
    crops = draw_crops(random, 512, 512, config, "global")
    share = crops["box"][:, 2] * crops["box"][:, 3] / 512**2
    assert 0.38 < share.min() and share.max() <= 1 and share.mean() == pytest.approx(0.66, abs=0.03)
    assert crops["flip"].mean(0) == pytest.approx([0.5, 0.5], abs=0.03)
    jittered = (crops["order"] >= 0).any(-1).mean(0)
    assert jittered == pytest.approx([0.8 * 0.9, 0.1], abs=0.03)
    assert crops["grey"].mean(0) == pytest.approx([0.08, 0], abs=0.02)
    assert len(Counter(map(tuple, crops["order"][:, 0].tolist()))) == 25  # 24 orders and none
    for i, (low, high) in enumerate(((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
        drawn = crops["factor"][(crops["order"] >= 0).any(-1)][:, i]
        assert low <= drawn.min() < low + 0.02 and high - 0.02 < drawn.max() <= high + 1e-6


def test_a_batch_is_one_buffer_hardly_larger_than_its_pixels(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (512, 512), (i, 0, 0)).save(tmp_path / f"{i}.png")
    config = tiny_config()
    config = replace(
        config, crops=CropConfig(global_px=40, local_px=24), data=replace(config.data, window_px=512)
    )
    batch = next(make_loader(dataset(tmp_path, config), 0, 1))
    pixels = 4 * 3 * 512 * 512
    assert pixels < batch.buffer.numel() < 1.005 * pixels
    assert loader._PIECE / 4 * batch.buffer.numel() < 2**25
    storage = batch.buffer.untyped_storage().data_ptr()
    tensors = [*batch.images, *(x for table in batch.tables for x in table)]
    assert all(x.untyped_storage().data_ptr() == storage for x in tensors)
    assert len(batch) == 4 and [len(table.image) for table in batch.tables] == [8, 32]
    assert batch.tables[0].image.tolist() == [0, 1, 2, 3] * 2  # crop-major


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
@pytest.mark.parametrize("piece", [32, 3])
def test_batches_on_a_gpu_are_those_of_the_cpu(
    image_folder: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(image_folder)
    monkeypatch.setattr(loader, "_PIECE", piece)
    for a, b in zip(
        make_loader(data, 0, 6), make_loader(data, 0, 6, device=torch.device("cuda")), strict=True
    ):
        assert b.buffer.is_cuda and torch.equal(a.buffer, b.buffer.cpu()) and a.fields == b.fields
