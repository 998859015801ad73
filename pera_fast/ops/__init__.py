"""The ops: one file each, with its public function, argument checks and backends."""

from pera_fast.ops._dispatch import BackendError
from pera_fast.ops.adamw_ema import adamw_ema
from pera_fast.ops.crop_patches import CropTable, SourceImages, crop_patches, pack_images
from pera_fast.ops.disjoint_masks import disjoint_masks
from pera_fast.ops.distill_loss import distill_loss, mean_prototype_logit, sinkhorn_centre
from pera_fast.ops.ema_update import ema_update
from pera_fast.ops.grad_norm import grad_norm
from pera_fast.ops.koleo import koleo
from pera_fast.ops.linear import linear
from pera_fast.ops.packed_attention import packed_attention
from pera_fast.ops.patch_embed import patch_embed
from pera_fast.ops.residual_norm import residual_add, residual_norm

__all__ = [
    "BackendError",
    "CropTable",
    "SourceImages",
    "adamw_ema",
    "crop_patches",
    "disjoint_masks",
    "distill_loss",
    "ema_update",
    "grad_norm",
    "koleo",
    "linear",
    "mean_prototype_logit",
    "pack_images",
    "packed_attention",
    "patch_embed",
    "residual_add",
    "residual_norm",
    "sinkhorn_centre",
]
