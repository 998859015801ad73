"""Checkpoints: folders of safetensors and JSON, written whole or not at all. Nothing is ever unpickled.

    checkpoints/step_00001000/
        model.safetensors      student, teacher, heads, mask token, centre
        optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME, step.NAME
        state.json             step, config, statistics, versions

All randomness follows from (seed, step), so the step is also the state of every random generator and the
position in the stream of images.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import pera_fast
from pera_fast.config import Config, ConfigError, from_dict, to_dict
from pera_fast.data.statistics import Statistics
from pera_fast.model.pera import PerA
from pera_fast.model.vit import VisionTransformer
from pera_fast.optim import TeacherOptimizer

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_PREFIX = "step_"


def save(
    folder: Path,
    step: int,
    model: PerA,
    optimizer: TeacherOptimizer,
    config: Config,
    statistics: Statistics,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` completed steps into `folder`, then drop all but the newest `keep`."""
    target = folder / f"{_PREFIX}{step:08d}"
    partial = folder / f".partial_{step:08d}_{os.getpid()}"
    for left_over in folder.glob(".partial_*"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)
    moments = {
        f"{key}.{name}": value
        for name, parameter, _ in model.ema_pairs()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    # apex counts the steps of a group, not of a parameter.
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:
            moments[f"step.group{i}"] = torch.as_tensor(group["step"])
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / _FILES[0])
    save_file({k: v.contiguous() for k, v in moments.items()}, partial / _FILES[1])
    state = {
        "format": 1,
        "step": step,
        "config": to_dict(config),
        "statistics": json.loads(statistics.to_json()),
        "versions": {"pera_fast": pera_fast.__version__, "torch": torch.__version__},
    }
    (partial / _FILES[2]).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for name in _FILES:
        _sync(partial / name)
    if target.exists():  # the same step again, e.g. after a resume at the very end
        shutil.rmtree(target)
    partial.rename(target)
    _sync(folder)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def complete(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if all((p / name).is_file() for name in _FILES)]
    return sorted(found)


def newest(path: str | Path) -> Path:
    """The newest checkpoint of a run folder, or `path` itself when it is one. ConfigError if there is none."""
    path = Path(path)
    if all((path / name).is_file() for name in _FILES):
        return path
    for folder in (path / "checkpoints", path):
        if found := complete(folder):
            return found[-1]
    raise ConfigError(f"checkpoint: expected a checkpoint or a run with one, got {path}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened for reading."""

    path: Path
    step: int
    config: Config
    statistics: Statistics

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read state.json of the newest checkpoint under `path`; ConfigError when it cannot be used."""
        path = newest(path)
        try:
            state: dict[str, Any] = json.loads((path / _FILES[2]).read_text(encoding="utf-8"))
            statistics = Statistics.from_json(json.dumps(state["statistics"]))
            return cls(path, int(state["step"]), from_dict(state["config"]), statistics)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"checkpoint: {path} cannot be read: {error}") from None

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        try:
            return load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"checkpoint: {self.path / name} cannot be read: {error}") from None

    def restore(self, model: PerA, optimizer: TeacherOptimizer) -> None:
        """Load everything a run goes on from. ConfigError when model and checkpoint do not fit."""
        try:
            model.load_state_dict(self.tensors(_FILES[0]), strict=True)
        except RuntimeError as error:
            raise ConfigError(
                f"checkpoint: {self.path} does not fit this config: {_one_line(error)}"
            ) from None
        moments = self.tensors(_FILES[1])
        names = {parameter: name for name, parameter, _ in model.ema_pairs()}
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        wanted = ("exp_avg", "exp_avg_sq") if "step.group0" in moments else ("exp_avg", "exp_avg_sq", "step")
        for i, parameter in enumerate(ordered):
            name = names[parameter]
            found = {key: moments[f"{key}.{name}"] for key in wanted if f"{key}.{name}" in moments}
            if not found:
                continue  # it never had a gradient
            for key in wanted:
                shape = torch.Size() if key == "step" else parameter.shape
                if key not in found or found[key].shape != shape:
                    raise ConfigError(f"checkpoint: {self.path / _FILES[1]} has no fitting {key} of {name}")
            state[i] = found
        groups = optimizer.state_dict()["param_groups"]
        for i, group in enumerate(groups):
            if f"step.group{i}" in moments:
                group["step"] = int(moments[f"step.group{i}"])
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def teacher(self) -> VisionTransformer:
        """The teacher's backbone in evaluation mode, on the CPU."""
        prefix = "teacher.backbone."
        weights = {
            k.removeprefix(prefix): v for k, v in self.tensors(_FILES[0]).items() if k.startswith(prefix)
        }
        backbone = VisionTransformer(self.config.model, self.config.crops.global_px)
        try:
            backbone.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise ConfigError(f"checkpoint: {self.path} has no whole teacher: {_one_line(error)}") from None
        return backbone.eval().requires_grad_(False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _sync(path: Path) -> None:
    """Make the disk hold what was written, so that a rename never precedes its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
