"""One training step with the authors' data flow, in eager PyTorch.

All patches are embedded and chosen by boolean masks, crops of one size form one batch per group, logits
are materialised, weight norm is recomputed per call, clip, AdamW and EMA are separate sweeps. It uses our
modules' parameters, so both steps start from the same weights and must give the same loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast.config import Config
from pera_fast.model.pera import PerA
from pera_fast.model.vit import Block, VisionTransformer

Views = list[tuple[Tensor, Tensor]]  # student and teacher views of global crops, then of local ones


def masks(indices: Tensor, num_patches: int) -> Tensor:
    """Indices [n, k] -> bool [n, num_patches]."""
    empty = torch.zeros(len(indices), num_patches, dtype=torch.bool, device=indices.device)
    return empty.scatter_(1, indices, True)


def tokens(backbone: VisionTransformer, images: Tensor, keep: Tensor) -> Tensor:
    patches = backbone.patch_embed.proj(images).flatten(2).mT
    grid = images.shape[-1] // backbone.patch_px
    patches = patches + backbone.positions(grid, grid)
    cls = (backbone.cls_token + backbone.pos_embed[:, :1]).expand(len(patches), -1, -1)
    return torch.cat((cls, patches[keep].view(len(patches), -1, patches.shape[-1])), dim=1)


def attention(block: Block, x: Tensor) -> Tensor:
    b, n, d = x.shape
    query, key, value = block.attn.qkv(x).view(b, n, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return block.attn.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(b, n, d))


def run_block(block: Block, x: Tensor, drop_path: float) -> Tensor:
    branches = (
        lambda y: attention(block, block.norm1(y)),
        lambda y: block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y)))),
    )
    for branch in branches:
        if drop_path:
            chosen = torch.randperm(len(x), device=x.device)[: max(int(len(x) * (1 - drop_path)), 1)]
            scale = len(x) / len(chosen)
            residual = branch(x[chosen]).to(x.dtype)
            x = torch.index_add(x.flatten(1), 0, chosen, residual.flatten(1), alpha=scale).view_as(x)
        else:
            x = x + branch(x)
    return x


def step(
    model: PerA, config: Config, views: Views, chosen: list[tuple[Tensor, Tensor, Tensor]], tau_teacher: float
) -> tuple[Tensor, Tensor]:
    """Loss of one batch and the teacher's logits. chosen: (student, target, teacher) patches of each crop size."""
    normed, taught = backbones(model, config, views, chosen)
    t_logits = torch.cat([head_logits(model.teacher.cls_head, x[:, 0]) for x in taught])
    s_logits = torch.cat([head_logits(model.student.cls_head, x[:, 0]) for x in normed])
    t_logits = t_logits.detach()
    return loss(model, config, views, chosen, s_logits, t_logits, normed[0], tau_teacher), t_logits


def backbones(
    model: PerA, config: Config, views: Views, chosen: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The student's and the teacher's normalised tokens [crops of a size, tokens, D] of each crop size."""
    student, teacher = model.student.backbone, model.teacher.backbone
    drop_path, middle = config.model.drop_path, len(student.blocks) // 2
    patch_px = config.model.patch_px
    inputs, taught = [], []
    for (view0, view1), (s, _, t) in zip(views, chosen, strict=True):
        num_patches = (view0.shape[-1] // patch_px) ** 2
        inputs.append(tokens(student, view0, masks(s, num_patches)))
        with torch.no_grad():
            taught.append(tokens(teacher, view1, masks(t, num_patches)))
    with torch.no_grad():
        for block in teacher.blocks:
            taught = [run_block(block, x, 0.0) for x in taught]
        taught = [teacher.norm(x) for x in taught]
    for i, block in enumerate(student.blocks):
        if i == middle:
            grid = views[0][0].shape[-1] // patch_px
            masked = model.mask_token + student.positions(grid, grid)[chosen[0][1]]
            inputs[0] = torch.cat((inputs[0], masked.to(inputs[0].dtype)), dim=1)
        inputs = [run_block(block, x, drop_path) for x in inputs]
    return [student.norm(x) for x in inputs], taught


def unit(head: torch.nn.Module, cls: Tensor) -> Tensor:
    return F.normalize(head.mlp(cls), dim=-1, eps=1e-12)


def head_logits(head: torch.nn.Module, cls: Tensor) -> Tensor:
    """Logits of the weight-normalised last layer, whose weight is made anew in every call."""
    layer = head.last_layer
    weight = layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True))
    return F.linear(unit(head, cls), weight)


def loss(
    model: PerA, config: Config, views: Views, chosen: list[tuple[Tensor, Tensor, Tensor]], s_logits: Tensor,
    t_logits: Tensor, normed: Tensor, tau_teacher: float,
) -> Tensor:  # fmt: skip
    crops, optim = config.crops, config.optim
    num_crops = crops.num_global + crops.num_local
    target = F.softmax((t_logits.float() - model.centre) / tau_teacher, dim=-1)
    prediction = F.log_softmax(s_logits.float() / optim.student_temperature, dim=-1)
    distill = -(target * prediction).sum(-1).mean()
    spread = s_logits.new_zeros((), dtype=torch.float32)
    for part in s_logits[: len(s_logits) // num_crops * crops.num_global].chunk(crops.num_global):
        x = F.normalize(part.float(), dim=-1, eps=1e-8)
        nearest = (x.detach() @ x.detach().T).fill_diagonal_(-2).argmax(1)
        spread = spread - torch.log((x - x[nearest]).norm(dim=1) + 1e-8).mean()
    patch_px, visible = config.model.patch_px, 1 + chosen[0][0].shape[1]
    predicted = head_logits(model.pixel_head, normed[:, visible:])
    pixels = F.unfold(views[0][0], patch_px, stride=patch_px).mT
    pixels = pixels.unflatten(-1, (-1, patch_px**2)).mT.flatten(-2)  # (c, p, q) -> (p, q, c)
    wanted = pixels[masks(chosen[0][1], pixels.shape[1])].view(predicted.shape)
    pixel = (predicted.float() - wanted).square().sum(-1).mean()
    return distill + optim.koleo_weight * spread + optim.pixel_weight * pixel


def update(
    model: PerA, config: Config, optimizer: torch.optim.AdamW, momentum: float, t_logits: Tensor
) -> None:
    """Clip, AdamW, then the teacher parameter by parameter, and the centre."""
    clip_norm = config.optim.clip_norm
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip_norm)
    optimizer.step()
    with torch.no_grad():
        for ours, theirs in zip(model.student.parameters(), model.teacher.parameters(), strict=True):
            theirs.mul_(momentum).add_(ours.detach(), alpha=1 - momentum)
        mean = t_logits.float().mean(0)
        model.centre.mul_(config.optim.centre_momentum).add_(mean, alpha=1 - config.optim.centre_momentum)
