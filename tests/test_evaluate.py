"""k-NN evaluation: features of known quality, the tasks it is run on, the command and its errors."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ONE, run_here, tiny_config
from PIL import Image
from torch import Tensor, nn

from pera_fast import _cli, checkpoint, evaluate
from pera_fast.config import ConfigError
from pera_fast.data.sources import DataError, open_scene, read_window
from pera_fast.data.statistics import Statistics
from pera_fast.engine import Engine
from pera_fast.features import Tile, extract, to_input

CPU = torch.device("cpu")
CONFIG = tiny_config()
STATISTICS = Statistics(
    {"uint8": (0.0,) * 3}, {"uint8": (255.0,) * 3}, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 1, 1
)  # fmt: skip
COLOURS = {"field": (40, 200, 40), "roof": (200, 60, 40), "water": (30, 60, 200)}


class MeanColour(nn.Module):
    """Stands in for a backbone whose class token tells the colours apart without fault."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return images.mean((2, 3)), None


def class_folders(root: Path, per_class: int, names: tuple[str, ...] = tuple(COLOURS), seed: int = 0) -> Path:
    """Noise around one colour per class, in images of different sizes."""
    random = np.random.default_rng(seed)
    for name in names:
        (root / name / "deeper").mkdir(parents=True)
        for i in range(per_class):
            shape = (int(random.integers(20, 60)), int(random.integers(20, 60)), 3)
            pixels = np.array(COLOURS[name]) + random.integers(-30, 30, shape)
            folder = root / name / ("deeper" if i % 2 else ".")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("classes")
    return class_folders(root / "train", 8), class_folders(root / "val", 5, seed=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose teacher is not what it started from."""
    run = tmp_path_factory.mktemp("run")
    engine = Engine(CONFIG, STATISTICS, ONE)
    with torch.no_grad():
        for parameter in engine.model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint.save(
        run / "checkpoints", 3, engine.model, engine.optimizer, CONFIG, STATISTICS, keep=1, world=ONE
    )
    return run


def test_perfect_features_are_classified_without_fault(folders: tuple[Path, Path]) -> None:
    train, val = (evaluate.class_folder_tiles(folder) for folder in folders)
    result = evaluate.knn(MeanColour(), CONFIG, STATISTICS, train, val, k=5)
    assert result == {
        "top1": 1.0, "k": 5, "classes": ["field", "roof", "water"], "train": 24, "val": 15, "skipped": 0,
        "per_class_top1": {"field": 1.0, "roof": 1.0, "water": 1.0},
        "confusion": [[5, 0, 0], [0, 5, 0], [0, 0, 5]],
    }  # fmt: skip


def test_shuffled_labels_are_near_chance(folders: tuple[Path, Path]) -> None:
    """The score measures the agreement of features with labels, not something that leaks through."""
    train, val = (evaluate.class_folder_tiles(folder) for folder in folders)
    random, scores = np.random.default_rng(0), []
    for _ in range(10):
        labels = random.permutation([tile.label for tile in train])
        shuffled = [replace(tile, label=str(label)) for tile, label in zip(train, labels, strict=True)]
        backbone: Any = MeanColour()
        scores.append(evaluate.knn(backbone, CONFIG, STATISTICS, shuffled, val, k=3)["top1"])
    assert 0.2 < np.mean(scores) < 0.47  # chance is 1/3


def test_votes_are_a_softmax_of_the_similarity() -> None:
    distances = np.array([[0.0, 0.1, 0.5]])
    votes = evaluate._votes(distances)
    softmax = torch.softmax(torch.from_numpy((1 - distances) / 0.07), -1).numpy()
    np.testing.assert_allclose(votes / votes.sum(), softmax, rtol=1e-12)


def test_k_is_clipped_to_the_train_images(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = (evaluate.class_folder_tiles(folder) for folder in folders)
    monkeypatch.setattr(logging.getLogger("pera_fast"), "propagate", True)  # a command run before may stop it
    with caplog.at_level(logging.WARNING, "pera_fast"):
        backbone: Any = MeanColour()
        assert evaluate.knn(backbone, CONFIG, STATISTICS, train, val, k=1000)["k"] == 24
    assert "using all 24" in caplog.text
    with pytest.raises(ConfigError, match="k: expected"):
        evaluate.knn(backbone, CONFIG, STATISTICS, train, val, k=0)


def test_unreadable_images_are_skipped_and_counted(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    val = class_folders(tmp_path / "val", 3)
    (val / "roof" / "broken.png").write_bytes(b"no image")
    cut = val / "water" / "cut.png"
    cut.write_bytes((val / "water" / "0.png").read_bytes()[:400])  # the header is whole, the pixels are not
    tiles, skipped = evaluate._class_folders(val)
    assert (len(tiles), skipped) == (10, 1)
    features = extract(MeanColour(), tiles, CONFIG, STATISTICS, CPU, batch_size=4)
    assert features.rows.shape == (9, 3) and features.rows.dtype == torch.float32
    assert features.labels == ["field"] * 3 + ["roof"] * 3 + ["water"] * 3
    assert [path for path, _ in features.bad] == [str(cut)]


def test_input_is_scaled_resized_and_normalised() -> None:
    pixels = np.zeros((3, 10, 30), np.uint8)
    pixels[1] = 255
    image = to_input(pixels, "uint8", STATISTICS, CONFIG, 16)
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    expected = torch.tensor([-0.4 / 0.2, 0.5 / 0.25, -0.6 / 0.3])
    torch.testing.assert_close(image, expected[:, None, None].expand_as(image))
    own = replace(CONFIG, data=replace(CONFIG.data, mean=(0.0,) * 3, std=(1.0,) * 3))
    torch.testing.assert_close(to_input(pixels, "uint8", STATISTICS, own, 16)[1], torch.ones(16, 16))
    with pytest.raises(DataError, match="uint16"):
        to_input(pixels.astype(np.uint16), "uint16", STATISTICS, CONFIG, 16)


def test_features_do_not_depend_on_the_batch(folders: tuple[Path, Path]) -> None:
    tiles = evaluate.class_folder_tiles(folders[1])
    backbone = evaluate.untrained_backbone(CONFIG)
    several, single = (
        extract(backbone, tiles, CONFIG, STATISTICS, CPU, batch_size=size).rows for size in (7, 1)
    )
    torch.testing.assert_close(several, single)


def test_tiles_of_one_scene_are_cut_where_they_say(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    scene = open_scene(tmp_path / "a.png")
    tiles = [Tile(scene, top, left, 20, 30, None) for top in (0, 40) for left in (0, 30, 60)]
    found = extract(MeanColour(), tiles, CONFIG, STATISTICS, CPU).rows
    for tile, row in zip(tiles, found, strict=True):
        window, _ = read_window(scene, tile.top, tile.left, 20, 30, bands=None, in_bands=3)
        torch.testing.assert_close(
            row, to_input(window, "uint8", STATISTICS, CONFIG, CONFIG.crops.global_px).mean((1, 2))
        )


def test_untrained_backbone_is_where_a_run_starts() -> None:
    state = torch.get_rng_state()
    untrained = evaluate.untrained_backbone(CONFIG).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    teacher = Engine(CONFIG, STATISTICS, ONE).model.teacher.backbone.state_dict()
    assert untrained.keys() == teacher.keys()
    for name, value in teacher.items():
        assert torch.equal(untrained[name], value), name


def test_scene_halves(tmp_path: Path) -> None:
    """Both lists know every scene, tiles of the two never overlap, and empty corners are left out."""
    random = np.random.default_rng(0)
    for name, (height, width) in {"wide": (250, 500), "small": (110, 160), "narrow": (200, 60)}.items():
        pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        if name == "wide":
            pixels[:50, :50, 3] = 0  # one whole tile of nothing
            pixels[:2, 450:, 3] = 0  # 4 % of one tile
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    scenes = [open_scene(path) for path in sorted(tmp_path.iterdir())]
    train, val = evaluate.scene_halves(scenes)
    assert {t.label for t in train} == {t.label for t in val} == {"wide.png", "small.png"}
    wide = [t for t in train if t.label == "wide.png"]
    assert {(t.height, t.width) for t in wide} == {(50, 50)}
    assert len(wide) == 5 * 4 - 1 and len([t for t in val if t.label == "wide.png"]) == 5 * 4
    for scene in scenes:
        edges = [t.left + t.width for t in train if t.scene == scene]
        starts = [t.left for t in val if t.scene == scene]
        assert not edges or max(edges) <= min(starts)


def test_command_prints_one_json_object(saved: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    done = run_here(
        "pera_fast.evaluate", "knn", "--checkpoint", saved, "--train", folders[0], "--val", folders[1],
        "--k", 5, "--device", "cpu", "--out", out, "--confusion", tmp_path / "confusion.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == [
        "top1", "k", "classes", "train", "val", "skipped", "per_class_top1", "confusion", "untrained_top1",
        "points_gained", "raw_colours_top1",
    ]  # fmt: skip
    assert result["points_gained"] == pytest.approx(100 * (result["top1"] - result["untrained_top1"]))
    assert result["raw_colours_top1"] == 1.0  # the classes are colours
    assert json.loads(out.read_text()) == result
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_error_ends_the_command_with_one_sentence(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    train, val = folders
    missing = tmp_path / "none"
    done = run_here(
        "pera_fast.evaluate", "knn", "--checkpoint", missing, "--train", train, "--val", val
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: checkpoint: expected a checkpoint or a run with one, got {missing}\n"


def test_little_memory_takes_smaller_batches(tmp_path: Path) -> None:
    class Small(MeanColour):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(images)

    tiles = evaluate.class_folder_tiles(class_folders(tmp_path, 5))
    plain, small = (
        extract(net, tiles, CONFIG, STATISTICS, CPU, batch_size=7) for net in (MeanColour(), Small())
    )
    assert len(plain.rows) == 15 and torch.equal(small.rows, plain.rows) and small.labels == plain.labels


def test_errors_name_what_is_wrong(
    saved: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train, val = folders
    flat, empty = tmp_path / "flat", tmp_path / "empty"
    two = class_folders(tmp_path / "two", 1, ("roof", "water"))
    flat.mkdir()
    (empty / "roof").mkdir(parents=True)
    cases = [
        (tmp_path / "gone", val, f"cannot open {tmp_path / 'gone'}: No such file"),
        (train, flat, f"{flat}: expected one folder of images per class"),
        (two, val, "a class that the train images lack: field (train has roof, water)"),
        (train, empty, f"no image (.jpg, .jpeg, .png, .tif, .tiff) found under {empty / 'roof'}"),
    ]
    for train_folder, val_folder, sentence in cases:
        arguments = ["knn", "--checkpoint", saved, "--train", train_folder, "--val", val_folder]
        monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as stopped:
            _cli.run(evaluate.main)
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert sentence in said and said.startswith("error: ") and said.count("\n") == 1
