"""residual_norm: scatter-add of one branch, gather and LayerNorm for the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import interpreted, run_on_isa, three_way

from pera_fast import ops, reference
from pera_fast.ops import _library

needs_cpp = pytest.mark.skipif(_library.why_no_cpp() is not None, reason=f"cpp: {_library.why_no_cpp()}")


def test_against_a_loop_over_rows() -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(9, 16), torch.randn(4, 16)
    rows, next_rows = torch.tensor([7, 0, 3, 4]), torch.tensor([8, 7, 1])
    scale = torch.tensor([1.5, 1.5, 2.0, 2.0])
    weight, bias = torch.randn(16), torch.randn(16)
    want = x.double()
    for i, row in enumerate(rows.tolist()):
        want[row] += scale[i] * branch[i].double()
    got, normed = ops.residual_norm(x, branch, rows, scale, next_rows, weight, bias)
    torch.testing.assert_close(got, want.float())
    want_normed = F.layer_norm(want[next_rows], (16,), weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(normed, want_normed.float())


def case(rows: int, dim: int, part: float, branch_dtype: torch.dtype) -> dict[str, Any]:
    """A stream, a branch on a part of its rows, in any order, and the next branch's part; 1: all, as None."""
    random = torch.Generator().manual_seed(rows)

    def subset() -> torch.Tensor | None:
        return None if part == 1 else torch.randperm(rows, generator=random)[: max(1, int(rows * part))]

    chosen, following = subset(), subset()
    count = rows if chosen is None else len(chosen)
    return {
        "x": torch.randn(rows, dim, generator=random) + 3,
        "branch": torch.randn(count, dim, generator=random).to(branch_dtype),
        "rows": chosen,
        "scale": None if part == 1 else 1 + torch.rand(count, generator=random),
        "next_rows": following,
        "weight": torch.randn(dim, generator=random),
        "bias": torch.randn(dim, generator=random),
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("part", [0.3, 0.7, 1])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (7, 5), (300, 384), (2000, 40)])
@pytest.mark.parametrize(
    ("branch_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_numerics(
    rows: int, dim: int, part: float, branch_dtype: torch.dtype, dtype: torch.dtype, inplace: bool
) -> None:
    c = case(rows, dim, part, branch_dtype)
    low = torch.bfloat16 in (branch_dtype, dtype)

    def both(function: Any, out: torch.dtype) -> Any:
        def run(
            x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
        ) -> torch.Tensor:
            stream, y = function(x * 1.0, branch, c["rows"], c["scale"], c["next_rows"], weight, bias, 1e-6)
            return torch.cat((stream.flatten(), 0.1 * y.to(out).to(stream.dtype).flatten()))

        return run

    three_way(
        both(lambda *a: ops.residual_norm(*a, dtype=dtype if a[0].dtype != torch.float64 else None,
                                          inplace=inplace), dtype),
        both(reference.residual_norm, torch.float64),
        c["x"], c["branch"], c["weight"], c["bias"],
        slack=5e-3 if low else 1e-6,
    )  # fmt: skip


def test_all_rows_is_plain_add_and_norm() -> None:
    x, branch = torch.randn(5, 8), torch.randn(5, 8)
    got, normed = ops.residual_norm(x, branch, None, None, None, torch.ones(8), torch.zeros(8))
    torch.testing.assert_close(got, x + branch, rtol=0, atol=0)
    torch.testing.assert_close(normed, F.layer_norm(x + branch, (8,), eps=1e-6))
    unchanged, _ = ops.residual_norm(x, None, None, None, None, torch.ones(8), torch.zeros(8))
    assert unchanged is x
    torch.testing.assert_close(ops.residual_add(x, branch, None, None), x + branch, rtol=0, atol=0)


def test_inplace_writes_to_x_and_otherwise_x_stays() -> None:
    x, branch, ones, zeros = torch.randn(5, 8), torch.randn(2, 8), torch.ones(8), torch.zeros(8)
    before, rows = x.clone(), torch.tensor([4, 1])
    after, _ = ops.residual_norm(x, branch, rows, None, None, ones, zeros)
    assert torch.equal(x, before) and after is not x
    again, _ = ops.residual_norm(x, branch, rows, None, None, ones, zeros, inplace=True)
    assert again.data_ptr() == x.data_ptr() and torch.equal(x, after)


@needs_cpp
def test_a_chain_of_inplace_steps_equals_autograd_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches that feed on one another's normalised rows, as a transformer's do."""
    torch.manual_seed(0)
    start, weight, bias = torch.randn(40, 16), torch.randn(6, 16), torch.randn(6, 16)
    subsets = [torch.randperm(40)[:28].sort().values for _ in range(6)]
    scale = torch.full((28,), 40 / 28)

    def run(inplace: bool) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (start, weight, bias)]
        x, branch, last = leaves[0] * 1.0, None, None
        for i, subset in enumerate(subsets):
            x, y = ops.residual_norm(
                x, branch, last, None if branch is None else scale, subset, leaves[1][i], leaves[2][i],
                inplace=inplace,
            )  # fmt: skip
            branch, last = y.tanh(), subset
        x = ops.residual_add(x, branch, last, scale, inplace=inplace)
        return [x, *torch.autograd.grad(x.square().sum(), leaves)]

    chained = run(inplace=True)
    monkeypatch.setenv("PERA_FAST_BACKEND", "residual_norm=reference")
    for got, want in zip(chained, run(inplace=False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("has_branch", [False, True])
@pytest.mark.parametrize("needs_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_before_weight_and_bias(
    dtype: torch.dtype, needs_gradients: bool, has_branch: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come without a gradient, and change neither the other outputs nor their gradients."""
    monkeypatch.setenv("PERA_FAST_BACKEND", f"residual_norm={backend}")
    c = case(60, 48, 0.7, dtype)
    if not has_branch:
        c |= {"branch": None, "rows": None, "scale": None}
    leaves = [
        c[n].requires_grad_(needs_gradients) for n in ("x", "branch", "weight", "bias") if c[n] is not None
    ]
    *want, n = ops.residual_norm(**c, dtype=dtype, with_normalised=True)
    got = ops.residual_norm(**c, dtype=dtype)
    assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert n.dtype == dtype and not n.requires_grad
    slack = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        (n.float() * c["weight"] + c["bias"]).to(dtype), got[1], rtol=slack, atol=slack
    )
    if needs_gradients:
        gradients = [torch.autograd.grad(a.sum() + b.float().square().sum(), leaves) for a, b in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    after, y, n = ops.residual_norm(**{**c, "weight": None, "bias": None}, dtype=dtype, with_normalised=True)
    assert torch.equal(y, n) and not n.requires_grad and torch.equal(after, got[0])


@needs_cpp
def test_same_bits_for_any_number_of_threads() -> None:
    c = case(2000, 48, 0.7, torch.float32)
    leaves = [c[name].requires_grad_() for name in ("x", "branch", "weight", "bias")]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, y = ops.residual_norm(**c)
            results.append([x, y, *torch.autograd.grad(x.sum() + y.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


ON_ONE_ISA = """
import sys, torch
import test_residual_norm as tests
assert torch.ops.pera_fast.isa() == ("baseline", "avx2", "avx512").index(sys.argv[1])
for part in (0.7, 1):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        tests.test_numerics(60, 37, part, *dtypes, True)
"""


@needs_cpp
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_each_instruction_set(capability: str) -> None:
    run_on_isa(capability, ON_ONE_ISA)


@pytest.mark.parametrize("name", ["rows", "next_rows"])
@pytest.mark.parametrize(
    ("values", "problem"), [([0, 9], "got 9"), ([-1, 2], "got -1"), ([2, 2], "row 2 twice")]
)
@needs_cpp
def test_rows_that_are_not_there_or_twice(name: str, values: list[int], problem: str) -> None:
    arguments = {"rows": torch.tensor([1, 3]), "next_rows": torch.tensor([1, 3]), name: torch.tensor(values)}
    with pytest.raises(RuntimeError, match=f"{name}: .*{problem}"):
        ops.residual_norm(
            torch.zeros(6, 4),
            torch.zeros(2, 4),
            scale=None,
            weight=torch.ones(4),
            bias=torch.zeros(4),
            **arguments,
        )


def test_a_scale_that_would_learn_is_refused() -> None:
    x, scale = torch.zeros(3, 4), torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="scale: expected a constant, got a tensor that requires a gradient"):
        ops.residual_add(x, x, None, scale)
    with torch.no_grad():
        ops.residual_add(x, x, None, scale)


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


@needs_cpp
def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    y = ops.residual_norm(x, None, None, None, None, torch.ones(4), torch.zeros(4))[1]
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@needs_cpp
def test_weights_that_do_not_lie_together() -> None:
    x, weight = torch.randn(5, 4), torch.randn(8, requires_grad=True)
    arguments = (None, None, None, None, weight[::2], torch.ones(1).expand(4))
    y, want = ops.residual_norm(x, *arguments)[1], reference.residual_norm(x, *arguments, 1e-6)[1]
    torch.testing.assert_close(y, want)
    for got, expected in zip(*(torch.autograd.grad(z.sum(), weight) for z in (y, want)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weight": torch.ones(4, device="meta")}, "weight: expected it on cpu as x, got meta"),
        ({"branch": torch.zeros(6, 4, device="meta")}, "branch: expected it on cpu as x, got meta"),
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("part", [0.3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numerics_on_cuda(
    part: float, dtype: torch.dtype, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", "residual_norm=triton")
    c = {k: v if v is None else v.cuda() for k, v in case(300, 384, part, dtype).items()}

    def stacked(stream: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat((stream.flatten(), 0.1 * y.to(stream.dtype).flatten()))

    rest = (c["rows"], c["scale"], c["next_rows"])
    three_way(
        lambda x, b, w, c: stacked(*ops.residual_norm(x * 1.0, b, *rest, w, c, dtype=dtype, inplace=inplace)),
        lambda x, b, w, c: stacked(*reference.residual_norm(x, b, *rest, w, c, 1e-6)),
        c["x"], c["branch"], c["weight"], c["bias"],
        slack=5e-3 if dtype == torch.bfloat16 else 1e-6,
    )  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
def test_a_graph_makes_the_tables_of_its_rows_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though eager calls with the same tensor have made them before."""
    monkeypatch.setenv("PERA_FAST_BACKEND", "residual_norm=triton")
    x, branch = torch.randn(40, 64, device="cuda"), torch.randn(9, 64, device="cuda")
    rows = torch.randperm(40, device="cuda")[:9]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            ops.residual_add(x, branch, rows, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = ops.residual_add(x, branch, rows, None)
        rows.copy_(torch.randperm(40, device="cuda")[:9])
        graph.replay()
        want = x.index_add(0, rows, branch)
    torch.cuda.synchronize()
    assert torch.equal(out, want)


# --- the Triton kernels, without a GPU ---

INTERPRETED = """
import torch
import test_residual_norm as tests
from pera_fast.kernels import residual_norm as kernels
for rows, dim, part, affine, keeps in ((1, 1, 1, True, True), (40, 24, 0.7, True, True), (33, 37, 1, False, True),
                                       (33, 37, 0.3, True, False), (70, 48, 0.5, False, True),
                                       (150, 20, 0.6, True, True)):
    c = tests.case(rows, dim, part, torch.float32)
    weight, bias = (c["weight"], c["bias"]) if affine else (None, None)
    count = rows if c["next_rows"] is None else len(c["next_rows"])
    results = []
    for module, inplace in ((kernels, False), (kernels, True), (torch.ops.pera_fast, False)):
        source = c["x"].clone()
        x = source if inplace else torch.full_like(c["x"], torch.nan)
        y = torch.full((count, dim), torch.nan)
        normalised = (torch.full_like(y, torch.nan) if affine else y) if keeps else None
        deviation = torch.full((count,), torch.nan) if keeps else None
        module.residual_norm_forward(source, x, c["branch"], c["rows"], c["scale"], c["next_rows"], weight, bias, 1e-6,
                                     y, normalised, deviation)
        out = [x, y]
        if keeps:
            gradients = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in (x, y)]
            for given in (gradients, (None, gradients[1]), (gradients[0], None)):
                overwrites = inplace and given[0] is not None
                given = [given[0].clone(), given[1]] if overwrites else given
                dx = given[0] if overwrites else torch.full_like(x, torch.nan)
                db = torch.full_like(c["branch"], torch.nan)
                dw = [torch.full((dim,), torch.nan) if affine and given[1] is not None else None for _ in range(2)]
                module.residual_norm_backward(*given, c["rows"], c["scale"], c["next_rows"], weight, normalised,
                                              deviation, dx, db, *dw)
                out += [dx, db, *(t for t in dw if t is not None)]
        results.append(out)
    for apart, within, want in zip(*results, strict=True):
        assert torch.equal(apart, within)
        torch.testing.assert_close(apart, want, rtol=1e-5, atol=2e-6)

# A table is made once, and again when the rows have changed.
rows = torch.tensor([3, 1])
table = kernels._table(rows, 5)
assert kernels._table(rows, 5) is table and table.tolist() == [-1, 1, -1, 0, -1]
assert kernels._table(rows, 4).tolist() == [-1, 1, -1, 0]
rows[0] = 2
assert kernels._table(rows, 4).tolist() == [-1, 1, 0, -1]
with torch.inference_mode():
    rows = torch.tensor([3, 1])
    kernels._table(rows, 5)
    rows[0] = 2
    assert kernels._table(rows, 4).tolist() == [-1, 1, 0, -1]
print("equal")
"""


@needs_cpp
def test_triton_kernels_in_the_interpreter_equal_those_in_cpp() -> None:
    assert interpreted(INTERPRETED) == "equal"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dim", [384, 768, 1024])
@pytest.mark.parametrize("aligned", [("dim",), ("dim", "rows")], ids=["dim", "dim and rows"])  # as launched
def test_triton_kernels_compile_without_spills(
    capability: int, dtype: str, dim: int, aligned: tuple[str, ...]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from pera_fast.kernels import aot
    from pera_fast.kernels import residual_norm as kernels

    floats = dict.fromkeys(
        ("source", "x", "scale", "weight", "bias", "inverse_deviation", "x_gradient", "out", "partial"),
        "*fp32",
    )
    types = {
        **floats, **dict.fromkeys(("branch", "y", "normalised", "y_gradient", "branch_gradient"), f"*{dtype}"),
        **dict.fromkeys(("branch_row", "next_row"), "*i32"), **dict.fromkeys(("rows", "each", "dim"), "i32"),
        "eps": "fp32",
    }  # fmt: skip
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        flags = [n for n in kernel.arg_names if n.startswith(("HAS_", "KEEPS", "IN_PLACE"))]
        constants = {**dict.fromkeys(flags, True), "BLOCK": 2 ** (dim - 1).bit_length()}
        warps = kernels.num_warps(constants["BLOCK"])
        report = aot.compile_kernel(
            kernel, {n: t for n, t in types.items() if n in kernel.arg_names},
            {n: v for n, v in constants.items() if n in kernel.arg_names}, capability=capability,
            num_warps=warps, multiples_of_16=[n for n in kernel.arg_names if n in aligned],
        )  # fmt: skip
        assert report.spill_bytes == 0 and report.registers <= 255
        assert report.shared_bytes <= aot.SHARED_MEMORY_LIMIT[89]
        if kernel is kernels.backward_kernel:  # one wave of programs, by 65536 registers
            at_once = 65536 // (32 * warps * (-(-report.registers // 8) * 8))
            assert at_once >= kernels.PROGRAMS_PER_MULTIPROCESSOR


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("forward_kernel", ["branch", "branch_row", "scale", "next_row"]),  # before the first branch
        ("forward_kernel", ["branch_row", "scale", "weight", "bias"]),  # all rows, norms made again
        (
            "forward_kernel",
            ["y", "next_row", "weight", "bias", "normalised", "inverse_deviation"],
        ),  # the last
        ("backward_kernel", ["x_gradient", "branch_row", "scale", "branch_gradient"]),
        ("backward_kernel", ["y_gradient", "next_row", "weight", "normalised", "inverse_deviation"]),
    ],
)
def test_triton_kernels_compile_without_some_tensors(name: str, without: list[str], in_place: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from pera_fast.kernels import aot
    from pera_fast.kernels import residual_norm as kernels

    kernel = getattr(kernels, name)
    flags = {
        "HAS_BRANCH": "branch" if name == "forward_kernel" else "branch_gradient", "HAS_X": "x_gradient",
        "HAS_Y": "y" if name == "forward_kernel" else "y_gradient", "HAS_BRANCH_ROW": "branch_row",
        "HAS_SCALE": "scale", "HAS_NEXT_ROW": "next_row", "HAS_WEIGHT": "weight", "HAS_BIAS": "bias",
        "KEEPS": "inverse_deviation", "KEEPS_NORMALISED": "normalised",
    }  # fmt: skip
    constants = {flag: tensor not in without for flag, tensor in flags.items()}
    constants |= dict.fromkeys(without) | {"IN_PLACE": in_place, "BLOCK": 512}
    types = dict.fromkeys(kernel.arg_names, "*fp32") | {"branch_row": "*i32", "next_row": "*i32"}
    types |= {**dict.fromkeys(("rows", "each", "dim"), "i32"), "eps": "fp32"}
    report = aot.compile_kernel(
        kernel,
        {n: types[n] for n in kernel.arg_names if n not in constants},
        {n: value for n, value in constants.items() if n in kernel.arg_names},
    )
    assert report.spill_bytes == 0
