"""How good the teacher's features are: `python -m pera_fast.evaluate knn|linear|seg --checkpoint RUN …`.

Two baselines are measured by the same protocol: the network before training, and raw colours.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pera_fast import _cli, probes
from pera_fast.backbone import Backbone, load_backbone
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
from pera_fast.features import Features, Tile, extract
from pera_fast.files import whole, write_whole
from pera_fast.model.vit import VisionTransformer

_log = logging.getLogger("pera_fast")

_TEMPERATURE = 0.07  # of the votes, as DINO (arXiv 2104.14294) weighs its neighbours
_HEADER_THREADS = 16
_CPU = torch.device("cpu")
# What is said of a baseline, too; the rest of a result is of the task.
_ROW = (
    "top1", "top1_std", "per_class_top1", "miou", "miou_std", "per_class_iou", "pixel_accuracy", "pixel_accuracy_std",
    "C",
)  # fmt: skip


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


def scene_halves(scenes: Sequence[Scene]) -> tuple[list[Tile], list[Tile]]:
    """A classification task for images without labels: which scene does this tile come from?

    Every scene is cut into square tiles of a fifth of its shorter side, or of 48 px if that is more and fits. Tiles
    whose centre lies in the left 45 % are the neighbours (first list), those right of 55 % are classified (second
    list); the gap keeps the two apart. The label is the scene's file name. Tiles with more than 5 % missing pixels
    are left out, and so are scenes that do not have tiles on both sides.
    """
    train_tiles: list[Tile] = []
    val_tiles: list[Tile] = []
    for scene in scenes:
        try:
            tiles = _valid_tiles(scene)
        except UnreadableImage as error:
            _log.warning("skipped %s", error)
            continue
        left = [t for t in tiles if t.left + t.width / 2 < 0.45 * scene.width]
        right = [t for t in tiles if t.left + t.width / 2 > 0.55 * scene.width]
        if left and right:
            train_tiles += left
            val_tiles += right
    return train_tiles, val_tiles


def _valid_tiles(scene: Scene) -> list[Tile]:
    shorter = min(scene.height, scene.width)
    side = min(max(48, shorter // 5), shorter)
    windows = [
        (top, left, side, side)
        for top in range(0, scene.height - side + 1, side)
        for left in range(0, scene.width - side + 1, side)
    ]
    read = read_windows(scene, windows, bands=None, in_bands=scene.num_bands)
    return [
        Tile(scene, *window, label=os.path.basename(printable(scene.path)))
        for window, (_, valid) in zip(windows, read, strict=True)
        if 1 - valid.mean() <= 0.05
    ]


# --- k nearest neighbours -------------------------------------------------------------------------------


def knn(
    backbone: nn.Module,
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
    tiles classified right), k, classes, train and val (tiles used), skipped (unreadable), per_class_top1,
    confusion (tiles [K, K], rows: true class). DataError when there is nothing to compare, or a class in val that
    train lacks.
    """
    if k < 1:
        raise ConfigError(f"k: expected a whole number of at least 1, got {k}")
    train, val = _features(backbone, config, statistics, train_tiles, val_tiles, device, progress)
    if k > len(train.labels):
        _log.warning("k = %d is more than the train images: using all %d", k, len(train.labels))
        k = len(train.labels)
    from sklearn.neighbors import KNeighborsClassifier  # takes a second

    classifier = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=_votes)
    classifier.fit(train.rows.numpy(), train.labels)
    predicted = classifier.predict(val.rows.numpy())
    classes = sorted(set(train.labels))
    return {
        "top1": float(np.mean(predicted == np.array(val.labels))),
        "k": k,
        "classes": classes,
        "train": len(train.labels),
        "val": len(val.labels),
        "skipped": len(train.bad) + len(val.bad),
        "per_class_top1": _per_class(val.labels, predicted),
        "confusion": probes.confusion_of(val.labels, predicted, classes),
    }


def _features(
    network: nn.Module,
    config: Config,
    statistics: Statistics,
    train_tiles: Sequence[Tile],
    val_tiles: Sequence[Tile],
    device: torch.device,
    progress: bool,
) -> tuple[Features, Features]:
    """Of the train and of the val tiles; DataError when they cannot be compared, or a feature is not finite."""
    check_tiles(train_tiles, val_tiles, statistics)
    train, val = (
        extract(network, tiles, config, statistics, device, progress=progress)
        for tiles in (train_tiles, val_tiles)
    )
    for path, reason in train.bad + val.bad:
        _log.warning("skipped %s: %s", printable(path), reason)
    for name, features in (("train", train), ("val", val)):
        if not features.labels:
            path, reason = features.bad[0]
            raise DataError(f"no {name} image can be read; the first is {printable(path)}: {reason}")
    check_classes(train.labels, val.labels)
    return train, val


def _per_class(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Share of each class that was recognised."""
    right = defaultdict(list)
    for true, said in zip(truth, predicted, strict=True):
        right[true].append(true == said)
    return {name: float(np.mean(right[name])) for name in sorted(right)}


def _votes(distances: np.ndarray) -> np.ndarray:
    """Weights of cosine distances [val, k]: a softmax of similarity, up to a factor per row."""
    return np.exp(-distances / _TEMPERATURE)


def check_classes(train: Sequence[str], val: Sequence[str]) -> None:
    if not train or not val:
        raise DataError(f"expected images to compare, got {len(train)} train and {len(val)} val images")
    unknown = sorted(set(val) - set(train))
    if unknown:
        raise DataError(
            f"the val images have a class that the train images lack: {', '.join(unknown)} "
            f"(train has {', '.join(sorted(set(train)))})"
        )


def check_tiles(train: Sequence[Tile], val: Sequence[Tile], statistics: Statistics) -> None:
    """DataError when `val` could not be classified by `train`: classes that differ, a dtype without a scale."""
    check_classes([t.label or "" for t in train], [t.label or "" for t in val])
    for dtype in sorted({tile.scene.dtype for tile in (*train, *val)}):
        statistics.scale_of(dtype)


# --- linear probe ---------------------------------------------------------------------------------------


def linear(
    backbone: nn.Module,
    config: Config,
    statistics: Statistics,
    train_tiles: Sequence[Tile],
    val_tiles: Sequence[Tile],
    features: Literal["cls", "cls+mean"] = "cls",
    shots: int | None = None,
    seeds: int = 3,
    device: torch.device = _CPU,
    progress: bool = False,
) -> dict[str, Any]:
    """Top-1 of multinomial logistic regression on features of a frozen network, over several draws of train images.

    Each seed, from 0 on, draws a fifth of every class of train (`probes.split`). On these C is chosen, from 1e-6 to
    100 in decades; on the others, or on `shots` of each class, features are standardised and the classifier is
    fitted (`probes.fit_head`). The val images are classified once with the result and decide nothing.

    features: the class token, or that and the mean of the patch tokens. Returns top1 and top1_std over seeds, C (of
    each seed), features, shots, seeds, classes, train and val (tiles used), fitted (tiles that a classifier is
    fitted on), skipped (unreadable), per_class_top1 (mean over seeds), confusion (tiles [K, K], rows: true class,
    over all seeds). Raises ConfigError and DataError as `knn` and `probes.split`.
    """
    probes.check_seeds(seeds)
    if shots is not None and shots < 1:
        raise ConfigError(f"shots: expected a whole number of at least 1, got {shots}")
    probes.split([tile.label or "" for tile in train_tiles], shots, 0)  # before the work rather than after it
    reading = probes.Reading(backbone, features)
    train, val = _features(reading, config, statistics, train_tiles, val_tiles, device, progress)
    classes = sorted(set(train.labels))
    x, x_val = train.rows.to(device), val.rows.to(device)
    one_hot = torch.tensor(
        [[float(label == name) for name in classes] for label in train.labels], device=device
    )
    chosen, top1, predicted = [], [], []
    for seed in range(seeds):
        fit, held = probes.split(train.labels, shots, seed)
        head = probes.fit_head(x, one_hot, fit.to(device), held.to(device))
        said = [classes[i] for i in head(x_val).argmax(1).tolist()]
        chosen.append(head.C)
        top1.append(float(np.mean(np.array(said) == np.array(val.labels))))
        predicted += said
    mean, deviation = probes.mean_and_std(top1)
    return {
        "top1": mean,
        "top1_std": deviation,
        "C": chosen,
        "features": features,
        "shots": shots,
        "seeds": seeds,
        "classes": classes,
        "train": len(train.labels),
        "fitted": len(fit),
        "val": len(val.labels),
        "skipped": len(train.bad) + len(val.bad),
        "per_class_top1": _per_class(val.labels * seeds, predicted),
        "confusion": probes.confusion_of(val.labels * seeds, predicted, classes),
    }


# --- baselines ------------------------------------------------------------------------------------------


def untrained_backbone(config: Config) -> VisionTransformer:
    """A network of this config with the weights that its seed draws, on the CPU: what a run from scratch began with."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.run.seed)
        # The backbone is the first thing PerA draws, so the heads need not be built to get the same weights.
        backbone = VisionTransformer(config.model, config.crops.global_px)
    return backbone.eval().requires_grad_(False)


def _baselines(config: Config, statistics: Statistics) -> dict[str, nn.Module]:
    return {"untrained": untrained_backbone(config), "raw_colours": probes.RawColours(config, statistics)}


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
    """`knn` plus untrained_top1, of the network the run started from, points_gained over it (in points), and
    raw_colours_top1, of histograms of the tiles' colours."""
    tasks = (config, statistics, train_tiles, val_tiles, k, device, progress)
    result = knn(backbone, *tasks)
    top1 = {name: knn(network, *tasks)["top1"] for name, network in _baselines(config, statistics).items()}
    return result | {
        "untrained_top1": top1["untrained"],
        "points_gained": 100 * (result["top1"] - top1["untrained"]),
        "raw_colours_top1": top1["raw_colours"],
    }


def _compare(
    measure: Callable[[nn.Module], dict[str, Any]], backbone: Backbone, baselines: bool, score: str
) -> dict[str, Any]:
    """What `measure` finds of the network, and under its name what it finds of each baseline."""
    result = measure(backbone.vit)
    if not baselines:
        return result
    for name, network in _baselines(backbone.config, backbone.statistics).items():
        result[name] = {key: value for key, value in measure(network).items() if key in _ROW}
    return result | {"points_gained": 100 * (result[score] - result["untrained"][score])}


# --- commands -------------------------------------------------------------------------------------------


def knn_command(
    checkpoint: str,
    train: str,
    val: str,
    k: int = 20,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: str | None = None,
    confusion: str | None = None,
    baselines: bool = True,
) -> None:
    """Cosine k-NN accuracy of the teacher's class token, as one JSON object on stdout.

    Args:
        checkpoint: A run folder (its newest checkpoint is taken), one checkpoint, or an exported .safetensors.
        train: Folder with one subfolder of images per class: the neighbours.
        val: Folder of the same classes: the images that are classified.
        k: Neighbours that vote.
        device: Where the network runs; auto takes a GPU if there is one.
        out: Also write the JSON to this file.
        confusion: Write the confusion matrix to this PNG.
        baselines: Also classify with the network the run started from, and by raw colours.
    """
    _cli.check_files([checkpoint], out=out, confusion=confusion)
    backbone = load_backbone(checkpoint, device)
    (train_tiles, train_bad), (val_tiles, val_bad) = _class_folders(train), _class_folders(val)
    compare = compare_with_untrained if baselines else knn
    result = compare(
        backbone.vit, backbone.config, backbone.statistics, train_tiles, val_tiles, k, backbone.device,
        progress=True,
    )  # fmt: skip
    result["skipped"] += train_bad + val_bad
    _write(result, out, confusion)


def linear_command(
    checkpoint: str,
    train: str,
    val: str,
    features: Literal["cls", "cls+mean"] = "cls",
    shots: int | None = None,
    seeds: int = 3,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: str | None = None,
    confusion: str | None = None,
    baselines: bool = True,
) -> None:
    """Accuracy of logistic regression on the frozen teacher's features, as one JSON object on stdout.

    Its C is chosen on a fifth of the train images, which each seed draws anew; val decides nothing.

    Args:
        checkpoint: A run folder (its newest checkpoint is taken), one checkpoint, or an exported .safetensors.
        train: Folder with one subfolder of images per class, to fit on.
        val: Folder of the same classes: the images that are classified.
        features: The class token, or that and the mean of the patch tokens.
        shots: Fit on this many images of each class; default: all that are not held out.
        seeds: Draws of train images to take mean and standard deviation over.
        device: Where the network runs; auto takes a GPU if there is one.
        out: Also write the JSON to this file.
        confusion: Write the confusion matrix to this PNG.
        baselines: Also classify with the network the run started from, and by raw colours.
    """
    _cli.check_files([checkpoint], out=out, confusion=confusion)
    backbone = load_backbone(checkpoint, device)
    (train_tiles, train_bad), (val_tiles, val_bad) = _class_folders(train), _class_folders(val)

    def measure(network: nn.Module) -> dict[str, Any]:
        return linear(
            network, backbone.config, backbone.statistics, train_tiles, val_tiles, features, shots, seeds,
            backbone.device, progress=True,
        )  # fmt: skip

    result = _compare(measure, backbone, baselines, "top1")
    result["skipped"] += train_bad + val_bad
    _write(result, out, confusion)


def seg_command(
    checkpoint: str,
    train_images: str,
    train_masks: str,
    val_images: str,
    val_masks: str,
    classes: tuple[str, ...] | None = None,
    ignore_index: int = 255,
    seeds: int = 3,
    max_patches: int = 100_000,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: str | None = None,
    confusion: str | None = None,
    baselines: bool = True,
) -> None:
    """mIoU of a linear layer on the frozen teacher's patch tokens, as one JSON object on stdout.

    The layer is fitted on the shares of the classes in each patch. Its C is chosen on a fifth of the train images,
    which each seed draws anew; val decides nothing, and is measured pixel by pixel.

    Args:
        checkpoint: A run folder (its newest checkpoint is taken), one checkpoint, or an exported .safetensors.
        train_images: Folder of images to fit on.
        train_masks: Folder of their masks: PNG or TIFF of one band of class numbers, under the image's name.
        val_images: Folder of the images that are measured.
        val_masks: Folder of their masks.
        classes: Names of the classes 0, 1, …, or how many there are; default: the numbers in the train masks.
        ignore_index: Number in a mask that belongs to no class.
        seeds: Draws of train images to take mean and standard deviation over.
        max_patches: Patches of the train images whose features are kept in memory, drawn at random.
        device: Where the network runs; auto takes a GPU if there is one.
        out: Also write the JSON to this file.
        confusion: Write the confusion matrix to this PNG.
        baselines: Also segment with the network the run started from, and by raw colours.
    """
    _cli.check_files([checkpoint], out=out, confusion=confusion)
    backbone = load_backbone(checkpoint, device)
    train, val = probes.mask_pairs(train_images, train_masks), probes.mask_pairs(val_images, val_masks)
    found = probes.classes_of(train, val, classes, ignore_index)
    task = probes.Segmentation(
        train, val, found, backbone.config, backbone.statistics, backbone.device, seeds, max_patches,
        progress=True,
    )  # fmt: skip
    result = _compare(lambda network: probes.segment(network, task), backbone, baselines, "miou")
    about = {
        "classes": list(found.names), "ignore_index": ignore_index, "seeds": seeds, "train": len(train),
        "val": len(val),
    }  # fmt: skip
    _write(result | about, out, confusion)


def _write(result: dict[str, Any], out: str | None, confusion: str | None) -> None:
    """The JSON on stdout and to `out`, the picture to `confusion`; DataError when a file cannot be written."""
    text = json.dumps(result, indent=2, allow_nan=False)
    print(text)
    if out is not None:
        write_whole(out, text + "\n")
    if confusion is not None:
        with whole(confusion) as partial:
            partial.write_bytes(probes.confusion_png(result["confusion"], result["classes"]))


def main() -> None:
    commands: dict[str, Callable[..., None]] = {
        "knn": knn_command,
        "linear": linear_command,
        "seg": seg_command,
    }
    _cli.ask_which(commands, prog="pera_fast.evaluate", description="Measure a teacher's features.")()


if __name__ == "__main__":
    _cli.run(main)
