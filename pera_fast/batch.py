"""How many images a forward pass takes, and how many passes a step: from the options and the memory there is."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pera_fast.config import Config, ConfigError
from pera_fast.distributed import World
from pera_fast.engine import Engine
from pera_fast.plan import (
    GB,
    MARGIN,
    input_bytes,
    largest_batch,
    line_through,
    plan_for,
    synthetic_patches,
)

_log = logging.getLogger("pera_fast")
_MOST_ON_CPU = 64
_GAPS = 0.03  # between the tensors of a recorded step, at least: 3 to 9 % (bench/null_gpu.py), the rest is MARGIN's


@dataclass(frozen=True)
class Fit:
    """A batch size, and the peak that was foreseen for it."""

    images: int
    predicted_bytes: float


def choose(engine: Engine, config: Config, world: World) -> tuple[Config, float | None]:
    """The config with whole numbers for batch_size and accumulate, and the predicted peak where it was fitted.

    Raises ConfigError when not even one image fits, or global_batch cannot be shared out.
    """
    run, on_gpu, found, passes = config.run, world.device.type == "cuda", None, config.run.accumulate
    while True:
        if run.batch_size == "auto":
            found = fit_on_gpu(engine, config, world, passes) if on_gpu else fit_on_cpu(config, world)
        elif on_gpu:
            _allocate(engine)
        most, fitted_for = run.images if found is None else found.images, passes
        if run.global_batch is not None:
            most, passes = share_out(run.global_batch, world.ranks, most)
        if found is None or not on_gpu or passes <= fitted_for:
            break  # of more passes, each has more beside it
    predicted = found.predicted_bytes if found is not None and found.images == most else None
    _log.info(
        "%d images a step (%d, ranks %d, forward passes %d); the learning rate is taken as it is given",
        most * world.ranks * passes, most, world.ranks, passes,
    )  # fmt: skip
    return replace(config, run=replace(run, batch_size=most, accumulate=passes, global_batch=None)), predicted


def share_out(global_batch: int, ranks: int, most: int) -> tuple[int, int]:
    """(images a forward pass, passes): as few passes as fit `most` images, all equal."""
    if global_batch % ranks:
        raise ConfigError(f"global_batch: expected a multiple of the {ranks} ranks, got {global_batch}")
    per_rank = global_batch // ranks
    passes = next(n for n in range(-(-per_rank // most), per_rank + 1) if per_rank % n == 0)
    return per_rank // passes, passes


def fit_on_cpu(config: Config, world: World) -> Fit:
    """By the plan and the memory that is free, shared by this machine's ranks; at most 64 images, equal on all."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = _least(world, _available_bytes() / local_ranks)
    found = plan_for(config, available, _MOST_ON_CPU)
    images = min(found.largest_batch(available), _MOST_ON_CPU)
    _enough(images, found.bytes_at(1), available)
    return Fit(images, found.bytes_at(images))


def fit_on_gpu(engine: Engine, config: Config, world: World, passes: int) -> Fit:
    """By passes of a few images, measured, of which a step has `passes`; every rank takes what fits the fullest GPU."""
    device = world.device
    beside = input_bytes(config, max(np.dtype(name).itemsize for name in engine.statistics.low), passes)
    gaps = _GAPS if config.is_recorded else 0

    def measure(images: int) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            engine.probe(synthetic_patches(config, images, device), passes)
        except torch.OutOfMemoryError:
            return math.inf
        return torch.cuda.max_memory_allocated(device) * (1 + gaps) + images * beside

    _allocate(engine)
    free, _ = torch.cuda.mem_get_info(device)
    limit = _least(world, free + torch.cuda.memory_reserved(device))
    return fit(lambda images: _most(world, measure(images)), limit)


def fit(measure: Callable[[int], float], limit_bytes: float) -> Fit:
    """The largest batch whose peak, on the line through two small probes and a larger one, fits with a margin.

    measure: most bytes at once in a step of so many images, infinity where they do not fit.
    """
    for sizes in ([4, 8], [1, 2]):
        peaks = [measure(n) for n in sizes]
        if max(peaks) < math.inf:
            break
    else:
        raise ConfigError(
            f"batch_size: expected memory for two images, got {limit_bytes / GB:.2f} GB, of which one step takes "
            "more; --activation blocks needs less"
        )
    first = largest_batch(*line_through(sizes, peaks), limit_bytes)
    # Half way: what grows in jumps (kept logits, libraries' workspaces) has grown by then.
    half, has_failed = first // 16 * 8, False
    while half > sizes[1]:
        if (peak := measure(half)) < math.inf:
            sizes.append(half)
            peaks.append(peak)
            break
        half, has_failed = half // 16 * 8, True
    line = line_through(sizes[-2:], peaks[-2:])
    images = largest_batch(*line, limit_bytes)
    if has_failed:
        # Somebody else has taken memory, or it grows faster than the line: no more than was seen to fit.
        images = min(images, sizes[-1])
    _enough(images, sum(line), limit_bytes)
    predicted = line[0] + images * line[1]
    _log.info(
        "largest batch %d: %.2f GB predicted of %.2f GB, %.1f MB an image (probes: %s)",
        images, predicted / GB, limit_bytes / GB, line[1] / 1e6,
        ", ".join(f"{n} images {peak / GB:.2f} GB" for n, peak in zip(sizes, peaks, strict=True)),
    )  # fmt: skip
    return Fit(images, predicted)


def _allocate(engine: Engine) -> None:
    """The optimiser's moments, before anything is measured or begun."""
    try:
        engine.optimizer.allocate()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "preset: expected a model whose weights, teacher and moments fit the GPU, got a larger one; --shard all "
            "shares it out over ranks"
        ) from error


def _enough(images: int, needed: float, limit_bytes: float) -> None:
    if images < 1:
        raise ConfigError(
            f"batch_size: expected memory for one image, {needed / (1 - MARGIN) / GB:.2f} GB, got "
            f"{limit_bytes / GB:.2f} GB; --activation blocks needs less"
        )


def _least(world: World, value: float) -> float:
    return -_most(world, -value)


def _most(world: World, value: float) -> float:
    """The largest of every rank's values."""
    values = world.gather(torch.tensor(value, dtype=torch.float64, device=world.device))
    return max(float(v) for v in values)


def _available_bytes() -> float:
    """What the system has left, and no more than this process's control group may still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _left_to_group())
    raise ConfigError(
        "batch_size: expected a number on this system, got auto, and no /proc/meminfo to decide by"
    )


def _left_to_group(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Of a container's limit, as Linux has it (control groups 2); infinite where there is none."""
    try:
        limit = float((root / "memory.max").read_text().replace("max", "inf"))
        used = float((root / "memory.current").read_text())
        facts = (line.split() for line in (root / "memory.stat").read_text().splitlines())
        given_back = sum(int(value) for name, value in facts if name in ("inactive_file", "slab_reclaimable"))
    except (OSError, ValueError):
        return math.inf
    return max(0.0, limit - used + given_back)
