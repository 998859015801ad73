"""packed_attention: each sequence attends to itself alone, as softmax(q kᵀ scale) v says."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import interpreted, run_on_isa, three_way
from torch import Tensor

from pera_fast import ops, reference
from pera_fast.ops import _library

packed_attention = importlib.import_module("pera_fast.ops.packed_attention")  # the module, not the function
needs_cpp = pytest.mark.skipif(_library.why_no_cpp() is not None, reason=f"cpp: {_library.why_no_cpp()}")
MIXES = [[(4, 8), (3, 23)], [(2, 158), (5, 8)], [(1, 1)], [(0, 5), (2, 3)], [(7, 13)], [(1, 471), (300, 1)]]
SLACK = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "torch"])
@pytest.mark.parametrize("groups", MIXES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 20])
@pytest.mark.parametrize("dtype", SLACK)
def test_numerics(
    groups: list[tuple[int, int]],
    head_dim: int,
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"packed_attention={backend}")
    torch.manual_seed(0)
    qkv = torch.randn(sum(n * length for n, length in groups), 3, 2, head_dim).to(dtype)
    scale = head_dim**-0.5
    three_way(
        lambda x: ops.packed_attention(x, groups), lambda x: reference.packed_attention(x, groups, scale), qkv,
        slack=SLACK[dtype],
    )  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("groups", MIXES)
@pytest.mark.parametrize("dtype", SLACK)
def test_short_sequences_by_the_kernels_and_long_ones_by_the_library(
    groups: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    """As on a GPU, where each has its own."""

    def attended(qkv: Tensor, longer_than: int) -> Tensor:
        return torch.cat(packed_attention._sdpa(qkv, groups, 0.2, longer_than))

    torch.manual_seed(0)
    qkv = torch.randn(sum(n * length for n, length in groups), 3, 2, 32).to(dtype)
    three_way(
        lambda x: attended(x, 23),
        lambda x: reference.packed_attention(x, groups, 0.2),
        qkv,
        slack=SLACK[dtype],
    )
    qkv.requires_grad_()
    alone = [torch.autograd.grad(attended(qkv, n).float().square().sum(), qkv)[0] for n in (0, 471)]
    mixed = torch.autograd.grad(attended(qkv, 23).float().square().sum(), qkv)[0]
    row = 0
    for n, length in groups:
        of_group = slice(row, row + n * length)
        assert torch.equal(mixed[of_group], alone[length <= 23][of_group]), length
        row += n * length


@pytest.mark.parametrize("dtype", SLACK)
@pytest.mark.parametrize("seed", range(4))
def test_numerics_of_random_lengths(seed: int, dtype: torch.dtype) -> None:
    """1 to 300 sequences of up to 600 rows, some empty, through cu_seqlens and as q, k, v; other scales."""
    random = torch.Generator().manual_seed(seed)
    sequences = int(torch.randint(1, [300, 30, 6, 2][seed] + 1, (), generator=random))
    lengths = torch.randint(0, [8, 60, 300, 600][seed] + 1, (sequences,), generator=random)
    lengths[0] = max(int(lengths[0]), 1)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    qkv = torch.randn(int(lengths.sum()), 3, 2, 32, generator=random).to(dtype)
    groups, scale = [(1, n) for n in lengths.tolist() if n], 0.05 + seed
    three_way(
        lambda x: ops.packed_attention(x.unbind(1), scale=scale, cu_seqlens=starts),
        lambda x: reference.packed_attention(x, groups, scale),
        qkv,
        slack=SLACK[dtype] * (1 + 8 * scale),
    )
    torch.testing.assert_close(
        ops.packed_attention(qkv, cu_seqlens=starts, scale=scale),
        ops.packed_attention(qkv, groups, scale), rtol=0, atol=0,
    )  # fmt: skip


def test_sequences_do_not_see_each_other() -> None:
    qkv = torch.randn(3 * 4 + 2 * 5, 3, 2, 8)
    groups = [(3, 4), (2, 5)]
    before = ops.packed_attention(qkv, groups)
    qkv[4:8] = torch.nan  # the second sequence
    after = ops.packed_attention(qkv, groups)
    torch.testing.assert_close(after[:4], before[:4], rtol=0, atol=0)
    torch.testing.assert_close(after[8:], before[8:], rtol=0, atol=0)
    assert after[4:8].isnan().all()


def test_uniform_scores_average_the_values_exactly() -> None:
    qkv = torch.zeros(6, 3, 1, 4)
    qkv[:, 2, 0, 0] = torch.tensor([1.0, 3.0, 5.0, 7.0, 2.0, 4.0])
    got = ops.packed_attention(qkv, [(1, 4), (1, 2)])[:, 0, 0]
    assert got.tolist() == [4.0] * 4 + [3.0] * 2


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_large_scores_stay_finite(size: float) -> None:
    qkv = (size * torch.randn(100, 3, 2, 64)).requires_grad_()
    out = ops.packed_attention(qkv, [(5, 20)])
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    assert out.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e8])
def test_one_huge_score_takes_its_value(size: float) -> None:
    """Scores of 1e9 and 1e17: rounded alike, the largest is no larger than itself."""
    torch.manual_seed(0)
    qkv = torch.randn(37, 3, 2, 48)
    qkv[:, 0] *= size
    qkv[:, 1] *= size
    got = ops.packed_attention(qkv, [(1, 37)])
    q, k, v = qkv.transpose(0, 2).unbind(1)
    want = torch.softmax(q.double() @ k.double().mT / 48**0.5, -1) @ v.double()
    torch.testing.assert_close(got.transpose(0, 1).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.3, -8.0, 0.0])
def test_a_scale_below_0(scale: float) -> None:
    three_way(
        lambda x: ops.packed_attention(x, [(1, 49), (1, 11)], scale=scale),
        lambda x: reference.packed_attention(x, [(1, 49), (1, 11)], scale),
        4 * torch.randn(60, 3, 2, 16),
        slack=1e-5,
    )


def test_non_contiguous_input() -> None:
    wide = torch.randn(10, 3, 2, 16)
    torch.testing.assert_close(
        ops.packed_attention(wide[..., ::2], [(2, 5)]),
        ops.packed_attention(wide[..., ::2].contiguous(), [(2, 5)]),
    )


@needs_cpp
def test_same_bits_for_any_number_of_threads() -> None:
    qkv, groups = torch.randn(2 * 315 + 16 * 8, 3, 3, 64, requires_grad=True), [(2, 315), (16, 8)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = ops.packed_attention(qkv, groups)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    finally:
        torch.set_num_threads(before)
    for other in results:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


ON_ONE_ISA = """
import sys, torch
import test_packed_attention as tests
names = ("baseline", "avx2", "avx512")
assert torch.ops.pera_fast.isa() == names.index(sys.argv[1])
for groups in tests.MIXES:
    for head_dim in (64, 80, 20):
        for dtype in tests.SLACK:
            with tests.pytest.MonkeyPatch.context() as patch:
                tests.test_numerics(groups, head_dim, dtype, "cpp", patch)
"""


@needs_cpp
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_each_instruction_set(capability: str) -> None:
    run_on_isa(capability, ON_ONE_ISA)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    qkv = torch.randn(11, 3, 2, 16, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.pera_fast.packed_attention.default, (qkv, [2, 1], [3, 5], 0.3))


@needs_cpp
def test_compiles_without_a_break() -> None:
    qkv = torch.randn(22, 3, 2, 8, requires_grad=True)

    def loss() -> torch.Tensor:
        return ops.packed_attention(qkv, [(3, 4), (2, 5)]).square().sum()

    (want,) = torch.autograd.grad(loss(), qkv)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), qkv)
    torch.testing.assert_close(got, want)


def bad(rows: int = 6, **arguments: object) -> dict[str, object]:
    return {"qkv": torch.zeros(rows, 3, 1, 4), **arguments}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"qkv": torch.zeros(6, 2, 1, 4), "groups": [(1, 6)]}, r"qkv: expected shape .* got \[6, 2, 1, 4\]"),
        (bad(groups=[(1, 5)]), r"groups: .* 6 rows of qkv, got 5"),
        (bad(groups=[(1, 6), (1, 0)]), r"groups: expected \(sequences >= 0, length >= 1\)"),
        (bad(), "groups, cu_seqlens: expected one of the two, got none"),
        (bad(groups=[(1, 6)], cu_seqlens=torch.tensor([0, 6])), "expected one of the two, got both"),
        (bad(cu_seqlens=torch.tensor([1, 6])), "cu_seqlens: expected 0 first and 6 rows last, got 1 and 6"),
        (
            {
                "qkv": torch.zeros(6, 3, 1, 4),
                "groups": [(1, 6)],
                "scale": torch.tensor(1.0, requires_grad=True),
            },
            "scale: expected a constant, got a tensor that requires a gradient",
        ),
        (bad(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens: expected 0 first and 6 rows last, got 0 and 5"),
        (
            bad(cu_seqlens=torch.tensor([0, 4, 2, 6])),
            "cu_seqlens: expected no decrease, got a sequence of -2 rows",
        ),
        (
            bad(cu_seqlens=torch.tensor([0.0, 6.0])),
            "cu_seqlens: expected int32 or int64 .* got torch.float32",
        ),
        (
            {"qkv": torch.zeros(6, 3, 1, 300), "groups": [(1, 6)]},
            "qkv: expected a head_dim of 1 to 256, got 300",
        ),
        (
            {
                "qkv": (torch.zeros(6, 1, 4), torch.zeros(6, 1, 4).half(), torch.zeros(6, 1, 4)),
                "groups": [(1, 6)],
            },
            "k: expected shape, dtype and device of q, .*float16",
        ),
        (
            {"qkv": (torch.zeros(6, 1, 4), torch.zeros(6, 1, 4), torch.zeros(5, 1, 4)), "groups": [(1, 6)]},
            r"v: expected .* got .*\[5, 1, 4\]",
        ),
        (
            {"qkv": (torch.zeros(6, 1, 4, device="meta"), *torch.zeros(2, 6, 1, 4)), "groups": [(1, 6)]},
            "k: expected .*meta.* got .*cpu",
        ),
        (
            {"qkv": torch.zeros(6, 3, 1, 4).long(), "groups": [(1, 6)]},
            "floating-point tensor, got torch.int64",
        ),
    ],
)
def test_bad_input(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.packed_attention(**arguments)  # type: ignore[arg-type]


def test_no_rows_at_all() -> None:
    qkv = torch.zeros(0, 3, 2, 8, requires_grad=True)
    for arguments in ({"groups": []}, {"groups": [(0, 8)]}, {"cu_seqlens": torch.tensor([0, 0])}):
        out = ops.packed_attention(qkv, **arguments)
        assert out.shape == (0, 2, 8)
        assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_gradients_of_the_reference() -> None:
    qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.packed_attention(x, [(2, 2), (1, 3)], 0.5), qkv)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
@pytest.mark.parametrize("groups", MIXES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", SLACK)
@pytest.mark.parametrize("backend", ["triton", "torch", "auto"])
def test_numerics_on_cuda(
    groups: list[tuple[int, int]],
    head_dim: int,
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"packed_attention={backend}")
    torch.manual_seed(0)
    qkv = torch.randn(sum(n * length for n, length in groups), 3, 2, head_dim, device="cuda").to(dtype)
    scale = head_dim**-0.5
    three_way(
        lambda x: ops.packed_attention(x, groups),
        lambda x: reference.packed_attention(x, groups, scale),
        qkv,
        slack=SLACK[dtype],
    )
    x = qkv.requires_grad_()
    runs = [
        torch.autograd.grad(ops.packed_attention(x, groups).float().square().sum(), x)[0] for _ in range(2)
    ]
    assert backend != "triton" or torch.equal(*runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU visible")
def test_offsets_past_2_31_on_cuda() -> None:
    """A teacher's rows of a thousand images, as the library is given them: views of one matrix."""
    sequences, length = 2000, 471
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    qkv = torch.randn(sequences * length, 3, 12, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    assert qkv.numel() > 2**31
    gradient = torch.randn(len(qkv), 12, 64, dtype=torch.bfloat16, device="cuda")

    def attended(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        out = ops.packed_attention(x, [(len(x) // length, length)])
        return out.detach(), torch.autograd.grad(out, x, gradient)[0]

    got = attended(qkv, gradient)
    # From the start, about 2^31 elements in, and at the end.
    for first in (0, 2**31 // (length * 2304) - 2, sequences - 4):
        rows = slice(first * length, (first + 4) * length)
        alone = attended(qkv.detach()[rows].clone().requires_grad_(), gradient[rows])
        for whole, want in zip(got, alone, strict=True):
            torch.testing.assert_close(whole[rows], want, rtol=2e-2, atol=2e-2)


# --- the Triton kernels, without a GPU ---

INTERPRETED = """
import torch
from pera_fast import reference
from pera_fast.kernels import packed_attention as kernels
block_d = lambda dim: max(16, 1 << (dim - 1).bit_length())
for block in (16, 64):
  kernels.config = lambda dtype, dim, _: (block, block_d(dim), 4, 4)
  for groups, heads, dim in (
      (((4, 8), (3, 23)), 2, 32), (((1, 1),), 1, 64), (((1, 70), (9, 8)), 2, 80), (((2, 158),), 1, 64),
      (((1, 64), (1, 65), (2, 0), (1, 33)), 1, 96), (((2, 130), (5, 7)), 1, 128),
  ):
      torch.manual_seed(0)
      rows = sum(n * length for n, length in groups)
      qkv = torch.randn(rows, 3, heads, dim, requires_grad=True)
      gradient, scale = torch.randn(rows, heads, dim), 1.3 * dim ** -0.5
      want = reference.packed_attention(qkv, [g for g in groups if g[1]], scale)
      (want_gradient,) = torch.autograd.grad(want, qkv, gradient)
      out, softmax = torch.full_like(want, torch.nan), torch.full((heads, 2, rows), torch.nan)
      kernels.attention_forward(qkv.detach(), groups, scale, out, softmax)
      torch.testing.assert_close(out, want.detach(), rtol=1e-5, atol=1e-5)
      tiles = kernels.tiles_of(groups, qkv.device, block)
      assert all(softmax[:, 0, first:end].isfinite().all() for first, end, _, _ in tiles.long.tolist())
      got = torch.full_like(qkv, torch.nan)
      kernels.attention_backward(gradient, qkv.detach(), groups, scale, out, softmax, got)
      torch.testing.assert_close(got, want_gradient, rtol=1e-5, atol=1e-5)
print("equal")
"""


def test_triton_kernels_in_the_interpreter_equal_the_reference() -> None:
    assert interpreted(INTERPRETED) == "equal"


def test_tiles_cover_every_row_once() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from pera_fast.kernels import packed_attention as kernels

    groups = ((5, 8), (2, 23), (3, 158), (1, 64), (4, 1), (2, 0), (1, 471))
    block = 64
    tiles = kernels.tiles_of(groups, torch.device("cpu"), block)
    every = torch.cat((tiles.short, tiles.long))
    rows = [row for first, end, _, _ in every.tolist() for row in range(first, end)]
    assert sorted(rows) == list(range(sum(n * length for n, length in groups)))
    for first, end, first_key, end_key in every.tolist():
        assert 0 < end - first <= block
        # A row's own sequence lies within the tile's keys; of a short tile keys and rows are the same.
        assert first_key <= tiles.start[first:end].min() and tiles.end[first:end].max() <= end_key
    assert all(tile[:2] == tile[2:] for tile in tiles.short.tolist())
    assert len(every) == len(tiles.short) + len(tiles.long)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("aligned", [("dim",), ("dim", "rows")], ids=["dim", "dim and rows"])  # as launched
def test_triton_kernels_compile_without_spills(
    capability: int, dtype: str, dim: int, aligned: tuple[str, ...]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from pera_fast.kernels import aot
    from pera_fast.kernels import packed_attention as kernels

    floats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype == "fp32" and dim > 64:
        with pytest.raises(ValueError, match="head_dim: expected at most 64 in torch.float32, got"):
            kernels.config(floats[dtype], dim, capability)
        return
    block, block_d, warps, warps_long = kernels.config(floats[dtype], dim, capability)
    types = {
        **dict.fromkeys(("qkv", "out", "gradient", "qkv_gradient"), f"*{dtype}"), "log_sum": "*fp32", "along": "*fp32",
        **dict.fromkeys(("tiles", "start", "end"), "*i32"), **dict.fromkeys(("rows", "heads", "dim"), "i32"),
        "scale": "fp32",
    }  # fmt: skip
    for kernel in (
        kernels.short_forward_kernel, kernels.long_forward_kernel, kernels.short_backward_kernel,
        kernels.query_backward_kernel, kernels.key_backward_kernel,
    ):  # fmt: skip
        is_long = kernel in (kernels.query_backward_kernel, kernels.key_backward_kernel)
        report = aot.compile_kernel(
            kernel, {name: types[name] for name in kernel.arg_names if name in types},
            {"BLOCK": block, "BLOCK_D": block_d}, capability=capability,
            num_warps=warps_long if is_long else warps, num_stages=kernels.NUM_STAGES,
            multiples_of_16=[n for n in kernel.arg_names if n in aligned],
        )  # fmt: skip
        assert report.spill_bytes == 0, f"{report.name}: {report.spill_bytes} bytes spilled"
        assert report.shared_bytes <= aot.SHARED_MEMORY_LIMIT[capability]
