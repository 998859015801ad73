"""What a linear classifier makes of frozen features, of whole images and of patches, and the picture of its faults.

Networks are compared as modules of one kind: normalised images [n, C, H, W] -> (one feature of each image [n, D],
one of each patch [n, L, D']). The ViT is one, `RawColours` another.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import groupby
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor, nn
from tqdm import tqdm

from pera_fast.config import Config, ConfigError
from pera_fast.data.sources import (
    DataError,
    Scene,
    UnreadableImage,
    list_images,
    open_raster,
    open_scene,
    printable,
)
from pera_fast.data.statistics import Statistics
from pera_fast.features import Tile, extract

C_GRID = tuple(10.0**exponent for exponent in range(-6, 3))
_HELD_OUT = 0.2  # of the train images: C is chosen on them
_ITERATIONS = 100  # of L-BFGS, for each C; the path's next C goes on from there
_CONSTANT = 1e-6  # a feature with less deviation than this is constant
_BINS = 32  # of a band's histogram
_IGNORED = -1
_CHUNK = 64  # windows whose features are in memory at once


# --- what is compared -----------------------------------------------------------------------------------


class RawColours(nn.Module):
    """The baseline that has learned nothing: what the scaled values alone, from 0 to 1, say of a class.

    forward: normalised images [n, C, H, W] -> (a histogram of 32 bins of each band, as shares, [n, C·32];
    mean and standard deviation of each band in each patch, [n, L, 2·C]).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, statistics: Statistics) -> None:
        super().__init__()
        self.patch_px = config.model.patch_px
        self.register_buffer("mean", torch.tensor(config.data.mean or statistics.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(config.data.std or statistics.std)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        values = images * self.std + self.mean
        bins = (values * _BINS).long().clamp_(0, _BINS - 1).flatten(2)
        histogram = values.new_zeros(*bins.shape[:2], _BINS).scatter_add_(
            2, bins, torch.ones_like(values).flatten(2)
        )
        mean = F.avg_pool2d(values, self.patch_px)
        # Around the mean: the mean square less the squared mean would leave rounding where a patch is flat.
        around = values - mean.repeat_interleave(self.patch_px, 2).repeat_interleave(self.patch_px, 3)
        deviation = F.avg_pool2d(around.square(), self.patch_px).sqrt()
        return histogram.flatten(1) / bins.shape[2], torch.cat((mean, deviation), 1).flatten(2).mT


class Reading(nn.Module):
    """A network, answering with what a probe reads of it: (class token [n, D], the same with the mean of the
    patch tokens beside it [n, D + D'], or the patch tokens [n, L, D'])."""

    def __init__(self, network: nn.Module, what: Literal["cls", "cls+mean", "patches"]) -> None:
        super().__init__()
        self.network, self.what = network, what

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        cls, patches = self.network(images)
        if self.what == "cls+mean":
            return torch.cat((cls, patches.mean(1)), 1), None
        return (cls if self.what == "cls" else patches), None


# --- a linear classifier --------------------------------------------------------------------------------


class Head(NamedTuple):
    """Logits of a feature as it is: x @ weight + bias."""

    weight: Tensor  # [D, K]
    bias: Tensor  # [K]
    C: float  # the regularisation it was fitted with

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., K], on the head's device."""
        return x.to(self.weight) @ self.weight + self.bias


def regularisation_path(x: Tensor, targets: Tensor, grid: Sequence[float] = C_GRID) -> Iterator[Tensor]:
    """Multinomial logistic regression for each C, ascending; weight and bias as float [D + 1, K], the bias last.

    x: float [n, D]. targets: of its dtype [n, K], what each row weighs in each class (one 1 in a row: its class).
    Minimises C · Σ targets · -log softmax + |weight|² / 2, scikit-learn's objective, by L-BFGS; each C goes on where
    the one before it ended.
    """
    weight_and_bias = x.new_zeros(x.shape[1] + 1, targets.shape[1])
    for c in grid:
        # In units in which every direction is about as steep, however strong the regularisation.
        unit = x.new_ones(x.shape[1] + 1, 1)
        unit[:-1] = (1 + 1 / (c * targets.sum())).rsqrt()
        objective = partial(_objective, x=x, targets=targets, c=c, unit=unit)
        weight_and_bias = _minimise(objective, weight_and_bias / unit) * unit
        yield weight_and_bias


def _objective(free: Tensor, x: Tensor, targets: Tensor, c: float, unit: Tensor) -> Tensor:
    """That of `regularisation_path`, divided by C and by the number of rows; free: [D + 1, K] in `unit`s."""
    weight, bias = (free * unit).split([x.shape[1], 1])
    cross_entropy = -(targets * torch.addmm(bias, x, weight).log_softmax(1)).sum()
    return (cross_entropy + weight.square().sum() / (2 * c)) / targets.sum()


def _minimise(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    free = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free], max_iter=_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(free)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return free.detach()


def fit_head(x: Tensor, targets: Tensor, fit: Tensor, held: Tensor) -> Head:
    """The classifier fitted on the rows `fit`, with the C of `C_GRID` that has the least cross-entropy on `held`.

    x: float [n, D]. targets: [n, K], as for `regularisation_path`. fit, held: int64 or bool, rows of both. Features
    are standardised by the mean and deviation of the rows `fit`. C rises until it is two decades above the best. The
    head is not fitted again on both: what several draws differ by is then what the choice of images makes.
    """
    mean, std = x[fit].mean(0), x[fit].std(0, correction=0)
    std = torch.where(std > _CONSTANT, std, 1)
    rows, others = ((x[part] - mean) / std for part in (fit, held))
    best, least = None, float("inf")
    for c, parameters in zip(C_GRID, regularisation_path(rows, targets[fit]), strict=True):
        loss = -(targets[held] * (others @ parameters[:-1] + parameters[-1]).log_softmax(1)).sum().item()
        if best is None or loss < least:
            weight = parameters[:-1] / std[:, None]
            best, least = Head(weight, parameters[-1] - mean @ weight, c), loss
        elif c > 99 * best.C:
            break  # it only gets worse from here on, and the weakest regularisation takes longest
    assert best is not None
    return best


def split(labels: Sequence[str], shots: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """The train images that a head is fitted on, and those on which its C is chosen; int64 row numbers, drawn by seed.

    A fifth of each class is held out, at least one image. shots: fit on this many images of each class, and hold out
    no more than as many again. Raises ConfigError for more shots than images, DataError for a class with one image.
    """
    random = np.random.default_rng(seed)
    names = np.array(labels)
    fit, held = [], []
    for name in sorted(set(labels)):
        members = random.permutation(np.flatnonzero(names == name))
        num_held = min(max(1, round(_HELD_OUT * len(members))), shots or len(members))
        rest = members[num_held:]
        if not len(rest):
            raise DataError(
                f"train: expected at least 2 images of a class, one of them held out, got 1 of {name}"
            )
        if shots is not None and shots > len(rest):
            raise ConfigError(
                f"shots: expected at most {len(rest)}, the {len(members)} train images of {name} less {num_held} "
                f"held out, got {shots}"
            )
        held.append(members[:num_held])
        fit.append(rest[:shots])
    return torch.from_numpy(np.concatenate(fit)), torch.from_numpy(np.concatenate(held))


def check_seeds(seeds: int) -> None:
    if seeds < 1:
        raise ConfigError(f"seeds: expected a whole number of at least 1, got {seeds}")


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Over seeds; the deviation is that of a sample, 0 for a single one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def confusion_of(truth: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """How often each class (row) was taken for each (column), int [K, K]."""
    counts = Counter(zip(truth, predicted, strict=True))
    return [[counts[row, column] for column in classes] for row in classes]


# --- images with masks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An image and the file of its mask."""

    scene: Scene
    mask: str


@dataclass(frozen=True)
class Classes:
    """Which numbers of the masks are which class. names: [K]. numbers: ascending, [K]. ignored: belongs to none."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    ignored: int

    def index(self, mask: np.ndarray) -> Tensor:
        """Numbers of a mask [H, W] -> int64 [H, W], place in `names`, -1 where ignored."""
        places = np.searchsorted(self.numbers, mask)
        return torch.from_numpy(np.where(mask == self.ignored, _IGNORED, places))


class Window(NamedTuple):
    """A square window of a pair's image. seen: rows and columns at its top and left that earlier windows cover."""

    pair: Pair
    tile: Tile
    seen: tuple[int, int]


def mask_pairs(images: str | os.PathLike[str], masks: str | os.PathLike[str]) -> list[Pair]:
    """Every image under `images` with the mask of the same path under `masks`, apart from the extension.

    Masks: PNG or TIFF of one band of whole numbers and of the image's size. Raises DataError for a folder without
    images, an image without a mask or with two, and for a file that cannot be read: each labelled image counts.
    """
    files: dict[str, list[str]] = {}
    for path in list_images(masks, (".png", ".tif", ".tiff")):
        files.setdefault(_stem(path, masks), []).append(path)
    paths = list_images(images)
    if os.path.samefile(images, masks):
        raise DataError(f"expected images and masks in two folders, got {printable(images)} for both")
    without = [path for path in paths if _stem(path, images) not in files]
    if without:
        raise DataError(
            f"{len(without)} of the {len(paths)} images under {printable(images)} have no mask under "
            f"{printable(masks)}: expected {printable(_stem(without[0], images))}.png, .tif or .tiff for the first, "
            f"{printable(without[0])}"
        )
    pairs = []
    for path in paths:
        found = files[_stem(path, images)]
        if len(found) > 1:
            raise DataError(f"{printable(path)}: expected one mask, got {', '.join(map(printable, found))}")
        try:
            pairs.append(Pair(open_scene(path), found[0]))
        except UnreadableImage as error:
            raise DataError(str(error)) from None
    return pairs


def _stem(path: str, root: str | os.PathLike[str]) -> str:
    """Path below `root` without its extension; `root` may be the file itself."""
    name = os.path.basename(path) if path == os.fspath(root) else os.path.relpath(path, root)
    return os.path.splitext(name)[0]


def read_mask(pair: Pair) -> np.ndarray:
    """The numbers in a mask as stored, [H, W] of an integer dtype: of a palette its indices, not its colours.

    The mask is read whole. Raises DataError: not a PNG or TIFF, not one band, not whole numbers, another size than
    the image's.
    """
    try:
        with open(pair.mask, "rb") as file:
            is_png = file.read(4) == b"\x89PNG"
        return _read_png(pair) if is_png else _read_tiff(pair)
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly anything on corrupt input
        reason = " ".join(str(error.__cause__ or error).replace(pair.mask, "file").split())
        raise DataError(f"{printable(pair.mask)} cannot be read as a mask: {reason}") from None


def _read_png(pair: Pair) -> np.ndarray:
    """By Pillow, since GDAL reads a truncated PNG of 8 bit as noise, without an error."""
    with open(pair.mask, "rb") as file:
        header = file.read(26)
        file.seek(0)
        image = PngImageFile(file)  # Image.open would refuse large ones
        _check_mask(pair, len(image.getbands()), "uint8", image.height, image.width)
        numbers = np.asarray(image)
    depth, colour = header[24:]
    if depth in (2, 4) and colour == 0:
        return numbers // (255 // (2**depth - 1))  # Pillow scales grey, though not palettes, to 0..255
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def _read_tiff(pair: Pair) -> np.ndarray:
    with open_raster(pair.mask) as file:
        _check_mask(pair, file.count, file.dtypes[0], *file.shape)
        numbers: np.ndarray = file.read(1)
    return numbers


def _check_mask(pair: Pair, bands: int, dtype: str, height: int, width: int) -> None:
    """DataError for what no mask of the pair's image can be, before its pixels are read."""
    where, scene = printable(pair.mask), pair.scene
    if bands != 1:
        raise DataError(f"{where}: expected a mask of one band, got {bands}")
    if np.dtype(dtype).kind not in "iu":
        raise DataError(f"{where}: expected a mask of whole numbers, got {dtype}")
    if (height, width) != (scene.height, scene.width):
        raise DataError(
            f"{where}: expected a mask of {scene.width}x{scene.height} pixels, as {printable(scene.path)} has, got "
            f"{width}x{height}"
        )


def numbers_in(pairs: Sequence[Pair], ignored: int) -> dict[int, str]:
    """Each number in the masks, ascending, and the first file with it. DataError as `read_mask`, or for none."""
    found: dict[int, str] = {}
    for pair in pairs:
        for number in np.unique(read_mask(pair)).tolist():
            found.setdefault(number, pair.mask)
    found.pop(ignored, None)
    if not found:
        first = printable(pairs[0].mask)
        raise DataError(f"every pixel of the {len(pairs)} masks is ignored ({ignored}); the first is {first}")
    return dict(sorted(found.items()))


def classes_of(
    train: Sequence[Pair], val: Sequence[Pair], named: Sequence[str] | None, ignored: int
) -> Classes:
    """The classes of a data set: as named, from number 0 on; else the numbers that the train masks hold.

    named: names, or their count alone, as in ["6"]. Raises DataError for a number that is no class, or a class in
    val that train lacks; ConfigError for a name that comes twice.
    """
    in_train, in_val = numbers_in(train, ignored), numbers_in(val, ignored)
    names = tuple(str(number) for number in in_train)
    numbers = tuple(in_train)
    if named:
        count = int(named[0]) if len(named) == 1 and named[0].isdecimal() else None
        names = tuple(named) if count is None else tuple(str(i) for i in range(count))
        numbers = tuple(range(len(names)))
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"classes: expected different names, or their count, got {' '.join(named)}")
        for number, path in (in_train | in_val).items():
            if number not in numbers:
                raise DataError(
                    f"{printable(path)}: expected class numbers from 0 to {numbers[-1]}, or {ignored} for what is "
                    f"ignored, got {number}"
                )
    unknown = [number for number in in_val if number not in in_train]
    if unknown:
        raise DataError(
            f"the val masks have a class that the train masks lack: {', '.join(map(str, unknown))}, first in "
            f"{printable(in_val[unknown[0]])} (train has {', '.join(map(str, in_train))})"
        )
    return Classes(names, numbers, ignored)


def windows_of(pairs: Sequence[Pair], px: int) -> list[Window]:
    """Square windows that cover each image: of `px`, or of its shorter side where that is less.

    They lie side by side; the last of a row or column is moved back to end with the image.
    """
    windows = []
    for pair in pairs:
        scene = pair.scene
        side = min(px, scene.height, scene.width)
        for top, above in _starts(scene.height, side):
            for left, before in _starts(scene.width, side):
                windows.append(Window(pair, Tile(scene, top, left, side, side, None), (above, before)))
    return windows


def _starts(length: int, side: int) -> list[tuple[int, int]]:
    """Where windows begin along one axis, and how much of each an earlier one covers."""
    starts = [(start, 0) for start in range(0, length - side + 1, side)]
    over = length % side
    return starts + ([(length - side, side - over)] if over else [])


def label_maps(windows: Sequence[Window], classes: Classes) -> Iterator[Tensor]:
    """Places in `classes.names` int64 [side, side] of each window, -1 where ignored or seen by an earlier window."""
    for pair, same in groupby(windows, key=lambda window: window.pair):
        mask = read_mask(pair)
        for _, tile, (above, before) in same:
            cut = mask[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
            labels = classes.index(cut)
            labels[:above] = _IGNORED
            labels[:, :before] = _IGNORED
            yield labels


def patch_shares(labels: Tensor, grid: int, num_classes: int) -> Tensor:
    """Share of each class in each patch, float32 [grid², K]: int64 [side, side] -> rows that sum to what counts of it.

    Exact where side is a multiple of grid; else of the pixels that a patch touches.
    """
    # Class -1 takes the place after the last and is then dropped.
    one_hot = F.one_hot(torch.where(labels < 0, num_classes, labels), num_classes + 1)[..., :num_classes]
    return F.adaptive_avg_pool2d(one_hot.permute(2, 0, 1).float(), grid).flatten(1).T


# --- segmentation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmentation:
    """A task: images with masks, their classes, and how a network is fed with them."""

    train: Sequence[Pair]
    val: Sequence[Pair]
    classes: Classes
    config: Config
    statistics: Statistics
    device: torch.device
    seeds: int = 3
    max_patches: int = 100_000
    progress: bool = False

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if self.max_patches < 1:
            raise ConfigError(f"max_patches: expected a whole number of at least 1, got {self.max_patches}")
        for dtype in sorted({pair.scene.dtype for pair in (*self.train, *self.val)}):
            self.statistics.scale_of(dtype)

    @property
    def grid(self) -> int:
        """Patches along one side of a window."""
        return self.config.crops.global_px // self.config.model.patch_px

    def patches(self, network: nn.Module, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Tensor, Tensor]]:
        """Of each window its pair, patch features float32 [L, D] and label map int64 [side, side], both on the CPU.

        Raises DataError when an image cannot be read, or features are not finite.
        """
        windows = windows_of(pairs, self.config.crops.global_px)
        labels = label_maps(windows, self.classes)
        reading = cast(Any, Reading(network, "patches"))
        with tqdm(total=len(windows), unit="window", disable=not self.progress, leave=False) as bar:
            for start in range(0, len(windows), _CHUNK):
                chunk = windows[start : start + _CHUNK]
                tiles = [window.tile for window in chunk]
                features = extract(reading, tiles, self.config, self.statistics, self.device)
                if features.bad:
                    path, reason = features.bad[0]
                    raise DataError(f"{printable(path)}: {reason}")
                for window, tokens in zip(chunk, features.rows, strict=True):
                    yield window.pair, tokens, next(labels)
                bar.update(len(chunk))


def segment(network: nn.Module, task: Segmentation) -> dict[str, Any]:
    """mIoU of a linear layer on the patch features of a frozen network, by the protocol of `segmentation_heads`.

    Measured on every pixel of val that is not ignored, once: a patch's logits are upsampled bilinearly to pixels. The
    IoU of a class is that of the whole set, not a mean over images; one that neither masks nor predictions hold is
    None and not in the mean. Returns miou, pixel_accuracy and their _std over seeds, C (of each seed), train_patches,
    per_class_iou (mean over seeds), confusion (pixels [K, K], rows: mask, over all seeds).
    """
    heads, train_patches = segmentation_heads(network, task)
    meters = [_meter(len(task.classes.names)).to(task.device) for _ in heads]
    for _, tokens, labels in task.patches(network, task.val):
        for head, meter in zip(heads, meters, strict=True):
            meter.update(
                pixel_classes(head(tokens), task.grid, len(labels))[None], labels.to(task.device)[None]
            )
    found = [{name: value.cpu() for name, value in meter.compute().items()} for meter in meters]
    miou, miou_std = mean_and_std([f["miou"].item() for f in found])
    correct = [(f["confusion"].trace() / f["confusion"].sum()).item() for f in found]
    accuracy, accuracy_std = mean_and_std(correct)
    # torchmetrics has 0 for a class that is nowhere.
    iou = torch.stack([f["iou"].where(_present(f["confusion"]), torch.nan) for f in found]).nanmean(0)
    return {
        "miou": miou,
        "miou_std": miou_std,
        "pixel_accuracy": accuracy,
        "pixel_accuracy_std": accuracy_std,
        "C": [head.C for head in heads],
        "train_patches": train_patches,
        "per_class_iou": {
            name: None if value.isnan() else value.item()
            for name, value in zip(task.classes.names, iou, strict=True)
        },
        "confusion": torch.stack([f["confusion"] for f in found]).sum(0).tolist(),
    }


def segmentation_heads(network: nn.Module, task: Segmentation) -> tuple[list[Head], int]:
    """A head for each seed, fitted on patches of the train images, and how many patches there were to fit on.

    The loss is the cross-entropy of every pixel that counts, with the logits of its patch: of a patch that is the
    cross-entropy with the shares of its classes, so no pixel has to be visited, and the problem stays convex: L-BFGS
    solves it, without a learning rate. A seed draws the fifth of the train images that C is chosen on (`fit_head`).
    In memory: at most max_patches features, float32, the same number of each window, drawn at random; three times that
    while a head is fitted. DataError for fewer than two images with a pixel that counts.
    """
    x, targets, image = _train_patches(network, task)
    images = image.unique()
    if len(images) < 2:
        raise DataError(
            "train: expected at least 2 images with a pixel that counts, one of them held out, got 1"
        )
    heads = []
    for seed in range(task.seeds):
        parts = split([""] * len(images), None, seed)
        fit, held = (torch.isin(image, images[part]).to(task.device) for part in parts)
        heads.append(fit_head(x, targets, fit, held))
    return heads, len(x)


def _train_patches(network: nn.Module, task: Segmentation) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, D] and class shares [n, K] of patches, on the task's device, and the number of the image of each."""
    per_window = max(1, task.max_patches // len(windows_of(task.train, task.config.crops.global_px)))
    number = {pair: i for i, pair in enumerate(task.train)}
    random = np.random.default_rng(0)
    kept = []
    for pair, tokens, labels in task.patches(network, task.train):
        shares = patch_shares(labels, task.grid, len(task.classes.names))
        counted = shares.sum(1).nonzero().flatten()
        if len(counted) > per_window:
            counted = counted[np.sort(random.choice(len(counted), per_window, replace=False))]
        kept.append((tokens[counted], shares[counted], torch.full((len(counted),), number[pair])))
    x, targets, image = (torch.cat(column) for column in zip(*kept, strict=True))
    return x.to(task.device), targets.to(task.device), image


def pixel_classes(logits: Tensor, grid: int, side: int) -> Tensor:
    """The class of each pixel, int64 [side, side], by bilinear upsampling of its patches' logits [grid², K]."""
    planes = logits.T.reshape(1, -1, grid, grid)
    return F.interpolate(planes, (side, side), mode="bilinear", align_corners=False)[0].argmax(0)


def _present(confusion: Tensor) -> Tensor:
    return confusion.sum(0) + confusion.sum(1) > 0


def _meter(num_classes: int) -> Any:
    """Counts pixels of predicted and true classes, int64 of one shape, -1 for those that do not count."""
    from torchmetrics import MetricCollection  # takes seconds
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

    options: dict[str, Any] = {"num_classes": num_classes, "ignore_index": _IGNORED, "validate_args": False}
    return MetricCollection(
        {
            "miou": MulticlassJaccardIndex(average="macro", **options),
            "iou": MulticlassJaccardIndex(average="none", **options),
            "confusion": MulticlassConfusionMatrix(**options),
        }
    )


# --- the picture ----------------------------------------------------------------------------------------


def confusion_png(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """A PNG of a confusion matrix [K, K], rows: truth, as percentages of their row."""
    from matplotlib.figure import Figure  # takes a second

    counts = np.array(confusion, dtype=np.float64)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(3 + 0.5 * len(classes), 20)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class")
    axes.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)  # a $ is a $
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 30:
        for row, column in np.ndindex(percent.shape):
            value = percent[row, column]
            colour = "white" if value > 50 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
