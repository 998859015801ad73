"""linear: against float64 and F.linear."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import three_way
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pera_fast import ops

linear_module = sys.modules["pera_fast.ops.linear"]  # the function of that name hides it
_here = linear_module._traits()


def _traits(is_amd_avx512: bool, has_bfloat16: bool) -> tuple[bool, ...]:
    """Of another processor, with this build of torch."""
    return _here._replace(is_amd_avx512=is_amd_avx512, has_bfloat16=has_bfloat16)


@pytest.mark.parametrize(("backend", "is_amd"), [("torch", False), ("torch", True), ("reference", False)])
@pytest.mark.parametrize(
    ("rows", "features", "dim"), [(1, 1, 1), (7, 48, 20), (307, 384, 129), (307, 20, 48), (3072, 16, 33)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_error_against_float64_is_no_larger_than_eager_pytorch(
    backend: str,
    is_amd: bool,
    rows: int,
    features: int,
    dim: int,
    has_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"linear={backend}")
    monkeypatch.setattr(linear_module, "_traits", lambda: _traits(is_amd, True))
    inputs = [torch.randn(rows, features), torch.randn(dim, features), torch.randn(dim)][: 2 + has_bias]
    three_way(ops.linear, F.linear, *inputs, slack=1e-6)


def test_rows_that_do_not_lie_together() -> None:
    x, weight = torch.randn(10, 24)[::2, ::3], torch.randn(4, 8)
    torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))


def test_autocast_decides_the_dtype() -> None:
    x, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            ops.linear(x, weight, bias), F.linear(x, weight, bias), rtol=2**-7, atol=2**-7
        )
    assert ops.linear(x, weight, bias).dtype == torch.float32


@pytest.mark.parametrize("traits", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("rows", "features", "dim"), [(1, 1, 1), (7, 48, 20), (3072, 48, 129)])
def test_bfloat16_with_and_without_instructions(
    rows: int, features: int, dim: int, traits: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three-way, under autocast from float32 and on bfloat16 tensors. traits: an AMD processor, bfloat16 is quick."""
    monkeypatch.setattr(linear_module, "_traits", lambda: _traits(*traits))
    inputs = [torch.randn(rows, features), torch.randn(dim, features), torch.randn(dim)]

    def under_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=tensors[0].dtype == torch.float32):
                return function(*tensors)

        return call

    three_way(under_autocast(ops.linear), under_autocast(F.linear), *inputs, slack=2e-3)
    three_way(ops.linear, F.linear, *(x.bfloat16() for x in inputs), slack=2e-3)


@pytest.mark.parametrize("traits", [(False, False), (True, True)])
def test_what_is_kept_for_the_backward_pass_is_bfloat16(
    traits: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_traits", lambda: _traits(*traits))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            ops.linear(x, weight)
    assert [k.dtype for k in kept] == [torch.bfloat16] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_without_onednn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = (
        torch.randn(9, 24, dtype=dtype),
        torch.randn(4, 24, dtype=dtype),
        torch.randn(4, dtype=dtype),
    )
    want = F.linear(x, weight, bias)
    monkeypatch.setattr(linear_module, "_traits", lambda: linear_module._Traits(True, True, False, False))
    torch.testing.assert_close(ops.linear(x, weight, bias), want)


DTYPES = [torch.float32, torch.bfloat16]


def _of_norm(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A product of x * scale + shift that keeps x, as residual_norm and it do between them."""
    y = torch.addcmul(shift, x, scale).to(x.dtype)
    return ops.linear(y, weight, bias, norm=(x.detach(), scale.detach(), shift.detach()))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("traits", [(False, False), (True, False), (False, True), (True, True), None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "features", "dim"), [(1, 1, 1), (7, 48, 20), (307, 96, 129), (3072, 16, 33)]
)
def test_gradients_from_normalised_rows(
    rows: int, features: int, dim: int, dtype: torch.dtype, traits: tuple[bool, bool] | None, backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three-way. traits: None stands for a GPU's path. Scale and shift are far from 1 and 0, as after training."""
    monkeypatch.setenv("PERA_FAST_BACKEND", f"linear={backend}")
    if traits is not None:
        monkeypatch.setattr(linear_module, "_traits", lambda: _traits(*traits))
    x, weight, bias = torch.randn(rows, features), torch.randn(dim, features), torch.randn(dim)
    scale, shift = torch.randn(features).exp(), 2 * torch.randn(features)

    def eager(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(torch.addcmul(shift, x, scale).to(x.dtype), weight, bias)

    inputs = [t.to(dtype) for t in (x, scale, shift, weight, bias)]
    with linear_module.plain() if traits is None else nullcontext():
        three_way(_of_norm, eager, *inputs, slack=1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("traits", [(False, False), (True, True), None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_in_parts(
    has_bias: bool,
    dtype: torch.dtype,
    traits: tuple[bool, bool] | None,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three-way, views of another matrix and a part without rows among them, under a checkpoint. traits: as above."""
    monkeypatch.setenv("PERA_FAST_BACKEND", f"linear={backend}")
    if traits is not None:
        monkeypatch.setattr(linear_module, "_traits", lambda: _traits(*traits))
    inputs = [torch.randn(3, 50, 24), torch.randn(7, 24), torch.randn(40, 24), torch.randn(40)][
        : 3 + has_bias
    ]

    def parts(x: Tensor, y: Tensor) -> list[Tensor]:
        return [x[1], y, y[:0], x[:, :9].transpose(0, 1).flatten(0, 1)]

    def ours(x: Tensor, y: Tensor, *layer: Tensor) -> Tensor:
        return checkpoint(lambda *of: ops.linear(of, *layer), *parts(x, y), use_reentrant=False)

    def eager(x: Tensor, y: Tensor, *layer: Tensor) -> Tensor:
        return F.linear(torch.cat(parts(x, y)), *layer)

    with linear_module.plain() if traits is None else nullcontext():
        three_way(ours, eager, *(t.to(dtype) for t in inputs), slack=1e-6 if dtype == torch.float32 else 2e-3)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = (f(*inputs) for f in (ours, eager))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-4)


def test_parts_are_not_joined() -> None:
    """Nothing of their size is made in the forward pass but the product, nor kept but the parts."""
    weight, rows, kept = torch.randn(3, 8, requires_grad=True), torch.randn(2, 500, 8), []
    with (
        linear_module.plain(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        Shapes() as made,
    ):
        ops.linear(rows.unbind(), weight)
    assert [1000, 8] not in made.shapes and [1000, 3] in made.shapes
    assert [k.data_ptr() for k in kept] == [weight.data_ptr(), *(x.data_ptr() for x in rows)]


class Shapes(TorchDispatchMode):
    """Of all that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.shapes += [list(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out


@pytest.mark.parametrize("precision", DTYPES)
def test_normalised_rows_are_kept_instead(precision: torch.dtype) -> None:
    """Under autocast as outside, of which nothing else is left once the caller has let go of x."""
    weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(3, requires_grad=True)
    n = torch.randn(5, 8, dtype=precision)
    x = torch.randn(5, 8, dtype=precision, requires_grad=True) + 1
    kept = StorageWeakRef(x.untyped_storage())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        y = ops.linear(x, weight, bias, norm=(n, torch.ones(8), torch.zeros(8)))
    assert y.dtype == precision
    del x
    assert kept.expired()
    y.sum().backward()
    slack = 1e-6 if precision == torch.float32 else 2e-2
    torch.testing.assert_close(weight.grad, n.float().sum(0).expand(3, 8), rtol=slack, atol=slack)
    torch.testing.assert_close(bias.grad, torch.full((3,), 5.0))


@pytest.mark.skipif(not _here.has_onednn, reason="torch has no oneDNN")
def test_a_checkpoint_takes_no_product_twice() -> None:
    """What is made again for the backward pass ends where the product's operands are there."""
    taken = []
    product = linear_module._rows_times

    def counted(*arguments: Tensor) -> Tensor:
        taken.append(1)
        return product(*arguments)

    x, weight = torch.randn(307, 24, requires_grad=True), torch.randn(4, 24, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "_traits", lambda: _traits(True, True))
        patch.setattr(linear_module, "_rows_times", counted)
        y = checkpoint(lambda x: ops.linear(x.exp(), weight), x, use_reentrant=False)
        assert len(taken) == 1
        got = torch.autograd.grad(y.sum(), (x, weight))
        assert len(taken) == 3  # and the two gradients
    want = torch.autograd.grad(F.linear(x.exp(), weight).sum(), (x, weight))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [20, 3072])
def test_the_result_can_be_changed_in_place(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_traits", lambda: _traits(True, True))
    x, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(4, 8)
    y = ops.linear(x, weight)
    y.add_(1).view(-1).relu_()
    want = (F.linear(x, weight) + 1).relu()
    torch.testing.assert_close(y, want)
    got, want = (torch.autograd.grad(value.square().sum(), x)[0] for value in (y, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("traits", [None, (False, False), (True, True)])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_under_torch_compile(
    precision: torch.dtype, has_norm: bool, traits: tuple[bool, bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if traits is not None:
        found = _traits(*traits)
        monkeypatch.setattr(linear_module, "_traits", lambda: found)
    torch._dynamo.reset()
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((20, 8), (4, 8), (4,))]
    norm = (leaves[0].detach(), torch.ones(8), torch.zeros(8)) if has_norm else None

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            return ops.linear(*leaves, norm=norm).float().square().sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), leaves)
    slack = 1e-5 if precision == torch.float32 else 4e-2
    torch.testing.assert_close(got, torch.autograd.grad(loss(), leaves), rtol=slack, atol=slack)


@pytest.mark.parametrize(("rows", "dim"), [(0, 3), (5, 0)])
def test_nothing_in_or_out(rows: int, dim: int) -> None:
    x, weight = torch.zeros(rows, 8, requires_grad=True), torch.randn(dim, 8, requires_grad=True)
    out = ops.linear(x, weight)
    assert out.shape == (rows, dim)
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), (x, weight)), (x, weight), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_float64_stays_float64_under_autocast() -> None:
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))


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


def test_bad_parts() -> None:
    with pytest.raises(ValueError, match="x: expected one part at least, got none"):
        ops.linear([], torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"weight: expected shape \[D, 3\], got \[5, 4\]"):
        ops.linear([torch.zeros(2, 4), torch.zeros(2, 3)], torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (((3, 4), (4,), (4,)), r"norm.rows: expected shape \[2, 4\], got \[3, 4\]"),
        (((2, 4), (2,), (4,)), r"norm.weight: expected shape \[4\], got \[2\]"),
        (((2, 4), (4,), (1,)), r"norm.bias: expected shape \[4\], got \[1\]"),
    ],
)
def test_a_norm_of_something_else(shapes: tuple[tuple[int, ...], ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.linear(torch.zeros(2, 4), torch.zeros(5, 4), norm=tuple(torch.zeros(shape) for shape in shapes))
