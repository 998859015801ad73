"""Every op that has a gradient, forward and backward in each dtype against float64, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_cuda, three_way
from torch import Tensor

from pera_fast import ops, reference

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
# Above the error of eager PyTorch in the same dtype, whose products may round in between more or less often.
SLACK = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GROUPS = [(5, 17), (3, 40), (1, 1)]
ROWS = sum(n * length for n, length in GROUPS)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.fixture(params=list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def check(
    function: Callable[..., Tensor], eager: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype
) -> None:
    three_way(function, eager, *inputs, slack=SLACK[dtype])


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As a network under autocast rounds what it puts into a product; not where everything is exact."""
    return x if x.dtype == torch.float64 else x.to(dtype)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_packed_attention(
    backend: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu" and backend == "triton":
        pytest.skip("Triton's kernels run on a GPU")
    monkeypatch.setenv("PERA_FAST_BACKEND", backend if backend == "auto" else f"packed_attention={backend}")
    qkv = torch.randn(ROWS, 3, 3, 64, device=device).to(dtype)
    check(
        lambda x: ops.packed_attention(x, GROUPS),
        lambda x: reference.packed_attention(x, GROUPS, 64**-0.5),
        qkv,
        dtype=dtype,
    )


@pytest.mark.parametrize("is_subset", [False, True])
def test_residual_norm(is_subset: bool, device: str, dtype: torch.dtype) -> None:
    dim, chosen = 96, torch.randperm(ROWS)[: ROWS // 2].sort().values.to(device)
    rows = chosen if is_subset else None
    count = len(chosen) if is_subset else ROWS
    scale = torch.rand(count, device=device) + 0.5 if is_subset else None
    x, branch = torch.randn(ROWS, dim, device=device), torch.randn(count, dim, device=device)
    weight, bias = torch.rand(dim, device=device) + 0.5, torch.randn(dim, device=device)

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        s, low = scale if scale is None else scale.to(x.dtype), rounded(branch, dtype)
        return torch.cat(ops.residual_norm(x, low, rows, s, None, weight, bias, dtype=low.dtype), dim=1)

    def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        low = rounded(branch, dtype).to(x.dtype)
        added = low if scale is None else low * scale[:, None].to(x.dtype)
        x = x + added if rows is None else x.index_add(0, rows, added)
        y = rounded(F.layer_norm(x, (dim,), weight, bias, 1e-6), dtype)
        return torch.cat((x, y), dim=1)

    check(ours, eager, x, branch, weight, bias, dtype=dtype)


def test_distill_loss(device: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        pytest.skip("gradients of 1e-7 need a scaler in float16, which PerA does without")
    z = [F.normalize(torch.randn(12, 32, device=device), dim=1) for _ in range(2)]
    v = [torch.randn(300, 32, device=device) for _ in range(2)]
    g = torch.rand(300, 1, device=device) + 0.5
    centre = torch.randn(300, device=device) / 10

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(z_student: Tensor, v_student: Tensor, g_student: Tensor) -> Tensor:
            same = [x.to(z_student.dtype) for x in (z[1], v[1], g, centre)]
            # Eager's own rounding under autocast is the measure for ours.
            with torch.autocast(
                device, dtype, enabled=z_student.dtype != torch.float64 and dtype != torch.float32
            ):
                return function(
                    z_student,
                    same[0],
                    (v_student, g_student),
                    (same[1], same[2]),
                    same[3],
                    0.1,
                    0.04,
                    [4, 4, 4],
                )

        return of

    check(loss(ops.distill_loss), loss(reference.distill_loss), z[0], v[0], g, dtype=dtype)


def test_koleo(device: str) -> None:
    z = F.normalize(torch.randn(2, 9, 32, device=device), dim=2)
    v, g = torch.randn(300, 32, device=device), torch.rand(300, 1, device=device) + 0.5
    check(lambda *x: ops.koleo(*x)[0], lambda *x: reference.koleo(*x)[0], z, v, g, dtype=torch.float32)


def test_linear(device: str, dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(*shape, device=device).to(dtype) for shape in ((ROWS, 96), (160, 96), (160,))
    )
    check(ops.linear, F.linear, x, weight, bias, dtype=dtype)


def test_patch_embed(device: str, dtype: torch.dtype) -> None:
    rows = torch.randn(ROWS, 48, device=device)
    weight, table = torch.randn(64, 48, device=device) / 7, torch.randn(30, 64, device=device)
    index = torch.randint(0, 30, (ROWS,), device=device)

    def ours(weight: Tensor, table: Tensor) -> Tensor:
        return ops.patch_embed(rounded(rows.to(weight.dtype), dtype), rounded(weight, dtype), table, index)

    def eager(weight: Tensor, table: Tensor) -> Tensor:
        product = rounded(rows.to(weight.dtype), dtype) @ rounded(weight, dtype).T
        return product.to(table.dtype) + table[index]

    check(ours, eager, weight, table, dtype=dtype)
