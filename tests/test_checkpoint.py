"""Checkpoints: whole or not at all, read on any number of ranks, refused with a reason."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE, several_ranks, tiny_config
from safetensors.torch import load_file, save_file
from test_engine import assert_near, run, state

from pera_fast import checkpoint
from pera_fast.config import Config, ConfigError
from pera_fast.distributed import World, world
from pera_fast.engine import Engine
from pera_fast.model.shard import whole


def saved(folder: Path, images: Path, step: int = 1, **options: Any) -> Engine:
    engine, _ = run(images, tiny_config(**options), step)
    checkpoint.save(
        folder, step, engine.model, engine.optimizer, engine.config, engine.statistics, keep=2, world=ONE
    )
    return engine


def test_files(image_folder: Path, tmp_path: Path) -> None:
    engine = saved(tmp_path, image_folder)
    folder = checkpoint.newest(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [
        "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in engine.model.state_dict().items())
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "others may read them as the umask says"
    teacher = checkpoint.Checkpoint.open(tmp_path).teacher().state_dict()
    assert all(torch.equal(teacher[k], v) for k, v in engine.teacher().state_dict().items())


def test_the_newest_are_kept(image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".partial_00000001_1").mkdir(parents=True)
    for step in (1, 2, 3):
        saved(folder, image_folder, step)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000002", "step_00000003"]


def test_only_what_a_run_has_named_is_dropped(image_folder: Path, tmp_path: Path) -> None:
    saved(tmp_path, image_folder, 1)
    for name in ("step_00000001.bak", "step_100000000"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    saved(tmp_path, image_folder, 2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000002", "step_100000000"]
    assert (tmp_path / "step_00000001.bak/state.json").exists()


def test_a_checkpoint_that_cannot_be_dropped_ends_no_run(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some network disks refuse while another process reads it; what is left of it goes with a later one."""
    plain = shutil.rmtree

    def busy(path: Path, *arguments: Any, **options: Any) -> None:
        if "step_00000001" in path.name and not options:
            raise OSError(errno.EBUSY, "Device or resource busy")
        plain(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        saved(folder, image_folder, step)
    assert "cannot be removed: Device or resource busy" in caplog.text
    assert [p.name for p in checkpoint.complete(folder)] == ["step_00000002", "step_00000003"]
    saved(folder, image_folder, 4)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no state", "half a state", "not a state"])
def test_what_is_not_whole_is_not_a_checkpoint(image_folder: Path, tmp_path: Path, damage: str) -> None:
    """The one before is taken instead."""
    saved(tmp_path, image_folder, 1)
    saved(tmp_path, image_folder, 2)
    last = tmp_path / "step_00000002"
    file = last / ("optimizer.safetensors" if damage in ("cut", "gone") else "state.json")
    if damage in ("gone", "no state"):
        file.unlink()
    elif damage == "not a state":
        file.write_text("[1]")
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    with pytest.raises(ConfigError, match="expected a checkpoint or a run with one"):
        checkpoint.newest(last)


def _edit(folder: Path, name: str, change: Any) -> None:
    """Change the tensors of a file so that the folder stays whole."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    facts = json.loads((folder / "state.json").read_text())
    facts["files"][name] = (folder / name).stat().st_size
    (folder / "state.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("model", lambda t: t.pop("mask_token"), r"expected mask_token of shape \[1, 1, 32\], got nothing"),
        (
            "model",
            lambda t: t.update({"mask_token": torch.zeros(1, 1, 8), "centre": torch.zeros(2)}),
            r"expected mask_token of shape \[1, 1, 32\], got \[1, 1, 8\] and 1 more",
        ),
        ("model", lambda t: t.update({"other": torch.zeros(3)}), "it has other, which this model has not"),
        (
            "optimizer",
            lambda t: t.pop("exp_avg_sq.mask_token"),
            "expected exp_avg_sq.mask_token of shape .*, got nothing",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    image_folder: Path, tmp_path: Path, name: str, change: Any, sentence: str
) -> None:
    engine = saved(tmp_path, image_folder)
    _edit(checkpoint.newest(tmp_path), f"{name}.safetensors", change)
    before = {k: v.clone() for k, v in state(engine).items()}
    with pytest.raises(ConfigError, match=sentence):
        checkpoint.Checkpoint.open(tmp_path).restore(engine.model, engine.optimizer)
    assert_near(state(engine), before, 0)


def test_what_cannot_be_read_is_refused(image_folder: Path, tmp_path: Path) -> None:
    saved(tmp_path, image_folder)
    file = checkpoint.newest(tmp_path) / "model.safetensors"
    file.write_bytes(b"\xff" * 20 + file.read_bytes()[20:])
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.Checkpoint.open(tmp_path).teacher()


def test_another_format_is_refused(image_folder: Path, tmp_path: Path) -> None:
    saved(tmp_path, image_folder)
    file = checkpoint.newest(tmp_path) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ConfigError, match="expected format 2, got 99"):
        checkpoint.Checkpoint.open(tmp_path)


# --- on several ranks ---

TOTAL = 5


def _config(ranks: int, shard: str) -> Config:
    """Eight images a step, on however many ranks."""
    config = tiny_config(batch_size=8 // ranks, shard=shard)
    return replace(config, optim=replace(config.optim, decay_all=False))


def _steps(images: Path, folder: Path, stop: int, shard: str, on: World) -> dict[str, torch.Tensor]:
    """From the checkpoint there is, if there is one, to `stop`, and a checkpoint there; every tensor, whole."""
    config, start, engine = _config(on.ranks, shard), 0, None
    if checkpoint.complete(folder):
        found = checkpoint.Checkpoint.open(folder)
        engine, start = Engine(config, found.statistics, on), found.step
        found.restore(engine.model, engine.optimizer)
    engine, _ = run(images, config, stop, start, engine, on)
    checkpoint.save(folder, stop, engine.model, engine.optimizer, config, engine.statistics, keep=2, world=on)
    return {name: whole(value) for name, value in state(engine).items()}


def _rank(images: str, folder: str, stop: str, shard: str) -> None:
    with world("cpu") as on:
        _steps(Path(images), Path(folder), int(stop), shard, on)


def test_saved_on_two_ranks_resumed_on_one_and_on_four(image_folder: Path, tmp_path: Path) -> None:
    straight = _steps(image_folder, tmp_path / "straight", TOTAL, "none", ONE)
    several_ranks(__file__, 2, image_folder, tmp_path / "two", 2, "all")
    files = sorted(p.name for p in (tmp_path / "two/step_00000002").iterdir())
    assert files[-1] == "state.json" and [f.split("-")[0] for f in files[:-1]] == ["shard", "shard"]
    sizes = [(tmp_path / "two/step_00000002" / f).stat().st_size for f in files[:-1]]
    assert max(sizes) < 1.2 * min(sizes), "each rank writes its share"

    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert_near(_steps(image_folder, tmp_path / "one", TOTAL, "none", ONE), straight, 1e-5)
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    several_ranks(__file__, 4, image_folder, tmp_path / "four", TOTAL, "all")
    # And back to one rank: the weights that four ranks saved, without a step.
    again = Engine(_config(1, "none"), checkpoint.Checkpoint.open(tmp_path / "four").statistics, ONE)
    checkpoint.Checkpoint.open(tmp_path / "four").restore(again.model, again.optimizer)
    assert_near(state(again), straight, 1e-5)
    teacher = checkpoint.Checkpoint.open(tmp_path / "four").teacher().state_dict()
    assert all(torch.equal(teacher[k], v) for k, v in again.teacher().state_dict().items())

    (tmp_path / "four/step_00000005" / files[0].replace("1", "2", 1)).unlink()
    assert checkpoint.newest(tmp_path / "four").name == "step_00000002", "a share is missing"


def test_a_folder_that_cannot_be_made_is_said_on_every_rank(image_folder: Path, tmp_path: Path) -> None:
    """Else those that have a share to write would wait for the first."""
    (tmp_path / "file").touch()
    several_ranks(__file__, 2, image_folder, tmp_path / "file" / "checkpoints", "refused", "all")


if __name__ == "__main__":
    if sys.argv[3] == "refused":
        with pytest.raises(checkpoint.WriteError, match="cannot be written to .*: Not a directory"):
            _rank(*sys.argv[1:3], "1", sys.argv[4])
    else:
        _rank(*sys.argv[1:])
