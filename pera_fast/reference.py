"""The specification: the maths of every op in plain PyTorch.

Each function works in the dtype of its input. In float64 it is the oracle that tests hold kernels to;
in the working dtype it is what runs where no kernel does. Formulas: PerA (arXiv 2505.19447), unless said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# --- disjoint_masks -------------------------------------------------------------------------------------

_UINT32 = 0xFFFFFFFF


def philox4x32_10(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four output words for four counter words, all uint32 values in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64, so their bits are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & _UINT32) ^ c1 ^ k0, p1 & _UINT32
        c2, c3 = ((p0 >> 32) & _UINT32) ^ c3 ^ k1, p0 & _UINT32
        k0, k1 = (k0 + 0x9E3779B9) & _UINT32, (k1 + 0xBB67AE85) & _UINT32
    return [c0, c1, c2, c3]


def disjoint_masks(
    crop_index: Tensor, seed: int, step: int, num_patches: int, num_student: int, num_target: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Three disjoint random sets of each crop's patches; see pera_fast.ops.disjoint_masks."""
    crop = crop_index[:, None]
    group = torch.arange((num_patches + 3) // 4, device=crop_index.device)[None, :]
    zeros = torch.zeros_like(crop + group)
    counter = [zeros + group, zeros + step, zeros + (crop & _UINT32), zeros + ((crop >> 32) & _UINT32)]
    words = philox4x32_10(counter, (seed & _UINT32, (seed >> 32) & _UINT32))
    keys = torch.stack(words, dim=-1).flatten(1)[:, :num_patches]
    order = keys.argsort(dim=1, stable=True)  # stable: equal keys stay in order of their patch index
    student, target, teacher = order.split(
        [num_student, num_target, num_patches - num_student - num_target], dim=1
    )
    return student.sort(1).values, target.sort(1).values, teacher.sort(1).values


# --- crop_patches ---------------------------------------------------------------------------------------

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class CropTable(NamedTuple):
    """How each of n crop pairs is cut and coloured. View 0 is the student's, view 1 the teacher's."""

    image: Tensor  # int64 [n], which source image
    box: Tensor  # int64 [n, 4], top, left, height, width in pixels of that image
    flip: Tensor  # bool [n, 2], horizontal, vertical
    factor: Tensor  # float32 [n, 2, 4], brightness, contrast, saturation, hue of each view
    order: Tensor  # int64 [n, 2, 4], the colour operations in the order they apply, -1 for none
    grey: Tensor  # bool [n, 2], view turned to grey


def luma(rgb: Tensor) -> Tensor:
    """ITU-R 601 grey of [3, H, W] -> [1, H, W], as Pillow's "L" mode."""
    return (rgb[0] * 0.299 + rgb[1] * 0.587 + rgb[2] * 0.114)[None]


def shift_hue(rgb: Tensor, turn: float) -> Tensor:
    """Turn the hue of [3, H, W] values in 0..1 by `turn` (1 = full circle), through HSV."""
    value = rgb.amax(0)
    chroma = value - rgb.amin(0)
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    r, g, b = (value - rgb) / safe
    hue = torch.where(rgb[0] == value, b - g, torch.where(rgb[1] == value, 2 + r - b, 4 + g - r))
    sextant = torch.remainder(hue / 6 + turn, 1.0) * 6
    # Smith 1978: each channel is value minus chroma times a clipped triangle wave of the hue.
    phase = torch.tensor([5.0, 3.0, 1.0], dtype=rgb.dtype, device=rgb.device)[:, None, None]
    wave = torch.remainder(phase + sextant, 6.0)
    return value - chroma * torch.minimum(wave, 4 - wave).clamp(0, 1)


def colour(image: Tensor, factor: Tensor, order: Tensor, grey: bool) -> Tensor:
    """Jitter one view. [C, H, W] in 0..1 -> the same; factor and order: 4 values each (see CropTable).

    Blends follow torchvision's: brightness towards 0, contrast towards the mean grey, saturation towards
    grey, each clipped to 0..1. With other than three bands there is no grey: contrast uses each band's own
    mean, and saturation, hue and grey do nothing.
    """
    is_rgb = image.shape[0] == 3
    if grey and is_rgb:
        return luma(image).expand_as(image)
    for operation in order.tolist():
        amount = float(factor[operation])
        if operation == BRIGHTNESS:
            image = (image * amount).clamp(0, 1)
        elif operation == CONTRAST:
            mean = luma(image).mean() if is_rgb else image.mean((1, 2), keepdim=True)
            image = (image * amount + mean * (1 - amount)).clamp(0, 1)
        elif operation == SATURATION and is_rgb:
            image = (image * amount + luma(image) * (1 - amount)).clamp(0, 1)
        elif operation == HUE and is_rgb:
            image = shift_hue(image, amount)
    return image


def cut(image: Tensor, box: Sequence[int], flip: Sequence[bool], crop_px: int) -> Tensor:
    """Crop, resize with antialiased bilinear, flip. [C, H, W] -> [C, crop_px, crop_px]."""
    crop = window(image, box)[None]
    crop = F.interpolate(crop, (crop_px, crop_px), mode="bilinear", antialias=True, align_corners=False)[0]
    axes = [axis for axis, on in ((2, flip[0]), (1, flip[1])) if on]
    return crop.flip(axes) if axes else crop


def window(image: Tensor, box: Sequence[int]) -> Tensor:
    """The pixels of a box (top, left, height, width). [C, H, W] -> [C, height, width]."""
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def patchify(images: Tensor, patch_px: int, order: str) -> Tensor:
    """[..., C, H, W] -> [..., L, C * patch_px**2] in raster order; order "cpq" or "pqc" within a patch."""
    *batch, bands, height, width = images.shape
    tiles = images.reshape(-1, bands, height // patch_px, patch_px, width // patch_px, patch_px)
    permutation = (0, 2, 4, 1, 3, 5) if order == "cpq" else (0, 2, 4, 3, 5, 1)
    return tiles.permute(permutation).reshape(*batch, -1, bands * patch_px**2)


def crop_patches(
    images: Sequence[Tensor],
    low: Tensor,
    high: Tensor,
    table: CropTable,
    student_patches: Tensor,
    target_patches: Tensor,
    teacher_patches: Tensor,
    *,
    crop_px: int,
    patch_px: int,
    mean: Tensor,
    std: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Augment and gather. See pera_fast.ops.crop_patches for shapes; works in the dtype of `low`."""
    boxes, flips, sources = table.box.tolist(), table.flip.tolist(), table.image.tolist()
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for crop, (source, box, flip) in enumerate(zip(sources, boxes, flips, strict=True)):
        base, span = low[source][:, None, None], (high - low)[source][:, None, None]
        pixels = ((window(images[source], box).to(low.dtype) - base) / span).clamp(0, 1)
        pixels = cut(pixels, (0, 0, *box[2:]), flip, crop_px)
        for view in range(2):
            how = table.factor[crop, view], table.order[crop, view], bool(table.grey[crop, view])
            views[view].append(colour(pixels, *how))
    student_view, teacher_view = ((torch.stack(v) - mean[:, None, None]) / std[:, None, None] for v in views)

    def gather(view: Tensor, patches: Tensor, order: str) -> Tensor:
        return patchify(view, patch_px, order).take_along_dim(patches[:, :, None], dim=1)

    return (
        gather(student_view, student_patches, "cpq"),
        gather(student_view, target_patches, "pqc"),
        gather(teacher_view, teacher_patches, "cpq"),
    )


# --- packed_attention -----------------------------------------------------------------------------------


def packed_attention(qkv: Tensor, groups: Sequence[tuple[int, int]], scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v within each sequence. qkv [rows, 3, heads, head_dim] -> [rows, heads, head_dim]."""
    outputs, start = [], 0
    for sequences, length in groups:
        part = qkv[start : start + sequences * length].unflatten(0, (sequences, length))
        query, key, value = part.permute(2, 0, 3, 1, 4)  # each [sequences, heads, length, head_dim]
        weights = torch.softmax(query @ key.mT * scale, dim=-1)
        outputs.append((weights @ value).transpose(1, 2).flatten(0, 1))
        start += sequences * length
    return torch.cat(outputs)


# --- residual_norm --------------------------------------------------------------------------------------


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    next_rows: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x[rows] += scale * branch, then LayerNorm of x[next_rows]. None rows: all of them."""
    if branch is not None:
        x = residual_add(x, branch, rows, scale)
    selected = x if next_rows is None else x.index_select(0, next_rows)
    return x, F.layer_norm(selected, selected.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def residual_add(x: Tensor, branch: Tensor, rows: Tensor | None, scale: Tensor | None) -> Tensor:
    """x with scale * branch added at `rows`. x [R, D], branch [r, D], scale [r] -> [R, D]."""
    branch = branch.to(x.dtype)
    if scale is not None:
        branch = branch * scale.to(x.dtype)[:, None]
    return x + branch if rows is None else x.index_add(0, rows, branch)


# --- distill_loss ---------------------------------------------------------------------------------------


def prototype_logits(z: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """z · (g v/‖v‖)ᵀ. z [n, d], v [K, d], g [K, 1] -> [n, K]."""
    return z @ (v * (g / v.norm(dim=1, keepdim=True))).T


def distill_loss(
    z_student: Tensor,
    z_teacher: Tensor,
    prototypes_student: tuple[Tensor, Tensor],
    prototypes_teacher: tuple[Tensor, Tensor],
    centre: Tensor,
    tau_student: float,
    tau_teacher: float,
    groups: Sequence[int],
) -> Tensor:
    """-Σ_k softmax((t - c)/τ_t)_k · log_softmax(s/τ_s)_k, mean over each group's rows -> [len(groups)]."""
    with torch.no_grad():
        target = torch.softmax(
            (prototype_logits(z_teacher, *prototypes_teacher) - centre) / tau_teacher, dim=-1
        )
    log_prediction = torch.log_softmax(prototype_logits(z_student, *prototypes_student) / tau_student, dim=-1)
    per_row = -(target * log_prediction).sum(-1)
    return torch.stack([part.mean() for part in per_row.split(list(groups))])


def koleo(z: Tensor, v: Tensor, g: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """-mean log(‖x_i - x_nn(i)‖ + eps) on the L2-normalised prototype logits x. z [n, d] -> (loss [], nn [n]).

    Kozachenko-Leonenko entropy estimate, Sablayrolles et al. 2018. Fewer than two rows have no neighbour:
    the loss is 0 and nn is all 0.
    """
    if len(z) < 2:
        return z.sum() * 0, torch.zeros(len(z), dtype=torch.int64, device=z.device)
    x = F.normalize(prototype_logits(z, v, g), dim=-1, eps=eps)
    with torch.no_grad():
        similarity = x @ x.T
        neighbour = similarity.fill_diagonal_(-2).argmax(dim=1)
    return -torch.log((x - x[neighbour]).norm(dim=1) + eps).mean(), neighbour


# --- adamw_ema ------------------------------------------------------------------------------------------


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    teachers: Sequence[Tensor | None],
    *,
    step: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    clip_coefficient: float,
    momentum: float,
) -> None:
    """Clip, AdamW (Loshchilov & Hutter 2019), then teacher += (1 - momentum)(param - teacher); in place."""
    beta1, beta2 = betas
    for p, g, m, v, teacher in zip(params, grads, exp_avgs, exp_avg_sqs, teachers, strict=True):
        g = g * clip_coefficient
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
        p.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
        if teacher is not None:
            teacher.lerp_(p, 1 - momentum)
