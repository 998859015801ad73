"""Offsets past 2^31: what lies beyond is read and written like what lies before. Skipped where memory is short."""

from __future__ import annotations

import fcntl
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_crop_patches import table

from pera_fast import ops, reference

BEYOND = 2**31 + 4096
MARGIN = 4 << 30  # for the tests beside this one


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture
def needs_gb() -> Iterator[Callable[[float], None]]:
    """Skips without so many free gigabytes; one such test at a time, whichever process it is in."""
    with (Path(tempfile.gettempdir()) / "pera_fast_large.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def check(gigabytes: float) -> None:
            free = (available_bytes() - MARGIN) / 1e9
            if free < gigabytes:
                pytest.skip(f"needs {gigabytes:g} GB of free memory, found {free:.1f}")

        yield check


def test_grad_norm(needs_gb: Callable[[float], None]) -> None:
    needs_gb(4.4)
    gradient = torch.zeros(BEYOND, dtype=torch.bfloat16)
    gradient[-1], gradient[2**31], gradient[2**31 - 1] = 3, 4, 12
    assert ops.grad_norm([gradient]).item() == 13


def test_ema_update(needs_gb: Callable[[float], None]) -> None:
    needs_gb(8.7)
    teacher, param = (torch.zeros(BEYOND, dtype=torch.bfloat16) for _ in range(2))
    param[2**31 - 2 :] = 2
    ops.ema_update([teacher], [param], 0.5)
    assert teacher[2**31 - 2 :].eq(1).all() and not teacher[2**31 - 100 : 2**31 - 2].any() and teacher[0] == 0


def test_adamw_ema(needs_gb: Callable[[float], None]) -> None:
    needs_gb(17.5)
    param, gradient, average, square = (torch.zeros(BEYOND, dtype=torch.bfloat16) for _ in range(4))
    gradient[2**31 - 2 :] = 1
    ops.adamw_ema(
        [param], [gradient], [average], [square], [torch.zeros(())], grad_norm=torch.tensor(1.0), lr=0.5
    )
    assert param[2**31 - 2 :].eq(-0.5).all() and not param[2**31 - 100 : 2**31 - 2].any()


def test_packed_attention(needs_gb: Callable[[float], None]) -> None:
    length, dim = 16, 64
    sequences = BEYOND // (3 * dim * length) + 1
    needs_gb(2 * 1.34 * 2 * sequences * length * 3 * dim / 1e9)
    qkv = torch.zeros(sequences * length, 3, 1, dim, dtype=torch.bfloat16)
    last = slice(-3 * length, None)
    qkv[last] = torch.randn(3 * length, 3, 1, dim, dtype=torch.bfloat16)
    gradient = torch.zeros(len(qkv), 1, dim, dtype=torch.bfloat16)
    gradient[last] = 1
    qkv.requires_grad_()
    out = ops.packed_attention(qkv, [(sequences, length)])
    out.backward(gradient)
    assert qkv.grad is not None
    alone = qkv.detach()[last].float().requires_grad_()
    expected = reference.packed_attention(alone, [(3, length)], dim**-0.5)
    expected.backward(gradient[last].float())
    assert alone.grad is not None
    torch.testing.assert_close(out[last].float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(qkv.grad[last].float(), alone.grad, rtol=2e-2, atol=2e-2)
    assert not out[-4 * length : -3 * length].any() and not out[:length].any()


def test_residual_norm(needs_gb: Callable[[float], None]) -> None:
    dim = 64
    needs_gb(4.0 * BEYOND / 1e9)
    x = torch.zeros(BEYOND // dim, dim)
    rows = torch.tensor([5, len(x) - 1, 2**31 // dim])
    branch = torch.randn(3, dim)
    with torch.no_grad():
        after, y = ops.residual_norm(x, branch, rows, None, rows, None, None, inplace=True)
    assert torch.equal(after[rows], branch) and after[7].eq(0).all()
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(branch, (dim,), eps=1e-6))


@pytest.mark.parametrize("where", ["second image", "within one image"])
def test_crop_patches(where: str, needs_gb: Callable[[float], None]) -> None:
    needs_gb(5)
    small = torch.randint(0, 255, (3, 40, 40), dtype=torch.uint8)
    if where == "second image":
        before = torch.zeros(3, 1, BEYOND // 3 + 1, dtype=torch.uint8)
        sources, box, image = [before, small], [0, 0, 40, 40], 1
    else:
        side = math.isqrt(BEYOND // 3) + 1
        large = torch.zeros(3, side, side, dtype=torch.uint8)
        large[:, -40:, -40:] = small
        sources, box, image = [large], [side - 40, side - 40, 40, 40], 0

    def crops(sources: list[torch.Tensor], box: list[int], image: int) -> torch.Tensor:
        masks = ops.disjoint_masks(
            torch.tensor([0]), seed=0, step=0, num_patches=16, num_student=5, num_target=5
        )
        rows = ops.crop_patches(
            ops.pack_images(sources), table([box], image=[image]), *masks, crop_px=32, patch_px=8,
            mean=torch.zeros(3), std=torch.ones(3),
        )  # fmt: skip
        return torch.cat([part.flatten() for part in rows])

    assert torch.equal(crops(sources, box, image), crops([small], [0, 0, 40, 40], 0))


def test_distill_loss(needs_gb: Callable[[float], None]) -> None:
    dim, tail = 256, 1000
    prototypes = BEYOND // dim + tail
    needs_gb(4.0 * prototypes * dim / 1e9)
    v = torch.ones(prototypes, dim)
    v[-tail:, : dim // 2] = -1  # at right angles to the others
    g, z = torch.ones(prototypes, 1), torch.full((1, dim), dim**-0.5)
    with torch.no_grad():
        found = ops.distill_loss(z, z, (v, g), (v, g), torch.zeros(prototypes), 1.0, 0.05, [1])
    # Logits are 1 but for the tail's, which are 0; p of the teacher's, log q of the student's.
    logits = torch.tensor([1.0, 0.0], dtype=torch.float64)
    counts = torch.tensor([prototypes - tail, tail], dtype=torch.float64)
    p, q = (torch.exp(logits / t) / (counts * torch.exp(logits / t)).sum() for t in (0.05, 1.0))
    torch.testing.assert_close(found.double(), -(counts * p * q.log()).sum()[None], rtol=1e-5, atol=0)
