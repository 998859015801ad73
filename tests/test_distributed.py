"""How ranks part: at the end together, and after an error of one of them without waiting for the others."""

from __future__ import annotations

import subprocess

import pytest
from conftest import start_ranks

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
