"""The few things one rank needs to know of the others. One process without torchrun is rank 0 of 1."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pera_fast.config import ConfigError


@dataclass(frozen=True)
class World:
    rank: int
    ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        if self.ranks > 1:
            flag = self.sum(torch.full((), float(flag), device=self.device)).item() > 0
        return flag

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's tensor of the same shape, by rank, without gradient."""
        values = values.detach().contiguous()
        if self.ranks == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.ranks)]
        dist.all_gather(parts, values)
        return parts

    def agree(self, **values: Any) -> None:
        """ConfigError on every rank, naming the first of these values that is not the same on all of them."""
        if self.ranks == 1:
            return
        every: list[dict[str, Any]] = [{}] * self.ranks
        dist.all_gather_object(every, values)
        for name in values:
            for rank, theirs in enumerate(every):
                if theirs[name] != every[0][name]:
                    raise ConfigError(
                        f"{name}: expected the same on every rank, got {every[0][name]} on rank 0, "
                        f"{theirs[name]} on rank {rank}"
                    )

    def mesh(self, per_node: bool) -> DeviceMesh:
        """All ranks sharing one model, or the ranks of each node sharing a copy of it."""
        device, here = self.device.type, int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
        if not per_node or here == self.ranks:
            return init_device_mesh(device, (self.ranks,), mesh_dim_names=("shard",))
        if self.ranks % here:
            raise ConfigError(
                f"shard: expected equally many ranks on every node, got {self.ranks} in all, {here} here"
            )
        return init_device_mesh(device, (self.ranks // here, here), mesh_dim_names=("replicate", "shard"))

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(box)
        return box[0]


def _store(timeout: timedelta) -> dist.Store:
    """Where the ranks find each other: torchrun's store, or after it one that this start alone writes to.

    torchrun keeps its store over restarts (torch 2.13), so a rank may find the address of one that was killed there,
    and both then wait for each other without end. So rank 0 opens a store of its own and leaves its port in torchrun's:
    of an earlier start's port nobody answers any more.
    """
    shared, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host, key = os.environ["MASTER_ADDR"], "pera_fast/port"
    if rank == 0:
        own = dist.TCPStore(host, 0, ranks, is_master=True, timeout=timeout, wait_for_workers=False)
        shared.set(key, str(own.port))
        return own
    give_up = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            own = dist.TCPStore(
                host, int(shared.get(key)), ranks, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False
            )  # fmt: skip
        except dist.DistError:
            if time.monotonic() > give_up:
                raise
        else:
            own.set_timeout(timeout)
            return own


def _use_gpu(number: int) -> None:
    """Make a GPU the current one, and have PyTorch's allocator there extend its blocks instead of adding others, unless
    the user has set it up: without, a step leaves a seventh of the memory unused between blocks, and a recorded one a
    quarter. NCCL must not register such memory for a recorded step.
    """
    is_set_up = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if not is_set_up:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    torch.cuda.set_device(number)  # which reads the setting
    if not is_set_up:
        try:
            torch.empty(1, device="cuda")
        except RuntimeError:  # not every driver maps memory to addresses
            torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


@contextmanager
def world(device_name: str) -> Iterator[World]:
    """Join the ranks that torchrun started; NCCL on CUDA, gloo on CPU. Leaves the group at the end, unless an error
    comes out of it and the group is NCCL's: leaving that one waits for the others, who may wait for this rank.
    `_cli.run` then ends the process where it is.
    """
    ranks, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    has_cuda = torch.cuda.is_available()
    if device_name == "cuda" and not has_cuda:
        raise ConfigError("device: expected a machine with a CUDA GPU, got none that this torch can use")
    use_cuda = has_cuda and device_name != "cpu"
    if use_cuda and local_rank >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ConfigError(f"nproc-per-node: expected at most one rank per GPU, {gpus}, got rank {local_rank}")
    if use_cuda:
        _use_gpu(local_rank)
        # Graphs cannot be recorded on the default stream, nor can the gradients of what was made there.
        torch.cuda.set_stream(torch.cuda.Stream())
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if ranks > 1:
        # The others wait while rank 0 evaluates, which may take longer than the default of ten minutes.
        timeout = timedelta(hours=2)
        dist.init_process_group(
            "nccl" if use_cuda else "gloo", store=_store(timeout), rank=int(os.environ["RANK"]), world_size=ranks,
            timeout=timeout,
        )  # fmt: skip
    if int(os.environ.get("RANK", "0")) > 0:  # what all ranks would say is said once
        logging.getLogger("pera_fast").setLevel(logging.WARNING)
    has_failed = True
    try:
        yield World(int(os.environ.get("RANK", "0")), ranks, device)
        has_failed = False
    finally:
        if ranks > 1 and not (has_failed and dist.get_backend() == "nccl"):
            # A DistributedDataParallel that outlives its group aborts the process at its end, one time in five
            # (torch 2.13, gloo); it is part of reference cycles, so it has to be collected.
            gc.collect()
            dist.destroy_process_group()
