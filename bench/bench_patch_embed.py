"""Rows of the patches that are used -> tokens, against the convolution over whole views and boolean masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baselines.eager_step import masks, tokens
from compare import all_close, compare, needs_bfloat16, needs_gpu
from torch import Tensor
from workload import batch, small_vit_s, statistics, whole_views

from pera_fast.distributed import World
from pera_fast.engine import Engine


@pytest.mark.parametrize(("dim", "name"), [(384, "ViT-S"), (768, "ViT-B")])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bfloat16)])
def bench_patch_embed(benchmark, dim: int, name: str, precision: str) -> None:
    measure(benchmark, dim, name, precision, 8, "cpu")


@needs_gpu
def bench_patch_embed_gpu(benchmark) -> None:
    measure(benchmark, 768, "ViT-B", "bf16", 64, "cuda")


def measure(benchmark, dim: int, name: str, precision: str, images: int, device: str) -> None:
    """Rows or views -> tokens of student (with its gradients) and teacher."""
    config = small_vit_s()
    config = replace(
        config,
        model=replace(config.model, embed_dim=dim, num_heads=dim // 64, depth=1),
        run=replace(config.run, precision=precision),
    )
    engine = Engine(config, statistics(), World(0, 1, torch.device(device)))
    model, decoded = engine.model, batch(config, images=images)
    patches = engine.patches(0, 0, decoded)
    pixels = (config.crops.global_px, config.crops.local_px)
    # Any views will do that hold the very patches.
    views = [whole_views(patches, i, px) for i, px in enumerate(pixels)]
    student, teacher = model.student.backbone, model.teacher.backbone
    leaves = [student.patch_embed.proj.weight, student.patch_embed.proj.bias, student.pos_embed]
    sizes = (config.crops.global_px // 16, config.crops.local_px // 16)

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def ours() -> list[Tensor]:
        with autocast():
            positions = [student.positions(grid, grid) for grid in sizes]
            seen = student.embed(patches.student_rows, [m.student for m in patches.groups], positions)
            with torch.no_grad():
                positions = [teacher.positions(grid, grid) for grid in sizes]
                taught = teacher.embed(patches.teacher_rows, [m.teacher for m in patches.groups], positions)
        return [seen, taught, *torch.autograd.grad(seen.sum(), leaves)]

    def theirs() -> list[Tensor]:
        with autocast():
            chosen = list(zip(views, patches.groups, sizes, strict=True))
            seen = [tokens(student, v[0], masks(m.student, grid**2)).flatten(0, 1) for v, m, grid in chosen]
            with torch.no_grad():
                taught = [
                    tokens(teacher, v[1], masks(m.teacher, grid**2)).flatten(0, 1) for v, m, grid in chosen
                ]
        gradients = torch.autograd.grad(sum(x.sum() for x in seen), leaves)
        return [torch.cat(seen), torch.cat(taught), *gradients]

    compare(
        benchmark, op="patch_embed",
        peer="convolution over all patches, boolean masks",
        ours=ours, theirs=theirs, same=all_close(2e-2 if precision == "bf16" else 1e-3), dtype=precision,
        shape=f"{name}, {images} images 512 px, 2x448 + 8x96 pairs, student fwd+bwd, teacher fwd", pairs=5,
        device=device,
    )  # fmt: skip
