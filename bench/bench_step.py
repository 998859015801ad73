"""The whole training step, patches to update, against the authors' data flow in eager PyTorch."""

import copy
from dataclasses import replace

import pytest
import torch
from baselines import eager_step
from baselines.pillow_augment import crop_pairs
from compare import all_close, compare, needs_bfloat16
from workload import IMAGENET, batch, small_vit_s, statistics

from pera_fast.distributed import World
from pera_fast.engine import Engine
from pera_fast.ops import _dispatch
from pera_fast.schedules import StepValues

VALUES = StepValues(lr=1e-3, weight_decay=0.04, momentum=0.992, teacher_temperature=0.04)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bfloat16)])
def bench_step(benchmark, precision: str) -> None:
    # Without drop path, whose subsets are random, both steps must give the same loss.
    config = small_vit_s(drop_path=0.0)
    config = replace(config, run=replace(config.run, precision=precision))
    images = 2
    backends = ", ".join(sorted({_dispatch.resolve(op, "cpu").backend for op in _dispatch.registered()}))
    engine = Engine(config, statistics(), World(0, 1, torch.device("cpu")))
    twin = copy.deepcopy(engine.model)
    optimizer = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.04, eps=2e-5, fused=True
    )
    decoded = batch(config, images)
    arrays = [image.numpy() for image in decoded.images.views()]
    mean, std = (torch.tensor(x) for x in IMAGENET)
    sizes = (config.crops.global_px, config.crops.local_px)

    def chosen(step: int) -> list[tuple[torch.Tensor, ...]]:
        return [tuple(masks) for masks in engine.patches(step, 0, decoded).groups]

    indices = chosen(0)

    def ours() -> torch.Tensor:
        return torch.tensor(engine.step(0, [decoded], VALUES).losses["total"])

    def theirs() -> torch.Tensor:
        views = [
            tuple(crop_pairs(arrays, table, px, mean, std))
            for table, px in zip(decoded.tables, sizes, strict=True)
        ]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, t_logits = eager_step.step(twin, config, views, indices, VALUES.teacher_temperature)
        loss.backward()
        eager_step.update(twin, config, optimizer, VALUES.momentum, t_logits)
        return loss.detach()

    # Pillow's 8-bit rounding changes the pixels a little, so the losses agree to a few per cent.
    compare(
        benchmark, op="step", backend=backends, peer="eager step, Pillow augmentation", ours=ours,
        theirs=theirs, same=all_close(0.05), pairs=3, dtype=precision,
        shape=f"ViT-S, {images} images, 8192 prototypes",
    )  # fmt: skip
