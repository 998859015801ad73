"""The report: every section, real pictures, and what happens where something is missing."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import ONE, tiny_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from pera_fast import _cli, checkpoint, pictures, report
from pera_fast.config import Config, ModelConfig
from pera_fast.data.loader import WindowDataset, collate
from pera_fast.data.sources import Scene, SceneIndex, scan
from pera_fast.data.statistics import Statistics, compute_statistics
from pera_fast.engine import Engine, TrainingStopped
from pera_fast.evaluate import untrained_backbone
from pera_fast.features import Tile
from pera_fast.model.vit import VisionTransformer
from pera_fast.pictures import Picture, SeenTile
from pera_fast.records import Records
from pera_fast.train import train

CURVES = ("summary", "losses", "schedules", "health", "speed")
OF_IMAGES = ("masks", "views", "features", "training", "attention", "neighbours")


def line(step: int, **changed: object) -> dict[str, object]:
    names = (
        "loss", "distill_global", "distill_local", "koleo", "pixel", "lr", "weight_decay", "momentum",
        "teacher_temperature", "grad_norm", "images_per_second", "data_wait_share", "teacher_entropy",
        "prototype_entropy", "kl", "feature_std",
    )  # fmt: skip
    values: dict[str, object] = {name: 1.5 + 1 / step for name in names}
    counts = {"peak_memory_bytes": 2**30, "skipped_steps": 0, "bad_images": 0}
    return {"step": step, "epoch": step / 3, **values, **counts, **changed}


def images(folder: Path, bands: int, dtype: str) -> list[Scene]:
    """Three scenes, one of which has another shape."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate(((64, 72), (40, 100), (64, 72))):
        pixels = random.integers(0, 200, (bands, height, width)).astype(dtype)
        placed = rasterio.Affine(1, 0, 10, 0, -1, 20)  # rasterio warns of images that lie nowhere
        profile: dict[str, Any] = {"driver": "GTiff", "count": bands, "dtype": dtype, "transform": placed}
        with rasterio.open(folder / f"{i}.tif", "w", height=height, width=width, **profile) as file:
            file.write(pixels)
    return scan(folder).scenes


def setting(bands: int) -> Config:
    config = tiny_config(seed=3)
    return replace(config, model=replace(config.model, in_bands=bands))


def statistics_of(scenes: list[Scene], bands: int) -> Statistics:
    return compute_statistics(scenes, bands=None, in_bands=bands)


def save_checkpoints(run: Path, config: Config, statistics: Statistics, *steps: int) -> None:
    engine = Engine(config, statistics, ONE)
    for step in steps:
        with torch.no_grad():
            engine.model.teacher.backbone.pos_embed.normal_()  # another network at every step
        arguments = (engine.model, engine.optimizer, config, statistics)
        checkpoint.save(run / "checkpoints", step, *arguments, keep=99, world=ONE)


def write(run: Path, scenes: list[Scene], config: Config) -> str:
    statistics = statistics_of(scenes, config.model.in_bands)
    path = report.write_report(
        run, backbone=untrained_backbone(config), config=config, statistics=statistics, scenes=scenes
    )
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    assert found, name
    return found[1]


def pictures_in(text: str) -> list[np.ndarray]:
    """Every embedded image, decoded."""
    found = []
    for kind, data in re.findall(r'src="data:image/(png|jpeg);base64,([^"]+)"', text):
        image = Image.open(BytesIO(base64.b64decode(data, validate=True)))
        assert image.format == kind.upper()
        found.append(np.asarray(image.convert("RGB")))
    assert len(found) == text.count("<img")
    return found


@pytest.mark.parametrize(("bands", "dtype"), [(1, "uint8"), (3, "uint8"), (13, "uint16"), (2, "float32")])
def test_every_section_has_its_pictures(tmp_path: Path, bands: int, dtype: str) -> None:
    scenes, config = images(tmp_path / "images", bands, dtype), setting(bands)
    lines = [json.dumps(line(step)) for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    save_checkpoints(tmp_path, config, statistics_of(scenes, bands), 10, 20)
    page = write(tmp_path, scenes, config)
    counts = {name: len(pictures_in(section(page, name))) for name in (*CURVES, *OF_IMAGES)}
    assert counts == {
        "summary": 0, "losses": 5, "schedules": 4, "health": 4, "speed": 3, "masks": 2, "views": 4,
        "features": 3 * 3, "training": 2 * (1 + 3), "attention": 2 * (2 + 2),
        # One tile of each square scene, two that touch of the long one.
        "neighbours": 2 * (1 + 3) + 2 * (1 + 2),
    }  # fmt: skip
    for picture in pictures_in(page):
        assert picture.std() > 1  # something is drawn
    grey = "in grey" in page
    assert grey == (bands < 3) and ("first 3 of 13 bands" in page) == (bands == 13)
    assert ("brightened" in page) == (dtype != "uint8")


def test_page_needs_nothing_else_and_fits_a_phone(tmp_path: Path) -> None:
    page = write(tmp_path, images(tmp_path / "images", 3, "uint8"), setting(3))
    assert '<meta name="viewport" content="width=device-width' in page
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert re.search(r"img \{[^}]*max-width: 100%", page)


def test_summary_tells_the_run_in_numbers(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    # 5 windows per epoch, 4 images per rank and step: 60 steps of 2 ranks are 96 epochs.
    lines = [line(30, images_per_second=10.0), {"step": 30, "knn_top1": 0.5}, line(60, epoch=96.0, loss=4.25)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(text) + "\n" for text in lines))
    result = {"top1": 0.75, "untrained_top1": 0.5, "k": 20, "classes": ["a", "b"], "val": 8}
    (tmp_path / "eval.json").write_text(json.dumps(result))
    summary = section(write(tmp_path, scenes, config), "summary")
    for text in (
        "60 (96 epochs)", ">480<", "width 32, 2 blocks", "Total loss 4.25", "1.0 GiB",
        "50.0 % before training, 75.0 % after (+25.0 points)", "8 images, 2 classes, k = 20",
    ):  # fmt: skip
        assert text in summary, text


def test_missing_and_damaged_records_are_no_obstacle(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    page = write(tmp_path, scenes, config)
    assert "records nothing to draw here" in section(page, "losses")
    assert "k-NN" not in section(page, "summary")
    one = {"step": 1, "loss": 2.0, "koleo": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(one) + '\n[1]\n{"step": 2, "lo')
    (tmp_path / "eval.json").write_text('{"top1"')
    page = write(tmp_path, scenes, config)
    assert len(pictures_in(section(page, "losses"))) == 1
    assert "records nothing to draw here" in section(page, "schedules")


def test_images_that_are_gone_become_a_sentence(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    statistics = statistics_of(scenes, 3)
    for scene in scenes:
        Path(scene.path).unlink()
    page = report.write_report(
        tmp_path, backbone=untrained_backbone(config), config=config, statistics=statistics, scenes=scenes
    ).read_text()
    for name in OF_IMAGES:
        assert "nothing to show here" in section(page, name) and "<img" not in section(page, name)
    assert re.search(r"no image can be read: .*\d.tif: No such file", section(page, "features"))


def test_names_are_escaped(tmp_path: Path) -> None:
    scenes = images(tmp_path / "images", 3, "uint8")
    odd = tmp_path / "images" / '<b>"&.tif'
    Path(scenes[0].path).rename(odd)
    page = write(tmp_path, scan(tmp_path / "images").scenes, setting(3))
    assert "<b>" not in page and "&lt;b&gt;&quot;&amp;.tif" in page


def test_crop_is_the_one_that_the_run_trains_on(tmp_path: Path) -> None:
    """Cut, colours and masks, against what the first step makes of the same batch."""
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    statistics = statistics_of(scenes, 3)
    pair = pictures.first_crop(config, statistics, scenes)
    dataset = WindowDataset(SceneIndex(scenes, []), statistics, config)
    batch = collate([dataset[i] for i in range(config.run.batch_size)])
    trained = Engine(config, statistics, ONE).patches(0, 0, batch)
    masks = trained.groups[0]
    _, crop, index = pictures.choose_crop(config, statistics, scenes)
    image = index // (config.crops.num_global + config.crops.num_local)
    row = crop * config.run.batch_size + image
    for ours, theirs in zip(pair.patches, masks, strict=True):
        assert torch.equal(ours, theirs[row])
    patch_px, mean, std = config.model.patch_px, torch.tensor(statistics.mean), torch.tensor(statistics.std)
    for view, patches, rows in (
        (pair.views[0], pair.patches[0], trained.student_rows.split(1 + masks.student.shape[1])),
        (pair.views[1], pair.patches[2], trained.teacher_rows.split(1 + masks.teacher.shape[1])),
    ):
        normal = ((view - mean[:, None, None]) / std[:, None, None])[None]
        cells = torch.nn.functional.unfold(normal.float(), patch_px, stride=patch_px)[0].T[patches]
        torch.testing.assert_close(cells, rows[row][1:].float(), rtol=0, atol=0.05)


def test_pictures_show_each_patch_where_it_belongs(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    pair = pictures.first_crop(config, statistics_of(scenes, 3), scenes)
    patch_px = config.model.patch_px
    student = pictures.only(pair.display(pair.views[0]), pair.patches[0], patch_px)
    teacher = pictures.only(pair.display(pair.views[1]), pair.patches[2], patch_px)
    blank = [(image == pictures.HIDDEN).all(-1) for image in (student, teacher)]
    assert not (~blank[0] & ~blank[1]).any()  # no pixel is shown to both
    shown = [1 - mask.mean() for mask in blank]
    side = config.crops.global_px // patch_px
    assert shown == pytest.approx([len(pair.patches[i]) / side**2 for i in (0, 2)])


def test_command_writes_the_page_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = images(tmp_path / "images", 3, "uint8")
    config = setting(3)
    config = replace(config, data=replace(config.data, data=str(tmp_path / "images")))
    statistics = statistics_of(scenes, 3)
    run = tmp_path / "run"
    save_checkpoints(run, config, statistics, 1)
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    _cli.run(report.main)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n" and (run / "report.html").is_file()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        _cli.run(report.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: checkpoint: expected")


# --- what is missing ---


def test_a_run_that_stopped_at_its_first_step(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    save_checkpoints(tmp_path, config, statistics_of(scenes, 3), 1)
    page = write(tmp_path, scenes, config)
    shown = section(page, "training")
    assert len(pictures_in(shown)) == 2 * 3 and "Before training" in shown and "Step 1<" in shown
    assert len(pictures_in(section(page, "speed"))) == 3


def test_checkpoints_are_spread_and_damaged_ones_left_out(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    assert "no checkpoint of this run can be read" in section(write(tmp_path, scenes, config), "training")
    save_checkpoints(tmp_path, config, statistics_of(scenes, 3), *range(10, 80, 10))
    found = re.findall("Step (\\d+)<", section(write(tmp_path, scenes, config), "training"))
    assert found == ["10", "30", "50", "70"] * 2
    state = tmp_path / "checkpoints/step_00000050/state.json"
    state.write_text(state.read_text().replace('"format": 2', '"format": 1'))
    found = re.findall("Step (\\d+)<", section(write(tmp_path, scenes, config), "training"))
    assert found == ["10", "30", "70"] * 2


def test_one_scene(tmp_path: Path) -> None:
    """A small one has no tiles to compare; a large one has, but not those beside the tile."""
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    page = write(tmp_path, scenes[:1], config)
    assert "no two tiles that lie apart" in section(page, "neighbours")
    assert [len(pictures_in(section(page, name))) for name in ("features", "attention")] == [3, 4]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 300, 3), np.uint8)).save(
        tmp_path / "large.png"
    )
    text = section(write(tmp_path, scan(tmp_path / "large.png").scenes, config), "neighbours")
    assert len(pictures_in(text)) == 5 * 6 and "another image" not in text
    assert text.count("same image") == 25


def test_scenes_that_cannot_be_read_have_others_in_their_place(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    Path(scenes[0].path).write_bytes(b"not an image any more")
    page = write(tmp_path, scenes * 4, config)
    assert len(pictures_in(section(page, "features"))) == 4 * 3 and "0.tif" not in section(page, "features")
    assert "0.tif" not in section(page, "neighbours")


def test_a_network_that_is_not_finite_becomes_a_sentence(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    backbone = untrained_backbone(config)
    backbone.norm.bias[0] = float("nan")
    statistics = statistics_of(scenes, 3)
    page = report.write_report(
        tmp_path, backbone=backbone, config=config, statistics=statistics, scenes=scenes
    ).read_text()
    for name in ("features", "attention", "neighbours"):
        assert "features are not finite" in section(page, name)
    assert len(pictures_in(section(page, "masks"))) == 2


def test_one_head_is_its_own_mean(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    config = replace(config, model=replace(config.model, num_heads=1))
    text = section(write(tmp_path, scenes, config), "attention")
    assert len(pictures_in(text)) == 2 * 2 and "Head 1" not in text


# --- features, attention, neighbours ---


def test_matched_colours_do_not_see_how_a_network_turns_its_features() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(6, 9, 16)) * np.linspace(1, 3, 16)
    turn = np.linalg.qr(random.normal(size=(16, 16)))[0]
    before, after = pictures.matched_colours([features @ turn + 5, features])
    np.testing.assert_allclose(before, after, atol=1e-6)
    np.testing.assert_allclose(after, pictures.pca_colours([features])[0], atol=1e-6)
    other, after = pictures.matched_colours([random.normal(size=(6, 9, 16)), features])
    assert np.abs(other - after).mean() > 0.1
    assert pictures.matched_colours([features[..., :2]])[0][..., 2].max() == 0  # two features, two colours


def plain_cls_attention(vit: VisionTransformer, image: torch.Tensor) -> torch.Tensor:
    """The usual ViT, written down once more: what its last softmax gives the class token, [heads, 1 + L]."""
    proj = vit.patch_embed.proj
    grid = F.conv2d(image[None], proj.weight, proj.bias, stride=vit.patch_px)[0]
    patches = grid.flatten(1).T + vit.positions(*grid.shape[1:])
    x = torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], patches])
    for block in vit.blocks:
        y = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
        heads = block.attn.num_heads
        query, key, value = (
            part.reshape(len(x), heads, -1).transpose(0, 1) for part in block.attn.qkv(y).chunk(3, dim=1)
        )
        weights = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
        x = x + block.attn.proj((weights @ value).transpose(0, 1).reshape(len(x), -1))
        y = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
    return weights[:, 0]


def test_attention_of_cls_is_the_last_blocks_softmax() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(ModelConfig(embed_dim=32, depth=3, num_heads=4, patch_px=8), 40).eval()
    for parameter in vit.parameters():  # as they are drawn, every key would weigh nearly the same
        parameter.requires_grad_(False).add_(0.2 * torch.randn_like(parameter))
    image = torch.randn(3, 24, 56)
    shares = pictures.cls_attention(vit, image)
    assert shares.shape == (4, 1 + 3 * 7) and float(shares.max()) > 0.1
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    torch.testing.assert_close(shares, plain_cls_attention(vit, image), rtol=1e-4, atol=1e-6)
    assert not vit.blocks[-1].attn._forward_pre_hooks


def test_heat_is_dark_where_there_is_nothing() -> None:
    colours = pictures.heat(np.array([[0.0, 0.5], [0.75, 1.0]]))
    brightness = colours.mean(-1)
    assert brightness[0, 0] < 0.02 and (np.diff(brightness.flatten()) > 0).all()
    assert np.isfinite(pictures.heat(np.zeros((2, 2)))).all()


def test_tiles_lie_within_the_scene_and_apart() -> None:
    scene = Scene("x", 500, 730, 3, "uint8")
    for count, side in ((1, 256), (4, 250), (22, 100), (160, 48)):
        windows = pictures._tile_windows(scene, count, 256, np.random.default_rng(0))
        seen = np.zeros((scene.height, scene.width), int)
        for top, left, height, width in windows:
            assert (height, width) == (side, side)
            seen[top : top + height, left : left + width] += 1
        assert seen.max() == 1 and seen.sum() == len(windows) * side**2
        assert len(windows) == min(count, (500 // side) * (730 // side))
    assert pictures._tile_windows(replace(scene, height=5), 9, 256, np.random.default_rng(0))[0][2:] == (5, 5)


def test_tiles_are_few_however_many_scenes(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    statistics, backbone = statistics_of(scenes, 3), untrained_backbone(config)
    for repeats in (1, 50, 200):
        tiles = pictures.seen_tiles(backbone, config, statistics, scenes * repeats)
        assert 1 < len(tiles) <= 160
        assert all(float(seen.token.norm()) == pytest.approx(1, abs=1e-5) for seen in tiles)
    again = pictures.seen_tiles(backbone, config, statistics, scenes * 200)
    assert [seen.tile for seen in again] == [seen.tile for seen in tiles]


def test_tiles_without_data_are_left_out(tmp_path: Path) -> None:
    config = setting(3)
    pixels = np.full((3, 48, 96), 7, np.uint8)
    pixels[:, :, :48] = 0
    placed = rasterio.Affine(1, 0, 10, 0, -1, 20)
    profile: dict[str, Any] = {"count": 3, "dtype": "uint8", "nodata": 0, "transform": placed}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=48, width=96, **profile) as file:
        file.write(pixels)
    scenes = scan(tmp_path).scenes
    tiles = pictures.seen_tiles(untrained_backbone(config), config, statistics_of(scenes, 3), scenes)
    assert [seen.tile.left for seen in tiles] == [48]


def test_neighbours_are_the_most_similar_that_do_not_touch() -> None:
    scene, other = (Scene(name, 100, 400, 3, "uint8") for name in "ab")
    angles = {(scene, 0): 0.0, (scene, 100): 0.1, (scene, 200): 0.45, (scene, 300): 0.22, (other, 100): 0.3}
    tiles = [
        SeenTile(
            Tile(of, 0, left, 100, 100, None),
            np.zeros((2, 2, 3)),
            torch.tensor([np.cos(angle), np.sin(angle)]),
        )
        for (of, left), angle in angles.items()
    ]
    assert pictures.nearest(tiles, queries=5, count=2) == [
        (0, [3, 4]), (1, [3, 4]), (2, [4, 0]), (3, [4, 1]), (4, [3, 2]),
    ]  # fmt: skip
    assert pictures.nearest(tiles[:2]) == [] and pictures.nearest([]) == []


# --- the same in TensorBoard ---


def test_callback_is_shown_the_pictures_of_the_page(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    statistics = statistics_of(scenes, 3)
    save_checkpoints(tmp_path, config, statistics, 5)
    shown: list[tuple[str, np.ndarray, int | None]] = []
    page = report.write_report(
        tmp_path, backbone=untrained_backbone(config), config=config, statistics=statistics, scenes=scenes,
        show=lambda *image: shown.append(image),
    ).read_text()  # fmt: skip
    in_page = [picture for name in OF_IMAGES for picture in pictures_in(section(page, name))]
    assert len(shown) == len(in_page) == len({(tag, step) for tag, _, step in shown})
    for (_, image, _), picture in zip(shown, in_page, strict=True):
        error = np.abs(image * 255 - picture)
        assert error.max() <= 1 or (len(image) < 300 and error.mean() < 5)  # PNG, or JPEG for a photograph
    steps = {step for tag, _, step in shown if tag == "training/1 features of 0.tif"}
    assert steps == {0, 5}


def test_small_pictures_are_enlarged_and_large_ones_are_not() -> None:
    small, large = np.random.default_rng(0).random((36, 20, 3)), np.zeros((400, 300, 3))
    shown = pictures.enlarged(small)
    assert shown.shape == (11 * 36, 11 * 20, 3) and (shown[::11, ::11] == small).all()
    assert pictures.enlarged(large).shape == large.shape
    row = [Picture("x", small, "a"), Picture("x", small, "b", 3)]
    text = report.Section("T", "t", "", [row]).html()
    assert 'alt="x"' in text and 'alt="x at step 3"' in text


def test_a_run_leaves_its_pictures_in_tensorboard(image_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(out=str(tmp_path / "run"), max_steps=2, checkpoint_every=1, log_every=1)
    train(replace(config, data=replace(config.data, data=str(image_folder))), ONE)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), {"images": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    assert {tag.split("/")[0] for tag in tags["images"]} == set(OF_IMAGES) and "loss" in tags["scalars"]
    assert [event.step for event in events.Images("training/1 features of 00.png")] == [0, 1, 2]
    (crop,) = events.Images("masks/1 the crop")
    page = (tmp_path / "run/report.html").read_text()
    decoded = np.asarray(Image.open(BytesIO(crop.encoded_image_string)).convert("RGB"), int)
    assert crop.step == 2 and np.abs(decoded - pictures_in(section(page, "masks"))[0]).max() <= 1


def test_images_that_cannot_be_written_are_treated_as_records_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_image", fail)
    sentence = "TensorBoard's images cannot be written to .*: No space left on device"
    for policy in ("stop", "go_on"):
        config = tiny_config(on_write_error=policy)
        records = Records(tmp_path / policy, config, ONE, 0, 1, is_new=True)
        records.close()
        if policy == "stop":
            with pytest.raises(TrainingStopped, match=sentence):
                records.images(1, [("a", np.zeros((2, 2, 3)), None)])
        else:
            records.images(1, [("a", np.zeros((2, 2, 3)), None)])
            assert re.search(sentence + "; the run goes on", caplog.text)
