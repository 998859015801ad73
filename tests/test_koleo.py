"""koleo: against a search over pairs, and against float64."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import three_way

from pera_fast import ops, reference
from pera_fast.ops import _library

needs_cpp = pytest.mark.skipif(_library.why_no_cpp() is not None, reason=f"cpp: {_library.why_no_cpp()}")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "torch"]
module = sys.modules["pera_fast.ops.koleo"]  # the function of that name hides it


def test_koleo_against_a_search_over_pairs() -> None:
    random = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(2, 6, 5, generator=random, dtype=torch.float64), dim=-1)
    v, g = torch.randn(30, 5, generator=random).double(), torch.ones(30, 1).double()
    losses, neighbours = ops.koleo(z, v, g)
    for rows, loss, found in zip(z, losses, neighbours, strict=True):
        x = F.normalize(reference.prototype_logits(rows, v, g), dim=-1)
        nearest = [min((float((x[i] - x[j]).norm()), j) for j in range(6) if j != i) for i in range(6)]
        assert found.tolist() == [j for _, j in nearest]
        assert float(loss) == pytest.approx(-sum(math.log(d + 1e-8) for d, _ in nearest) / 6, rel=1e-9)


def test_many_rows_are_compared_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 23, 7, generator=random, dtype=torch.float64)
    gram = torch.eye(7, dtype=torch.float64)
    wanted = (torch.cdist(x, x) + torch.diag(torch.full((23,), torch.inf))).argmin(2)
    for pairs in (module._PAIRS, 23 * 5, 23 * 4, 1):  # all rows, five at a time, four, one
        monkeypatch.setattr(module, "_PAIRS", pairs)
        assert torch.equal(module._nearest(x, x @ gram), wanted)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rows", [1, 6, 30])
def test_gradients_of_what_is_made_of_the_prototypes_are_added_to(
    backend: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the buffer they come in, whoever made it; without any, KoLeo's are written."""
    monkeypatch.setenv("PERA_FAST_BACKEND", f"koleo={backend}")
    random = torch.Generator().manual_seed(3)
    leaves = [
        torch.randn(shape, generator=random).requires_grad_() for shape in ((2, rows, 8), (150, 8), (150, 1))
    ]

    def gradients(
        of_v: float | None, of_g: float | None, of_koleo: float, through: bool
    ) -> list[torch.Tensor]:
        z, v, g = leaves
        losses, neighbours, *same = module.koleo_and_prototypes(z, v, g)
        used = same if through else (v, g)
        rest = z.square().sum()
        for share, x in ((of_v, used[0]), (of_g, used[1])):
            rest = rest if share is None else rest + share * x.square().sum()
        total = rest + of_koleo * losses.sum() if of_koleo else rest
        return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))

    for case in ((1.0, 1.0, 1.0), (1.0, None, 1.0), (None, 2.0, 1.0), (0.5, 2.0, 0.0), (None, None, 1.0)):
        for got, want in zip(gradients(*case, True), gradients(*case, False), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    _, _, v, _ = module.koleo_and_prototypes(*leaves)  # of v alone
    assert torch.equal(torch.autograd.grad(v.sum(), leaves[1])[0], torch.ones(150, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [1.0, 0.03, 0.001])  # rows as far apart as any, to almost equal
@pytest.mark.parametrize(
    ("crops", "rows", "prototypes", "dim"),
    [(2, 8, 4096, 384), (1, 2, 513, 32), (3, 40, 700, 48), (2, 9, 300, 21)],
)
def test_koleo_error_against_float64_is_no_larger_than_eager_pytorch(
    crops: int,
    rows: int,
    prototypes: int,
    dim: int,
    spread: float,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"koleo={backend}")
    random = torch.Generator().manual_seed(0)
    z = torch.randn(dim, generator=random) + spread * torch.randn(crops, rows, dim, generator=random)
    v, g = torch.randn(prototypes, dim, generator=random), 1 + torch.rand(prototypes, 1, generator=random)
    three_way(
        lambda z, v, g: ops.koleo(z, v, g)[0],
        lambda z, v, g: reference.koleo(z, v, g)[0],
        F.normalize(z, dim=-1), v, g, slack=2e-6 / spread,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("crops", "rows", "prototypes", "dim"), [(2, 8, 4096, 384), (3, 40, 700, 48)])
def test_neighbours_of_rows_that_are_almost_equal(
    crops: int, rows: int, prototypes: int, dim: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network's are that has hardly begun: similarities in float32 find other neighbours for every second row."""
    monkeypatch.setenv("PERA_FAST_BACKEND", f"koleo={backend}")
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        z = torch.randn(dim, generator=random) + 1e-3 * torch.randn(crops, rows, dim, generator=random)
        z = F.normalize(z, dim=-1).requires_grad_()
        v, g = torch.randn(prototypes, dim, generator=random), torch.ones(prototypes, 1)
        losses, neighbours = ops.koleo(z, v, g)
        want, wanted = reference.koleo(z.double(), v.double(), g.double())
        assert torch.equal(neighbours, wanted)
        gradient, wanted_gradient = (torch.autograd.grad(loss.sum(), z)[0] for loss in (losses, want))
        assert (gradient - wanted_gradient).norm() < 1e-3 * wanted_gradient.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
@pytest.mark.parametrize("is_low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [8, 64, 300])
def test_koleo_on_cuda(rows: int, is_low: bool) -> None:
    """Under autocast its error is at most that of logits in bfloat16."""
    random = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(2, rows, 384, generator=random), dim=-1).cuda()
    v, g = torch.randn(4096, 384, generator=random).cuda(), 1 + torch.rand(4096, 1, generator=random).cuda()

    def eager(z: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        w = v * (g / v.norm(dim=1, keepdim=True))
        x = F.normalize((z @ w.T).to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        with torch.no_grad():
            nearest = (x @ x.mT - 2 * torch.eye(rows, device="cuda", dtype=x.dtype)).argmax(2)
        return -torch.log((x - x.gather(1, nearest[..., None].expand_as(x))).norm(dim=-1) + 1e-8).mean(1)

    def under_autocast(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*leaves: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=is_low and leaves[0].dtype == torch.float32):
                return function(*leaves)

        return run

    three_way(
        under_autocast(lambda *leaves: ops.koleo(*leaves)[0]), under_autocast(eager), z, v, g,
        slack=2e-3 if is_low else 2e-6,
    )  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
def test_equal_calls_give_equal_bits_on_cuda() -> None:
    """Most rows have the same neighbour, whose gradient is a sum over them."""
    z = torch.randn(2, 500, 384, device="cuda") + 10 * torch.randn(1, 1, 384, device="cuda")
    z[:, 0] = z.mean(1)
    z = F.normalize(z, dim=-1).requires_grad_()
    v, g = torch.randn(4096, 384, device="cuda"), torch.ones(4096, 1, device="cuda")
    _, neighbours = ops.koleo(z, v, g)
    assert (neighbours == 0).sum() > 500
    first, *others = [torch.autograd.grad(ops.koleo(z, v, g)[0].sum(), z)[0] for _ in range(5)]
    assert all(torch.equal(first, other) for other in others)


def test_koleo_gradients_of_the_reference() -> None:
    z, v = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (F.normalize(z, dim=-1), v, 1 + torch.rand(20, 1).double())]
    assert torch.autograd.gradcheck(lambda *x: reference.koleo(*x)[0], leaves)


def test_koleo_of_one_row_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    module._warn_of_one_row.cache_clear()
    z = torch.ones(2, 1, 4, requires_grad=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            losses, _ = ops.koleo(z, torch.randn(9, 4), torch.ones(9, 1))
    losses.sum().backward()
    assert losses.tolist() == [0, 0] and z.grad is not None and z.grad.abs().sum() == 0
    assert caplog.text.count("KoLeo is 0") == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_koleo_of_equal_rows_is_finite(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"koleo={backend}")
    leaves = [x.requires_grad_() for x in (torch.ones(2, 3, 4), torch.randn(9, 4), torch.ones(9, 1))]
    losses, _ = ops.koleo(*leaves)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_shows_in_the_loss(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"koleo={backend}")
    z = torch.randn(2, 3, 4)
    z[0, 1, 2] = torch.nan
    losses, _ = ops.koleo(z, torch.randn(9, 4), torch.ones(9, 1))
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_lie_together(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"koleo={backend}")
    z, v, g = torch.randn(16, 6).T.unflatten(0, (2, 3)), torch.randn(16, 9).T, torch.ones(1, 1).expand(9, 1)
    torch.testing.assert_close(ops.koleo(z, v, g)[0], reference.koleo(z, v, g)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(_library.why_no_cpp() is not None, reason=str(_library.why_no_cpp()))
def test_a_second_derivative_is_refused() -> None:
    z = torch.randn(2, 3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        ops.koleo(z, torch.randn(9, 4), torch.ones(9, 1))[0].sum(), z, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("z", "sentence"),
    [
        (torch.zeros(3, 32), r"z: expected shape \[crops, n, d\] with at least one row, got \[3, 32\]"),
        (torch.zeros(2, 0, 8), r"z: .* got \[2, 0, 8\]"),
        (torch.zeros(2, 3, 7), r"v, g: expected v of shape \[K, 7\], got \[20, 32\]"),
    ],
)
def test_bad_input_of_koleo(z: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.koleo(z, torch.zeros(20, 32), torch.ones(20, 1))
