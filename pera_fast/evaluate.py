"""How good the teacher's features are: `python -m pera_fast.evaluate knn --checkpoint RUN --train DIR …`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from pera_fast import _cli
from pera_fast.checkpoint import Checkpoint
from pera_fast.config import Config, ConfigError
from pera_fast.data.sources import (
    DataError,
    Scene,
    UnreadableImage,
    list_images,
    open_scene,
    printable,
    read_windows,
)
from pera_fast.data.statistics import Statistics
from pera_fast.features import Tile, choose_device, extract
from pera_fast.model.vit import VisionTransformer

_log = logging.getLogger("pera_fast")

_TEMPERATURE = 0.07  # of the votes, as DINO (arXiv 2104.14294) weighs its neighbours
_HEADER_THREADS = 16
_CPU = torch.device("cpu")


# --- what is classified ---------------------------------------------------------------------------------


def class_folder_tiles(root: str | os.PathLike[str]) -> list[Tile]:
    """Every readable image under the class folders of `root`, whole; the label is the class folder's name.

    Each direct subfolder is a class. Unreadable images are logged and left out. DataError when there is no
    class folder or one of them has no readable image.
    """
    return _class_folders(root)[0]


def _class_folders(root: str | os.PathLike[str]) -> tuple[list[Tile], int]:
    """The tiles of `class_folder_tiles`, and how many images could not be read."""
    root = os.fspath(root)
    try:
        found = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot open {printable(root)}: {error.strerror}") from None
    if not found:
        raise DataError(f"{printable(root)}: expected one folder of images per class in it, got no folder")
    tiles: list[Tile] = []
    skipped = 0
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        for name in found:
            folder = os.path.join(root, name)
            paths = list_images(folder)
            scenes = [s for s in pool.map(_scene_or_none, paths) if s is not None]
            if not scenes:
                raise DataError(f"no image under {printable(folder)} can be read")
            skipped += len(paths) - len(scenes)
            tiles += [Tile.whole(scene, printable(name)) for scene in scenes]
    return tiles, skipped


def _scene_or_none(path: str) -> Scene | None:
    try:
        return open_scene(path)
    except UnreadableImage as error:
        _log.warning("skipped %s", error)
        return None


def scene_halves(
    scenes: Sequence[Scene], nodata: float | None = None, max_nodata_share: float = 0.05
) -> tuple[list[Tile], list[Tile]]:
    """A classification task for images without labels: which scene does this tile come from?

    Every scene is cut into square tiles, at least 48 px and about a fifth of its shorter side. Tiles whose
    centre lies in the left 45 % are the neighbours (first list), those right of 55 % are classified (second
    list); the gap keeps the two apart. The label is the scene's file name. Tiles with more than
    max_nodata_share missing pixels are left out, and so are scenes without a tile on either side.
    """
    train_tiles: list[Tile] = []
    val_tiles: list[Tile] = []
    for scene in scenes:
        try:
            tiles = _valid_tiles(scene, nodata, max_nodata_share)
        except UnreadableImage as error:
            _log.warning("skipped %s", error)
            continue
        left = [t for t in tiles if t.left + t.width / 2 < 0.45 * scene.width]
        right = [t for t in tiles if t.left + t.width / 2 > 0.55 * scene.width]
        if left and right:
            train_tiles += left
            val_tiles += right
    return train_tiles, val_tiles


def _valid_tiles(scene: Scene, nodata: float | None, max_nodata_share: float) -> list[Tile]:
    shorter = min(scene.height, scene.width)
    side = min(max(48, shorter // 5), shorter)
    windows = [
        (top, left, side, side)
        for top in range(0, scene.height - side + 1, side)
        for left in range(0, scene.width - side + 1, side)
    ]
    read = read_windows(scene, windows, bands=None, in_bands=scene.num_bands, nodata=nodata)
    return [
        Tile(scene, *window, label=os.path.basename(printable(scene.path)))
        for window, (_, valid) in zip(windows, read, strict=True)
        if 1 - valid.mean() <= max_nodata_share
    ]


# --- k nearest neighbours -------------------------------------------------------------------------------


def knn(
    backbone: VisionTransformer,
    config: Config,
    statistics: Statistics,
    train_tiles: Sequence[Tile],
    val_tiles: Sequence[Tile],
    k: int = 20,
    device: torch.device = _CPU,
    progress: bool = False,
) -> dict[str, Any]:
    """Cosine k-NN on the class token: each val tile takes the class its k nearest train tiles vote for.

    A vote weighs exp(cosine similarity / 0.07), as in DINO (arXiv 2104.14294). Returns top1 (share of val
    tiles classified right), k, classes, train and val (tiles used), skipped (unreadable), per_class_top1.
    DataError when there is nothing to compare, or a class in val that train lacks.
    """
    if k < 1:
        raise ConfigError(f"k: expected a whole number of at least 1, got {k}")
    check_tiles(train_tiles, val_tiles, statistics)
    train, val = (
        extract(backbone, tiles, config, statistics, device, progress=progress)
        for tiles in (train_tiles, val_tiles)
    )
    for path, reason in train.bad + val.bad:
        _log.warning("skipped %s: %s", printable(path), reason)
    for name, features in (("train", train), ("val", val)):
        if not features.labels:
            path, reason = features.bad[0]
            raise DataError(f"no {name} image can be read; the first is {printable(path)}: {reason}")
        if not bool(torch.isfinite(features.cls).all()):
            raise DataError(f"the network's features of the {name} images are not finite")
    check_classes(train.labels, val.labels)
    if k > len(train.labels):
        _log.warning("k = %d is more than the train images: using all %d", k, len(train.labels))
        k = len(train.labels)
    from sklearn.neighbors import KNeighborsClassifier  # takes a second

    classifier = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=_votes)
    classifier.fit(train.cls.numpy(), train.labels)
    right = classifier.predict(val.cls.numpy()) == np.array(val.labels)
    return {
        "top1": float(right.mean()),
        "k": k,
        "classes": sorted(set(train.labels)),
        "train": len(train.labels),
        "val": len(val.labels),
        "skipped": len(train.bad) + len(val.bad),
        "per_class_top1": {
            name: float(right[np.array(val.labels) == name].mean()) for name in sorted(set(val.labels))
        },
    }


def _votes(distances: np.ndarray) -> np.ndarray:
    """Weights of cosine distances [val, k]: a softmax of similarity, up to a factor per row."""
    return np.exp(-distances / _TEMPERATURE)


def check_classes(train: Sequence[str], val: Sequence[str]) -> None:
    if not train or not val:
        raise DataError(f"k-NN: expected images to compare, got {len(train)} train and {len(val)} val images")
    unknown = sorted(set(val) - set(train))
    if unknown:
        raise DataError(
            f"the val images have a class that the train images lack: {', '.join(unknown)} "
            f"(train has {', '.join(sorted(set(train)))})"
        )


def check_tiles(train: Sequence[Tile], val: Sequence[Tile], statistics: Statistics) -> None:
    """DataError when `knn` could not classify `val` by `train`: classes that differ, a dtype without a scale."""
    check_classes([t.label or "" for t in train], [t.label or "" for t in val])
    for dtype in sorted({tile.scene.dtype for tile in (*train, *val)}):
        statistics.scale_of(dtype)


def untrained_backbone(config: Config) -> VisionTransformer:
    """The network a run with this config started from, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.run.seed)
        # The backbone is the first thing PerA draws, so the heads need not be built to get the same weights.
        backbone = VisionTransformer(config.model, config.crops.global_px)
    return backbone.eval().requires_grad_(False)


def compare_with_untrained(
    backbone: VisionTransformer,
    config: Config,
    statistics: Statistics,
    train_tiles: Sequence[Tile],
    val_tiles: Sequence[Tile],
    k: int = 20,
    device: torch.device = _CPU,
    progress: bool = False,
) -> dict[str, Any]:
    """`knn` plus untrained_top1, of the network the run started from, and points_gained (in points)."""
    tasks = (config, statistics, train_tiles, val_tiles, k, device, progress)
    result = knn(backbone, *tasks)
    untrained = knn(untrained_backbone(config), *tasks)["top1"]
    return result | {"untrained_top1": untrained, "points_gained": 100 * (result["top1"] - untrained)}


# --- command --------------------------------------------------------------------------------------------


def knn_command(
    checkpoint: str,
    train: str,
    val: str,
    k: int = 20,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: str | None = None,
    untrained: bool = True,
) -> None:
    """Cosine k-NN accuracy of the teacher's class token, as one JSON object on stdout.

    Args:
        checkpoint: A run folder (its newest checkpoint is taken) or one checkpoint.
        train: Folder with one subfolder of images per class: the neighbours.
        val: Folder of the same classes: the images that are classified.
        k: Neighbours that vote.
        device: Where the network runs; auto takes a GPU if there is one.
        out: Also write the JSON to this file.
        untrained: Also classify with the network the run started from.
    """
    opened = Checkpoint.open(checkpoint)
    on = choose_device(device)
    (train_tiles, train_bad), (val_tiles, val_bad) = _class_folders(train), _class_folders(val)
    compare = compare_with_untrained if untrained else knn
    result = compare(
        opened.teacher(), opened.config, opened.statistics, train_tiles, val_tiles, k, on, progress=True
    )
    result["skipped"] += train_bad + val_bad
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        try:
            Path(out).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {out}: {error.strerror}") from None


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"knn": knn_command}, prog="python -m pera_fast.evaluate", description="Measure a teacher's features."
    )


if __name__ == "__main__":
    _cli.run(main)
