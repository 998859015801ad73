"""How ranks part: at the end together, and after an error of one of them without waiting for the others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import needs_cuda, start_ranks

from pera_fast.distributed import world

RANK = """
import atexit, sys
from unittest.mock import patch
import torch.distributed as dist
from pera_fast import _cli
from pera_fast.config import ConfigError
from pera_fast.distributed import world

def main():
    with patch.object(dist, "get_backend", lambda *_: sys.argv[1]), world("cpu") as on:
        dist.barrier()
        if on.rank == 1:
            raise ConfigError("out: expected a disk with room, got a full one")
        dist.barrier()  # which never comes

atexit.register(print, "torn down")
_cli.run(main)
"""


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_an_error_on_one_rank_ends_it(backend: str) -> None:
    """NCCL, whose teardown may wait for ever, is played by gloo: what is seen is that nothing is torn down."""
    ranks = start_ranks(2, "-c", RANK, backend, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        (_, told), (out, error) = (rank.communicate(timeout=120) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == 2 and error.splitlines()[-1].startswith(
        "error: out: expected a disk with room"
    )
    assert out == ("" if backend == "nccl" else "torn down\n")
    assert ranks[0].returncode == 1 and "Traceback" in told  # its peer is gone: torchrun would have ended it


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("maps_memory", [True, False])
def test_the_allocator_is_set_up_unless_it_is(
    given: str | None, maps_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_GRAPH_REGISTER")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:512")
    for name, stand_in in (("is_available", True), ("device_count", 1), ("Stream", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=stand_in: value)
    for name in ("set_device", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    set_later: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", set_later.append)

    def empty(*_: int, device: str) -> None:
        if device == "cuda" and not maps_memory:
            raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", empty)
    with world("cuda"):
        found = {name: os.environ[name] for name in names if name in os.environ}
    if given:
        assert found == {given: "max_split_size_mb:512"}
    else:
        assert found == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"}
    assert set_later == ([] if given or maps_memory else ["expandable_segments:False"])


@needs_cuda
def test_the_allocators_blocks_grow() -> None:
    """The setting comes before the allocator reads it."""
    code = (
        "import torch; from pera_fast.distributed import world\n"
        "with world('cuda'): x = torch.ones(1, device='cuda')\n"
        "assert all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
