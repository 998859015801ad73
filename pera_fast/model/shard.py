"""Weights, gradients and moments shared out over ranks, for models that do not fit one GPU: FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pera_fast.model.vit import Branch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pera_fast.model.pera import PerA


def shard(
    model: PerA, mesh: DeviceMesh, precision: Literal["bf16", "fp32"], reduce_in: Literal["bf16", "fp32"]
) -> None:
    """Share out a PerA in place; its weights are then DTensors.

    Student's and teacher's branches are gathered one by one as they are run, in the dtype of their products, and
    let go of again. The rest (embeddings, norms, heads and prototypes, which the loss needs until its
    backward pass) is whole and in float32 from the forward to the end of the backward pass. The mesh's ranks
    take the mean of their gradients in reduce_in.
    """
    # Imported where it is used: it takes a second.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    in_products = MixedPrecisionPolicy(dtypes[precision], dtypes[reduce_in], cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, Branch):
            fully_shard(module, mesh=mesh, mp_policy=in_products)
    elsewhere = MixedPrecisionPolicy(torch.float32, dtypes[reduce_in], cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=elsewhere, reshard_after_forward=False)
    register_fsdp_forward_method(model, "student_z")


def whole(tensor: Tensor) -> Tensor:
    """A weight gathered from the ranks that share it, all of which must ask for it; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def by_rows(function: Callable[..., Tensor], *weights: Tensor) -> Tensor:
    """function(*weights), which makes a number [rows] of each row of the weights [rows, …], gathered likewise."""
    first: Any = weights[0]
    if not hasattr(first, "to_local"):
        return function(*weights)
    from torch.distributed.tensor import DTensor

    local = function(*(w.to_local() for w in weights))  # type: ignore[attr-defined]
    rows = DTensor.from_local(
        local, first.device_mesh, first.placements, run_check=False, shape=first.shape[:1], stride=(1,)
    )
    return rows.full_tensor()
