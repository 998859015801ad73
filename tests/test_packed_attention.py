"""packed_attention: each sequence attends to itself alone, as softmax(q kᵀ scale) v says."""

import pytest
import torch
from conftest import three_way

from pera_fast import ops, reference

MIXES = [[(4, 8), (3, 23)], [(2, 158), (5, 8)], [(1, 1)], [(0, 5), (2, 3)], [(7, 13)]]


@pytest.mark.parametrize("groups", MIXES)
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numerics(groups: list[tuple[int, int]], head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(n * length for n, length in groups), 3, 2, head_dim).to(dtype)
    slack = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    scale = head_dim**-0.5
    three_way(
        lambda x: ops.packed_attention(x, groups), lambda x: reference.packed_attention(x, groups, scale), qkv,
        slack=slack,
    )  # fmt: skip


def test_sequences_do_not_see_each_other() -> None:
    qkv = torch.randn(3 * 4 + 2 * 5, 3, 2, 8)
    groups = [(3, 4), (2, 5)]
    before = ops.packed_attention(qkv, groups)
    qkv[4:8] = 100.0  # the second sequence
    after = ops.packed_attention(qkv, groups)
    torch.testing.assert_close(after[:4], before[:4], rtol=0, atol=0)
    torch.testing.assert_close(after[8:], before[8:], rtol=0, atol=0)


def test_uniform_scores_average_the_values_exactly() -> None:
    qkv = torch.zeros(6, 3, 1, 4)
    qkv[:, 2, 0, 0] = torch.tensor([1.0, 3.0, 5.0, 7.0, 2.0, 4.0])
    got = ops.packed_attention(qkv, [(1, 4), (1, 2)])[:, 0, 0]
    assert got.tolist() == [4.0] * 4 + [3.0] * 2


def test_non_contiguous_input() -> None:
    wide = torch.randn(10, 3, 2, 16)
    torch.testing.assert_close(
        ops.packed_attention(wide[..., ::2], [(2, 5)]),
        ops.packed_attention(wide[..., ::2].contiguous(), [(2, 5)]),
    )


@pytest.mark.parametrize(
    ("shape", "groups", "sentence"),
    [
        ((6, 2, 1, 4), [(1, 6)], r"qkv: expected shape .* got \[6, 2, 1, 4\]"),
        ((6, 3, 1, 4), [(1, 5)], r"groups: .* 6 rows of qkv, got 5"),
        ((6, 3, 1, 4), [(1, 6), (1, 0)], r"groups: expected \(sequences >= 0, length >= 1\)"),
    ],
)
def test_bad_input(shape: tuple[int, ...], groups: list[tuple[int, int]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.packed_attention(torch.zeros(shape), groups)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="qkv: expected a floating-point tensor, got torch.int64"):
        ops.packed_attention(torch.zeros(6, 3, 1, 4, dtype=torch.int64), [(1, 6)])


def test_gradients_of_the_reference() -> None:
    qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.packed_attention(x, [(2, 2), (1, 3)], 0.5), qkv)
