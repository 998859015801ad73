"""The trained network as users take it: the teacher's ViT and what it must be fed, in one object and one file.

backbone.safetensors    the ViT's tensors under timm's names; metadata: config and statistics (JSON), step
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import pera_fast
from pera_fast.checkpoint import Checkpoint, save_tensors
from pera_fast.config import Config, ConfigError, DataConfig, RunConfig, from_dict, to_dict
from pera_fast.data.statistics import Statistics
from pera_fast.features import choose_device, normalise, to_unit
from pera_fast.files import whole
from pera_fast.model.vit import VisionTransformer


class Backbone(nn.Module):
    """A ViT in evaluation mode with the settings and statistics it was trained with.

    vit: the network, on normalised images. config: model, crops, and the bands it reads. statistics: the scale of
    each dtype, mean and std of each band. step: how far it was trained.
    """

    def __init__(self, vit: VisionTransformer, config: Config, statistics: Statistics, step: int) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.config, self.statistics, self.step = config, statistics, step

    @property
    def patch_px(self) -> int:
        return self.config.model.patch_px

    @property
    def dim(self) -> int:
        """Width D of a feature."""
        return self.config.model.embed_dim

    @property
    def device(self) -> torch.device:
        return self.vit.cls_token.device

    @property
    def bands(self) -> tuple[int, ...]:
        """The numbers, from 1, of the bands it reads, in its order."""
        return self.config.data.bands or tuple(range(1, self.config.model.in_bands + 1))

    def preprocess(self, pixels: np.ndarray | Tensor) -> Tensor:
        """Values as stored, uint8, uint16 or float32 [C, H, W] or [n, C, H, W] -> normalised float32 of that shape.

        C: the bands of `bands`, in that order. Raises ValueError for another number of bands, DataError for a dtype
        without a scale.
        """
        values = pixels.cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
        bands = self.config.model.in_bands
        if values.ndim not in (3, 4) or values.shape[-3] != bands:
            raise ValueError(
                f"pixels: expected [C, H, W] or [n, C, H, W] with C = {bands}, got {values.shape}"
            )
        unit = to_unit(values, values.dtype.name, self.statistics)
        return normalise(unit, self.statistics, self.config)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float [n, C, H, W] -> (class token [n, D], patch tokens [n, H/p · W/p, D]), after the last norm.

        Moves the images to the network's device. Height and width: multiples of patch_px, else ValueError.
        """
        return self.vit(images.to(self.device))


def load_backbone(path: str | Path, device: str = "cpu") -> Backbone:
    """The teacher of a run folder (its newest checkpoint), of one checkpoint, or of a file of `pera_fast.export`.

    device: cpu, cuda or auto. Raises ConfigError for what is none of these, or does not fit itself.
    """
    on = choose_device(device)
    if Path(path).is_file():
        return _read(Path(path)).to(on)
    found = Checkpoint.open(path)
    return Backbone(found.teacher(), _public(found.config), found.statistics, found.step).to(on)


def save_backbone(backbone: Backbone, path: str | Path) -> None:
    """Write a file that `load_backbone` reads, and timm by its names. DataError when it cannot be written."""
    write_tensors(dict(backbone.vit.state_dict()), path, metadata_of(backbone))


def write_tensors(weights: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all. DataError when it cannot be written."""
    with whole(path) as partial:
        save_tensors(weights, partial, metadata)


def metadata_of(backbone: Backbone) -> dict[str, str]:
    """What a file has to say beside its tensors, as text: how to feed the network, and how to build it."""
    data, statistics = backbone.config.data, backbone.statistics
    return {
        "format": "pt",  # transformers asks for it
        "pera_fast": pera_fast.__version__,
        "bands": json.dumps(backbone.bands),
        "mean": json.dumps(data.mean or statistics.mean),
        "std": json.dumps(data.std or statistics.std),
        "patch_px": str(backbone.patch_px),
        "image_px": str(backbone.config.crops.global_px),
        "step": str(backbone.step),
        "config": json.dumps(to_dict(backbone.config)),
        "statistics": json.dumps(json.loads(statistics.to_json())),
    }


def _public(config: Config) -> Config:
    """What belongs to the network; the folders and the hardware of a run stay with the run."""
    data = config.data
    return replace(
        config,
        data=DataConfig(
            bands=data.bands, mean=data.mean, std=data.std, nodata=data.nodata,
            max_nodata_share=data.max_nodata_share, window_px=data.window_px,
        ),
        run=RunConfig(seed=config.run.seed),
    )  # fmt: skip


def exported(path: str | Path) -> tuple[Config, Statistics, int] | None:
    """What a safetensors file of `pera_fast.export` says of itself: config, statistics, step. None for other files.

    ConfigError when it cannot be read.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        if not {"config", "statistics", "step"} <= metadata.keys():
            return None
        config = from_dict(json.loads(metadata["config"]))
        return config, Statistics.from_json(metadata["statistics"]), int(metadata["step"])
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"checkpoint: {path} cannot be read: {error}") from None


def _read(path: Path) -> Backbone:
    found = exported(path)
    if found is None:
        raise ConfigError(
            f"checkpoint: expected a run, a checkpoint or a file of pera_fast.export --format safetensors, got {path}; "
            "pera_fast.convert reads other files"
        )
    config, statistics, step = found
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"checkpoint: {path} cannot be read: {error}") from None
    misfit = f"checkpoint: {path} does not fit its own config: expected"
    blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if blocks != config.model.depth:  # before so many are made
        raise ConfigError(f"{misfit} {config.model.depth} blocks, got {blocks}")
    try:
        with torch.device("meta"):
            vit = VisionTransformer(config.model, config.crops.global_px)
    except (RuntimeError, OverflowError) as error:
        raise ConfigError(f"{misfit} a network that can be made, got {error}") from None
    wanted = vit.state_dict()
    if wrong := [k for k in wanted.keys() | weights.keys() if _shape(wanted, k) != _shape(weights, k)]:
        name = min(wrong)
        raise ConfigError(f"{misfit} {name} of shape {_shape(wanted, name)}, got {_shape(weights, name)}")
    vit.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return Backbone(vit, config, statistics, step)


def _shape(weights: dict[str, Tensor], name: str) -> list[int] | str:
    return list(weights[name].shape) if name in weights else "nothing"
