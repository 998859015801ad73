"""linear: against float64 and F.linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import three_way

from pera_fast import ops


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("rows", "features", "dim"), [(1, 1, 1), (7, 48, 20), (300, 384, 129)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_error_against_float64_is_no_larger_than_eager_pytorch(
    backend: str, rows: int, features: int, dim: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"linear={backend}")
    inputs = [torch.randn(rows, features), torch.randn(dim, features), torch.randn(dim)][: 2 + has_bias]
    three_way(ops.linear, F.linear, *inputs, slack=1e-6)


def test_rows_that_do_not_lie_together() -> None:
    x, weight = torch.randn(10, 24)[::2, ::3], torch.randn(4, 8)
    torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))


def test_autocast_decides_the_dtype() -> None:
    x, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    assert ops.linear(x, weight, bias).dtype == torch.float32


def test_no_rows() -> None:
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    out = ops.linear(x, weight)
    assert out.shape == (0, 3)
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (((2, 3, 4), (5, 4), None), r"x: expected shape \[R, F\], got \[2, 3, 4\]"),
        (((2, 4), (5, 3), None), r"weight: expected shape \[D, 4\], got \[5, 3\]"),
        (((2, 4), (5, 4), (4,)), r"bias: expected shape \[5\], got \[4\]"),
    ],
)
def test_bad_input(shapes: tuple[tuple[int, ...] | None, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.linear(*(None if shape is None else torch.zeros(shape) for shape in shapes))
