"""What can be seen of a trained network, as arrays: who sees which patch, features, neighbours, attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import ceil, sqrt
from typing import NamedTuple, cast

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from pera_fast import reference
from pera_fast.config import Config
from pera_fast.data.loader import Sample, WindowDataset
from pera_fast.data.sources import DataError, Scene, SceneIndex, UnreadableImage, read_window, read_windows
from pera_fast.data.statistics import Statistics
from pera_fast.features import Tile, normalise, resize, to_unit
from pera_fast.model.vit import Block, VisionTransformer

# Okabe and Ito's colours, told apart with any kind of colour vision.
STUDENT, TARGET, TEACHER = "#0072B2", "#E69F00", "#009E73"
HIDDEN = 0.93  # grey level of patches that a network does not see
_ENLARGED_PX = 384  # side of a small image in the page: sharp on a phone, small in the file
_SCENES, _GRID = 4, 36  # scenes shown with their features, and patches along their longer side
_PATCH_PX = 8  # side of a patch in a scene's image, at most: the page stays small with any size of patches
_TILES, _TILE_PX = 160, 96  # tiles among which neighbours are looked for, and the side they are shown at
_BATCH = 32  # tiles; bounds the memory of one forward pass


class Picture(NamedTuple):
    """One image, for the page and for TensorBoard alike."""

    name: str  # what it shows: the alternative text and the tag
    image: np.ndarray  # [H, W, 3] in 0..1
    caption: str
    step: int | None = None  # after how many steps it was so, where that is not the end


def enlarged(image: np.ndarray) -> np.ndarray:
    """[H, W, 3]: a small image enlarged by whole pixels, so that patches keep their edges."""
    times = max(1, round(_ENLARGED_PX / max(image.shape[:2])))
    return image.clip(0, 1).repeat(times, 0).repeat(times, 1)


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` > 1 of the numbers 0..count-1, spread evenly, both ends among them."""
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)} if count else ())


class Display:
    """How the pixels of one image become the page's: stretched as the image needs, the first three bands.

    8-bit images stay as they are. The range that other dtypes share can leave one sensor's images black, so
    each band of those is stretched from its 2nd to its 98th percentile.
    """

    def __init__(self, image: Tensor, dtype: str) -> None:
        bands = self._three(image)
        self.low, self.high = np.zeros(3), np.ones(3)
        if dtype != "uint8":
            self.low, self.high = np.percentile(bands, (2, 98), axis=(0, 1))
            self.high = np.maximum(self.high, self.low + 1e-6)

    @staticmethod
    def _three(image: Tensor) -> np.ndarray:
        shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        return shown.permute(1, 2, 0).numpy()

    def __call__(self, image: Tensor) -> np.ndarray:
        """[C, H, W] in 0..1 -> [H, W, 3] in 0..1; grey where there are fewer than three bands."""
        return ((self._three(image) - self.low) / (self.high - self.low)).clip(0, 1)


# --- one crop of the run: masks and views ---------------------------------------------------------------


@dataclass(frozen=True)
class CropPair:
    """A global crop of the run's first step: its pixels, its two views, and who sees which patch."""

    crop: Tensor  # [C, px, px] in 0..1, before colours change
    views: tuple[Tensor, Tensor]  # student's, teacher's
    patches: tuple[Tensor, Tensor, Tensor]  # int64, raster indices: student, target, teacher
    display: Display


def first_crop(config: Config, statistics: Statistics, scenes: Sequence[Scene]) -> CropPair:
    """A global crop as the run drew it in its first step.

    If possible a typical one: with the student's colours changed and the teacher's not.

    UnreadableImage or DataError when the images cannot be read.
    """
    sample, crop, crop_index = choose_crop(config, statistics, scenes)
    crops, table = config.crops, {k: torch.from_numpy(v[crop]) for k, v in sample.crops["global"].items()}
    image = to_unit(sample.pixels, str(sample.pixels.dtype), statistics)
    cropped = reference.window(image, table["box"].tolist())
    image = reference.cut(cropped, table["flip"].tolist(), crops.global_px)
    student, teacher = (
        reference.colour(image, table["factor"][view], table["order"][view], bool(table["grey"][view]))
        for view in range(2)
    )
    counts = crops.mask_counts((crops.global_px // config.model.patch_px) ** 2)
    masks = reference.disjoint_masks(
        torch.tensor([crop_index]), config.run.seed, 0, sum(counts), counts[0], counts[1]
    )
    display = Display(image, str(sample.pixels.dtype))
    return CropPair(image, (student, teacher), (masks[0][0], masks[1][0], masks[2][0]), display)


def choose_crop(config: Config, statistics: Statistics, scenes: Sequence[Scene]) -> tuple[Sample, int, int]:
    """A sample of the first step, one of its global crops, and that crop's index in the whole batch."""
    dataset = WindowDataset(SceneIndex(scenes, []), statistics, config)
    num_global, crops_per_image = config.crops.num_global, config.crops.num_global + config.crops.num_local
    batch = config.run.batch_size
    for position in range(8 if batch == "auto" else min(batch, 8)):  # auto: a run that has not begun
        sample = dataset[position]
        for crop in range(num_global):
            student, teacher = sample.crops["global"]["order"][crop][:, 0] >= 0
            if student and not teacher:
                return sample, crop, position * crops_per_image + crop
    return dataset[0], 0, 0


def _patch_mask(patches: Tensor, side: int, patch_px: int) -> np.ndarray:
    """True at the pixels of the given patches, [side * patch_px] * 2."""
    grid = np.zeros(side * side, bool)
    grid[patches.numpy()] = True
    return grid.reshape(side, side).repeat(patch_px, 0).repeat(patch_px, 1)


def tinted(pair: CropPair, patch_px: int) -> np.ndarray:
    """[H, W, 3]: the crop under the colours of the three sets."""
    # On grey the three colours mean one thing only.
    image = pair.display(pair.crop).mean(-1, keepdims=True).repeat(3, -1)
    side = len(image) // patch_px
    for colour, patches in zip((STUDENT, TARGET, TEACHER), pair.patches, strict=True):
        tint = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        mask = _patch_mask(patches, side, patch_px)
        image[mask] = 0.4 * image[mask] + 0.6 * tint
    return image


def only(image: np.ndarray, patches: Tensor, patch_px: int) -> np.ndarray:
    """[H, W, 3]: an image with all but the given patches blank."""
    shown = image.copy()
    shown[~_patch_mask(patches, len(shown) // patch_px, patch_px)] = HIDDEN
    return shown


# --- features as colours --------------------------------------------------------------------------------


class ShownScene(NamedTuple):
    """A scene that the page shows, or the middle of it if it is large, at whole patches."""

    scene: Scene
    pixels: Tensor  # what the network is given, [C, rows * p, columns * p]
    image: np.ndarray  # [H, W, 3] in 0..1


def shown_scenes(config: Config, statistics: Statistics, scenes: Sequence[Scene]) -> list[ShownScene]:
    """Up to four readable scenes spread over the list. DataError when none of those tried can be read."""
    shown: list[ShownScene] = []
    chosen = spread(len(scenes), _SCENES)
    # The others stand in for scenes that cannot be read.
    others = islice((i for i in range(len(scenes)) if i not in chosen), 3 * _SCENES)
    error: Exception = DataError("there is none")
    for i in chain(chosen, others):
        if len(shown) == _SCENES:
            break
        try:
            image = _whole_patches(scenes[i], config, statistics)
        except (UnreadableImage, DataError) as caught:
            error = caught
            continue
        pixels = normalise(image, statistics, config)
        patch_px = config.model.patch_px
        small = resize(image, *(side // patch_px * min(patch_px, _PATCH_PX) for side in image.shape[1:]))
        shown.append(ShownScene(scenes[i], pixels, Display(small, scenes[i].dtype)(small)))
    if not shown:
        raise DataError(f"no image can be read: {error}")
    return shown


def _whole_patches(scene: Scene, config: Config, statistics: Statistics) -> Tensor:
    """The scene, or its middle if it is large, in 0..1 at whole patches: [C, rows * p, columns * p]."""
    patch_px = config.model.patch_px
    # At most as much ground per patch as training shows, so that a vast scene is neither read whole nor
    # shrunk to a scale that the network never saw.
    most = max(1, config.data.window_px * _GRID * patch_px // config.crops.global_px)
    height, width = min(scene.height, most), min(scene.width, most)
    pixels, _ = read_window(
        scene, (scene.height - height) // 2, (scene.width - width) // 2, height, width,
        bands=config.data.bands, in_bands=config.model.in_bands, nodata=config.data.nodata,
    )  # fmt: skip
    rows, columns = (max(1, round(_GRID * side / max(height, width))) for side in (height, width))
    return resize(to_unit(pixels, scene.dtype, statistics), rows * patch_px, columns * patch_px)


def patch_features(backbone: VisionTransformer, pixels: Tensor) -> np.ndarray:
    """Normalised [C, H, W] -> float32 [rows, columns, D]. DataError when they are not finite."""
    _, patches = _features(backbone, pixels[None])
    return patches[0].unflatten(0, (pixels.shape[1] // backbone.patch_px, -1)).numpy()


def _features(backbone: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens [n, D] and patch tokens [n, L, D], float32, on the CPU. DataError unless finite."""
    device = backbone.cls_token.device
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        cls, patches = (x.float().cpu() for x in backbone(images.to(device)))
    if not bool(torch.isfinite(patches).all() and torch.isfinite(cls).all()):
        raise DataError("the network's features are not finite")
    return cls, patches


def pca_colours(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Features [rows, columns, D] of several images -> [rows, columns, 3] in 0..1, colours common to all."""
    flat = np.concatenate([features.reshape(-1, features.shape[-1]) for features in maps])
    colours = _stretched(_scores(flat))
    ends = np.cumsum([features.shape[0] * features.shape[1] for features in maps])[:-1]
    parts = np.split(colours, ends)
    return [part.reshape(*features.shape[:2], 3) for part, features in zip(parts, maps, strict=True)]


def matched_colours(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Features [rows, columns, D] of one image at several times -> [rows, columns, 3] in 0..1.

    Each time has principal components of its own, since what varied most before training hardly varies after
    it. They are turned to agree with those of the time after as well as they can (orthogonal Procrustes).
    """
    scores = [_scores(features.reshape(-1, features.shape[-1])) for features in maps]
    for i in reversed(range(len(scores) - 1)):
        u, _, vt = np.linalg.svd(scores[i].T @ scores[i + 1])
        scores[i] = scores[i] @ u @ vt
    return [
        _stretched(score).reshape(*features.shape[:2], 3)
        for score, features in zip(scores, maps, strict=True)
    ]


def _scores(features: np.ndarray) -> np.ndarray:
    """[n, D] -> [n, 3]: principal components of unit variance; 0 where there are fewer than three."""
    components = min(3, *features.shape)
    scores = PCA(components, svd_solver="covariance_eigh", whiten=True).fit_transform(features)
    return np.pad(scores, ((0, 0), (0, 3 - components)))


def _stretched(scores: np.ndarray) -> np.ndarray:
    """[n, 3] -> the same in 0..1, each column from its 2nd to its 98th percentile."""
    low, high = np.percentile(scores, (2, 98), axis=0)
    return ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1)


# --- attention ------------------------------------------------------------------------------------------


def cls_attention(backbone: VisionTransformer, pixels: Tensor) -> Tensor:
    """How the last block's class token shares its attention out: normalised [C, H, W] -> [heads, 1 + L].

    The first key is the class token itself, the others are the patches in raster order; each head's shares
    sum to 1. The op for attention never holds these numbers, so they are made again, in float32, from what
    enters the block's attention.
    """
    attention = cast(Block, backbone.blocks[-1]).attn
    entered: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    try:
        _features(backbone, pixels[None])
    finally:
        hook.remove()
    with torch.inference_mode():
        qkv = F.linear(entered[0].float(), attention.qkv.weight.float(), attention.qkv.bias.float())
        query, key, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)  # [1 + L, heads, d]
        logits = torch.einsum("hd,lhd->hl", query[0], key) / sqrt(key.shape[-1])
        return logits.softmax(-1).cpu()


def heat(values: np.ndarray) -> np.ndarray:
    """[rows, columns], 0 or more -> [rows, columns, 3]: black is 0, the brightest the 99th percentile."""
    most = max(float(np.percentile(values, 99)), 1e-12)
    return matplotlib.colormaps["inferno"]((values / most).clip(0, 1))[..., :3]


# --- nearest neighbours ---------------------------------------------------------------------------------


class SeenTile(NamedTuple):
    """A tile and what the network makes of it."""

    tile: Tile
    image: np.ndarray  # [px, px, 3] in 0..1
    token: Tensor  # class token [D], of unit length


def seen_tiles(
    backbone: VisionTransformer, config: Config, statistics: Statistics, scenes: Sequence[Scene]
) -> list[SeenTile]:
    """Up to 160 readable tiles of scenes spread over the list, in the scenes' order.

    DataError when the network's features are not finite.
    """
    seen: list[SeenTile] = []
    readable = _readable_tiles(config, statistics, scenes)
    px = min(_TILE_PX, config.crops.global_px)
    while batch := list(islice(readable, _BATCH)):
        inputs = torch.stack([normalise(image, statistics, config) for _, image in batch])
        for (tile, image), token in zip(batch, _features(backbone, inputs)[0], strict=True):
            small = resize(image, px, px)
            seen.append(SeenTile(tile, Display(small, tile.scene.dtype)(small), F.normalize(token, dim=0)))
    return seen


def _readable_tiles(
    config: Config, statistics: Statistics, scenes: Sequence[Scene]
) -> Iterator[tuple[Tile, Tensor]]:
    """Tiles with few missing pixels, and theirs in 0..1 at the size of a global crop."""
    random = np.random.default_rng(config.run.seed)
    data, px = config.data, config.crops.global_px
    chosen = spread(len(scenes), _TILES)
    for scene in (scenes[i] for i in chosen):
        windows = _tile_windows(scene, _TILES // len(chosen), data.window_px, random)
        try:
            for window, (pixels, valid) in zip(
                windows,
                read_windows(
                    scene, windows, bands=data.bands, in_bands=config.model.in_bands, nodata=data.nodata
                ),
                strict=True,
            ):
                if 1 - valid.mean() <= data.max_nodata_share:
                    yield (
                        Tile(scene, *window, label=None),
                        resize(to_unit(pixels, scene.dtype, statistics), px, px),
                    )
        except (UnreadableImage, DataError):
            continue


def _tile_windows(
    scene: Scene, count: int, window_px: int, random: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """At most `count` squares of a grid over the scene, as (top, left, height, width), in raster order."""
    shorter = min(scene.height, scene.width)
    # Few tiles a scene are large ones, many are small, but never so small that nothing is to be seen in them.
    side = min(shorter, window_px, max(48, shorter // ceil(sqrt(count))))
    rows, columns = scene.height // side, scene.width // side
    cells = np.sort(random.choice(rows * columns, min(count, rows * columns), replace=False))
    return [(int(cell) // columns * side, int(cell) % columns * side, side, side) for cell in cells]


def nearest(tiles: Sequence[SeenTile], queries: int = 5, count: int = 5) -> list[tuple[int, list[int]]]:
    """(index of a tile, indices of the `count` most similar, nearest first), for tiles spread over the list.

    Similarity is the cosine of class tokens. Tiles that touch the query show the same place: left out.
    """
    tokens = torch.stack([seen.token for seen in tiles]) if tiles else torch.empty(0, 1)
    found = []
    for query in sorted({int((i + 0.5) * len(tiles) / queries) for i in range(queries)} if tiles else ()):
        similarity = (tokens @ tokens[query]).tolist()
        others = [i for i, seen in enumerate(tiles) if not _touch(seen.tile, tiles[query].tile)]
        if others:
            found.append((query, sorted(others, key=lambda i: -similarity[i])[:count]))
    return found


def _touch(a: Tile, b: Tile) -> bool:
    return (
        a.scene == b.scene
        and a.top <= b.top + b.height
        and b.top <= a.top + a.height
        and a.left <= b.left + b.width
        and b.left <= a.left + a.width
    )
