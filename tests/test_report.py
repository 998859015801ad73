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

from pera_fast import _cli, checkpoint, report
from pera_fast.config import Config
from pera_fast.data.loader import WindowDataset, collate
from pera_fast.data.sources import Scene, SceneIndex, scan
from pera_fast.data.statistics import Statistics, compute_statistics
from pera_fast.engine import Engine
from pera_fast.evaluate import untrained_backbone

SECTIONS = ("summary", "losses", "schedules", "health", "masks", "views", "features")


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


def pictures(text: str) -> list[np.ndarray]:
    """Every embedded image, decoded."""
    found = []
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text):
        image = Image.open(BytesIO(base64.b64decode(data, validate=True)))
        assert image.format == "PNG"
        found.append(np.asarray(image.convert("RGB")))
    assert len(found) == text.count("<img")
    return found


@pytest.mark.parametrize(("bands", "dtype"), [(1, "uint8"), (3, "uint8"), (6, "uint16"), (2, "float32")])
def test_every_section_has_its_pictures(tmp_path: Path, bands: int, dtype: str) -> None:
    scenes = images(tmp_path / "images", bands, dtype)
    lines = [json.dumps(line(step)) for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write(tmp_path, scenes, setting(bands))
    counts = [len(pictures(section(page, name))) for name in SECTIONS]
    assert counts == [0, 5, 4, 4, 2, 4, 9]
    for picture in pictures(page):
        assert picture.std() > 1  # something is drawn
    grey = "in grey" in page
    assert grey == (bands < 3) and ("first 3 of 6 bands" in page) == (bands == 6)


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
    assert len(pictures(section(page, "losses"))) == 1
    assert "records nothing to draw here" in section(page, "schedules")


def test_images_that_are_gone_become_a_sentence(tmp_path: Path) -> None:
    scenes, config = images(tmp_path / "images", 3, "uint8"), setting(3)
    statistics = statistics_of(scenes, 3)
    for scene in scenes:
        Path(scene.path).unlink()
    page = report.write_report(
        tmp_path, backbone=untrained_backbone(config), config=config, statistics=statistics, scenes=scenes
    ).read_text()
    for name in ("masks", "views", "features"):
        assert "No image could be read" in section(page, name) and "<img" not in section(page, name)


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
    pair = report.first_crop(config, statistics, scenes)
    dataset = WindowDataset(SceneIndex(scenes, []), statistics, config)
    batch = collate([dataset[i] for i in range(config.run.batch_size)])
    trained = Engine(config, statistics, ONE).patches(0, 0, batch)
    masks = trained.groups[0]
    _, crop, index = report._choose_crop(config, statistics, scenes)
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
    pair = report.first_crop(config, statistics_of(scenes, 3), scenes)
    patch_px = config.model.patch_px
    student = report._only(pair.display(pair.views[0]), pair.patches[0], patch_px)
    teacher = report._only(pair.display(pair.views[1]), pair.patches[2], patch_px)
    blank = [(image == report._HIDDEN).all(-1) for image in (student, teacher)]
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
    engine = Engine(config, statistics, ONE)
    run = tmp_path / "run"
    checkpoint.save(
        run / "checkpoints", 1, engine.model, engine.optimizer, config, statistics, keep=1, world=ONE
    )
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    _cli.run(report.main)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n" and (run / "report.html").is_file()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        _cli.run(report.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: checkpoint: expected")
