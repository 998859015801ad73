"""The whole training step against the authors' data flow in eager PyTorch, with and without their augmentation."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from baselines import eager_step, pillow_augment
from compare import all_close, compare, keep, needs_bfloat16, needs_gpu, peak_bytes, peak_flops
from torch import Tensor
from workload import IMAGENET, batch, statistics, whole_views

from pera_fast.config import PRESETS, Config
from pera_fast.distributed import World
from pera_fast.engine import Engine
from pera_fast.ops import _dispatch
from pera_fast.plan import flop_per_image
from pera_fast.schedules import StepValues

VALUES = StepValues(lr=1e-3, weight_decay=0.04, momentum=0.992, teacher_temperature=0.04)
PEERS = ("eager step", "eager step, torch.compile", "eager step, Pillow augmentation")
BF16 = pytest.param("bf16", marks=needs_bfloat16)


@pytest.mark.parametrize("precision", ["fp32", BF16])
@pytest.mark.parametrize(
    ("preset", "images", "prototypes", "drop_path", "peer"),
    [
        # Without drop path, whose subsets are random, both steps must give the same loss.
        ("vit_s", 2, 8192, 0.0, PEERS[2]),
        ("vit_ti", 4, 65536, 0.3, PEERS[2]),
        ("vit_s", 4, 65536, 0.3, PEERS[0]),
        ("vit_s", 4, 65536, 0.3, PEERS[1]),
        ("vit_s", 4, 65536, 0.3, PEERS[2]),
    ],
)
def bench_step(
    benchmark, preset: str, images: int, prototypes: int, drop_path: float, peer: str, precision: str
) -> None:
    measure(benchmark, preset, images, prototypes, drop_path, peer, precision, "cpu")


@needs_gpu
@pytest.mark.parametrize(
    ("preset", "images", "peer"),
    [
        *((preset, 64, peer) for preset in ("vit_b", "vit_s") for peer in PEERS),
        # Where what does not grow with the batch counts for little, and both still fit.
        ("vit_b", 256, PEERS[0]),
    ],
)
def bench_step_gpu(benchmark, preset: str, images: int, peer: str) -> None:
    measure(benchmark, preset, images, 131072, 0.3, peer, "bf16", "cuda")


@needs_gpu
def bench_largest_batch_gpu(benchmark) -> None:
    """Times at equal batch, and the batch of each side that memory is predicted to hold."""
    measure(benchmark, "vit_b", 32, 131072, 0.3, PEERS[0], "bf16", "cuda")
    limit = 0.95 * torch.cuda.mem_get_info()[1]
    for name, side in (("largest_batch", 0), ("peer_largest_batch", 1)):
        peaks = peaks_of(config_of("vit_b", 131072, 0.3, "bf16"), side, (16, 32))
        per_image = (peaks[1] - peaks[0]) / 16
        benchmark.extra_info[name] = int((limit - peaks[0]) / per_image) + 16
        benchmark.extra_info[f"{name}_bytes_per_image"] = per_image
    keep(benchmark)


def peaks_of(config: Config, side: int, sizes: Sequence[int]) -> list[int]:
    """Most bytes allocated on the GPU in a step of so many images: of ours, 0, or of the eager one, 1."""
    peaks = []
    for images in sizes:
        step = sides(config, images, PEERS[0], "cuda", ExitStack())[side]  # the other side is let go of
        step()  # moments and workspaces stay
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks.append(torch.cuda.max_memory_allocated())
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return peaks


def config_of(preset: str, prototypes: int, drop_path: float, precision: str) -> Config:
    base = PRESETS[preset]
    return replace(
        base,
        model=replace(base.model, num_prototypes=prototypes, drop_path=drop_path),
        run=replace(base.run, precision=precision),
    )


def sides(
    config: Config, images: int, peer: str, device: str, closing: ExitStack
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A step of ours from decoded images, and of the peer's from finished views, or from images too with Pillow."""
    engine = Engine(config, statistics(), World(0, 1, torch.device(device)))
    twin = copy.deepcopy(engine.model)
    optimizer = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.04, eps=2e-5, fused=True
    )
    decoded = batch(config, images)
    source = decoded
    if device == "cuda":  # finished views are there already; beside Pillow's, both copy as a loader has it
        source = decoded.pin_memory() if "Pillow" in peer else decoded.to(engine.world.device)
    mean, std = (torch.tensor(x) for x in IMAGENET)
    sizes = (config.crops.global_px, config.crops.local_px)
    patches = engine.patches(0, 0, source)
    indices = [tuple(masks) for masks in patches.groups]
    forward = torch.compile(eager_step.step) if "compile" in peer else eager_step.step

    def ours() -> Tensor:
        return torch.tensor(engine.step(0, [source], VALUES).losses["total"])

    def train(views: list[tuple[Tensor, ...]]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=config.run.precision == "bf16"):
            loss, t_logits = forward(twin, config, views, indices, VALUES.teacher_temperature)
        loss.backward()
        eager_step.update(twin, config, optimizer, VALUES.momentum, t_logits)
        return loss.detach().cpu()

    if "Pillow" not in peer:
        finished = [tuple(whole_views(patches, i, px)) for i, px in enumerate(sizes)]
        return ours, lambda: train(finished)
    arrays = [image.numpy() for image in decoded.images.views()]
    if device == "cuda":  # whose cores are free for it
        ahead = pillow_augment.Ahead(arrays, decoded.tables, sizes, mean, std)
        closing.enter_context(ahead)
        return ours, lambda: ahead.during(train)

    def augment_and_train() -> Tensor:
        pairs = zip(decoded.tables, sizes, strict=True)
        return train([tuple(pillow_augment.crop_pairs(arrays, table, px, mean, std)) for table, px in pairs])

    return ours, augment_and_train


def measure(
    benchmark, preset: str, images: int, prototypes: int, drop_path: float, peer: str, precision: str, device: str
) -> None:  # fmt: skip
    config = config_of(preset, prototypes, drop_path, precision)
    if device == "cuda":  # as pera_fast.distributed.world has it, so that the step can be recorded
        torch.cuda.set_stream(torch.cuda.Stream())
    with ExitStack() as closing:
        ours, theirs = sides(config, images, peer, device, closing)
        rate: dict[str, Any] = {}
        if device == "cuda":
            ours()  # moments and workspaces stay
            rate = {"peak_flops": peak_flops("bfloat16", "cuda"), "peak": peak_bytes(ours, "cuda")}
            for _ in range(13):  # the step is recorded on the way
                ours()
        backends = ", ".join(sorted({_dispatch.resolve(op, device).backend for op in _dispatch.registered()}))
        compare(
            benchmark, op="step", backend=backends, peer=peer, ours=ours, theirs=theirs, device=device, pairs=3,
            # Pillow's 8-bit rounding changes the pixels a little, so the losses agree to a few per cent.
            same=None if drop_path else all_close(0.05), dtype=precision, flops=images * flop_per_image(config),
            images=images, **rate, shape=f"{preset}, {images} images, {prototypes} prototypes, drop path {drop_path}",
        )  # fmt: skip
