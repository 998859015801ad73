"""patch_embed: against the convolution it stands for, and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import three_way

from pera_fast import ops, reference
from pera_fast.reference import patchify


def test_equals_the_convolution_of_the_usual_vit() -> None:
    convolution = torch.nn.Conv2d(3, 24, 8, stride=8)
    images, positions = torch.randn(2, 3, 32, 40), torch.randn(20, 24)
    want = convolution(images).flatten(2).mT + positions
    rows = patchify(images, 8, "cpq")
    chosen = torch.tensor([[1, 4, 19], [0, 7, 8]])
    picked = rows.take_along_dim(chosen[:, :, None], 1).flatten(0, 1)
    weight, table = convolution.weight.flatten(1), positions + convolution.bias
    got = ops.patch_embed(picked, weight, table, chosen.flatten())
    torch.testing.assert_close(got, want.take_along_dim(chosen[:, :, None], 1).flatten(0, 1))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("rows", "features", "dim"), [(1, 3, 1), (7, 48, 20), (130, 768, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64_is_no_larger_than_eager_pytorch(
    backend: str, rows: int, features: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"patch_embed={backend}")
    pixels, index = torch.randn(rows, features).to(dtype), torch.randint(0, 9, (rows,))

    def ours(weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return ops.patch_embed(pixels.to(weight.dtype), weight, table, index)

    def eager(weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(index, table) + F.linear(pixels.to(weight.dtype), weight)

    slack = 1e-6 if dtype == torch.float32 else 1e-2
    three_way(ours, eager, torch.randn(dim, features).to(dtype), torch.randn(9, dim).to(dtype), slack=slack)


def test_float32_tokens_from_bfloat16_rows() -> None:
    pixels, index = torch.randn(5, 12).bfloat16(), torch.arange(5)
    weight, table = torch.randn(4, 12), torch.randn(5, 4)
    want = reference.patch_embed(pixels.double(), weight.bfloat16().double(), table.double(), index, None)
    plain = ops.patch_embed(pixels, weight, table, index)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = ops.patch_embed(pixels, weight, table, index)
    for got in (plain, under_autocast):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0.05)


def test_a_row_of_zeros_is_the_tables_entry() -> None:
    table = torch.randn(3, 8)
    got = ops.patch_embed(torch.zeros(2, 6), torch.randn(8, 6), table, torch.tensor([2, 0]))
    assert torch.equal(got, table[[2, 0]])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": torch.zeros(2, 6).int()}, r"rows: expected float \[R, F\], got torch.int32 \[2, 6\]"),
        ({"weight": torch.zeros(8, 5)}, r"weight: expected shape \[D, 6\], got \[8, 5\]"),
        ({"table": torch.zeros(3, 7)}, r"table: expected shape \[T, 8\], got \[3, 7\]"),
        ({"index": torch.zeros(3).long()}, r"index: expected int64 \[2\], got torch.int64 \[3\]"),
        ({"index": torch.zeros(2)}, r"index: expected int64 \[2\], got torch.float32 \[2\]"),
    ],
)
def test_bad_input(change: dict[str, torch.Tensor], sentence: str) -> None:
    good = {"rows": torch.zeros(2, 6), "weight": torch.zeros(8, 6), "table": torch.zeros(3, 8),
            "index": torch.zeros(2, dtype=torch.int64)}  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        ops.patch_embed(**{**good, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_pixels(dtype: torch.dtype) -> None:
    """Rows go to their places; the other tokens are the table's entries, with its gradient."""
    rows, place = torch.randn(3, 6).to(dtype), torch.tensor([4, 0, 2])
    weight, table = torch.randn(8, 6, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    index = torch.tensor([1, 3, 3, 0, 2])
    want = table[index].index_add(0, place, F.linear(rows.float(), weight.to(dtype).float()))
    got = ops.patch_embed(rows, weight, table, index, place)
    slack = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got, want, rtol=slack, atol=slack)
    assert torch.equal(got[[1, 3]], table[index[[1, 3]]])
    pairs = zip(*(torch.autograd.grad(x.square().sum(), (weight, table)) for x in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=slack, atol=10 * slack)
    with pytest.raises(ValueError, match=r"place: expected int64 \[3\], got torch.int64 \[2\]"):
        ops.patch_embed(rows, weight, table, index, place[:2])
