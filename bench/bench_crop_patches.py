"""From decoded images to the patch embedding's input: masks, crops, colours, normalisation, gathering."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import PIL
import pytest
import torch
from baselines.pillow_augment import crop_pairs
from compare import all_close, compare
from torch import Tensor
from workload import IMAGENET, batch, small_vit_s, statistics

from pera_fast.config import Config
from pera_fast.data.loader import Batch
from pera_fast.distributed import World
from pera_fast.engine import Engine
from pera_fast.model.pera import Patches
from pera_fast.ops import _dispatch
from pera_fast.reference import patchify

# Pillow-SIMD, a faster build of Pillow, takes its place when it is installed instead; it adds .postN.
PILLOW = "Pillow-SIMD" if ".post" in PIL.__version__ else "Pillow"
MEAN, STD = (torch.tensor(x) for x in IMAGENET)
CPU = World(0, 1, torch.device("cpu"))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def engine(exact: bool, precision: str) -> Engine:
    config = small_vit_s()
    config = replace(
        config,
        crops=replace(config.crops, exact_augmentation=exact),
        run=replace(config.run, precision=precision),
    )
    return Engine(config, statistics(), CPU)


def pillow_views(config: Config, decoded: Batch) -> list[list[Tensor]]:
    """Student and teacher views of global and local crops, and the masks that come with them."""
    arrays = [image.numpy() for image in decoded.images.views()]
    sizes = (config.crops.global_px, config.crops.local_px)
    views = []
    for table, px in zip(decoded.tables, sizes, strict=True):
        views.append(crop_pairs(arrays, table, px, MEAN, STD))
        patches = (px // config.model.patch_px) ** 2
        torch.argsort(torch.rand(len(table.image), patches), dim=1)
    return views


def rows_of(views: list[list[Tensor]], patches: Patches) -> list[Tensor]:
    """The student's rows, target pixels and teacher's rows cut out of full views."""
    sets = [
        [(views[i][view], getattr(masks, name), order) for i, masks in enumerate(patches.groups)]
        for view, name, order in ((0, "student", "cpq"), (0, "target", "pqc"), (1, "teacher", "cpq"))
    ]
    return [
        torch.cat(
            [patchify(v, 16, order).take_along_dim(p[:, :, None], 1).flatten(0, 1) for v, p, order in some]
        )
        for some in sets
    ]


def without_cls_rows(rows: Tensor, counts: list[tuple[int, int]]) -> Tensor:
    parts = rows.split([n * (1 + count) for n, count in counts])
    return torch.cat(
        [x.view(n, 1 + c, -1)[:, 1:].flatten(0, 1) for x, (n, c) in zip(parts, counts, strict=True)]
    )


@pytest.mark.parametrize("num_threads", [1, torch.get_num_threads()])
@pytest.mark.parametrize("exact", [True, False])
def bench_crop_patches(benchmark, exact: bool, num_threads: int) -> None:
    ours_engine = engine(exact, "fp32")
    decoded = batch(ours_engine.config, images=8)

    def ours() -> Patches:
        return ours_engine.patches(0, 0, decoded)

    def theirs() -> list[list[Tensor]]:
        return pillow_views(ours_engine.config, decoded)

    def same(patches: Patches, views: list[list[Tensor]]) -> None:
        want = rows_of(views, patches)
        counts = [[tuple(getattr(m, name).shape) for m in patches.groups] for name in ("student", "teacher")]
        got = [
            without_cls_rows(patches.student_rows, counts[0]),
            patches.target_pixels.flatten(0, 1),
            without_cls_rows(patches.teacher_rows, counts[1]),
        ]
        for ours, theirs in zip(got, want, strict=True):
            difference = (ours - theirs).abs() * 255 * STD.min()  # in levels
            if exact:
                assert difference.max() < 1e-2
            assert difference.mean() < 1

    with threads(num_threads):
        compare(
            benchmark, op="crop_patches",
            peer=f"{PILLOW} crops of both views, argsort masks", ours=ours, theirs=theirs, same=same, pairs=5,
            shape=f"8 images 512 px, 2x448 + 8x96 pairs, {'exact' if exact else 'float'}, {num_threads} threads",
        )  # fmt: skip


@pytest.mark.parametrize("exact", [True, False])
def bench_crop_patches_against_tensors(benchmark, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same op in PyTorch tensor operations: what one writes without Pillow and without a kernel."""
    ours_engine = engine(exact, "fp32")
    decoded = batch(ours_engine.config, images=2)

    def run(backend: str) -> Patches:
        monkeypatch.setenv("PERA_FAST_BACKEND", f"crop_patches={backend}")
        return ours_engine.patches(0, 0, decoded)

    fastest = _dispatch.resolve("crop_patches", "cpu").backend
    compare(
        benchmark, op="crop_patches", backend=fastest, peer="PyTorch tensor operations",
        ours=lambda: run(fastest), theirs=lambda: run("reference"), pairs=3,
        same=lambda a, b: all_close(1e-3)((a.student_rows, a.teacher_rows), (b.student_rows, b.teacher_rows)),
        shape=f"2 images 512 px, 2x448 + 8x96 pairs, {'exact' if exact else 'float'}",
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def bench_batch_memory(benchmark, precision: str) -> None:
    """Memory of a batch of 64 before the embedding's product; time is compared as well, at one size."""
    ours_engine = engine(False, precision)
    decoded = batch(ours_engine.config, images=64)

    def ours() -> Patches:
        return ours_engine.patches(0, 0, decoded)

    def theirs() -> list[list[Tensor]]:
        return pillow_views(ours_engine.config, decoded)

    compare(
        benchmark, op="crop_patches",
        peer=f"{PILLOW} crops of both views, argsort masks", ours=ours, theirs=theirs, pairs=1, dtype=precision,
        shape="64 images 512 px, 2x448 + 8x96 pairs, float",
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("exact", [True, False])
def bench_crop_patches_against_torchvision(benchmark, exact: bool, device: str) -> None:
    """On the GPU a batch of 64, images and crops already there; bytes are those that must be read and written."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU visible")
    try:
        from baselines import tensor_augment
    except Exception as error:  # not installed, or not made for this torch
        pytest.skip(f"torchvision: {error}")
    config = engine(exact, "bf16").config
    ours_engine = Engine(config, statistics(), World(0, 1, torch.device(device)))
    decoded = batch(config, images=64 if device == "cuda" else 4)
    moved = decoded.to(torch.device(device))
    mean, std = MEAN.to(device), STD.to(device)
    sizes = (config.crops.global_px, config.crops.local_px)

    def ours() -> Patches:
        return ours_engine.patches(0, 0, moved)

    def theirs() -> list[list[Tensor]]:
        images = moved.images.views()
        return [
            tensor_augment.crop_pairs(images, table, px, mean, std)
            for table, px in zip(decoded.tables, sizes, strict=True)
        ]

    def same(patches: Patches, views: list[list[Tensor]]) -> None:
        got = without_cls_rows(patches.teacher_rows.float(), [tuple(m.teacher.shape) for m in patches.groups])
        assert (got - rows_of(views, patches)[2]).abs().mean() * 255 * STD.min() < 1.5

    rows = ours()
    written = sum(
        x.numel() * x.element_size() for x in (rows.student_rows, rows.target_pixels, rows.teacher_rows)
    )
    compare(
        benchmark, op="crop_patches",
        peer="torchvision v2 on tensors", ours=ours, theirs=theirs, same=same, device=device, dtype="bfloat16",
        shape=f"{len(decoded)} images 512 px, 2x448 + 8x96 pairs, {'exact' if exact else 'float'}", pairs=5,
        bytes=written + decoded.buffer.numel(), images=len(decoded),
    )  # fmt: skip
