"""The specification: the maths of every op in plain PyTorch.

Each function works in the dtype of its input. In float64 it is the oracle that tests hold kernels to;
in the working dtype it is what runs where no kernel does. Formulas: PerA (arXiv 2505.19447), unless said.
"""

from __future__ import annotations

import math
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
PIXEL_DTYPES = (torch.uint8, torch.uint16, torch.float32)  # by SourceImages.dtypes


class SourceImages(NamedTuple):
    """Images of any size and dtype in one buffer, all with the same number of bands."""

    buffer: Tensor  # uint8 [bytes]
    offsets: Tensor  # int64 [images], first byte of each, a multiple of its dtype's size
    shapes: Tensor  # int64 [images, 3]: bands, height, width
    dtypes: Tensor  # int64 [images]: 0 uint8, 1 uint16, 2 float32
    low: Tensor  # float32 [images, bands], the value that becomes 0
    high: Tensor  # float32 [images, bands], the value that becomes 1

    def views(self) -> list[Tensor]:
        """Each image [bands, height, width] as it lies in the buffer; waits for the device."""
        listed = (self.offsets.tolist(), self.shapes.tolist(), self.dtypes.tolist())
        views = []
        for offset, shape, code in zip(*listed, strict=True):
            size = math.prod(shape) * PIXEL_DTYPES[code].itemsize
            views.append(self.buffer[offset : offset + size].view(PIXEL_DTYPES[code]).view(shape))
        return views


class CropTable(NamedTuple):
    """How each of n crop pairs is cut and coloured. View 0 is the student's, view 1 the teacher's."""

    image: Tensor  # int64 [n], which source image
    box: Tensor  # int64 [n, 4], top, left, height, width in pixels of that image
    flip: Tensor  # bool [n, 2], horizontal, vertical
    factor: Tensor  # float32 [n, 2, 4], brightness, contrast, saturation, hue of each view
    order: Tensor  # int64 [n, 2, 4], the colour operations in the order they apply, then -1
    grey: Tensor  # bool [n, 2], view turned to grey


# A view's levels are either float in 0..1 or, "exact", int64 in 0..255 as Pillow's 8-bit images hold them.


def luma(rgb: Tensor) -> Tensor:
    """ITU-R 601 grey of levels [3, H, W] -> [1, H, W]."""
    if rgb.dtype == torch.int64:
        return ((rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 0x8000) >> 16)[None]
    return (rgb[0] * 0.299 + rgb[1] * 0.587 + rgb[2] * 0.114)[None]


def blend(towards: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """towards + factor * (levels - towards), clipped; 8 bit is cut off, which costs half a level on average."""
    if levels.dtype == torch.int64:
        return (towards.float() + factor * (levels - towards).float()).clamp(0, 255).long()
    half_level = 0.5 / 255 if factor != 1 else 0
    factor = factor.to(levels.dtype)
    return (levels * factor + (towards * (1 - factor) - half_level)).clamp(0, 1)


def shift_hue(rgb: Tensor, turn: float) -> Tensor:
    """Turn the hue of float levels [3, H, W] by `turn` (1 = full circle), through HSV."""
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


def shift_hue_exact(rgb: Tensor, steps: int) -> Tensor:
    """Turn the hue of 8-bit levels [3, H, W] through 8-bit HSV, in the precision of each of Pillow's steps."""
    value = rgb.amax(0)
    chroma = value - rgb.amin(0)
    r, g, b = (value - rgb).float() / chroma.clamp(min=1).float()
    from_green, from_blue = (2.0 + r.double() - b.double()).float(), (4.0 + g.double() - r.double()).float()
    sextant = torch.where(rgb[0] == value, b - g, torch.where(rgb[1] == value, from_green, from_blue))
    hue = (torch.remainder(sextant.double() / 6 + 1, 1.0).float().double() * 255).long()
    saturation = ((chroma.float() / value.clamp(min=1).float()).double() * 255).long()

    hue = (torch.where(chroma > 0, hue, 0) + steps) % 256
    sixths = hue.double() * 6 / 255
    sector = sixths.long()
    within, share = (sixths - sector).float(), (saturation.double() / 255).float()
    p = (value * (1 - share.double()) + 0.5).long()
    q = (value * (1 - (share * within).double()) + 0.5).long()
    t = (value * (1 - share.double() * (1 - within.double())) + 0.5).long()
    v, choice = value, (sector % 6)[None]
    channels = [(v, q, p, p, t, v), (t, v, v, q, p, p), (p, p, t, v, v, q)]
    return torch.cat([torch.stack(c).gather(0, choice) for c in channels])


def colour(levels: Tensor, factor: Tensor, order: Tensor, grey: bool) -> Tensor:
    """Jitter one view. Levels [C, H, W] -> the same; factor and order: 4 values each (see CropTable).

    Blends follow Pillow's ImageEnhance: brightness towards 0, contrast towards the mean grey, saturation
    towards grey. Hue turns by whole 256ths, of which Pillow's cutting off takes half a one; float levels are
    rounded nowhere but lose the same on average. With other than three bands there is no grey: contrast uses
    each band's own mean, and saturation, hue and grey do nothing.
    """
    is_rgb, exact = levels.shape[0] == 3, levels.dtype == torch.int64
    if grey and is_rgb:
        return luma(levels).expand_as(levels)
    for operation in [i for i in order.tolist() if i >= 0]:
        amount = factor[operation]
        if operation == BRIGHTNESS:
            levels = blend(torch.zeros_like(levels), levels, amount)
        elif operation == CONTRAST:
            grey_levels = luma(levels) if is_rgb else levels
            mean = grey_levels.double().mean((1, 2), keepdim=True)
            levels = blend((mean + 0.5).long() if exact else mean.to(levels.dtype), levels, amount)
        elif operation == SATURATION and is_rgb:
            levels = blend(luma(levels), levels, amount)
        elif operation == HUE and is_rgb:
            steps = int(float(amount) * 255)
            levels = shift_hue_exact(levels, steps) if exact else shift_hue(levels, (steps - 0.5) / 255)
    return levels


def resize_exact(levels: Tensor, out: int) -> Tensor:
    """Antialiased bilinear as Pillow: weights of 22 bits, 8 bits between the passes. int64 [C, H, W] -> out²."""

    def weights(size: int) -> Tensor:
        scale = size / out
        support = max(scale, 1.0)
        centre = (torch.arange(out, device=levels.device, dtype=torch.float64) + 0.5) * scale
        place = torch.arange(size, device=levels.device, dtype=torch.float64)
        triangle = (1 - ((place - centre[:, None] + 0.5) * (1 / support)).abs()).clamp(min=0)
        return (triangle / triangle.sum(1, keepdim=True) * 2**22 + 0.5).floor()

    _, height, width = levels.shape
    x = levels.double()  # holds the whole numbers of the sums exactly, and has a matrix product on GPUs
    vertical_first = height > out and height - out > 2 * (width - out)
    for axis in ("down", "across") if vertical_first else ("across", "down"):
        product = weights(height) @ x if axis == "down" else x @ weights(width).T
        x = ((product + 2**21) / 2**22).floor()
    return x.long()


def cut(levels: Tensor, flip: Sequence[bool], crop_px: int) -> Tensor:
    """Resize with antialiased bilinear, flip. Levels [C, H, W] -> [C, crop_px, crop_px]."""
    if levels.dtype == torch.int64:
        crop = resize_exact(levels, crop_px)
    else:
        crop = F.interpolate(
            levels[None], (crop_px, crop_px), mode="bilinear", antialias=True, align_corners=False
        )[0]
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
    images: SourceImages,
    table: CropTable,
    student_patches: Tensor,
    target_patches: Tensor,
    teacher_patches: Tensor,
    *,
    crop_px: int,
    patch_px: int,
    mean: Tensor,
    std: Tensor,
    exact: bool,
    leading_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Augment and gather. See pera_fast.ops.crop_patches for shapes; works in the dtype of `mean`."""
    boxes, flips, indices = table.box.tolist(), table.flip.tolist(), table.image.tolist()
    sources, dtype = images.views(), torch.float32 if exact else mean.dtype
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for crop, (index, box, flip) in enumerate(zip(indices, boxes, flips, strict=True)):
        low, high = (x[index][:, None, None].to(dtype) for x in (images.low, images.high))
        levels = (window(sources[index], box).to(dtype) - low) * (1 / (high - low))
        levels = levels.nan_to_num(nan=0.0).clamp(0, 1)  # NaN: not a number that a pixel can have
        if exact:
            levels = (levels * 255 + 0.5).long()
        levels = cut(levels, flip, crop_px)
        for view in range(2):
            how = table.factor[crop, view], table.order[crop, view], bool(table.grey[crop, view])
            coloured = colour(levels, *how)
            views[view].append(coloured.to(mean.dtype) / 255 if exact else coloured)
    student_view, teacher_view = ((torch.stack(v) - mean[:, None, None]) / std[:, None, None] for v in views)

    def gather(view: Tensor, patches: Tensor, order: str, leading: int) -> Tensor:
        rows = patchify(view, patch_px, order).take_along_dim(patches[:, :, None], dim=1)
        return F.pad(rows, (0, 0, leading, 0))

    return (
        gather(student_view, student_patches, "cpq", leading_rows),
        gather(student_view, target_patches, "pqc", 0),
        gather(teacher_view, teacher_patches, "cpq", leading_rows),
    )


# --- patch_embed ----------------------------------------------------------------------------------------


def patch_embed(rows: Tensor, weight: Tensor, table: Tensor, index: Tensor, place: Tensor | None) -> Tensor:
    """table[index] with rows · weightᵀ added at `place` (None: in order).

    rows [R, F], weight [D, F], table [T, D], index int64 [N], place int64 [R] -> [N, D].
    """
    tokens, product = F.embedding(index, table), F.linear(rows, weight.to(rows.dtype))
    if place is None:
        return (tokens + product).to(table.dtype)
    return tokens.index_add(0, place, product.to(table.dtype))


# --- linear ---------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias. x [R, F], weight [D, F], bias [D] -> [R, D]."""
    return F.linear(x, weight, bias)


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
    return torch.cat(outputs) if outputs else qkv[:, 0]


# --- residual_norm --------------------------------------------------------------------------------------


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    next_rows: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x[rows] += scale * branch, then LayerNorm of x[next_rows]. None rows: all of them."""
    if branch is not None:
        x = residual_add(x, branch, rows, scale)
    selected = x if next_rows is None else x.index_select(0, next_rows)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return x, F.layer_norm(selected, selected.shape[-1:], weight, bias, eps)


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


def sinkhorn_centre(z: Tensor, v: Tensor, g: Tensor, tau: float, iterations: int) -> Tensor:
    """The centre for which softmax((t - centre)/τ) are Sinkhorn-Knopp's assignments. z [n, d] -> [K].

    As DINOv2: exp(t/τ) is scaled in turn to equal sums over prototypes and to equal sums over rows.
    """
    q = (prototype_logits(z, v, g) / tau).exp()
    u, w = q.new_ones(q.shape[1]), q.new_ones(len(q))
    for _ in range(iterations):
        u = 1 / (q.shape[1] * (q * w[:, None]).sum(0))
        w = 1 / (len(q) * (q * u).sum(1))
    return -tau * u.log()


def koleo(z: Tensor, v: Tensor, g: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """-mean log(‖x_i - x_nn(i)‖ + eps) of each crop on the L2-normalised prototype logits x.

    z [crops, n, d] -> (losses [crops], nn [crops, n]). Kozachenko-Leonenko entropy estimate, Sablayrolles et
    al. 2018. Fewer than two rows have no neighbour: the loss is 0 and nn is all 0.
    """
    if z.shape[1] < 2:
        return z.sum((1, 2)) * 0, torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device)
    x = F.normalize(prototype_logits(z.flatten(0, 1), v, g), dim=-1, eps=eps).unflatten(0, z.shape[:2])
    with torch.no_grad():
        similarity = x @ x.mT
        similarity.diagonal(dim1=1, dim2=2).fill_(-2)
        neighbour = similarity.argmax(dim=2)
    nearest = torch.stack([rows[chosen] for rows, chosen in zip(x, neighbour, strict=True)])
    return -torch.log((x - nearest).norm(dim=2) + eps).mean(1), neighbour


# --- adamw_ema ------------------------------------------------------------------------------------------


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    teachers: Sequence[Tensor | None],
    shadows: Sequence[Tensor | None],
    teacher_shadows: Sequence[Tensor | None],
    hyper: Tensor,
    grad_norm: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    clip_norm: float,
) -> Tensor:
    """Clip, AdamW (Loshchilov & Hutter 2019), then teacher += (1 - momentum)(param - teacher); in place.

    hyper: lr, weight decay, momentum. Returns whether the norm was not finite and nothing was done.
    """
    if not grad_norm.isfinite():
        return torch.tensor(True, device=grad_norm.device)
    lr, weight_decay, _ = hyper.tolist()
    clip = min(1.0, clip_norm / (float(grad_norm) + 1e-6))
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        g = g.to(p.dtype) * clip
        step += 1
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        denominator = (v / (1 - betas[1] ** float(step))).sqrt_().add_(eps)
        p.addcdiv_(m, denominator, value=-lr / (1 - betas[0] ** float(step)))
    for p, shadow in zip(params, shadows, strict=True):
        if shadow is not None:
            shadow.copy_(p)
    for teacher, p, shadow in zip(teachers, params, teacher_shadows, strict=True):
        if teacher is not None:
            ema_update([teacher], [p], hyper[2], [shadow])
    return torch.tensor(False, device=grad_norm.device)


def ema_update(
    teachers: Sequence[Tensor], params: Sequence[Tensor], momentum: Tensor, shadows: Sequence[Tensor | None]
) -> None:
    """teacher += (1 - momentum)(param - teacher) in place, and its bfloat16 copy."""
    for teacher, param, shadow in zip(teachers, params, shadows, strict=True):
        teacher.lerp_(param.to(teacher.dtype), float(1 - momentum))
        if shadow is not None:
            shadow.copy_(teacher)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm over all numbers of all tensors, float32 []."""
    return torch.stack([g.double().norm() for g in grads]).norm().float()
