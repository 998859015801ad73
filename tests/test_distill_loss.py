"""distill_loss: against the formula written out, and against float64."""

from __future__ import annotations

import functools
import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import interpreted, run_on_isa, three_way

from pera_fast import ops, reference
from pera_fast.ops import _library, _prototypes

module = sys.modules["pera_fast.ops.distill_loss"]  # the function of that name hides it
needs_cpp = pytest.mark.skipif(_library.why_no_cpp() is not None, reason=f"cpp: {_library.why_no_cpp()}")


DIM = 32  # of z; a test changes it


def problem(rows: int, prototypes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "z_student": F.normalize(normal(rows, DIM), dim=-1).to(dtype),
        "z_teacher": F.normalize(normal(rows, DIM), dim=-1).to(dtype),
        "prototypes_student": (
            normal(prototypes, DIM).to(dtype),
            (1 + normal(prototypes, 1).abs()).to(dtype),
        ),
        "prototypes_teacher": (
            normal(prototypes, DIM).to(dtype),
            (1 + normal(prototypes, 1).abs()).to(dtype),
        ),
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


def materialised(
    z: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *, p: dict[str, Any], groups: list[int]
) -> torch.Tensor:
    """The usual way: weight norm, all logits, softmax in float32 or better."""

    def logits(z: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        values = F.linear(z.to(v.dtype), v * (g / v.norm(dim=1, keepdim=True)))
        return values if values.dtype == torch.float64 else values.float()

    with torch.no_grad():
        teacher = logits(p["z_teacher"].to(v.dtype), *(x.to(v.dtype) for x in p["prototypes_teacher"]))
        target = F.softmax((teacher - p["centre"].to(teacher.dtype)) / p["tau_teacher"], dim=-1)
    per_row = -(target * F.log_softmax(logits(z, v, g) / p["tau_student"], dim=-1)).sum(-1)
    return torch.stack([part.mean() for part in per_row.split(groups)])


@needs_cpp
@pytest.mark.parametrize("rows", [1, 7, 80, 640])
@pytest.mark.parametrize("prototypes", [1, 513, 4096, 131072])
def test_error_against_float64_is_no_larger_than_eager_pytorch(
    rows: int, prototypes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, and in bfloat16 whichever way its products are taken."""
    monkeypatch.setenv("PERA_FAST_BACKEND", "distill_loss=cpp")
    p = problem(rows, prototypes, torch.float32)
    groups = [rows] if rows < 3 else [rows // 3, rows // 3, rows - 2 * (rows // 3)]
    of_loss = (p["z_student"], *p["prototypes_student"])

    def ours(by: str, in_bfloat16: bool, *of_loss: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(module, "_bfloat16_by", lambda: by)
        z, v, g = of_loss
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            return ops.distill_loss(**{**p, "z_student": z, "prototypes_student": (v, g)}, groups=groups)

    def eager(in_bfloat16: bool, *of_loss: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            return materialised(*of_loss, p=p, groups=groups)

    partial = functools.partial
    exact = three_way(partial(ours, "kernels", False), partial(eager, False), *of_loss, slack=2e-6)
    # bfloat16 moves a logit of 1 by 2^-9, a tenth of the teacher's exponent: few rows average little of it.
    ways = {by: partial(ours, by, True) for by in ("kernels", "library", "float32")}
    three_way(ways, partial(eager, True), *of_loss, slack=4e-2, exact=exact)


@needs_cpp
@pytest.mark.parametrize(("tau_teacher", "g"), [(0.02, 10.0), (0.02, 1.0), (0.005, 30.0)])
@pytest.mark.parametrize("centre", [0.0, 40.0])
def test_extreme_logits(tau_teacher: float, g: float, centre: float) -> None:
    """Far beyond what exp() of a fixed shift could hold."""
    p = problem(5, 3000, torch.float32)
    v_student, g_student = p["prototypes_student"]
    p["prototypes_teacher"] = (p["prototypes_teacher"][0], torch.full((3000, 1), g))
    p["tau_teacher"], p["centre"] = tau_teacher, centre * torch.linspace(-1, 1, 3000)
    rounding = 2**-23 * (g / min(tau_teacher, 0.1) + centre / tau_teacher)  # of one logit: relative in exp()
    three_way(
        lambda z, v, g: ops.distill_loss(**{**p, "z_student": z, "prototypes_student": (v, g)}, groups=[5]),
        functools.partial(materialised, p=p, groups=[5]),
        p["z_student"], v_student, g_student * g, slack=2e-6 + rounding,
    )  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["z_student", "z_teacher", "v_student", "v_teacher", "g_student", "centre"])
def test_a_number_that_is_not_finite_is_not_lost(where: str, value: float, in_bfloat16: bool) -> None:
    """The loss of the step in which it happened is as finite as the usual way's."""
    p = problem(4, 600, torch.float32)
    v_s, g_s = p["prototypes_student"]
    tensors = {**p, "v_student": v_s, "v_teacher": p["prototypes_teacher"][0], "g_student": g_s}
    tensors[where].view(-1)[3] = value
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        losses = ops.distill_loss(**p, groups=[1, 3])
    want = materialised(p["z_student"], v_s, g_s, p=p, groups=[1, 3])
    assert torch.equal(losses.isfinite(), want.isfinite())


@needs_cpp
@pytest.mark.parametrize("kept_bytes", [0, 3 * 256 * 9 * 8, 2**30])
def test_chunks_change_nothing_but_the_memory(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks with a last short one, and none, some or all of the logits kept."""
    p = problem(9, 2000, torch.float32)
    leaves = [p["z_student"], *p["prototypes_student"]]
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> list[torch.Tensor]:
        loss = ops.distill_loss(**p, groups=[4, 5])
        return [loss, *torch.autograd.grad(loss @ torch.tensor([0.3, 2.0]), leaves)]

    whole = run()
    monkeypatch.setitem(module.KEPT_BYTES, "cpu", kept_bytes)
    kept, _ = module._kept_shape(p["z_student"], 2000, torch.float32)
    assert kept == {0: 0, 2**30: 2000}.get(kept_bytes, 384)
    for got, again, want in zip(run(), run(), whole, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize(("rows", "dim", "prototypes"), [(30, 32, 5000), (156, 100, 1421), (168, 384, 600)])
def test_same_bits_for_any_number_of_threads(
    rows: int, dim: int, prototypes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "DIM", dim)
    p = problem(rows, prototypes, torch.float32)
    leaves = [x.requires_grad_() for x in (p["z_student"], *p["prototypes_student"])]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 7):
            torch.set_num_threads(threads)
            loss = ops.distill_loss(**p, groups=[rows])
            if rows < dim:  # with more rows KoLeo's backward pass asks the library for a product
                loss = loss + ops.koleo(leaves[0][None], *leaves[1:])[0]
            results.append([loss, *torch.autograd.grad(loss, leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


ON_ONE_ISA = """
import sys, torch
import test_distill_loss as tests, test_koleo as koleo_tests
names = ("baseline", "avx2", "avx512")
assert torch.ops.pera_fast.isa() == names.index(sys.argv[1])
for dim in (32, 37):
    tests.DIM = dim
    for rows, prototypes in ((1, 1), (33, 1000)):
        with tests.pytest.MonkeyPatch.context() as patch:
            tests.test_error_against_float64_is_no_larger_than_eager_pytorch(rows, prototypes, patch)
    with tests.pytest.MonkeyPatch.context() as patch:
        koleo_tests.test_koleo_error_against_float64_is_no_larger_than_eager_pytorch(2, 5, 300, dim, 1.0, "cpp", patch)
"""


@needs_cpp
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_each_instruction_set(capability: str) -> None:
    run_on_isa(capability, ON_ONE_ISA)


@needs_cpp
@pytest.mark.parametrize("rows", [16, 640, 1280])
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_extra_memory_is_bounded(rows: int, in_bfloat16: bool) -> None:
    """Beyond inputs and parameter gradients, at any number of rows; 131072 logits of 1280 rows are 0.7 GB."""
    prototypes, dim = 131072, 384
    z = F.normalize(torch.randn(rows, dim), dim=1).requires_grad_()
    v, g = torch.randn(prototypes, dim, requires_grad=True), torch.ones(prototypes, 1, requires_grad=True)
    centre = torch.zeros(prototypes)

    def step() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = ops.distill_loss(
                z, z.detach(), (v, g), (v.detach(), g.detach()), centre, 0.1, 0.04, [rows]
            )
        return torch.autograd.grad(loss.sum(), [z, v, g])

    gradients = 4 * (z.numel() + v.numel() + g.numel())
    assert peak_bytes(step) - gradients <= 64e6


def peak_bytes(function: Any) -> int:
    """Most bytes that torch had allocated at once during a call, beyond those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@needs_cpp
def test_opcheck_of_the_chunk_ops() -> None:
    raw, gradient = torch.randn(2, 300, 5), torch.empty(300, 5)
    scales = torch.rand(2, 300) + 0.5
    state = torch.zeros(5, 5)
    state[[0, 3]] = -torch.inf
    arguments = (*raw, *scales, torch.zeros(300), 25.0, 10.0)
    torch.library.opcheck(torch.ops.pera_fast.distill_sums.default, (*arguments, state))
    more = (torch.zeros(5), torch.zeros(5), torch.ones(5), gradient, torch.empty(300))
    torch.library.opcheck(torch.ops.pera_fast.distill_gradient.default, (*arguments, *more))
    v, operand = torch.randn(30, 21), torch.empty(30, 21, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.pera_fast.distill_operand.default, (v, operand, torch.empty(30)))
    finish = (operand, v, torch.rand(30), torch.empty(30, 21))
    torch.library.opcheck(torch.ops.pera_fast.distill_finish.default, finish)
    gram = (v, torch.ones(30, 1), torch.randn(21, 16))
    torch.library.opcheck(torch.ops.pera_fast.gram_forward.default, (*gram, torch.empty(6, 21)))
    gradients = (torch.empty(3, 21), torch.empty(30, 21), torch.empty(30, 1))
    for adds in (False, True):
        arguments = (*gram, v[:6].clone(), True, adds, *gradients)
        torch.library.opcheck(torch.ops.pera_fast.gram_backward.default, arguments)


@needs_cpp
@pytest.mark.parametrize("dim", [1, 16, 21, 384])
def test_operand_and_finish(dim: int) -> None:
    v, along = torch.randn(301, dim), torch.randn(301)
    operand, norm, gradient = (
        torch.empty(301, dim, dtype=torch.bfloat16),
        torch.empty(301),
        torch.empty(301, dim),
    )
    torch.ops.pera_fast.distill_operand(v, operand, norm)
    assert torch.equal(operand, v.bfloat16())
    torch.testing.assert_close(norm.double(), v.double().norm(dim=1), rtol=1e-6, atol=0)
    torch.ops.pera_fast.distill_finish(operand, v, along, gradient)
    torch.testing.assert_close(gradient, operand.float() - along[:, None] * v)


@needs_cpp
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_opcheck(in_bfloat16: bool) -> None:
    p = problem(5, 600, torch.float32)
    leaves = [p["z_student"], p["z_teacher"], *p["prototypes_student"], *p["prototypes_teacher"], p["centre"]]
    for place in (0, 2, 3):
        leaves[place].requires_grad_()
    torch.library.opcheck(torch.ops.pera_fast.distill_loss.default, (*leaves, 0.1, 0.04, in_bfloat16))


@needs_cpp
def test_compiles_without_a_break() -> None:
    p = problem(6, 600, torch.float32)
    leaves = [x.requires_grad_() for x in (p["z_student"], *p["prototypes_student"])]

    def loss() -> torch.Tensor:
        return ops.distill_loss(**p, groups=[2, 4]).sum()

    want = torch.autograd.grad(loss(), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_prototypes_without_a_dimension() -> None:
    """All logits are 0 / 0 = NaN times nothing: the loss says so, and no kernel fails."""
    z, v = torch.zeros(4, 0), torch.zeros(64, 0, requires_grad=True)
    prototypes = v, torch.ones(64, 1)
    loss = ops.distill_loss(
        z.requires_grad_(), z.detach(), prototypes, prototypes, torch.zeros(64), 0.1, 0.04, [4]
    )
    loss.sum().backward()
    assert loss.isnan().all() and v.grad is not None and v.grad.shape == v.shape


def test_float32_is_near_float64_and_bfloat16_sums_in_float32() -> None:
    exact, single = problem(6, 300), problem(6, 300, torch.float32)
    want = ops.distill_loss(**exact, groups=[3, 3])
    torch.testing.assert_close(ops.distill_loss(**single, groups=[3, 3]).double(), want, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.distill_loss(**single, groups=[3, 3])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=0)


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


# --- Sinkhorn-Knopp ---


def dinov2_assignments(logits: torch.Tensor, tau: float, iterations: int) -> torch.Tensor:
    """The published algorithm on the whole matrix, float64 [n, K]."""
    q = (logits.double() / tau).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True) * len(q)
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("rows", "prototypes", "tau"), [(1, 5, 0.1), (12, 700, 0.04), (80, 4096, 0.02)])
def test_sinkhorn_centre_gives_dinov2_assignments(
    rows: int, prototypes: int, tau: float, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_prototypes.CHUNK_BYTES, "cpu", 1)  # chunks of 256
    p = problem(rows, prototypes, torch.float32)
    z, (v, g) = p["z_teacher"], p["prototypes_teacher"]
    logits = reference.prototype_logits(z.double(), v.double(), g.double())
    want = dinov2_assignments(logits, tau, iterations)
    for centre in (
        ops.sinkhorn_centre(z, v, g, tau, iterations),
        reference.sinkhorn_centre(z.double(), v.double(), g.double(), tau, iterations),
    ):
        got = torch.softmax((logits - centre.double()) / tau, dim=1)
        assert (got - want).norm() / want.norm() < (1e-4 if centre.dtype == torch.float32 else 1e-9)


def _sinkhorn_of_one_rank(rank: int, port: int, out: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    p = problem(10, 600, torch.float32)
    part = p["z_teacher"][:4] if rank == 0 else p["z_teacher"][4:]
    centre = ops.sinkhorn_centre(part, *p["prototypes_teacher"], 0.04)
    torch.save(centre, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_sinkhorn_centre_over_ranks_is_that_of_all_rows(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_sinkhorn_of_one_rank, (port, str(tmp_path / "centre")), nprocs=2)
    p = problem(10, 600, torch.float32)
    want = ops.sinkhorn_centre(p["z_teacher"], *p["prototypes_teacher"], 0.04)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"centre.{rank}", weights_only=True), want)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"z": torch.zeros(0, 8)}, r"z: expected shape \[n, d\] with at least one row, got \[0, 8\]"),
        ({"tau": 0.0}, "tau: expected a finite temperature above 0, got 0.0"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"g": torch.ones(20)}, r"v, g: expected g of shape \[20, 1\], got \[20\]"),
    ],
)
def test_bad_input_of_sinkhorn_centre(change: dict[str, Any], sentence: str) -> None:
    good = {"z": torch.zeros(3, 8), "v": torch.ones(20, 8), "g": torch.ones(20, 1), "tau": 0.1}
    with pytest.raises(ValueError, match=sentence):
        ops.sinkhorn_centre(**{**good, **change})


def test_mean_logit_is_linear() -> None:
    p = problem(5, 40)
    v, g = p["prototypes_teacher"]
    want = reference.prototype_logits(p["z_teacher"], v, g).mean(0)
    torch.testing.assert_close(ops.mean_prototype_logit(p["z_teacher"].mean(0), v, g), want)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_dtypes_may_be_mixed(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"distill_loss={backend},koleo={backend}")
    p = problem(4, 20, torch.float32)
    of_z, of_weights = dtypes
    v, g = (x.to(of_weights) for x in p["prototypes_student"])
    changed = {**p, "z_student": p["z_student"].to(of_z), "prototypes_student": (v, g)}
    for got, want in (
        (ops.distill_loss(**changed, groups=[4]), ops.distill_loss(**p, groups=[4])),
        (
            ops.koleo(changed["z_student"][None], v, g)[0],
            ops.koleo(p["z_student"][None], *p["prototypes_student"])[0],
        ),
    ):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"z_teacher": torch.zeros(3, 32)}, "z_teacher: expected the shape"),
        ({"centre": torch.zeros(19)}, r"centre: expected shape \[20\], got \[19\]"),
        ({"centre": torch.zeros(20, device="meta")}, "centre: expected it on cpu as z_student, got meta"),
        (
            {"prototypes_teacher": (torch.zeros(20, 32, device="meta"), torch.ones(20, 1))},
            "prototypes_teacher: expected v and g on cpu as z, got meta and cpu",
        ),
        ({"tau_student": 0.0}, "tau_student: expected a finite temperature above 0, got 0.0"),
        ({"tau_teacher": math.nan}, "tau_teacher: .* got nan"),
        (
            {"tau_student": torch.tensor(0.1, requires_grad=True)},
            "tau_student: expected a constant, got a tensor",
        ),
        ({"centre": torch.zeros(20, requires_grad=True)}, "centre: expected a constant, got a tensor"),
        ({"groups": [2, 1]}, r"groups: .* 4 in all, got \[2, 1\]"),
        ({"groups": [4, 0]}, "groups: expected at least one row per crop"),
        ({"prototypes_teacher": (torch.zeros(21, 32), torch.ones(21, 1))}, "prototypes_teacher: expected 20"),
        (
            {"prototypes_student": (torch.zeros(0, 32), torch.ones(0, 1))},
            "prototypes_student: expected at least one prototype",
        ),
        (
            {"prototypes_student": (torch.zeros(20, 32), torch.ones(20))},
            r"prototypes_student: expected g .* got \[20\]",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.distill_loss(**{**problem(4, 20, torch.float32), "groups": [2, 2], **change})


# --- the Triton kernels, without a GPU ---

INTERPRETED = """
import torch
from pera_fast.kernels import distill_loss as kernels
from pera_fast.ops import _library
assert _library.why_no_cpp() is None
for prototypes, rows in ((1, 1), (70, 3), (64, 64), (3000, 130), (9000, 7)):
    random = torch.Generator().manual_seed(prototypes)
    raw = [torch.randn(prototypes, rows, generator=random) for _ in range(2)]
    scales = [1 + torch.rand(prototypes, generator=random) for _ in range(2)]
    arguments = (*raw, *scales, 0.1 * torch.randn(prototypes, generator=random), 25.0, 10.0)
    states = []
    kernels.PROGRAMS = 528 if prototypes > 3000 else 6
    for module in (kernels, torch.ops.pera_fast):
        state = torch.zeros(5, rows)
        state[[0, 3]] = -torch.inf
        for _ in range(2):
            module.distill_sums(*arguments, state)
        states.append(state)
    torch.testing.assert_close(*states, rtol=2e-6, atol=0)
    logs = [states[0][m] + states[0][s].log() for m, s in ((0, 1), (3, 4))]
    results = []
    for module in (kernels, torch.ops.pera_fast):
        results.append((torch.full_like(raw[0], torch.nan), torch.full((prototypes,), torch.nan)))
        module.distill_gradient(*arguments, *logs, torch.rand(rows) * 0 + 0.3, *results[-1])
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-6)
# Of rows past the last one no exponential is infinite, wherever the centre lies.
arguments = [torch.zeros(128, 16), torch.randn(128, 16), torch.ones(128), torch.ones(128), torch.full((128,), -1.8)]
dot = torch.empty(128)
kernels.distill_gradient(
    *arguments, 50.0, 10.0, torch.full((16,), 95.0), torch.full((16,), 50.0), torch.ones(16), torch.empty(128, 16), dot
)
assert dot.isfinite().all()
print("equal")
"""


@needs_cpp
def test_triton_kernels_in_the_interpreter_equal_those_in_cpp() -> None:
    assert interpreted(INTERPRETED) == "equal"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("aligned", [("prototypes", "rows", "per_split"), ()], ids=["multiples of 16", "any"])
def test_triton_kernels_compile_without_spills(capability: int, dtype: str, aligned: tuple[str, ...]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from pera_fast.kernels import aot
    from pera_fast.kernels import distill_loss as kernels

    floats = ("inverse_tau_teacher", "inverse_tau_student")
    chunk = {"teacher": f"*{dtype}", "student": f"*{dtype}"} | dict.fromkeys(
        ("scale_teacher", "scale_student", "centre"), "*fp32"
    )
    sizes = {"prototypes": "i32", "rows": "i32"}
    for kernel, prototypes, more in (
        (kernels.sums_kernel, kernels.BLOCK_PROTOTYPES, {"partial": "*fp32", "per_split": "i32"}),
        (
            kernels.gradient_kernel,
            kernels.GRADIENT_PROTOTYPES,
            {"gradient": f"*{dtype}", **dict.fromkeys(("log_sum_x", "log_sum_y", "weight", "dot"), "*fp32")},
        ),
    ):
        blocks = {"BLOCK_PROTOTYPES": prototypes, "BLOCK_ROWS": kernels.BLOCK_ROWS}
        report = aot.compile_kernel(
            kernel, {**chunk, **dict.fromkeys(floats, "fp32"), **sizes, **more}, blocks, capability=capability,
            num_warps=kernels.NUM_WARPS, multiples_of_16=[n for n in kernel.arg_names if n in aligned],
        )  # fmt: skip
        assert report.spill_bytes == 0 and report.registers <= 255
        assert report.shared_bytes <= aot.SHARED_MEMORY_LIMIT[89]  # the least of all supported GPUs
    report = aot.compile_kernel(
        kernels.merge_kernel, {"partial": "*fp32", "state": "*fp32", "splits": "i32", "rows": "i32"},
        {"SPLITS": kernels.SPLITS, "BLOCK_ROWS": kernels.MERGE_ROWS}, capability=capability,
        num_warps=kernels.NUM_WARPS, multiples_of_16=["rows"] if aligned else [],
    )  # fmt: skip
    assert report.spill_bytes == 0
