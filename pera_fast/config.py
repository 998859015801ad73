"""What a run is made of: frozen dataclasses, presets, validation, YAML in and out. No torch here.

The defaults are the paper's (arXiv 2505.19447) ViT-B run. Every field is an option of
`python -m pera_fast.train`, under its own name: `embed_dim` is `--embed-dim`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot work; its text is one sentence for the user."""

    exit_code = 2


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got}")


def _all_finite(config: object) -> None:
    """Every number of a config, alone or in a tuple."""
    for name, value in vars(config).items():
        numbers = value if isinstance(value, tuple) else (value,)
        _require(
            all(math.isfinite(n) for n in numbers if isinstance(n, float)), name, "finite numbers", value
        )


def _positive_int(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(isinstance(value, int) and value >= 1, name, "a whole number of at least 1", value)


def _at_least_zero(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value >= 0, name, "a finite number of at least 0", value)


def _between(config: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(low <= value <= high, name, f"a number from {low:g} to {high:g}", value)


@dataclass(frozen=True)
class ModelConfig:
    """The vision transformer and its two heads."""

    embed_dim: int = 768
    """Width of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 12
    """Attention heads per block; must divide embed_dim."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP as a multiple of embed_dim."""
    patch_px: int = 16
    """Side of a square patch in pixels."""
    in_bands: int = 3
    """Bands of the input images."""
    drop_path: float = 0.3
    """Share of sequences each student branch leaves out (0 turns drop path off)."""
    activation: Literal["none", "norms", "blocks"] = "norms"
    """What the backward pass does without, for larger batches: nothing but the output of GELU, which is quickly made
    again; that of LayerNorm, too, as gradients follow from the normalised rows just as well; or everything but the
    normalised input of each attention and MLP, from which the rest is made again."""
    head_hidden_dim: int = 2048
    """Hidden width of the CLS and pixel heads."""
    head_bottleneck_dim: int = 384
    """Width of the heads' normalised output, the input of the prototypes."""
    head_layers: int = 3
    """Linear layers of each head before its last, weight-normalised one."""
    num_prototypes: int = 131072
    """Prototypes of the distillation loss."""

    def __post_init__(self) -> None:
        _all_finite(self)
        _positive_int(
            self, "embed_dim", "depth", "num_heads", "patch_px", "in_bands", "head_hidden_dim",
            "head_bottleneck_dim", "head_layers", "num_prototypes",
        )  # fmt: skip
        _require(
            self.embed_dim % self.num_heads == 0,
            "num_heads",
            f"a divisor of embed_dim = {self.embed_dim}",
            self.num_heads,
        )
        _require(self.mlp_ratio > 0, "mlp_ratio", "a number above 0", self.mlp_ratio)
        _require(0 <= self.drop_path < 1, "drop_path", "a number from 0 to below 1", self.drop_path)


@dataclass(frozen=True)
class CropConfig:
    """Crop pairs, their colours, and how their patches are shared out."""

    global_px: int = 448
    """Side of a global crop in pixels; a multiple of patch_px."""
    local_px: int = 96
    """Side of a local crop in pixels; a multiple of patch_px."""
    num_global: int = 2
    """Global crop pairs per image."""
    num_local: int = 8
    """Local crop pairs per image (0 for none)."""
    global_area: tuple[float, float] = (0.4, 1.0)
    """Area of a global crop as a share of the image, smallest and largest."""
    local_area: tuple[float, float] = (0.05, 0.4)
    """Area of a local crop as a share of the image, smallest and largest."""
    aspect: tuple[float, float] = (0.75, 1.33)
    """Width over height of a crop before resizing, smallest and largest."""
    flip_probability: float = 0.5
    """Chance of each of a horizontal and a vertical flip, shared by the pair."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    student_colour_probability: float = 0.8
    """Chance that the student view's colours change."""
    teacher_colour_probability: float = 0.1
    """Chance that the teacher view's colours change."""
    grey_probability: float = 0.1
    """Share of the student view's changes that are to grey."""
    exact_augmentation: bool = False
    """Round to 8 bits after every operation, as the authors' Pillow pipeline does; the default is faster,
    keeps what images of more than 8 bits hold, and agrees with it in the mean."""
    student_ratio: float = 0.2
    """Share of a crop's patches that the student sees."""
    teacher_ratio: float = 0.6
    """Share of a crop's patches that the teacher sees; the rest are the student's pixel targets."""

    def __post_init__(self) -> None:
        _all_finite(self)
        _positive_int(self, "global_px", "local_px", "num_global")
        _require(self.num_local >= 0, "num_local", "a whole number of at least 0", self.num_local)
        for name in ("global_area", "local_area"):
            low, high = getattr(self, name)
            _require(0 < low <= high <= 1, name, "two shares, 0 < smallest <= largest <= 1", (low, high))
        low, high = self.aspect
        _require(0 < low <= high, "aspect", "two numbers, 0 < smallest <= largest", (low, high))
        _at_least_zero(self, "brightness", "contrast", "saturation")
        _between(self, 0, 0.5, "hue")
        _between(
            self, 0, 1, "flip_probability", "student_colour_probability", "teacher_colour_probability",
            "grey_probability",
        )  # fmt: skip
        for name in ("student_ratio", "teacher_ratio"):
            _require(0 < getattr(self, name) < 1, name, "a share between 0 and 1", getattr(self, name))
        total = self.student_ratio + self.teacher_ratio
        _require(total <= 1 + 1e-9, "student_ratio + teacher_ratio", "at most 1", f"{total:g}")

    def mask_counts(self, num_patches: int) -> tuple[int, int, int]:
        """Patches of the (student, target, teacher) in a crop of `num_patches`.

        Python's `round`, as the authors: student round(.2L), target round(.4L) - student, teacher the rest.
        448 px in patches of 16: 784 -> (157, 157, 470). 96 px: 36 -> (7, 7, 22).
        """
        student = round(num_patches * self.student_ratio)
        visible_or_target = round(num_patches * (1 - self.teacher_ratio))
        return student, visible_or_target - student, num_patches - visible_or_target


def usable_cores() -> int:
    """Of the processor, those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class DataConfig:
    """Which images, which of their bands, and how they become numbers."""

    data: str | None = None
    """Folder of JPEG, PNG, TIFF or GeoTIFF images, searched at any depth (default: the demo scenes)."""
    index: str | None = None
    """Folder that keeps what the files' headers say: made at the first start, read at later ones in their
    place. Delete it when files come or go (default: every start reads the headers)."""
    bands: tuple[int, ...] | None = None
    """Bands to read, counted from 1 (default: the first in_bands)."""
    stats: str | None = None
    """Statistics file of `python -m pera_fast.stats` (default: computed from a sample at the start)."""
    mean: tuple[float, ...] | None = None
    """Mean per band of the values scaled to 0..1; overrides the statistics."""
    std: tuple[float, ...] | None = None
    """Standard deviation per band of the values scaled to 0..1; overrides the statistics."""
    nodata: float | None = None
    """Value of missing pixels, in place of the one that a file declares; its mask and alpha count besides."""
    max_nodata_share: float = 0.05
    """Windows with a larger share of missing pixels are drawn again."""
    window_px: int = 512
    """Larger images are sampled in square windows of this side."""
    max_bad_share: float = 0.1
    """The run stops when a larger share of the images cannot be read."""
    workers: int | Literal["auto"] = "auto"
    """Processes per rank that read images: a number (0: read in the training process), or auto: a share of the
    processor's cores, at most 16."""

    def __post_init__(self) -> None:
        _all_finite(self)
        _positive_int(self, "window_px")
        if self.workers != "auto":
            _require(
                isinstance(self.workers, int) and self.workers >= 0,
                "workers",
                "a whole number of at least 0, or auto",
                self.workers,
            )
        _between(self, 0, 1, "max_nodata_share", "max_bad_share")
        if self.bands is not None:
            _require(
                len(self.bands) > 0 and min(self.bands) >= 1, "bands", "numbers counted from 1", self.bands
            )
        if self.std is not None:
            _require(min(self.std, default=0) > 0, "std", "numbers above 0", self.std)

    @property
    def num_workers(self) -> int:
        """workers as a number; auto: this rank's share of the cores that this process may use, from 1 to 16."""
        if self.workers != "auto":
            return self.workers
        return min(16, max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@dataclass(frozen=True)
class OptimConfig:
    """Loss weights, optimiser and schedules."""

    koleo_weight: float = 0.1
    pixel_weight: float = 0.01
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.03, 0.05)
    """At the start, and after teacher_temperature_warmup_epochs."""
    teacher_temperature_warmup_epochs: float = 30
    centring: Literal["ema", "sinkhorn"] = "ema"
    """How the teacher's logits are kept from collapsing: a moving average of their mean is subtracted, as the
    authors do, or Sinkhorn-Knopp makes every prototype equally used in each forward pass over all ranks, as
    DINOv2 does."""
    sinkhorn_iterations: int = 3
    centre_momentum: float = 0.9
    optimizer: Literal["adamw_ema", "torch_adamw", "apex_adam", "apex_lamb"] = "adamw_ema"
    """Clip, AdamW and the teacher's moving average in one pass, or PyTorch's fused AdamW, or FusedAdam or
    FusedLAMB of NVIDIA apex, with the other passes beside it."""
    lr: float = 1e-3
    """Largest learning rate."""
    lr_final: float = 1e-6
    warmup_epochs: float = 20
    """Epochs in which the learning rate rises from 0 to lr."""
    weight_decay: tuple[float, float] = (0.04, 0.2)
    """At the start and at the end."""
    decay_all: bool = True
    """Decay every parameter, as the authors do; off: not biases, norms, tokens, positions and weight_g."""
    momentum: tuple[float, float] = (0.992, 1.0)
    """Of the teacher's moving average, at the start and at the end."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 2e-5
    clip_norm: float = 3.0
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        _all_finite(self)
        _at_least_zero(
            self, "koleo_weight", "pixel_weight", "teacher_temperature_warmup_epochs", "warmup_epochs", "lr",
            "lr_final", "eps",
        )  # fmt: skip
        _positive_int(self, "sinkhorn_iterations")
        _require(self.student_temperature > 0, "student_temperature", "above 0", self.student_temperature)
        _require(
            min(self.teacher_temperature) > 0, "teacher_temperature", "above 0", self.teacher_temperature
        )
        _require(self.clip_norm > 0, "clip_norm", "a number above 0", self.clip_norm)
        _between(self, 0, 1, "centre_momentum")
        _require(0 <= min(self.momentum) <= max(self.momentum) <= 1, "momentum", "0 to 1", self.momentum)
        _require(min(self.weight_decay) >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(0 <= min(self.betas) and max(self.betas) < 1, "betas", "0 to below 1", self.betas)


@dataclass(frozen=True)
class RunConfig:
    """Length, batch, hardware and output of the run."""

    out: str = "runs/train"
    """Folder for checkpoints, metrics and the report."""
    resume: bool = False
    """Go on from the newest complete checkpoint in `out`."""
    epochs: float = 200
    max_steps: int | None = None
    """Stop after this many optimiser steps; the schedules still follow `epochs`."""
    batch_size: int | Literal["auto"] = "auto"
    """Images per rank and forward pass; auto: as many as fit, found by a few probe steps on a GPU and by
    prediction, up to 64, on a CPU."""
    accumulate: int = 1
    """Forward passes per optimiser step; the result equals one batch of that many times the size."""
    global_batch: int | None = None
    """Images per optimiser step over all ranks; accumulate follows from it and batch_size."""
    precision: Literal["bf16", "fp32"] = "bf16"
    reduce_in: Literal["fp32", "bf16"] = "fp32"
    """What ranks sum their gradients in, bucket by bucket while the backward pass goes on; bf16 sends half."""
    shard: Literal["none", "node", "all"] = "none"
    """Share out weights, teacher, gradients and moments (FSDP2), for models that do not fit: over all ranks, or over
    the ranks of each node, which then hold a copy together. none: every rank holds all (DDP)."""
    cuda_graph: bool = True
    """Record the step on a GPU after a few and replay it, with adamw_ema and without shard; where that fails, steps go
    on as they are."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    max_skipped: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl and TensorBoard points."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept besides (0: none)."""
    on_write_error: Literal["stop", "go_on"] = "stop"
    """When a checkpoint or record cannot be written, e.g. on a full disk: end the run, or say so and try again the
    next time. Earlier checkpoints stay as they are."""
    profile: int = 0
    """Steps to profile, once they are all alike, on a GPU recorded: profile/trace.json for Chrome's tracing or
    Perfetto, and profile/ops.txt, the time of each operation (0: none)."""
    report: bool = True
    """Write report.html at the end; `pera_fast.report` does it later, too."""
    eval_train: str | None = None
    """Folder of class folders whose images are the k-NN neighbours."""
    eval_val: str | None = None
    """Folder of class folders whose images are classified."""
    eval_every: int = 0
    """Steps between k-NN evaluations (0: only at the end, where the folders are given)."""

    def __post_init__(self) -> None:
        _all_finite(self)
        if self.batch_size != "auto":
            _positive_int(self, "batch_size")
        if self.global_batch is not None:
            _positive_int(self, "global_batch")
            _require(self.accumulate == 1, "accumulate", "1 with global_batch", self.accumulate)
        _positive_int(
            self, "accumulate", "max_skipped", "log_every", "checkpoint_every",
            "keep_checkpoints",
        )  # fmt: skip
        _require(self.epochs > 0, "epochs", "a number above 0", self.epochs)
        _require(0 <= self.seed < 2**63, "seed", "a whole number from 0 to below 2**63", self.seed)
        _require(self.profile >= 0, "profile", "a whole number of at least 0", self.profile)
        _require(self.keep_every >= 0, "keep_every", "a whole number of at least 0", self.keep_every)
        _require(self.eval_every >= 0, "eval_every", "a whole number of at least 0", self.eval_every)
        if self.max_steps is not None:
            _positive_int(self, "max_steps")
        _require(
            (self.eval_train is None) == (self.eval_val is None),
            "eval_train and eval_val",
            "both or neither",
            f"{self.eval_train} and {self.eval_val}",
        )
        _require(
            not self.eval_every or self.eval_train is not None,
            "eval_every",
            "eval_train and eval_val with it",
            "neither",
        )

    @property
    def images(self) -> int:
        """batch_size as a number; RuntimeError while it is auto."""
        if self.batch_size == "auto":
            raise RuntimeError("batch_size is still auto")
        return self.batch_size


@dataclass(frozen=True)
class Config:
    """Everything `python -m pera_fast.train` needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def is_recorded(self) -> bool:
        """Whether a step on a GPU is recorded."""
        return self.run.cuda_graph and self.run.shard == "none" and self.optim.optimizer == "adamw_ema"

    def __post_init__(self) -> None:
        patch_px, crops = self.model.patch_px, self.crops
        kinds = [("global_px", True)] + ([("local_px", False)] if crops.num_local else [])
        for name, has_target in kinds:
            size = getattr(crops, name)
            _require(size % patch_px == 0, name, f"a multiple of patch_px = {patch_px}", size)
            counts = crops.mask_counts((size // patch_px) ** 2)
            needed = counts if has_target else (counts[0], counts[2])
            _require(
                min(needed) >= 1 and min(counts) >= 0,
                "student_ratio, teacher_ratio",
                f"at least one patch in each set of a {size} px crop",
                f"{counts[0]} student, {counts[1]} target, {counts[2]} teacher",
            )
        for name in ("bands", "mean", "std"):
            value = getattr(self.data, name)
            if value is not None:
                _require(
                    len(value) == self.model.in_bands,
                    name,
                    f"in_bands = {self.model.in_bands} values",
                    f"{len(value)}",
                )


PRESETS: dict[str, Config] = {
    # Small enough for two CPU cores. A short run needs a teacher that follows sooner, and small batches a
    # lower rate: chosen by k-NN on the demo scenes and on RSSCN7 (README).
    "demo": Config(
        model=ModelConfig(
            embed_dim=192,
            depth=6,
            num_heads=3,
            patch_px=8,
            drop_path=0.0,
            head_hidden_dim=512,
            head_bottleneck_dim=128,
            num_prototypes=1024,
        ),
        crops=CropConfig(global_px=64, local_px=32, num_local=4),
        data=DataConfig(workers=1, window_px=256),
        optim=OptimConfig(
            lr=5e-4, warmup_epochs=2, teacher_temperature_warmup_epochs=5, momentum=(0.95, 1.0)
        ),
        run=RunConfig(out="runs/demo", epochs=120, batch_size=32, log_every=5, checkpoint_every=100),
    ),
    "vit_ti": Config(model=ModelConfig(embed_dim=192, num_heads=3)),
    "vit_s": Config(model=ModelConfig(embed_dim=384, num_heads=6)),
    "vit_b": Config(),
    "vit_l": Config(model=ModelConfig(embed_dim=1024, depth=24, num_heads=16)),
    "vit_g_1024": Config(
        model=ModelConfig(embed_dim=1024, depth=40, num_heads=16),
        optim=OptimConfig(momentum=(0.998, 1.0), teacher_temperature=(0.02, 0.03)),
    ),
}


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, tuples as lists: what YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any], base: Config | None = None) -> Config:
    """A Config from nested plain values over `base`; an unknown key or a wrong type is a ConfigError."""
    import dacite

    config = base or Config()
    if not isinstance(values, dict):
        raise ConfigError(f"config: expected sections of settings, got {type(values).__name__}")
    merged = to_dict(config)
    for section, settings in values.items():
        if section in merged and not isinstance(settings, dict):
            raise ConfigError(f"{section}: expected a section of settings, got {settings!r}")
        merged[section] = {**merged.get(section, {}), **settings} if section in merged else settings
    try:
        return dacite.from_dict(Config, merged, dacite.Config(strict=True, cast=[tuple, float]))
    except dacite.UnexpectedDataError as error:
        raise ConfigError(f"config: unknown setting {', '.join(sorted(map(str, error.keys)))}") from None
    except ConfigError:
        raise
    except (dacite.DaciteError, ValueError, TypeError) as error:  # the latter two: casts to float and tuple
        raise ConfigError(f"config: {error}") from None


def load_yaml(path: str | Path, base: Config | None = None) -> Config:
    """Read a Config from a YAML file with the sections model, crops, data, optim, run."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    return from_dict({} if values is None else values, base)


def save_yaml(config: Config, path: str | Path) -> None:
    """Write a Config so that `load_yaml` gives it back equal."""
    import yaml

    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


__all__ = [
    "PRESETS", "Config", "ConfigError", "CropConfig", "DataConfig", "ModelConfig", "OptimConfig",
    "RunConfig", "from_dict", "load_yaml", "save_yaml", "to_dict",
]  # fmt: skip
