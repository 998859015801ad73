"""Student and teacher through the ViT, forward and backward, against the authors' data flow in eager PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from baselines import eager_step
from compare import all_close, compare, near, needs_bfloat16, needs_gpu, peak_bytes
from torch import Tensor
from workload import batch, statistics, whole_views

from pera_fast.config import PRESETS, Config
from pera_fast.distributed import World
from pera_fast.engine import Engine
from pera_fast.model.pera import Patches, draw_subsets
from pera_fast.model.vit import Mlp
from pera_fast.ops import _dispatch

BOTH = pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bfloat16)])


def drawn(
    precision: str, drop_path: float, images: int, preset: str = "vit_s", device: str = "cpu"
) -> tuple[Config, Engine, Patches]:
    base = PRESETS[preset]
    config = replace(
        base,
        model=replace(base.model, num_prototypes=64, drop_path=drop_path),
        run=replace(base.run, precision=precision),
    )
    engine = Engine(config, statistics(), World(0, 1, torch.device(device)))
    return config, engine, engine.patches(0, 0, batch(config, images))


def autocast(precision: str, device: str = "cpu") -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


@BOTH
@pytest.mark.parametrize(("drop_path", "images"), [(0.0, 2), (0.3, 4)])
def bench_vit(benchmark, precision: str, drop_path: float, images: int) -> None:
    measure(benchmark, "vit_s", precision, drop_path, images, "eager data flow", "cpu")


@needs_gpu
@pytest.mark.parametrize("preset", ["vit_b", "vit_s"])
@pytest.mark.parametrize("peer", ["eager data flow", "eager data flow, torch.compile"])
def bench_vit_gpu(benchmark, preset: str, peer: str) -> None:
    measure(benchmark, preset, "bf16", 0.3, 64, peer, "cuda")


def measure(
    benchmark, preset: str, precision: str, drop_path: float, images: int, peer: str, device: str
) -> None:
    """Both from the same patches; the eager side is given whole views and embeds them all."""
    config, engine, patches = drawn(precision, drop_path, images, preset, device)
    model, depth = engine.model, config.model.depth
    twin = copy.deepcopy(model)
    pixels = (config.crops.global_px, config.crops.local_px)
    views = [whole_views(patches, i, px) for i, px in enumerate(pixels)]
    backbones = torch.compile(eager_step.backbones) if "compile" in peer else eager_step.backbones

    leaves = [[p for p in owner.parameters() if p.requires_grad] for owner in (model, twin)]

    def finish(parameters: list[Tensor], student: Tensor, teacher: Tensor, predicted: Tensor) -> list[Tensor]:
        weights = torch.arange(student.shape[1], device=device)
        total = student.square().mul(weights).sum() + predicted.float().square().mean()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        if drop_path:  # each side draws its own subsets
            return [teacher]
        return [student, teacher, *(g for g in gradients if g is not None)]

    def ours() -> list[Tensor]:
        with autocast(precision, device):
            subsets = draw_subsets(patches.groups, drop_path, depth)
            teacher = model.teacher_forward(patches)
            student, predicted = model.student_forward(patches, subsets)
        return finish(leaves[0], student, teacher, predicted)

    def theirs() -> list[Tensor]:
        with autocast(precision, device):
            normed, taught = backbones(twin, config, views, patches.groups)
            with torch.no_grad():
                teacher = torch.cat([eager_step.unit(twin.teacher.cls_head, x[:, 0]) for x in taught])
            student = torch.cat([eager_step.unit(twin.student.cls_head, x[:, 0]) for x in normed])
            visible = 1 + patches.groups[0].student.shape[1]
            predicted = eager_step.head_logits(twin.pixel_head, normed[0][:, visible:])
        return finish(leaves[1], student, teacher, predicted)

    name = {"vit_s": "ViT-S", "vit_b": "ViT-B"}[preset]
    backend = _dispatch.resolve("packed_attention", device).backend
    compare(
        benchmark, op="vit", backend=backend, peer=peer, ours=ours, theirs=theirs, device=device,
        same=near if precision == "bf16" else all_close(1e-3), dtype=precision, pairs=3,
        shape=f"{name}, {images} images, drop path {drop_path}, student fwd+bwd, teacher fwd",
    )  # fmt: skip


@BOTH
@pytest.mark.parametrize("recompute", ["none", "norms", "blocks"])
def bench_recompute(benchmark, precision: str, recompute: str) -> None:
    """Time of the student's pass when less of it is kept, and what is: bytes an image at the end of forward."""
    passes = []
    for images in (2, 4):
        config, engine, patches = drawn(precision, 0.3, images)
        model, depth = engine.model, config.model.depth
        leaves = [p for p in model.parameters() if p.requires_grad]

        def forward(kept: str, model=model, patches=patches, depth=depth) -> list[Tensor]:  # type: ignore[no-untyped-def]
            model.student.backbone.recompute = kept
            with autocast(precision):
                return list(model.student_forward(patches, draw_subsets(patches.groups, 0.3, depth)))

        passes.append(forward)

    def student(kept: str) -> list[Tensor]:
        z, predicted = passes[-1](kept)
        total = z.square().mul(torch.arange(z.shape[1])).sum() + predicted.float().square().mean()
        return [total, *(g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None)]

    # Two batch sizes, so that what does not grow with them (weights in bfloat16) drops out.
    small, large = (peak_bytes(partial(forward, recompute), "cpu") for forward in passes)
    per_image = (large - small) / 2
    compare(
        benchmark, op="vit", backend="cpp", peer="recompute none", ours=lambda: student(recompute),
        theirs=lambda: student("none"), same=near if precision == "bf16" else all_close(1e-3), dtype=precision,
        pairs=2, bytes_per_image=per_image,
        shape=f"ViT-S student, 4 images, recompute {recompute}",
    )  # fmt: skip


@BOTH
def bench_branch_against_compiled(benchmark, precision: str) -> None:
    """What torch.compile makes of an MLP branch, the products and the GELU that are left to the library."""
    torch.manual_seed(0)
    x = torch.randn(2500, 384, requires_grad=True)
    branch = Mlp(384, 1536)
    leaves = [x, *branch.parameters()]

    def plain(x: Tensor) -> Tensor:
        return branch.fc2(F.gelu(branch.fc1(x)))

    def gradients(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with autocast(precision):
            y = forward(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), leaves)]

    compiled, affine = torch.compile(plain), (torch.ones(384), torch.zeros(384))
    compare(
        benchmark, op="vit", backend="torch", peer="torch.compile", dtype=precision, shape="MLP of ViT-S, 2500 rows",
        ours=lambda: gradients(lambda x: branch(x, [(1, 2500)], "none", affine)), theirs=lambda: gradients(compiled),
        same=near if precision == "bf16" else all_close(1e-4), pairs=15,
    )  # fmt: skip
