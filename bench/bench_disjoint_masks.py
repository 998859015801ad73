"""disjoint_masks against argsort(rand) and boolean masks, the authors' data flow. Their randomness differs."""

import pytest
import torch
from compare import DEVICES, compare

from pera_fast import ops


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("crops", "counts"), [(128, (784, 157, 157)), (512, (36, 7, 7)), (24, (13248, 9273, 0))]
)
def bench_disjoint_masks(benchmark, crops: int, counts: tuple[int, int, int], device: str) -> None:
    patches, students, targets = counts
    index = torch.arange(crops, device=device)

    def ours() -> tuple[torch.Tensor, ...]:
        return ops.disjoint_masks(
            index, seed=0, step=0, num_patches=patches, num_student=students, num_target=targets
        )

    def theirs() -> tuple[torch.Tensor, ...]:
        rank = torch.argsort(torch.rand(crops, patches, device=device), dim=1)
        student, visible = rank < students, rank < students + targets
        masks = (student, visible & ~student, ~visible)
        return tuple(mask.nonzero()[:, 1].view(crops, -1) for mask in masks)

    def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape and (x.diff(dim=1) > 0).all() and (y.diff(dim=1) > 0).all()

    compare(
        benchmark, op="disjoint_masks",
        peer="argsort + boolean masks", ours=ours, theirs=theirs, same=same, dtype="int64", device=device,
        shape=f"{crops} crops of {patches}",
    )  # fmt: skip
