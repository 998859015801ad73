"""The teacher for other programs: `python -m pera_fast.export --checkpoint RUN --out FILE --format timm`."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from pera_fast import _cli
from pera_fast.backbone import Backbone, load_backbone, metadata_of, save_backbone, write_tensors
from pera_fast.config import ConfigError
from pera_fast.data.sources import DataError, printable
from pera_fast.files import whole
from pera_fast.model.names import to_hf
from pera_fast.model.vit import VisionTransformer, resample_table

_OPSET = 18


def at_size(backbone: Backbone, image_px: int) -> Backbone:
    """The same network with the positions it uses at another image size as its table.

    Other programs resample positions each in its own way, so their features are ours at the table's size alone.
    ConfigError unless image_px is a multiple of patch_px that this network's crops allow.
    """
    p = backbone.patch_px
    if image_px % p or not p <= image_px <= 1024 * p:
        raise ConfigError(
            f"image_px: expected a multiple of patch_px = {p} up to 1024 of them, got {image_px}"
        )
    try:
        config = replace(backbone.config, crops=replace(backbone.config.crops, global_px=image_px))
    except ConfigError as error:  # patches too few to share out
        raise ConfigError(f"image_px: expected a size that crops can have, got {image_px}: {error}") from None
    weights = dict(backbone.vit.state_dict())
    weights["pos_embed"] = resample_table(weights["pos_embed"], image_px // p)
    vit = VisionTransformer(config.model, image_px)
    vit.load_state_dict(weights)
    return Backbone(vit, config, backbone.statistics, backbone.step)


# --- folders of timm and transformers -------------------------------------------------------------------


def _of_8_bits(backbone: Backbone) -> tuple[list[float], list[float]]:
    """Mean and deviation of 8-bit values divided by 255, as other programs divide them, whatever their scale here."""
    data, statistics = backbone.config.data, backbone.statistics
    mean, std = (np.array(x) for x in (data.mean or statistics.mean, data.std or statistics.std))
    if "uint8" in statistics.low:
        low, high = statistics.scale_of("uint8")
        mean, std = low / 255 + mean * ((high - low) / 255), std * ((high - low) / 255)
    return mean.tolist(), std.tolist()


def save_timm(backbone: Backbone, folder: Path) -> None:
    """config.json and model.safetensors, for `timm.create_model("local-dir:FOLDER")`."""
    model, px = backbone.config.model, backbone.config.crops.global_px
    mean, std = _of_8_bits(backbone)
    settings = {
        "architecture": "vit_base_patch16_224",  # every size is this class with other arguments
        "num_classes": 0,
        "num_features": model.embed_dim,
        "global_pool": "token",
        "model_args": {
            "img_size": px,
            "patch_size": model.patch_px,
            "in_chans": model.in_bands,
            "embed_dim": model.embed_dim,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "mlp_ratio": model.mlp_ratio,
            "dynamic_img_size": True,
        },
        "pretrained_cfg": {
            "input_size": [model.in_bands, px, px],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _write_folder(folder, {"config.json": settings})
    write_tensors(dict(backbone.vit.state_dict()), folder / "model.safetensors", metadata_of(backbone))


def save_hf(backbone: Backbone, folder: Path) -> None:
    """For `transformers.ViTModel.from_pretrained(FOLDER, add_pooling_layer=False)`: the class token is row 0.

    preprocessor_config.json scales 8-bit images; for others, scale and deviation are in the file's metadata.
    """
    model, px = backbone.config.model, backbone.config.crops.global_px
    mean, std = _of_8_bits(backbone)
    settings = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": int(model.embed_dim * model.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": px,
        "patch_size": model.patch_px,
        "num_channels": model.in_bands,
        "qkv_bias": True,
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": px, "width": px},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    _write_folder(folder, {"config.json": settings, "preprocessor_config.json": processor})
    write_tensors(to_hf(backbone.vit.state_dict()), folder / "model.safetensors", metadata_of(backbone))


def _write_folder(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {printable(folder)}: {error.strerror}") from None


# --- ONNX -----------------------------------------------------------------------------------------------


class PlainViT(nn.Module):
    """The network in PyTorch's own operations alone, for exporters, with its positions at any size in the graph."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float [n, C, H, W] -> (class token [n, D], patch tokens [n, H/p · W/p, D])."""
        vit, proj = self.vit, self.vit.patch_embed.proj
        tokens = F.conv2d(images, proj.weight, proj.bias, stride=proj.stride)
        height, width = tokens.shape[2:]
        cls, table = (
            vit.pos_embed[:, :1] + vit.cls_token,
            vit.pos_embed[0, 1:].unflatten(0, (vit.grid, vit.grid)),
        )
        rows, columns = _resampling(height, vit.grid), _resampling(width, vit.grid)
        # `positions` takes the table as it is at its own size alone, where both sides are equal to the grid's.
        is_same = (_size(rows) == vit.grid) & (_size(columns) == vit.grid)
        rows, columns = (torch.where(is_same, _eye_like(m), m) for m in (rows, columns))
        positions = torch.einsum("hi,wj,ijd->hwd", rows, columns, table)
        x = tokens.flatten(2).mT + positions.flatten(0, 1)
        x = torch.cat((cls.expand(x.shape[0], -1, -1), x), dim=1)
        for block in vit.blocks:
            x = x + _attention(block.attn, block.norm1(x))  # type: ignore[operator]
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))  # type: ignore[operator, union-attr]
        x = vit.norm(x)
        return x[:, 0], x[:, 1:]


def _attention(attention: Any, x: Tensor) -> Tensor:
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _resampling(size: int, grid: int) -> Tensor:
    """Matrix [size, grid] of the bicubic interpolation along one side, as `resample_positions` has it.

    F.interpolate's cubic convolution (a = -0.75) at the points (i + 0.5) · grid / (size + 0.1) - 0.5, taps beyond the
    border being the border's. In arithmetic on `size`, which an exporter may leave open.
    """
    points = (torch.arange(size, dtype=torch.float32) + 0.5) * (grid / (size + 0.1)) - 0.5
    first = points.floor()
    taps = torch.arange(grid, dtype=torch.float32)
    matrix = torch.zeros_like(points)[:, None] * taps
    for offset in (-1, 0, 1, 2):
        distance = (points - first - offset).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        weight = near if offset in (0, 1) else far
        place = (first + offset).clamp(0, grid - 1)
        matrix = matrix + weight[:, None] * (place[:, None] == taps)
    return matrix


def _size(matrix: Tensor) -> Tensor:
    """Number of rows as a tensor, which a graph computes."""
    return torch.ones_like(matrix[:, 0]).sum()


def _eye_like(matrix: Tensor) -> Tensor:
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in matrix.shape)
    return (rows[:, None] == columns).to(matrix.dtype)


def save_onnx(backbone: Backbone, path: Path) -> None:
    """One graph: images [batch, C, height, width] -> cls [batch, D], patches [batch, H/p · W/p, D]; all sizes open.

    images are normalised as `Backbone.preprocess` does; how, is in the model's metadata. Of sides that are no multiples
    of patch_px, which this package refuses, a graph leaves the rest out. Needs onnx and onnxscript
    (`pip install pera_fast[onnx]`), else ConfigError.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ConfigError(
            f"format: onnx needs the package {error.name}: pip install pera_fast[onnx]"
        ) from None
    p, channels = backbone.patch_px, backbone.config.model.in_bands
    side = backbone.config.crops.global_px
    plain = PlainViT(backbone.vit.cpu()).eval()
    shapes = {
        "images": {
            0: torch.export.Dim("batch"),
            2: p * torch.export.Dim("rows", min=1, max=4096),
            3: p * torch.export.Dim("columns", min=1, max=4096),
        }
    }
    example = torch.zeros(2, channels, side, side + p)  # unlike sides, so that neither is taken for the other
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            plain, (example,), dynamo=True, input_names=["images"], output_names=["cls", "patches"],
            dynamic_shapes=shapes, opset_version=_OPSET, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for name, value in metadata_of(backbone).items():
        model.metadata_props.add(key=name, value=value)
    is_large = sum(x.numel() for x in plain.parameters()) * 4 > 2**31 - 2**20  # protobuf's limit
    data = f"{path.name}.data" if is_large else None
    with whole(path) as partial:
        onnx.save(model, str(partial), save_as_external_data=is_large, location=data)


# --- command --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Write a run's teacher, with its statistics and the order of its bands, in a form other programs read."""

    checkpoint: str
    """A run folder (its newest checkpoint is taken), one checkpoint, or a file of this command."""
    out: str
    """File (safetensors, onnx) or folder (timm, hf) to write."""
    format: Literal["safetensors", "timm", "hf", "onnx"] = "safetensors"
    """safetensors: one file for pera_fast.load_backbone, timm's names; timm, hf: a folder for
    timm.create_model("local-dir:OUT") or transformers.ViTModel.from_pretrained; onnx: batch and size stay open."""
    image_px: int | None = None
    """Side of the images it is to see: the positions are resampled as in training, so that other programs, which
    resample in other ways, need not (default: the global crops')."""


def export(args: Args) -> None:
    """Run the command. ConfigError and DataError for what the user can put right."""
    out, is_folder = Path(args.out), args.format in ("timm", "hf")
    if is_folder:
        _cli.check_folder(args.out)
    else:
        _cli.check_files([args.checkpoint], out=args.out)
    backbone = load_backbone(args.checkpoint)
    if args.image_px is not None:
        backbone = at_size(backbone, args.image_px)
    write = {"safetensors": save_backbone, "timm": save_timm, "hf": save_hf, "onnx": save_onnx}[args.format]
    try:
        write(backbone, out)
    except BaseException:
        if is_folder:
            shutil.rmtree(out, ignore_errors=True)
        raise
    print(args.out)


if __name__ == "__main__":
    _cli.run(lambda: export(_cli.ask(lambda: tyro.cli(Args, prog="pera_fast.export"))))
