"""Checkpoints: folders of safetensors and JSON, written whole or not at all. Nothing is ever unpickled.

    checkpoints/step_00001000/
        model.safetensors      student, teacher, heads, mask token, centre
        optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME, step.NAME
        state.json             step, images seen, config, statistics, versions, the sizes of the other files

Where the model is shared out over ranks, each writes its share of all these tensors to one file instead,
shard-….safetensors, through torch.distributed.checkpoint. Either kind is read on any number of ranks, sharing the
model out or not.

All randomness follows from (seed, step) and the place in the stream of images, so these are also the state of every
random generator.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import pera_fast
from pera_fast.config import Config, ConfigError, from_dict, to_dict
from pera_fast.data.statistics import Statistics
from pera_fast.distributed import World
from pera_fast.model.pera import PerA
from pera_fast.model.vit import VisionTransformer
from pera_fast.optim import TeacherOptimizer


class WriteError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were. Its text is one sentence for the user."""


def save_tensors(
    tensors: dict[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, readable by whom the umask allows, as any other. Raises OSError, SafetensorError."""
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode  # save_file puts one in its place that the owner alone may read
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path, metadata)
    path.chmod(mode)


_log = logging.getLogger("pera_fast")
_FORMAT = 2
_STATE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial_"  # folders that are being written or dropped; what a kill leaves of them goes with the next save


def save(
    folder: Path,
    step: int,
    model: PerA,
    optimizer: TeacherOptimizer,
    config: Config,
    statistics: Statistics,
    keep: int,
    world: World,
    keep_every: int = 0,
    images_seen: int = 0,
) -> Path:
    """Write the checkpoint of `step` completed steps into `folder`, then drop all but the newest `keep`.

    Those of steps that `keep_every` divides stay, too, if it is not 0. images_seen: the place in the stream of images
    that the next step begins at. Every rank calls it; the first writes what is not shared out. Raises WriteError,
    before which nothing is dropped; on every rank where the model is shared out.
    """
    target = folder / f"step_{step:08d}"
    weights = dict(model.state_dict())
    moments = {
        f"{key}.{name}": value
        for name, parameter, _ in model.ema_pairs()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    # apex counts the steps of a group, not of a parameter.
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:
            moments[f"step.group{i}"] = torch.as_tensor(group["step"])
    partial, reason = folder / f"{_PARTIAL}{step:08d}_{os.getpid()}", ""
    if world.is_first:
        for left_over in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            reason = error.strerror or str(error)
    # Said to all: the others would else wait for the first to write its share.
    partial, reason = world.share((partial, reason))
    try:
        if reason:
            raise WriteError(reason)
        if any(hasattr(value, "to_local") for value in weights.values()):
            _save_shares({**weights, **moments}, partial)
        elif world.is_first:
            for name, tensors in (("model", weights), ("optimizer", moments)):
                save_tensors(tensors, partial / f"{name}.safetensors")
        if world.is_first:
            _complete(partial, target, step, images_seen, config, statistics)
    except (OSError, SafetensorError, WriteError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WriteError(
            f"the checkpoint of step {step} cannot be written to {folder}: {' '.join(reason.split())}"
        ) from error
    if world.is_first:
        for old in complete(folder)[:-keep]:
            if not (keep_every and _step_of(old) % keep_every == 0):
                _drop(old)
    return target


def _drop(old: Path) -> None:
    try:
        shutil.rmtree(old.rename(old.with_name(f"{_PARTIAL}{old.name}")))
    except OSError as error:  # in use, on some network disks: no reason to end a run
        _log.warning("the checkpoint %s cannot be removed: %s", old, error.strerror or error)


def _save_shares(tensors: dict[str, Tensor], folder: Path) -> None:
    """Returns on no rank before every rank has written its share; if one cannot, WriteError on all."""
    # Imported where they are used: they take a second.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # on every rank, whichever it happened on
        rank, failure = next(iter(error.failures.items()))
        raise WriteError(f"rank {rank}: {failure[0]}") from error


def _complete(
    partial: Path, target: Path, step: int, images_seen: int, config: Config, statistics: Statistics
) -> None:
    """Add state.json to a folder of tensors, and give it its name once the disk holds all of it."""
    files = sorted(partial.iterdir())
    state = {
        "format": _FORMAT,
        "step": step,
        "images_seen": images_seen,
        "config": to_dict(config),
        "statistics": json.loads(statistics.to_json()),
        "versions": {"pera_fast": pera_fast.__version__, "torch": torch.__version__},
        "files": {file.name: file.stat().st_size for file in files},
    }
    (partial / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for file in [*files, partial / _STATE]:
        _sync(file)
    if target.exists():  # the same step again, e.g. after a resume at the very end
        shutil.rmtree(target)
    partial.rename(target)
    _sync(target.parent)


def complete(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    return [path for path in named(folder) if _is_whole(path)]


def named(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first, whole or not. A copy under another name is none of them."""
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / _STATE).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest(path: str | Path) -> Path:
    """The newest checkpoint of a run folder, or `path` itself when it is one. ConfigError if there is none."""
    path = Path(path)
    if _is_whole(path):
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
    images_seen: int
    config: Config
    statistics: Statistics

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read state.json of the newest checkpoint under `path`; ConfigError when it cannot be used."""
        path = newest(path)
        try:
            state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
            if state["format"] != _FORMAT:
                raise ValueError(f"expected format {_FORMAT}, got {state['format']}")
            statistics = Statistics.from_json(json.dumps(state["statistics"]))
            seen = int(state["images_seen"])
            return cls(path, int(state["step"]), seen, from_dict(state["config"]), statistics)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"checkpoint: {path} cannot be read: {error}") from None

    def shapes(self) -> dict[str, torch.Size]:
        """Every tensor's name and shape; ConfigError when they cannot be read."""
        try:
            found = self._reader().read_metadata().state_dict_metadata
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"checkpoint: {self.path} cannot be read: {error}") from None
        return {name: tensor.size for name, tensor in found.items()}

    def load(self, into: dict[str, Tensor]) -> None:
        """Fill tensors, each rank its share; ConfigError naming those that are not there in their shape."""
        import torch.distributed.checkpoint as dcp

        shapes = self.shapes()
        if wrong := [name for name, x in into.items() if shapes.get(name) != x.shape]:
            raise ConfigError(
                f"checkpoint: {self.path} does not fit this config: {_misfits(wrong, into, shapes)}"
            )
        with warnings.catch_warnings():
            # Every rank reads for itself, which torch warns of: to agree first would need all of them, even for
            # the teacher alone.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(dict(into), storage_reader=self._reader(), no_dist=True)

    def restore(self, model: PerA, optimizer: TeacherOptimizer) -> None:
        """Load everything a run goes on from. ConfigError when model and checkpoint do not fit."""
        shapes = self.shapes()
        weights = dict(model.state_dict())
        is_moment = tuple(f"{key}." for key in ("exp_avg", "exp_avg_sq", "step"))
        unknown = [name for name in shapes if name not in weights and not name.startswith(is_moment)]
        if unknown:
            raise ConfigError(
                f"checkpoint: {self.path} does not fit this config: it has {_few(unknown)}, which this model has not"
            )
        groups = optimizer.state_dict()["param_groups"]
        counts = {
            i: torch.zeros(shapes[name], dtype=torch.int64)
            for i in range(len(groups))
            if (name := f"step.group{i}") in shapes
        }
        keys = ("exp_avg", "exp_avg_sq") if counts else ("exp_avg", "exp_avg_sq", "step")
        names = {parameter: name for name, parameter, _ in model.ema_pairs()}
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            i: {key: torch.zeros(()) if key == "step" else torch.zeros_like(p.detach()) for key in keys}
            for i, p in enumerate(ordered)
            if any(f"{key}.{names[p]}" in shapes for key in keys)  # else it never had a gradient
        }
        moments = {
            f"{key}.{names[ordered[i]]}": x for i, values in state.items() for key, x in values.items()
        }
        self.load({**weights, **moments, **{f"step.group{i}": count for i, count in counts.items()}})
        for i, count in counts.items():
            groups[i]["step"] = int(count)
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def teacher(self) -> VisionTransformer:
        """The teacher's backbone in evaluation mode, on the CPU."""
        backbone = VisionTransformer(self.config.model, self.config.crops.global_px)
        self.load({f"teacher.backbone.{name}": value for name, value in backbone.state_dict().items()})
        return backbone.eval().requires_grad_(False)

    def _reader(self) -> Any:
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        return HuggingFaceStorageReader(str(self.path))


def _misfits(names: list[str], wanted: dict[str, Tensor], shapes: dict[str, torch.Size]) -> str:
    first = names[0]
    expected, got = list(wanted[first].shape), list(shapes[first]) if first in shapes else "nothing"
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"expected {first} of shape {expected}, got {got}{others}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sync(path: Path) -> None:
    """Make the disk hold what was written, so that a rename never precedes its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
