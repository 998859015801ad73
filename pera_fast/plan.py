"""What a run will need: `python -m pera_fast.plan [--gpu-memory GB] [--json] [options of pera_fast.train]`.

Memory is found by running one whole step on tensors without contents, which takes seconds and no memory; so it
is that of this code as it is, on any machine. Work is counted by formula.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pera_fast import _cli
from pera_fast.config import Config, ConfigError
from pera_fast.model.pera import CropGroup, Patches, PerA, draw_subsets
from pera_fast.model.shadow import give_shadows, shadows_of
from pera_fast.ops.distill_loss import KEPT_BYTES
from pera_fast.ops.linear import plain
from pera_fast.optim import make

GB = 10**9
MARGIN = 0.06  # of the memory is left to the allocator's rounding and to libraries' workspaces
MULTIPLE = 8


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank, FLOP of one image (a multiply and an add are two).

    Fixed are weights, teacher, moments, gradients, bfloat16 copies, and what the loss holds at any batch.
    """

    trained_parameters: int
    fixed_bytes: int
    bytes_per_image: int
    flop_per_image: int

    def bytes_at(self, images: int) -> int:
        """Most bytes at once in a step with this many images."""
        return self.fixed_bytes + images * self.bytes_per_image

    def largest_batch(self, memory_bytes: float) -> int:
        return largest_batch(self.fixed_bytes, self.bytes_per_image, memory_bytes)


def largest_batch(fixed: float, per_image: float, memory_bytes: float) -> int:
    """Most images, in multiples of 8 where there are as many, that fit with a margin; 0 where none does."""
    fitting = int((memory_bytes * (1 - MARGIN) - fixed) / per_image)
    return max(0, fitting // MULTIPLE * MULTIPLE if fitting >= MULTIPLE else fitting)


def line_through(images: Sequence[int], peaks: Sequence[float]) -> tuple[float, float]:
    """(fixed, per image) of the straight line with the least squared distance from measured peaks."""
    mean_x, mean_y = sum(images) / len(images), sum(peaks) / len(peaks)
    spread = sum((x - mean_x) ** 2 for x in images)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(images, peaks, strict=True)) / spread
    return mean_y - slope * mean_x, slope


def plan_for(config: Config, memory_bytes: float, most: int = 2**16, on_gpu: bool = False) -> Plan:
    """`plan` near the largest batch that fits, or `most`: in small steps another moment may be that of the peak."""
    found = plan(config, on_gpu)
    images = min(most, found.largest_batch(memory_bytes))
    return plan(config, on_gpu, (images // 2, images)) if images > 16 else found


def plan(config: Config, on_gpu: bool = False, sizes: tuple[int, int] = (8, 16)) -> Plan:
    """Run steps without contents at two batch sizes; the rest is a straight line."""
    with plain() if on_gpu else nullcontext():
        peaks = [peak_bytes(config, images) for images in sizes]
    fixed, per_image = line_through(sizes, peaks)
    if on_gpu:  # besides what waits there, more logits are kept
        fixed += KEPT_BYTES["cuda"] - KEPT_BYTES["cpu"]
        per_image += input_bytes(config, passes=config.run.accumulate)
    with torch.device("meta"):
        parameters = sum(p.numel() for _, p, _ in PerA(config).ema_pairs())
    return Plan(parameters, round(fixed), round(per_image), flop_per_image(config))


def input_bytes(config: Config, itemsize: int = 1, passes: int = 1) -> int:
    """Bytes on a GPU of an image in each of a step's passes, besides what one pass holds: its pixels, of this step
    and of the next, which are copied ahead, and the other passes' patches. Where steps are recorded, and hold on to
    their memory, the pixels of one batch more. itemsize: bytes of a pixel's band."""
    source = config.model.in_bands * config.data.window_px**2 * itemsize
    groups, *rows = synthetic_patches(config, 1, torch.device("meta"))
    patches = sum(x.nbytes for x in (*rows, *(x for group in groups for x in group)))
    return (2 * passes + config.is_recorded) * source + (passes - 1) * patches


def peak_bytes(config: Config, images: int) -> int:
    """Most bytes that the tensors of one rank's step hold at once."""
    with torch.device("meta"):  # where initialising costs nothing
        model = PerA(config)
    with FakeTensorMode(allow_non_fake_inputs=True), _Tracker() as tracker:
        _step(model.to_empty(device="cpu"), config, images)
    return tracker.peak


def _step(model: PerA, config: Config, images: int) -> None:
    """One step as the engine takes it, from patches on."""
    optim, bfloat16 = config.optim, config.run.precision == "bf16"
    if bfloat16:
        give_shadows(model)
    optimizer = make(
        "adamw_ema", model.ema_pairs(), betas=optim.betas, eps=optim.eps, clip_norm=optim.clip_norm,
        decay_all=optim.decay_all, shadows=shadows_of(model),
    )  # fmt: skip
    patches = synthetic_patches(config, images, torch.device("cpu"))
    optimizer.allocate()
    for _ in range(min(config.run.accumulate, 2)):  # the second has gradients beside it
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            subsets = draw_subsets(patches.groups, config.model.drop_path, config.model.depth)
            losses = model(patches, subsets, 0.04)
        losses.total.backward()
        del losses
    optimizer.step()


def synthetic_patches(config: Config, images: int, device: torch.device) -> Patches:
    """The input of a forward pass with zeros for pixels."""
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    groups, rows = [], [0, 0]
    for number, sets in _crop_kinds(config):
        n, (student, _, teacher) = number * images, sets
        groups.append(CropGroup(*(torch.zeros(n, count, dtype=torch.int64, device=device) for count in sets)))
        rows = [rows[0] + n * (1 + student), rows[1] + n * (1 + teacher)]
    size = config.model.in_bands * config.model.patch_px**2
    shapes = ((rows[0], size), (*groups[0].target.shape, size), (rows[1], size))
    return Patches(groups, *(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))


def _crop_kinds(config: Config) -> list[tuple[int, tuple[int, int, int]]]:
    """(crops of an image, (student, target, teacher) patches of each), global crops and then local ones."""
    crops, patch_px = config.crops, config.model.patch_px
    student, target, teacher = crops.mask_counts((crops.local_px // patch_px) ** 2)
    kinds = [
        (crops.num_global, crops.mask_counts((crops.global_px // patch_px) ** 2)),
        (crops.num_local, (student, 0, teacher)),  # local crops have no targets
    ]
    return kinds if crops.num_local else kinds[:1]


class _Tracker(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes


def flop_per_image(config: Config) -> int:
    """Products of one image's forward and backward pass: tokens through the blocks, attention, heads, loss."""
    model, crops = config.model, config.crops
    dim, hidden = model.embed_dim, int(model.embed_dim * model.mlp_ratio)
    qkv_proj, mlp = 2 * dim * 4 * dim, 2 * dim * 2 * hidden  # of a token
    pixels = model.in_bands * model.patch_px**2
    kept = 1 - model.drop_path

    def blocks(groups: list[tuple[int, int]], number: int) -> float:
        """(sequences, length) through `number` blocks, forward."""
        return number * sum(n * (length * (qkv_proj + mlp) + 4 * length**2 * dim) for n, length in groups)

    kinds = _crop_kinds(config)
    student = [(number, 1 + s) for number, (s, _, _) in kinds]
    with_targets = [(number, 1 + s + p) for number, (s, p, _) in kinds]
    teacher = [(number, 1 + t) for number, (_, _, t) in kinds]
    targets = sum(number * p for number, (_, p, _) in kinds)
    patches = [sum(number * sets[i] for number, sets in kinds) for i in (0, 2)]
    half = model.depth // 2
    # The last MLP sees CLS tokens and targets alone.
    student_blocks = kept * (
        blocks(student, half) + blocks(with_targets, model.depth - half) - patches[0] * mlp
    )
    widths = [dim, *[model.head_hidden_dim] * (model.head_layers - 1), model.head_bottleneck_dim]
    head = 2 * sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))
    rows = crops.num_global + crops.num_local
    prototypes = 2 * model.head_bottleneck_dim * model.num_prototypes
    student_side = (
        student_blocks
        + rows * (head + prototypes)
        + targets * (head + 2 * model.head_bottleneck_dim * pixels)
    )
    embedding = [2 * count * pixels * dim for count in patches]
    teacher_blocks = blocks(teacher, model.depth) - patches[1] * mlp
    teacher_side = teacher_blocks + embedding[1] + rows * (head + prototypes)
    # Backward twice the forward pass; no gradient goes to the pixels.
    return round(3 * student_side + 2 * embedding[0] + teacher_side)


def _options(arguments: list[str]) -> tuple[float | None, bool, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--json", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    if known.gpu_memory is not None and not 0 < known.gpu_memory < math.inf:
        raise ConfigError(f"gpu-memory: expected gigabytes above 0, got {known.gpu_memory:g}")
    return known.gpu_memory, known.json, rest


def main() -> None:
    from pera_fast.train import parse

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)  # before the options of pera_fast.train
    memory, as_json, rest = _options(sys.argv[1:])
    config = parse(rest)
    found = plan(config) if memory is None else plan_for(config, memory * GB, on_gpu=True)
    facts: dict[str, Any] = asdict(found)
    if memory is not None:
        facts["gpu_memory"] = memory * GB
        facts["largest_batch"] = batch = found.largest_batch(memory * GB)
        facts["bytes_at_largest_batch"] = found.bytes_at(batch)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    print(f"trained parameters   {found.trained_parameters / 1e6:,.1f} M")
    print(f"fixed memory         {found.fixed_bytes / GB:,.2f} GB")
    print(f"memory per image     {found.bytes_per_image / 1e6:,.1f} MB")
    print(f"work per image       {found.flop_per_image / GB:,.0f} GFLOP")
    if memory is not None:
        needed = found.bytes_at(max(1, batch)) / GB
        text = f"{batch} images, {needed:,.1f} GB" if batch else f"none: one image needs {needed:,.2f} GB"
        print(f"largest batch        {text} of {memory:g} GB")


if __name__ == "__main__":
    _cli.run(main)
