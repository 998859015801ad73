"""A tensor's name here and in other codebases. timm's names of a ViT are ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Ours -> transformers.ViTModel's as its hub files have them, which every release reads.
_HF = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HF_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
# What release 5 calls them in memory -> as in files.
_HF_SINCE_5 = {
    "attention.q_proj": _HF_QKV[0],
    "attention.k_proj": _HF_QKV[1],
    "attention.v_proj": _HF_QKV[2],
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OURS = {theirs: ours for ours, theirs in _HF.items()}
_OURS_BLOCK = {theirs: ours for ours, theirs in _HF_BLOCK.items()}


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
        if not (match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)):
            layer, kind = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name).groups(default="")  # type: ignore[union-attr]
            found[_HF[layer] + kind] = value
            continue
        block, layer, kind = match.groups()
        parts = _HF_QKV if layer == "attn.qkv" else (_HF_BLOCK[layer],)
        for part, chunk in zip(parts, value.chunk(len(parts)), strict=True):
            # A copy, since safetensors refuses tensors that share memory.
            found[f"encoder.layer.{block}.{part}.{kind}"] = chunk.clone() if len(parts) > 1 else chunk
    return found


def from_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_hf`, from files of any release, of ViTModel or a model around it. Other names stay as they are."""
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        own = name.removeprefix("vit.")
        layer, kind = re.fullmatch(r"(.+?)(\.weight|\.bias)?", own, re.DOTALL).groups(default="")  # type: ignore[union-attr]
        match = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", layer)
        part = _HF_SINCE_5.get(match[2], match[2]) if match else ""
        if match and part in _HF_QKV:
            apart.setdefault(f"blocks.{match[1]}.attn.qkv{kind}", {})[part] = value
        elif match and part in _OURS_BLOCK:
            found[f"blocks.{match[1]}.{_OURS_BLOCK[part]}{kind}"] = value
        else:
            found[_OURS[layer] + kind if layer in _OURS else name] = value
    for name, parts in apart.items():
        if len(parts) == 3 and len({x.shape for x in parts.values()}) == 1:  # else it is missing
            found[name] = torch.cat([parts[part] for part in _HF_QKV])
    return found
