"""ema_update: the teacher's moving average alone."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_cuda, run_on_isa
from torch import Tensor

from pera_fast import ops

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(7,), (0,), (33, 17), (4096,), (4097,), (3, 5000)]


def tensors(dtype: torch.dtype, seed: int, device: str = "cpu") -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(device, dtype) for shape in SHAPES]


def updated(
    teacher: torch.dtype = FP32, param: torch.dtype = FP32, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Teachers and shadows (every other has one) after two updates."""
    teachers = tensors(teacher, 0, device)
    shadows = [torch.zeros_like(t, dtype=BF16) if i % 2 else None for i, t in enumerate(teachers)]
    for step in range(2):
        ops.ema_update(teachers, tensors(param, 1 + step, device), 0.996, shadows)
    return teachers, shadows


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("param", [FP32, BF16])
def test_three_way(param: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"ema_update={backend}")
    ours, shadows = updated(FP32, param)
    assert all(low is None or torch.equal(low, t.bfloat16()) for t, low in zip(ours, shadows, strict=True))
    monkeypatch.setenv("PERA_FAST_BACKEND", "ema_update=reference")
    theirs, _ = updated(FP32, param)
    monkeypatch.undo()
    exact = tensors(torch.float64, 0)
    exact = [t.float().double() for t in exact]
    for step in range(2):
        for t, p in zip(exact, tensors(param, 1 + step), strict=True):
            t.lerp_(p.double(), 1 - 0.996)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= (b - c).norm() + 1e-7 * c.norm()


@pytest.mark.parametrize("teacher", [FP32, BF16])
def test_the_shadow_is_the_teacher_rounded(teacher: torch.dtype) -> None:
    for t, low in zip(*updated(teacher), strict=True):
        assert low is None or torch.equal(low, t.bfloat16())


def test_float64_goes_to_pytorch() -> None:
    teachers, params = [torch.zeros(3, dtype=torch.float64)], [torch.ones(3, dtype=torch.float64)]
    ops.ema_update(teachers, params, 0.9)
    torch.testing.assert_close(teachers[0], torch.full((3,), 0.1, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_equal_bits_on_every_instruction_set(capability: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.save(updated()[0], tmp_path / "expected.pt")
    run_on_isa(
        capability,
        f"""
import torch
from test_ema_update import updated
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
assert all(torch.equal(a, b) for a, b in zip(expected, updated()[0]))
""",
    )


def test_the_momentum_may_be_a_tensor_and_there_may_be_nothing() -> None:
    ops.ema_update([], [], 0.9)
    a, b = tensors(FP32, 0), tensors(FP32, 0)
    ops.ema_update(a, tensors(FP32, 1), 0.75)
    ops.ema_update(b, tensors(FP32, 1), torch.tensor(0.75))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_bad_input() -> None:
    t = [torch.zeros(3)]
    with pytest.raises(ValueError, match="params: expected 1 tensors, one for each of teachers, got 0"):
        ops.ema_update(t, [], 0.9)
    with pytest.raises(ValueError, match=r"params\[0\]: expected shape \[3\], got \[2\]"):
        ops.ema_update(t, [torch.zeros(2)], 0.9)
    with pytest.raises(ValueError, match=r"shadows\[0\]: expected torch.bfloat16, got torch.float32"):
        ops.ema_update(t, t, 0.9, t)


def test_opcheck() -> None:
    t, empty = tensors(FP32, 0)[:1], torch.empty(0)
    momentum = torch.tensor([0.9], dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.pera_fast.ema_update.default, (t, tensors(FP32, 1)[:1], [empty], momentum)
    )


@needs_cuda
@pytest.mark.parametrize("teacher", [FP32, BF16])
@pytest.mark.parametrize("param", [FP32, BF16])
def test_cuda_equals_cpu(teacher: torch.dtype, param: torch.dtype) -> None:
    for a, b in zip(updated(teacher, param, "cuda")[0], updated(teacher, param)[0], strict=True):
        assert torch.equal(a.cpu(), b)
