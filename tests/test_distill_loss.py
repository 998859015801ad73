"""distill_loss and koleo: against the formulas written out, and against float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pera_fast import ops, reference


def problem(rows: int, prototypes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "z_student": F.normalize(normal(rows, 8), dim=-1).to(dtype),
        "z_teacher": F.normalize(normal(rows, 8), dim=-1).to(dtype),
        "prototypes_student": (normal(prototypes, 8).to(dtype), (1 + normal(prototypes, 1).abs()).to(dtype)),
        "prototypes_teacher": (normal(prototypes, 8).to(dtype), (1 + normal(prototypes, 1).abs()).to(dtype)),
        "centre": 0.1 * normal(prototypes).to(dtype),
        "tau_student": 0.1,
        "tau_teacher": 0.04,
    }


@pytest.mark.parametrize(("groups", "prototypes"), [([3, 3, 5], 33), ([1], 1), ([7], 513)])
def test_against_the_formula_row_by_row(groups: list[int], prototypes: int) -> None:
    p = problem(sum(groups), prototypes)
    got = ops.distill_loss(**p, groups=groups)
    (v_s, g_s), (v_t, g_t) = p["prototypes_student"], p["prototypes_teacher"]
    losses = []
    for z_s, z_t in zip(p["z_student"], p["z_teacher"], strict=True):
        s = [float(z_s @ v_s[k] / v_s[k].norm() * g_s[k]) / 0.1 for k in range(prototypes)]
        t = [float(z_t @ v_t[k] / v_t[k].norm() * g_t[k] - p["centre"][k]) / 0.04 for k in range(prototypes)]
        log_s = math.log(sum(math.exp(x) for x in s))
        sum_t = sum(math.exp(x) for x in t)
        losses.append(-sum(math.exp(x) / sum_t * (y - log_s) for x, y in zip(t, s, strict=True)))
    want = [part.mean() for part in torch.tensor(losses, dtype=torch.float64).split(groups)]
    torch.testing.assert_close(got, torch.stack(want))


def test_float32_is_near_float64_and_ignores_autocast() -> None:
    exact, single = problem(6, 300), problem(6, 300, torch.float32)
    want = ops.distill_loss(**exact, groups=[3, 3])
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.distill_loss(**single, groups=[3, 3])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_gradients_reach_the_student_only() -> None:
    p = problem(4, 20)
    leaves = [p["z_student"], *p["prototypes_student"], p["z_teacher"], *p["prototypes_teacher"]]
    for leaf in leaves:
        leaf.requires_grad_()
    ops.distill_loss(**p, groups=[4]).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves[:3])
    assert all(leaf.grad is None for leaf in leaves[3:])

    def loss(z: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        detached = {
            "z_teacher": p["z_teacher"].detach(),
            "prototypes_teacher": tuple(x.detach() for x in leaves[4:]),
        }
        return reference.distill_loss(
            **{**p, **detached, "z_student": z, "prototypes_student": (v, g)}, groups=[2, 2]
        )

    assert torch.autograd.gradcheck(loss, [x.detach().requires_grad_() for x in leaves[:3]])


def test_large_logits_stay_finite() -> None:
    p = problem(3, 50, torch.float32)
    p["prototypes_teacher"] = (p["prototypes_teacher"][0], torch.full((50, 1), 10.0))
    p["tau_teacher"] = 0.02
    assert torch.isfinite(ops.distill_loss(**p, groups=[3])).all()


def test_koleo_against_a_search_over_pairs() -> None:
    random = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(6, 5, generator=random, dtype=torch.float64), dim=-1)
    v, g = torch.randn(30, 5, generator=random).double(), torch.ones(30, 1).double()
    x = F.normalize(reference.prototype_logits(z, v, g), dim=-1)
    nearest = [min((float((x[i] - x[j]).norm()), j) for j in range(6) if j != i) for i in range(6)]
    loss, neighbours = ops.koleo(z, v, g)
    assert neighbours.tolist() == [j for _, j in nearest]
    assert float(loss) == pytest.approx(-sum(math.log(d + 1e-8) for d, _ in nearest) / 6, rel=1e-9)


def test_koleo_of_one_row_and_of_equal_rows() -> None:
    z = torch.ones(1, 4, requires_grad=True)
    loss, _ = ops.koleo(z, torch.randn(9, 4), torch.ones(9, 1))
    loss.backward()
    assert loss.item() == 0 and z.grad is not None and z.grad.abs().sum() == 0
    twins = torch.ones(3, 4, requires_grad=True)
    loss, _ = ops.koleo(twins, torch.randn(9, 4), torch.ones(9, 1))
    loss.backward()
    assert torch.isfinite(loss) and twins.grad is not None and torch.isfinite(twins.grad).all()


def test_mean_logit_is_linear() -> None:
    p = problem(5, 40)
    v, g = p["prototypes_teacher"]
    want = reference.prototype_logits(p["z_teacher"], v, g).mean(0)
    torch.testing.assert_close(ops.mean_prototype_logit(p["z_teacher"].mean(0), v, g), want)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"z_teacher": torch.zeros(3, 8)}, "z_teacher: expected the shape"),
        ({"centre": torch.zeros(19)}, r"centre: expected shape \[20\], got \[19\]"),
        ({"tau_student": 0.0}, "tau_student: expected a finite temperature above 0, got 0.0"),
        ({"tau_teacher": math.nan}, "tau_teacher: .* got nan"),
        ({"groups": [2, 1]}, r"groups: .* 4 in all, got \[2, 1\]"),
        ({"groups": [4, 0]}, "groups: expected at least one row per crop"),
        ({"prototypes_teacher": (torch.zeros(21, 8), torch.ones(21, 1))}, "prototypes_teacher: expected 20"),
        (
            {"prototypes_student": (torch.zeros(20, 8), torch.ones(20))},
            r"prototypes_student: expected g .* got \[20\]",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.distill_loss(**{**problem(4, 20, torch.float32), "groups": [2, 2], **change})
