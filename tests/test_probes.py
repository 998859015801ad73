"""Linear probe and segmentation: the classifier against scikit-learn, planted classes, masks, commands, errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import run_here, shared_file, tiny_config
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from torch import Tensor, nn

from pera_fast import _cli, evaluate, probes
from pera_fast.backbone import Backbone, save_backbone
from pera_fast.config import ConfigError
from pera_fast.data.sources import DataError, open_scene
from pera_fast.data.statistics import Statistics
from pera_fast.features import Tile

pytestmark = pytest.mark.filterwarnings(
    f"ignore::{NotGeoreferencedWarning.__module__}.NotGeoreferencedWarning"
)

CPU = torch.device("cpu")
CONFIG = tiny_config()  # windows of 40 px, patches of 8
STATISTICS = Statistics(
    {"uint8": (0.0,) * 3, "uint16": (0.0,) * 3}, {"uint8": (255.0,) * 3, "uint16": (1020.0,) * 3},
    (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 1, 1,
)  # fmt: skip
COLOURS = np.array([(40, 200, 40), (200, 60, 40), (30, 60, 200)])
NAMES = ("field", "roof", "water")
RAW = probes.RawColours(CONFIG, STATISTICS)


def class_folders(root: Path, per_class: int, seed: int, textures: bool = False) -> Path:
    """Noise around a colour per class; or stripes, of the same colours in every class: down, across."""
    random = np.random.default_rng(seed)
    for number, name in enumerate(NAMES[:2] if textures else NAMES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = COLOURS[number] + random.integers(-30, 30, (48, 48, 3))
            if textures:
                stripes = 255 * (np.add.outer(np.arange(48), np.zeros(48, int)) + random.integers(2) & 1)
                pixels = np.repeat((stripes.T if number else stripes)[..., None], 3, 2)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def segmented(root: Path, count: int, seed: int, px: int = 80, bits: int = 8) -> tuple[Path, Path]:
    """Images of blocks of 16 px of three colours, and palette PNGs of the blocks' numbers."""
    random = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for i in range(count):
        mask = random.integers(3, size=(px // 16, px // 16), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        pixels = (COLOURS[mask] + random.integers(-20, 20, (px, px, 3))).clip(0, 255)
        if bits == 8:
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{i}.png")
        else:
            write_tiff(root / "images" / f"{i}.tif", 4 * pixels.astype(np.uint16).transpose(2, 0, 1))
        image = Image.fromarray(mask)
        image.putpalette([200, 10, 10, 7, 7, 7, 90, 0, 255])  # a number is not its colour's
        image.save(root / "masks" / f"{i}.png")
    return root / "images", root / "masks"


def write_tiff(path: Path, pixels: np.ndarray, driver: str = "GTiff", **options: Any) -> Path:
    """Bands [C, H, W] as they are."""
    count, height, width = pixels.shape
    with rasterio.open(
        path, "w", driver, width, height, count, dtype=str(pixels.dtype), **options
    ) as file:  # fmt: skip
        file.write(pixels)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("classes")
    return class_folders(root / "train", 10, 0), class_folders(root / "val", 6, 1)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Options of the seg command."""
    root = tmp_path_factory.mktemp("maps")
    (images, masks), (val_images, val_masks) = segmented(root / "a", 5, 0), segmented(root / "b", 3, 1)
    return {
        "--train-images": images, "--train-masks": masks, "--val-images": val_images, "--val-masks": val_masks
    }  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a network that is not what it started from."""
    vit = evaluate.untrained_backbone(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("exported") / "backbone.safetensors"
    save_backbone(Backbone(vit, CONFIG, STATISTICS, 3), path)
    return path


def tiles(folders: tuple[Path, Path]) -> tuple[list[Tile], list[Tile]]:
    return evaluate.class_folder_tiles(folders[0]), evaluate.class_folder_tiles(folders[1])


def shuffled(labelled: list[Tile], seed: int) -> list[Tile]:
    labels = np.random.default_rng(seed).permutation([tile.label for tile in labelled])
    return [replace(tile, label=str(label)) for tile, label in zip(labelled, labels, strict=True)]


# --- what is compared -----------------------------------------------------------------------------------


def test_raw_colours_by_hand() -> None:
    """Half of band 0 is 0.1, half 0.9; band 1 is 0.5 throughout; band 2 is 1 but for one patch of stripes."""
    values = torch.full((1, 3, 16, 24), 0.5)
    values[0, 0, :, :12], values[0, 0, :, 12:] = 0.1, 0.9
    values[0, 2] = 1
    values[0, 2, 8:, 16::2] = 0
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (STATISTICS.mean, STATISTICS.std))
    histogram, patches = RAW((values - mean) / std)
    expected = torch.zeros(3, 32)
    expected[0, [3, 28]] = 0.5  # 0.1 * 32 = 3.2; 0.9 * 32 = 28.8
    expected[1, 16] = 1
    expected[2, 31], expected[2, 0] = 1 - 32 / 384, 32 / 384
    torch.testing.assert_close(histogram, expected.flatten()[None])
    assert patches.shape == (1, 6, 6)
    torch.testing.assert_close(patches[0, 5], torch.tensor([0.9, 0.5, 0.5, 0, 0, 0.5]), atol=1e-6, rtol=0)
    torch.testing.assert_close(patches[0, 1], torch.tensor([0.5, 0.5, 1, 0.4, 0, 0]), atol=1e-6, rtol=0)


def test_reading_takes_what_it_says() -> None:
    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean((2, 3)), images.flatten(2).mT

    images = torch.rand(2, 3, 4, 4)
    cls, patches = network(images)
    read: Callable[[str], Tensor] = lambda what: probes.Reading(network, what)(images)[0]  # type: ignore # noqa: E731
    assert torch.equal(read("cls"), cls) and torch.equal(read("patches"), patches)
    torch.testing.assert_close(read("cls+mean"), torch.cat((cls, cls), 1))


# --- the classifier -------------------------------------------------------------------------------------


def test_path_is_scikit_learns_logistic_regression() -> None:
    """A row that weighs in several classes is, to scikit-learn, as many rows with weights."""
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    x, shares = random.standard_normal((60, 5)), random.random((60, 3)) ** 4
    x += 2 * np.pad(shares, ((0, 0), (0, 2)))
    grid = (1e-6, 1e-3, 1e-1, 1.0)
    path = probes.regularisation_path(torch.from_numpy(x), torch.from_numpy(shares), grid)
    for c, found in zip(grid, path, strict=True):
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
        theirs.fit(x.repeat(3, 0), np.tile([0, 1, 2], 60), sample_weight=shares.flatten())
        weight, bias = found[:-1].numpy(), found[-1].numpy()
        np.testing.assert_allclose(weight, theirs.coef_.T, atol=1e-3 * np.abs(theirs.coef_).max())
        ours, others = (b - b.mean() for b in (bias, theirs.intercept_))
        np.testing.assert_allclose(ours, others, atol=2e-3)


def test_head_takes_features_as_they_are() -> None:
    """Standardised within: another unit and origin, or a constant feature beside it, change no prediction."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    x = torch.randn(90, 4, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 4)
    targets = torch.nn.functional.one_hot(labels).float()
    fit, held = torch.arange(60), torch.arange(60, 90)
    plain = probes.fit_head(x, targets, fit, held)
    moved = torch.cat((50 * x - 7, torch.full((90, 1), 3.0)), 1)
    other = probes.fit_head(moved, targets, fit, held)
    assert other.C == plain.C
    torch.testing.assert_close(other(moved).softmax(1), plain(x).softmax(1), atol=2e-3, rtol=0)
    assert (plain(x).argmax(1) == labels).float().mean() > 0.8


def test_c_has_the_least_cross_entropy_on_held_out_rows_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    x = torch.randn(80, 40, generator=generator)  # more features than it takes: strong regularisation is best
    x[:, 0] += labels
    targets = torch.nn.functional.one_hot(labels).float()
    fit, held = torch.arange(50), torch.arange(50, 80)
    z = (x - x[fit].mean(0)) / x[fit].std(0, correction=0)
    losses = [
        torch.nn.functional.cross_entropy(z[held] @ found[:-1] + found[-1], labels[held]).item()
        for found in probes.regularisation_path(z[fit], targets[fit])
    ]
    best = probes.C_GRID[int(np.argmin(losses))]
    assert probes.fit_head(x, targets, fit, held).C == best and 1e-6 < best < 1


def test_split_counts_and_draws() -> None:
    labels = ["a"] * 10 + ["b"] * 3 + ["c"] * 2
    fit, held = probes.split(labels, None, seed=0)
    assert sorted((*fit.tolist(), *held.tolist())) == list(range(15))
    assert [sum(labels[i] == name for i in held) for name in "abc"] == [2, 1, 1]
    assert all(
        torch.equal(a, b) for a, b in zip((fit, held), probes.split(labels, None, seed=0), strict=True)
    )
    assert not torch.equal(held, probes.split(labels, None, seed=1)[1])

    fit, held = probes.split(labels, 1, seed=0)
    assert [labels[i] for i in fit] == ["a", "b", "c"] == [labels[i] for i in held]
    assert not set(fit.tolist()) & set(held.tolist())
    fit, held = probes.split(["a"] * 100 + ["b"] * 100, 5, seed=0)
    assert (len(fit), len(held)) == (10, 10)


def test_split_refuses_what_is_too_few() -> None:
    with pytest.raises(
        ConfigError, match="shots: expected at most 2, the 3 train images of b less 1 held out, got 3"
    ):
        probes.split(["a"] * 10 + ["b"] * 3, 3, seed=0)
    with pytest.raises(
        DataError, match="expected at least 2 images of a class, one of them held out, got 1 of b"
    ):
        probes.split(["a"] * 10 + ["b"], None, seed=0)


# --- linear probe ---------------------------------------------------------------------------------------


def test_classes_of_different_colours_are_told_by_raw_colours(folders: tuple[Path, Path]) -> None:
    result = evaluate.linear(RAW, CONFIG, STATISTICS, *tiles(folders))
    assert list(result) == [
        "top1", "top1_std", "C", "features", "shots", "seeds", "classes", "train", "fitted", "val", "skipped",
        "per_class_top1", "confusion",
    ]  # fmt: skip
    assert (result["top1"], result["top1_std"], result["per_class_top1"]) == (
        1.0,
        0.0,
        dict.fromkeys(NAMES, 1.0),
    )
    assert result["confusion"] == [[18, 0, 0], [0, 18, 0], [0, 0, 18]]  # six images, three seeds
    assert (result["train"], result["fitted"], result["val"]) == (30, 24, 18)


def test_classes_of_one_colour_are_not(tmp_path: Path) -> None:
    """Stripes down and stripes across have the same colours: what tells them apart has to see where they are."""

    class Edges(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            return torch.stack([images.diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3)], 1), None

    train, val = class_folders(tmp_path / "train", 12, 0, True), class_folders(tmp_path / "val", 12, 1, True)
    task = (CONFIG, STATISTICS, *tiles((train, val)))
    assert evaluate.linear(Edges(), *task)["top1"] == 1.0
    assert evaluate.linear(RAW, *task)["top1"] < 0.75


def test_labels_that_mean_nothing_are_near_chance(folders: tuple[Path, Path]) -> None:
    train, val = tiles(folders)
    scores = [
        evaluate.linear(RAW, CONFIG, STATISTICS, shuffled(train, seed), val, seeds=1)["top1"]
        for seed in range(8)
    ]
    assert 0.2 < np.mean(scores) < 0.47  # chance is 1/3


def test_val_labels_decide_nothing(folders: tuple[Path, Path]) -> None:
    """With wrong val labels the same C and predictions come out; with wrong train labels they do not."""
    vit = evaluate.untrained_backbone(CONFIG)
    train, val = tiles(folders)

    def chosen(train: list[Tile], val: list[Tile]) -> tuple[list[float], list[int]]:
        result = evaluate.linear(vit, CONFIG, STATISTICS, train, val, seeds=4)
        return result["C"], np.sum(result["confusion"], axis=0).tolist()

    right = chosen(train, val)
    assert chosen(train, shuffled(val, 0)) == right
    assert chosen(shuffled(train, 0), val)[0] != right[0]


def test_linear_is_the_same_again_and_varies_by_seed(folders: tuple[Path, Path]) -> None:
    vit = evaluate.untrained_backbone(CONFIG)
    task = (CONFIG, STATISTICS, shuffled(tiles(folders)[0], 0), tiles(folders)[1])
    first, again = (evaluate.linear(vit, *task, shots=3, seeds=3) for _ in range(2))
    assert first == again
    assert first["top1_std"] > 0 and len(first["C"]) == 3
    assert evaluate.linear(vit, *task, shots=3, seeds=1)["top1_std"] == 0


def test_shots_and_features(folders: tuple[Path, Path]) -> None:
    vit = evaluate.untrained_backbone(CONFIG)
    result = evaluate.linear(vit, CONFIG, STATISTICS, *tiles(folders), features="cls+mean", shots=2, seeds=1)
    assert (result["fitted"], result["shots"], result["features"]) == (6, 2, "cls+mean")
    assert evaluate.linear(RAW, CONFIG, STATISTICS, *tiles(folders), shots=1)["top1"] == 1.0


def test_untrained_network_exceeds_chance_on_rsscn7() -> None:
    """Seven classes of real scenes: random features and colours tell more than nothing, so a baseline is needed."""
    root = shared_file("data/rsscn7-mini")
    task = (CONFIG, STATISTICS, *tiles((root / "train", root / "val")))
    for network in evaluate._baselines(CONFIG, STATISTICS).values():
        assert evaluate.linear(network, *task, seeds=2)["top1"] > 0.3  # chance is 0.14


# --- masks ----------------------------------------------------------------------------------------------


def pair_of(tmp_path: Path, mask: Path, px: int = 16) -> probes.Pair:
    Image.fromarray(np.zeros((px, px, 3), np.uint8)).save(tmp_path / "image.png")
    return probes.Pair(open_scene(tmp_path / "image.png"), str(mask))


@pytest.mark.parametrize("kind", ["palette", "palette4", "bilevel", "grey4", "uint16", "int16"])
def test_masks_are_read_as_numbers(tmp_path: Path, kind: str) -> None:
    """Indices of a palette, not colours; numbers of 1 and 4 bit as they are, not scaled to 0..255; 16 bit."""
    top = {"palette4": 15, "bilevel": 1, "grey4": 15, "uint16": 60_000}.get(kind, 200)
    numbers = np.random.default_rng(0).integers(0, top + 1, (16, 16))
    numbers[0, :2] = 0, top
    path = tmp_path / "mask.png"
    if kind.startswith("palette"):
        image = Image.fromarray(numbers.astype(np.uint8))
        image.putpalette(np.random.default_rng(1).integers(256, size=768).tolist())
        image.save(path, bits=4 if kind == "palette4" else 8)
    elif kind == "bilevel":
        Image.fromarray(numbers.astype(bool)).save(path)
    elif kind == "grey4":
        write_tiff(path, numbers[None].astype(np.uint8), "PNG", NBITS=4)
        assert Image.open(path).getextrema() != (0, 256) and path.read_bytes()[24] == 4  # bit depth
    elif kind == "uint16":
        Image.fromarray(numbers.astype(np.uint16)).save(path)
    else:
        numbers[1] = -1
        # Renamed to a name that is not UTF-8, which GDAL does not open by itself.
        path = write_tiff(tmp_path / "mask.tif", numbers[None].astype(np.int16)).rename(
            tmp_path / os.fsdecode(b"m\xe4sk.tif")
        )
    assert np.array_equal(probes.read_mask(pair_of(tmp_path, path)), numbers)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_mask_is_read_whole_or_refused(tmp_path: Path, suffix: str) -> None:
    """Not as noise, which is what GDAL makes of a truncated PNG of 8 bit."""
    numbers = np.random.default_rng(0).integers(5, size=(1, 16, 16), dtype=np.uint8)
    options = {"driver": "PNG"} if suffix == "png" else {"compress": "deflate"}
    path = write_tiff(tmp_path / f"mask.{suffix}", numbers, **options)
    pair, whole, refused = pair_of(tmp_path, path), path.read_bytes(), 0
    for cut in range(0, len(whole), 5):
        path.write_bytes(whole[:cut])
        try:
            assert np.array_equal(probes.read_mask(pair), numbers[0]), cut
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 10


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    grey = np.zeros((1, 16, 16), np.uint8)
    broken = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(16, 16), dtype=np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:120])
    cases = {
        write_tiff(tmp_path / "rgb.tif", grey.repeat(3, 0)): "expected a mask of one band, got 3",
        write_tiff(tmp_path / "float.tif", grey.astype(np.float32)): "a mask of whole numbers, got float32",
        write_tiff(tmp_path / "wide.tif", grey.repeat(2, 2)): "a mask of 16x16 pixels, as .* has, got 32x16",
        broken: "broken.png cannot be read as a mask: ",
    }
    for path, sentence in cases.items():
        with pytest.raises(DataError, match=sentence) as raised:
            probes.read_mask(pair_of(tmp_path, path))
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_pairs_are_files_of_one_name(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for path in (images / "b.png", images / "city" / "a.png", masks / "b.png", masks / "city" / "a.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    (masks / "more.tif").write_bytes(b"not of any image")
    found = {Path(pair.scene.path).name: pair.mask for pair in probes.mask_pairs(images, masks)}
    assert found == {"a.png": str(masks / "city" / "a.png"), "b.png": str(masks / "b.png")}

    with pytest.raises(DataError, match="expected images and masks in two folders"):
        probes.mask_pairs(images, images)
    (masks / "b.tif").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/b.png: expected one mask, got .*b.png, .*b.tif$"):
        probes.mask_pairs(images, masks)
    for path in (masks / "b.png", masks / "b.tif"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"^1 of the 2 images .* have no mask .* expected b.png, .tif or .tiff"
    ):
        probes.mask_pairs(images, masks)
    (images / "city" / "a.png").write_bytes(b"no image")
    (masks / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match="a.png: not a JPEG, PNG or TIFF file"):
        probes.mask_pairs(images, masks)


def masks_of(tmp_path: Path, *numbers: list[int]) -> list[probes.Pair]:
    """A pair for each list of numbers, which fill the columns of its mask."""
    pairs = []
    for i, row in enumerate(numbers):
        mask = np.tile(np.array(row, np.int16), (1, len(row), 1))
        pairs.append(pair_of(tmp_path, write_tiff(tmp_path / f"{i}.tif", mask), len(row)))
    return pairs


def test_classes_are_named_or_found(tmp_path: Path) -> None:
    train, val, odd, none = masks_of(
        tmp_path, [30, 10, 10, 255], [10, 10, 255, 255], [0, 1, 2, 3], [255, 255]
    )
    found = probes.classes_of([train], [val], None, 255)
    assert found == probes.Classes(("10", "30"), (10, 30), 255)
    assert found.index(probes.read_mask(train))[0].tolist() == [1, 0, 0, -1]
    assert probes.classes_of([odd], [odd], ("5",), 255).names == ("0", "1", "2", "3", "4")
    named = probes.classes_of([odd], [odd], ("sea", "land", "ice", "snow"), 0)
    assert named.index(probes.read_mask(odd))[0].tolist() == [-1, 1, 2, 3]

    cases = [
        (([train], [val], ("2",), 255), DataError, "expected class numbers from 0 to 1, or 255 for .* ignored, got 10"),
        (([val], [train], None, 255), DataError, r"a class that the train masks lack: 30, .*0.tif \(train has 10\)"),
        (([odd], [odd], ("a", "b", "a", "c"), 255), ConfigError, "classes: expected different names"),
        (([odd], [odd], ("0",), 255), ConfigError, "classes: expected different names, or their count, got 0"),
        (([none], [val], None, 255), DataError, r"every pixel of the 1 masks is ignored \(255\)"),
    ]  # fmt: skip
    for arguments, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            probes.classes_of(*arguments)


@pytest.mark.parametrize("size", [(40, 40), (80, 120), (97, 61), (25, 90), (7, 7), (41, 40)])
def test_windows_show_every_pixel_once(tmp_path: Path, size: tuple[int, int]) -> None:
    """Windows are square, inside the image; the labels that count, put back in place, are the mask."""
    height, width = size
    mask = np.random.default_rng(0).integers(0, 5, (1, height, width), dtype=np.uint8)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "image.png")
    pair = probes.Pair(open_scene(tmp_path / "image.png"), str(write_tiff(tmp_path / "mask.tif", mask)))
    windows = probes.windows_of([pair], 40)
    classes = probes.Classes(tuple("abcde"), (0, 1, 2, 3, 4), 255)
    back, times = np.full(size, -1), np.zeros(size, int)
    for window, labels in zip(windows, probes.label_maps(windows, classes), strict=True):
        tile = window.tile
        assert tile.height == tile.width == min(40, height, width)
        place = np.s_[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        counts = labels.numpy() >= 0
        back[place][counts] = labels.numpy()[counts]
        times[place] += counts
    assert (times == 1).all() and np.array_equal(back, mask[0])


def test_patch_shares_by_hand() -> None:
    labels = torch.zeros(4, 4, dtype=torch.int64)
    labels[0, 2:] = 1  # half of the second patch
    labels[2:, :2] = torch.tensor([[-1, 2], [-1, -1]])
    expected = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 0.25], [1, 0, 0]])
    torch.testing.assert_close(probes.patch_shares(labels, 2, 3), expected)


# --- segmentation ---------------------------------------------------------------------------------------


def task_of(train: tuple[Path, Path], val: tuple[Path, Path], **options: Any) -> probes.Segmentation:
    pairs = probes.mask_pairs(*train), probes.mask_pairs(*val)
    classes = probes.classes_of(*pairs, None, 255)
    return probes.Segmentation(*pairs, classes, CONFIG, STATISTICS, CPU, **options)


def test_iou_by_hand() -> None:
    """Of six pixels one is ignored; class 2 is predicted but never true, class 3 is nowhere."""
    meter = probes._meter(4)
    meter.update(torch.tensor([[0, 0, 1, 1, 2, 3]]), torch.tensor([[0, 0, 0, 1, 1, -1]]))
    found = {name: value.tolist() for name, value in meter.compute().items()}
    assert found["iou"] == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert found["miou"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert found["confusion"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_logits_reach_the_pixels_of_their_patch() -> None:
    """Two patches a side: of 16 px each has 8, whose outer ones are surely its own."""
    pixels = probes.pixel_classes(5.0 * torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1])), 2, 16)
    corners = pixels[:6, :6], pixels[:6, 10:], pixels[10:, :6], pixels[10:, 10:]
    assert [corner.unique().tolist() for corner in corners] == [[0], [1], [2], [1]]
    halves = probes.pixel_classes(torch.eye(2).repeat(2, 1), 2, 16)
    assert torch.equal(halves, torch.arange(16).ge(8).long().expand(16, 16))


@pytest.mark.parametrize("bits", [8, 16])
def test_planted_regions_are_found(tmp_path: Path, bits: int) -> None:
    """Mean colours of patches that lie in one class each; 16-bit images alike."""
    task = task_of(segmented(tmp_path / "a", 4, 0, bits=bits), segmented(tmp_path / "b", 2, 1, bits=bits))
    result = probes.segment(RAW, task)
    assert list(result) == [
        "miou", "miou_std", "pixel_accuracy", "pixel_accuracy_std", "C", "train_patches", "per_class_iou",
        "confusion",
    ]  # fmt: skip
    assert result["miou"] > 0.9 and result["pixel_accuracy"] > 0.95
    assert np.sum(result["confusion"]) == 3 * 2 * 80 * 80  # seeds, images, pixels
    assert result["train_patches"] == 4 * 100
    iou = np.array(list(result["per_class_iou"].values()))
    assert result["miou"] == pytest.approx(iou.mean(), abs=1e-5)


def test_masks_that_mean_nothing_score_as_chance(tmp_path: Path) -> None:
    train, val = segmented(tmp_path / "a", 4, 0), segmented(tmp_path / "b", 2, 1)
    for i, path in enumerate(sorted(train[1].iterdir())):
        other = np.random.default_rng(100 + i).integers(3, size=(5, 5), dtype=np.uint8)
        Image.fromarray(other.repeat(16, 0).repeat(16, 1)).save(path)
    assert probes.segment(RAW, task_of(train, val))["pixel_accuracy"] < 0.5  # chance is 1/3


def test_ignored_pixels_do_not_count(tmp_path: Path) -> None:
    """Images whose lower half means nothing, ignored there: as good as without it, and that many fewer pixels."""
    train, val = segmented(tmp_path / "a", 4, 0), segmented(tmp_path / "b", 2, 1)
    before = probes.segment(RAW, task_of(train, val))
    for path in (*train[0].iterdir(), *val[0].iterdir()):
        pixels = np.array(Image.open(path))
        pixels[40:] = 255 - pixels[40:]
        Image.fromarray(pixels).save(path)
        mask = np.array(Image.open(path.parents[1] / "masks" / path.name))
        mask[40:] = 255
        Image.fromarray(mask).save(path.parents[1] / "masks" / path.name)
    after = probes.segment(RAW, task_of(train, val))
    assert np.sum(after["confusion"]) == 3 * 2 * 80 * 40 and after["train_patches"] == 4 * 50
    assert after["miou"] > 0.9 and after["miou"] == pytest.approx(before["miou"], abs=0.05)


def test_segmentation_is_the_same_again_and_val_decides_nothing(maps: dict[str, Path]) -> None:
    vit = evaluate.untrained_backbone(CONFIG)
    train, val = (maps["--train-images"], maps["--train-masks"]), (maps["--val-images"], maps["--val-masks"])
    first, again = (probes.segment(vit, task_of(train, val, seeds=2)) for _ in range(2))
    assert first == again
    swapped = replace(task_of(train, val, seeds=2), val=probes.mask_pairs(*train))
    assert probes.segment(vit, swapped)["C"] == first["C"]
    few = probes.segment(vit, task_of(train, val, seeds=2, max_patches=100))
    assert few["train_patches"] == 100 and few["miou"] < first["miou"] + 0.1


def test_whole_images_are_held_out(maps: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of one image are too alike for C to be chosen on some of them and the head fitted on others."""
    parts = []

    def fit_head(x: Tensor, targets: Tensor, fit: Tensor, held: Tensor) -> None:
        assert x.shape == (500, 6) and targets.shape == (500, 3)
        parts.append((fit.view(5, 100), held.view(5, 100)))  # five images of 100 patches

    monkeypatch.setattr(probes, "fit_head", fit_head)
    train, val = (maps["--train-images"], maps["--train-masks"]), (maps["--val-images"], maps["--val-masks"])
    probes.segmentation_heads(RAW, task_of(train, val, seeds=4))
    for fit, held in parts:
        assert torch.equal(fit, ~held) and torch.equal(held.all(1), held.any(1)) and held.all(1).sum() == 1
    assert len({int(held.any(1).int().argmax()) for _, held in parts}) > 1


def test_small_images_are_enlarged(tmp_path: Path) -> None:
    """Images below the size of a window are seen whole: 32 px become 40 px."""
    task = task_of(segmented(tmp_path / "a", 12, 0, px=32), segmented(tmp_path / "b", 6, 1, px=32))
    result = probes.segment(RAW, task)
    assert np.sum(result["confusion"]) == 3 * 6 * 32 * 32
    assert result["pixel_accuracy"] > 0.8


def test_segmentation_refuses_what_cannot_be(tmp_path: Path) -> None:
    one, val = segmented(tmp_path / "a", 1, 0), segmented(tmp_path / "b", 1, 1)
    with pytest.raises(
        DataError, match="at least 2 images with a pixel that counts, one of them held out, got 1"
    ):
        probes.segment(RAW, task_of(one, val))
    with pytest.raises(ConfigError, match="max_patches: expected a whole number of at least 1, got 0"):
        task_of(one, val, max_patches=0)
    cut = sorted(val[0].iterdir())[0]
    cut.write_bytes(cut.read_bytes()[:400])
    with pytest.raises(DataError, match="0.png: "):
        list(task_of(val, val).patches(RAW, probes.mask_pairs(*val)))


# --- commands -------------------------------------------------------------------------------------------


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 200


def test_confusion_is_drawn_for_any_number_of_classes(tmp_path: Path) -> None:
    for count in (1, 3, 40):
        path = tmp_path / f"{count}.png"
        path.write_bytes(
            probes.confusion_png(np.eye(count, dtype=int).tolist(), [f"${i}_{{$" for i in range(count)])
        )
        assert is_png(path)
    assert probes.confusion_of(["a", "a", "b"], ["a", "b", "b"], ["a", "b", "c"]) == [
        [1, 1, 0],
        [0, 1, 0],
        [0, 0, 0],
    ]


def test_linear_command(exported: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    out, picture = tmp_path / "linear.json", tmp_path / "confusion.png"
    done = run_here(
        "pera_fast.evaluate", "linear", "--checkpoint", exported, "--train", folders[0], "--val", folders[1],
        "--shots", 4, "--seeds", 2, "--device", "cpu", "--out", out, "--confusion", picture,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads(out.read_text()) == result and is_png(picture)
    row = ["top1", "top1_std", "C", "per_class_top1"]
    assert list(result["untrained"]) == list(result["raw_colours"]) == row
    assert result["raw_colours"]["top1"] == 1.0 and len(result["untrained"]["C"]) == 2
    assert result["points_gained"] == pytest.approx(100 * (result["top1"] - result["untrained"]["top1"]))
    assert (result["fitted"], result["seeds"], result["shots"]) == (12, 2, 4)


def test_seg_command(exported: Path, maps: dict[str, Path], tmp_path: Path) -> None:
    out, picture = tmp_path / "seg.json", tmp_path / "confusion.png"
    paths = [part for option in maps.items() for part in option]
    done = run_here(
        "pera_fast.evaluate", "seg", "--checkpoint", exported, *paths, "--classes", *NAMES, "--seeds", 2,
        "--device", "cpu", "--out", out, "--confusion", picture,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads(out.read_text()) == result and is_png(picture)
    assert list(result["untrained"]) == [
        "miou", "miou_std", "pixel_accuracy", "pixel_accuracy_std", "C", "per_class_iou"
    ]  # fmt: skip
    assert result["classes"] == list(NAMES) == list(result["raw_colours"]["per_class_iou"])
    assert result["raw_colours"]["miou"] > 0.9 and result["miou"] > 0.5
    assert (result["train"], result["val"], result["ignore_index"], result["seeds"]) == (5, 3, 255, 2)


def test_errors_are_one_sentence(
    exported: Path, folders: tuple[Path, Path], maps: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    linear: dict[str, Any] = {"--train": folders[0], "--val": folders[1]}
    one = class_folders(tmp_path / "one", 1, 0)
    empty, narrow = tmp_path / "empty", tmp_path / "narrow"
    empty.mkdir()
    narrow.mkdir()
    for path in maps["--val-masks"].iterdir():
        Image.open(path).crop((0, 0, 40, 80)).save(narrow / path.name)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("linear", linear | {"--seeds": 0}, "seeds: expected a whole number of at least 1, got 0"),
        ("linear", linear | {"--shots": 0}, "shots: expected a whole number of at least 1, got 0"),
        ("linear", linear | {"--shots": 9}, "shots: expected at most 8, the 10 train images of field less 2"),
        ("linear", linear | {"--train": one}, "train: expected at least 2 images of a class"),
        ("linear", linear | {"--train": empty}, f"{empty}: expected one folder of images per class"),
        ("linear", linear | {"--out": empty / "no" / "a"}, "out: expected a file in a folder that exists"),
        ("linear", linear | {"--checkpoint": empty}, "checkpoint: expected a checkpoint or a run with one"),
        ("linear", linear | {"--confusion": empty}, f"confusion: expected a file to write, got the folder {empty}"),
        ("linear", linear | {"--out": exported}, "out: expected a file that nothing else is read from or written to"),
        ("seg", maps | {"--seeds": 0}, "seeds: expected a whole number of at least 1, got 0"),
        ("seg", maps | {"--train-images": empty}, f"found under {empty}"),
        ("seg", maps | {"--val-masks": empty}, f"found under {empty}"),
        ("seg", maps | {"--val-masks": narrow}, "expected a mask of 80x80 pixels"),
        ("seg", maps | {"--train-masks": maps["--val-masks"]}, "2 of the 5 images under"),
        ("seg", maps | {"--classes": 2}, "expected class numbers from 0 to 1, or 255 for what is ignored, got 2"),
    ]  # fmt: skip
    for command, options, sentence in cases:
        options = {"--checkpoint": exported, "--device": "cpu"} | options
        arguments = [str(part) for option in options.items() for part in option]
        monkeypatch.setattr("sys.argv", ["evaluate", command, *arguments])
        with pytest.raises(SystemExit) as stopped:
            _cli.run(evaluate.main)
        lines = capsys.readouterr().err.splitlines()  # a progress bar ends with a carriage return
        said = [line for line in lines if line.strip() and "tile" not in line and "window/" not in line]
        assert stopped.value.code == 2, sentence
        assert len(said) == 1 and said[0].startswith("error: ") and sentence in said[0], said
