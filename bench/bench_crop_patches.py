"""crop_patches against Pillow's full crops of both views, at the paper's crop sizes."""

import torch
from baselines.pillow_augment import crop_pairs
from compare import compare
from workload import IMAGENET, batch, small_vit_s

from pera_fast import ops
from pera_fast.ops import _dispatch
from pera_fast.reference import patchify


def bench_crop_patches(benchmark) -> None:
    config = small_vit_s()
    crops = config.crops
    decoded = batch(config, images=2)
    mean, std = (torch.tensor(x) for x in IMAGENET)
    sizes = (crops.global_px, crops.local_px)
    chosen = []
    for table, px in zip(decoded.tables, sizes, strict=True):
        students, targets, teachers = crops.mask_counts((px // 16) ** 2)
        chosen.append(
            ops.disjoint_masks(
                torch.arange(len(table.image)), seed=0, step=0, num_patches=students + targets + teachers,
                num_student=students, num_target=targets,
            )
        )  # fmt: skip
    arrays = [image.numpy() for image in decoded.images()]

    def ours() -> list[torch.Tensor]:
        rows = []
        for table, px, (student, target, teacher) in zip(decoded.tables, sizes, chosen, strict=True):
            rows += ops.crop_patches(
                decoded.images(), decoded.low, decoded.high, table, student, target, teacher, crop_px=px,
                patch_px=16, mean=mean, std=std,
            )  # fmt: skip
        return rows

    def theirs() -> list[torch.Tensor]:
        return [
            view
            for table, px in zip(decoded.tables, sizes, strict=True)
            for view in crop_pairs(arrays, table, px, mean, std)
        ]

    def same(rows: list[torch.Tensor], views: list[torch.Tensor]) -> None:
        # Pillow rounds to 8 bit after every stage: a mean difference below 2.5 levels of 255.
        for got, view, patches in zip(rows[::3], views[::2], (c[0] for c in chosen), strict=True):
            want = torch.stack([patchify(v, 16, "cpq")[p] for v, p in zip(view, patches, strict=True)])
            assert (got - want).abs().mean() < 2.5 / 255 / 0.224

    compare(
        benchmark, op="crop_patches", backend=_dispatch.resolve("crop_patches", "cpu").backend,
        peer="Pillow crops of both views", ours=ours, theirs=theirs, same=same, pairs=5,
        shape="2 images 512 px, 2x448 + 8x96 pairs",
    )  # fmt: skip
