"""From JPEG files to the patch embedding's input: decoding alone, and everything, as training runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from baselines.pillow_augment import crop_pair
from compare import compare
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from workload import IMAGENET, small_vit_s, statistics

import pera_fast
from pera_fast.config import Config
from pera_fast.data import sources
from pera_fast.data.crops import draw_crops
from pera_fast.data.loader import WindowDataset, make_loader
from pera_fast.data.sources import Scene, read_window, scan
from pera_fast.distributed import World
from pera_fast.engine import Engine
from pera_fast.reference import CropTable

FILES = 48
IMAGES = 6 * FILES  # per measurement, so that starting the workers weighs little
BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 px JPEGs (4:2:0, quality 90) cut from the demo's aerial scenes."""
    path = tmp_path_factory.mktemp("jpegs")
    demo = Path(pera_fast.__file__).parent / "demo"
    scenes = [Image.open(file).convert("RGB") for file in sorted(demo.glob("neon_*.jpg"))]
    random = np.random.default_rng(0)
    for i in range(FILES):
        scene = scenes[i % len(scenes)]
        left, top = (int(random.integers(0, max(1, side - 511))) for side in scene.size)
        tile = scene.crop((left, top, left + 512, top + 512)).resize((512, 512))
        tile.save(path / f"{i:03d}.jpg", quality=90)
    return path


class PillowDataset(Dataset[list[Tensor]]):
    """The authors' data flow: decode, crop, colour and normalise in the worker, whole views in float32."""

    def __init__(self, scenes: list[Scene], config: Config) -> None:
        self.scenes, self.config = scenes, config
        self.mean, self.std = (torch.tensor(x) for x in IMAGENET)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, position: int) -> list[Tensor]:
        image = Image.open(self.scenes[position % FILES].path).convert("RGB")
        crops, random = self.config.crops, np.random.default_rng(position)
        views = []
        for kind, px in (("global", crops.global_px), ("local", crops.local_px)):
            drawn = draw_crops(random, image.height, image.width, crops, kind)
            table = CropTable(
                torch.zeros(len(drawn["box"])),
                *(torch.from_numpy(drawn[name]) for name in CropTable._fields[1:]),
            )
            pairs = [crop_pair(image, table, i, px, self.mean, self.std) for i in range(len(drawn["box"]))]
            views += [torch.stack(view) for view in zip(*pairs, strict=True)]
        return views


@pytest.mark.parametrize("exact", [True, False])
def bench_loader(benchmark, folder: Path, exact: bool) -> None:
    """Two workers on either side; ours ends with the packed rows, the peer's with the batch of views."""
    config = small_vit_s()
    config = replace(
        config,
        crops=replace(config.crops, exact_augmentation=exact),
        data=replace(config.data, workers=2),
        run=replace(config.run, batch_size=BATCH, precision="bf16"),
    )
    index = scan(folder)
    engine = Engine(config, statistics(), World(0, 1, torch.device("cpu")))
    dataset = WindowDataset(index, statistics(), config)

    def consume(rows: Iterator[object]) -> None:
        for _ in rows:
            pass

    def ours() -> None:
        batches = make_loader(dataset, 0, IMAGES // BATCH)
        consume(engine.patches(step, 0, batch) for step, batch in enumerate(batches))

    def theirs() -> None:
        consume(iter(DataLoader(PillowDataset(index.scenes, config), batch_size=BATCH, num_workers=2)))

    ratio = compare(
        benchmark, op="data", backend="loader and crop_patches", peer="DataLoader with Pillow augmentation",
        ours=ours, theirs=theirs, pairs=3, dtype="bf16 rows, float32 views",
        shape=f"{IMAGES} JPEGs 512 px, 2x448 + 8x96 pairs, {'exact' if exact else 'float'}, 2 workers",
        images=IMAGES,
    )  # fmt: skip
    assert ratio > 1


def bench_decode(benchmark, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    scenes = scan(folder).scenes

    def read(module: object) -> list[np.ndarray]:
        monkeypatch.setattr(sources, "simplejpeg", module)
        return [
            read_window(scene, 0, 0, scene.height, scene.width, bands=None, in_bands=3)[0] for scene in scenes
        ]

    def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))

    compare(
        benchmark, op="data", backend="simplejpeg", peer="Pillow", ours=lambda: read(simplejpeg),
        theirs=lambda: read(None), same=same, dtype="uint8", shape=f"{FILES} JPEGs 512 px, 4:2:0, decoding",
    )  # fmt: skip
