"""A tensor's name here and in other codebases. timm's names of a ViT are ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_QKV = ("query", "key", "value")
# Ours -> transformers.ViTModel's as its hub files have them, which every release reads.
_HF = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
)
# What transformers writes -> ours; from release 5 on, models in memory have the names after the |.
_FROM_HF = (
    (r"^(?:vit\.)?embeddings\.(cls_token)$", r"\1"),
    (r"^(?:vit\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(?:vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:vit\.)?layernorm\.", "norm."),
    (r"^(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (r"^(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (r"^(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
)  # fmt: skip
_HF_QKV = re.compile(
    r"^(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.(weight|bias)$"
)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        new, found = re.subn(pattern, replacement, name)
        if found:
            return new
    return name


_OFFICIAL = (  # theirs, ours
    ("s_mask_token", "mask_token"),
    ("pred_head.mlp0.mlp", "pixel_head.mlp"),
    ("pred_head", "pixel_head"),
)


def from_official(name: str) -> str:
    """The name of a tensor in the PerA authors' checkpoints -> ours."""
    for old, new in _OFFICIAL:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    # A head of one layer is a bare linear layer there and a sequence of one here.
    return re.sub(r"head\.mlp\.(weight|bias)$", r"head.mlp.0.\1", name)


def to_official(name: str) -> str:
    """Inverse of `from_official`, for heads of more than one layer."""
    for old, new in _OFFICIAL:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def to_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VisionTransformer's weights under transformers.ViTModel's names, query, key and value apart."""
    found = {}
    for name, value in weights.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            block, kind = match.groups()
            for part, chunk in zip(_QKV, value.chunk(3), strict=True):
                # A copy, since safetensors refuses tensors that share memory.
                found[f"encoder.layer.{block}.attention.attention.{part}.{kind}"] = chunk.clone()
        else:
            found[_renamed(name, _HF)] = value
    return found


def from_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_hf`, from files of any release, of ViTModel or a model around it. Other names stay as they are."""
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        if match := _HF_QKV.match(name):
            block, part, kind = match.groups()
            apart.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[part[0]] = value
        else:
            found[_renamed(name, _FROM_HF)] = value
    for name, parts in apart.items():
        if parts.keys() == set("qkv") and len({x.shape for x in parts.values()}) == 1:  # else it is missing
            found[name] = torch.cat([parts[p] for p in "qkv"])
    return found
