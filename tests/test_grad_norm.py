"""grad_norm: right, and the same whenever it is taken."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import needs_cuda, run_on_isa
from torch import Tensor

from pera_fast import ops

SHAPES = [(7,), (0,), (33, 17), (4096,), (4097,), (3, 50000), (1,)]


def gradients(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [
        (torch.randn(shape, generator=random) * 10.0 ** (i - 3)).to(device, dtype)
        for i, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_three_way(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"grad_norm={backend}")
    grads = gradients(dtype)
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    norm = ops.grad_norm(grads)
    assert norm.dtype == torch.float32 and norm.shape == ()
    theirs = abs(torch.nn.utils.get_total_norm(grads).double() - exact)
    assert abs(norm.double() - exact) <= theirs + 2**-24 * exact  # one rounding to float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 5), (5, 149999), (6, 0)])
def test_what_is_not_finite_is_seen(value: float, place: tuple[int, int]) -> None:
    grads = gradients()
    grads[place[0]].view(-1)[place[1]] = value
    assert not math.isfinite(ops.grad_norm(grads))


def test_large_numbers_do_not_overflow() -> None:
    assert ops.grad_norm([torch.full((4,), 1e25)]) == pytest.approx(2e25)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equal_bits_for_any_number_of_threads(threads: int) -> None:
    before, first = torch.get_num_threads(), ops.grad_norm(gradients())
    torch.set_num_threads(threads)
    try:
        assert ops.grad_norm(gradients()) == first
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_equal_bits_on_every_instruction_set(capability: str) -> None:
    expected = float(ops.grad_norm(gradients())).hex()
    run_on_isa(
        capability,
        f"""
from test_grad_norm import gradients
from pera_fast import ops
assert float(ops.grad_norm(gradients())).hex() == {expected!r}
""",
    )


def test_layouts_and_nothing() -> None:
    grads = gradients()
    grads[2] = grads[2].T
    strided = torch.stack((grads[3], grads[3]), 1)[:, 0]
    assert ops.grad_norm(grads) == pytest.approx(ops.grad_norm([*grads[:3], strided, *grads[4:]]))
    assert ops.grad_norm([]) == 0 and ops.grad_norm([torch.empty(0)]) == 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"grads\[1\]: expected device cpu, got meta"):
        ops.grad_norm([torch.ones(2), torch.ones(2, device="meta")])


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.pera_fast.grad_norm.default, (gradients(), torch.empty(())))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype: torch.dtype) -> None:
    on_device = gradients(dtype, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = ops.grad_norm(on_device)
        again = ops.grad_norm(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(norm, again)
    torch.testing.assert_close(norm.cpu(), ops.grad_norm(gradients(dtype)), rtol=1e-6, atol=0)
