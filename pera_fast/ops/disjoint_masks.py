"""Which patches of each crop the student, the target and the teacher see."""

from __future__ import annotations

import torch
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch, _library


def disjoint_masks(
    crop_index: Tensor, *, seed: int, step: int, num_patches: int, num_student: int, num_target: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw, for every crop, random disjoint sets of patches that together cover the crop.

    Patch p of crop c draws the key Philox4x32-10(key=seed, counter=(p // 4, step, c))[p % 4]. In ascending
    order of (key, p) the first num_student patches are the student's, the next num_target the target's, the
    rest the teacher's. So a crop's sets depend on (seed, step, c) alone: not on the batch it is in, the
    device, the backend or the number of processes. Source: PerA (arXiv 2505.19447), Salmon et al., SC 2011.

    Args:
        crop_index: int64 [n], the number of each crop within its step, counted over all processes.
        seed: 0 <= seed < 2**64.
        step: 0 <= step < 2**32, the optimiser step (or micro-batch) that the crops are drawn for.
        num_patches: patches per crop.
        num_student, num_target: patches of the student (at least 1) and the target (0: none); at least one
            patch is left to the teacher.

    Returns:
        student int64 [n, num_student], target int64 [n, num_target] and teacher int64
        [n, num_patches - num_student - num_target]: raster patch indices, every row ascending.

    Raises:
        ValueError: an argument outside of the above. BackendError: see `pera_fast.ops.BackendError`.
    """
    if crop_index.dtype != torch.int64 or crop_index.dim() != 1:
        raise ValueError(
            f"crop_index: expected int64 [n], got {str(crop_index.dtype).removeprefix('torch.')} "
            f"{list(crop_index.shape)}"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    if not 0 <= step < 2**32:
        raise ValueError(f"step: expected 0 <= step < 2**32, got {step}")
    if not 0 < num_patches < 2**31:
        raise ValueError(f"num_patches: expected 1 <= num_patches < 2**31, got {num_patches}")
    if num_student < 1:
        raise ValueError(f"num_student: expected at least 1, got {num_student}")
    if num_target < 0:
        raise ValueError(f"num_target: expected at least 0, got {num_target}")
    if num_student + num_target >= num_patches:
        raise ValueError(
            f"num_student + num_target: expected fewer than num_patches = {num_patches}, to leave the "
            f"teacher at least one patch, got {num_student} + {num_target}"
        )
    function = _dispatch.function("disjoint_masks", crop_index.device.type)
    return function(crop_index, seed, step, num_patches, num_student, num_target)


def _compiled(
    crop_index: Tensor, seed: int, step: int, num_patches: int, num_student: int, num_target: int
) -> tuple[Tensor, Tensor, Tensor]:
    signed_seed = seed - 2**64 if seed >= 2**63 else seed  # the op's int is signed; the bits are the same
    return torch.ops.pera_fast.disjoint_masks(
        crop_index, signed_seed, step, num_patches, num_student, num_target
    )


def _fake(
    crop_index: Tensor, seed: int, step: int, num_patches: int, num_student: int, num_target: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = crop_index.shape[0]
    return (
        crop_index.new_empty((n, num_student)),
        crop_index.new_empty((n, num_target)),
        crop_index.new_empty((n, num_patches - num_student - num_target)),
    )


if _library.why_no_cpp() is None:
    torch.library.register_fake("pera_fast::disjoint_masks", _fake)

_dispatch.register("disjoint_masks", "cuda", _compiled, _library.why_no_cuda)
_dispatch.register("disjoint_masks", "cpp", _compiled, _library.why_no_cpp)
_dispatch.register("disjoint_masks", "reference", reference.disjoint_masks)
