"""residual_norm: scatter-add of one branch, gather and LayerNorm for the next."""

import pytest
import torch
import torch.nn.functional as F

from pera_fast import ops, reference


def test_against_a_loop_over_rows() -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(9, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    rows, next_rows = torch.tensor([7, 0, 3, 4]), torch.tensor([8, 7, 1])
    scale = torch.tensor([1.5, 1.5, 2.0, 2.0])
    weight, bias = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    want = x.clone()
    for i, row in enumerate(rows.tolist()):
        want[row] += scale[i] * branch[i]
    got, normed = ops.residual_norm(x, branch, rows, scale, next_rows, weight, bias)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(normed, F.layer_norm(want[next_rows], (16,), weight, bias, 1e-6))


def test_all_rows_is_plain_add_and_norm() -> None:
    x, branch = torch.randn(5, 8), torch.randn(5, 8)
    got, normed = ops.residual_norm(x, branch, None, None, None, torch.ones(8), torch.zeros(8))
    torch.testing.assert_close(got, x + branch, rtol=0, atol=0)
    torch.testing.assert_close(normed, F.layer_norm(x + branch, (8,), eps=1e-6))
    unchanged, _ = ops.residual_norm(x, None, None, None, None, torch.ones(8), torch.zeros(8))
    assert unchanged is x
    torch.testing.assert_close(ops.residual_add(x, branch, None, None), x + branch, rtol=0, atol=0)


def test_gradients() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    branch = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    rows, next_rows, scale = torch.tensor([3, 1]), torch.tensor([0, 3]), torch.tensor([2.0, 0.5]).double()
    assert torch.autograd.gradcheck(
        lambda x, b, w, c: reference.residual_norm(x, b, rows, scale, next_rows, w, c, 1e-6),
        (x, branch, weight, bias),
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x: expected shape \[R, D\], got \[2, 3, 4\]"),
        ({"weight": torch.zeros(5)}, r"weight: expected shape \[4\], got \[5\]"),
        ({"branch": torch.zeros(2, 4)}, r"branch: expected shape \[6, 4\], got \[2, 4\]"),
        (
            {"rows": torch.tensor([1]), "branch": torch.zeros(1, 4), "scale": torch.ones(2)},
            r"scale: .* got \[2\]",
        ),
    ],
)
def test_bad_input(arguments: dict[str, torch.Tensor], sentence: str) -> None:
    good = {
        "x": torch.zeros(6, 4), "branch": None, "rows": None, "scale": None, "next_rows": None,
        "weight": torch.ones(4), "bias": torch.zeros(4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        ops.residual_norm(**{**good, **arguments})
