"""Attention over many sequences packed as rows of one matrix, no padding."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pera_fast import reference
from pera_fast.ops import _dispatch, _library
from pera_fast.ops.linear import join_parts

Groups = Sequence[tuple[int, int]]  # (number of sequences, their length), in row order


def packed_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    groups: Groups | None = None,
    scale: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention within each sequence: softmax(q kᵀ · scale) v. No row is padded.

    qkv: float32, bfloat16, float16 or float64 [rows, 3, heads, head_dim], the sequences' rows one after the
    other; or (q, k, v) of [rows, heads, head_dim] each, which are copied together.
    groups: (number of sequences, their length) of each run of equally long sequences, in row order.
    cu_seqlens: in place of groups, int32 or int64 [sequences + 1], where each sequence starts and the last one
    ends, from 0 to rows; empty sequences are fine. On a GPU reading it waits for the device; groups does not.
    scale: factor on the scores, default head_dim ** -0.5. head_dim: 1 to 256.

    Returns [rows, heads, head_dim] in qkv's dtype; sums are float32 or better. Equal calls give equal bits, on a GPU
    where the kernels take them or torch.use_deterministic_algorithms is on: PyTorch's SDPA adds its gradients in any
    order.
    Raises ValueError naming the argument when shapes, dtypes or devices do not fit.
    """
    if not isinstance(qkv, Tensor):
        qkv = _joined(*qkv)
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected shape [rows, 3, heads, head_dim], got {list(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv: expected a floating-point tensor, got {qkv.dtype}")
    if not 1 <= qkv.shape[3] <= 256:
        raise ValueError(f"qkv: expected a head_dim of 1 to 256, got {qkv.shape[3]}")
    if (groups is None) == (cu_seqlens is None):
        raise ValueError(
            "groups, cu_seqlens: expected one of the two, got " + ("both", "none")[groups is None]
        )
    if groups is None:
        assert cu_seqlens is not None
        groups = _groups_of(cu_seqlens, len(qkv))
    elif any(sequences < 0 or length < 1 for sequences, length in groups):
        raise ValueError(f"groups: expected (sequences >= 0, length >= 1) pairs, got {list(groups)}")
    rows = sum(sequences * length for sequences, length in groups)
    if rows != qkv.shape[0]:
        raise ValueError(f"groups: expected sequences that add up to {qkv.shape[0]} rows of qkv, got {rows}")
    _dispatch.check_constant(scale=scale)
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    return _dispatch.function("packed_attention", qkv.device.type)(qkv, groups, scale)


def attention_parts(qkv: Tensor, groups: Groups) -> list[Tensor]:
    """`packed_attention` as the parts that follow one another in it: the library keeps what it makes of each group for
    the backward pass, and a product of them (`ops.linear`) needs no second copy."""
    if _dispatch.resolve("packed_attention", qkv.device.type).backend == "torch":
        return _parts(qkv, groups, qkv.shape[3] ** -0.5)
    return [packed_attention(qkv, groups)]


def _joined(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    for name, x in (("k", key), ("v", value)):
        got, expected = ((list(t.shape), t.dtype, t.device) for t in (x, query))
        if got != expected:
            raise ValueError(f"{name}: expected shape, dtype and device of q, {expected}, got {got}")
    if query.dim() != 3:
        raise ValueError(f"q: expected shape [rows, heads, head_dim], got {list(query.shape)}")
    return torch.stack((query, key, value), 1)


def _groups_of(cu_seqlens: Tensor, rows: int) -> Groups:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 [sequences + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    starts = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    if starts[0] != 0 or starts[-1] != rows:
        raise ValueError(
            f"cu_seqlens: expected 0 first and {rows} rows last, got {starts[0]} and {starts[-1]}"
        )
    if min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens: expected no decrease, got a sequence of {min(lengths)} rows")
    return [(len(list(run)), length) for length, run in groupby(lengths) if length]


@functools.lru_cache(maxsize=256)
def _starts(groups: tuple[tuple[int, int], ...]) -> Tensor:
    """Where each sequence starts and the last one ends, int64 [sequences + 1] on the CPU."""
    lengths = [length for sequences, length in groups for _ in range(sequences)]
    return torch.tensor(list(accumulate(lengths, initial=0)))


def _pairs(counts: Sequence[int], lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(counts, lengths, strict=True))


def _attend(
    qkv: Tensor, counts: Sequence[int], lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Output [rows, heads, head_dim]; float32 [heads, 2, rows] for the backward pass: each row's largest score and
    1 / Σ exp, on a GPU what kernels/packed_attention.py says."""
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(rows, heads, head_dim)
    softmax = qkv.new_empty(heads, 2, rows, dtype=torch.float32)
    if qkv.device.type == "cpu":
        torch.ops.pera_fast.attention_forward(qkv, _starts(_pairs(counts, lengths)), scale, out, softmax)
    else:
        from pera_fast.kernels import packed_attention as kernels  # needs Triton

        kernels.attention_forward(qkv, _pairs(counts, lengths), scale, out, softmax)
    return out, softmax


def _fake(qkv, counts, lengths, scale):  # type: ignore[no-untyped-def]
    rows, _, heads, head_dim = qkv.shape
    return qkv.new_empty(rows, heads, head_dim), qkv.new_empty(heads, 2, rows, dtype=torch.float32)


def _attend_backward(
    gradient: Tensor, qkv: Tensor, out: Tensor, softmax: Tensor, counts: Sequence[int], lengths: Sequence[int],
    scale: float,
) -> Tensor:  # fmt: skip
    qkv_gradient = torch.empty_like(qkv)
    gradient, groups = gradient.contiguous(), _pairs(counts, lengths)
    if qkv.device.type == "cpu":
        torch.ops.pera_fast.attention_backward(
            gradient, qkv, _starts(groups), scale, out, softmax, qkv_gradient
        )
    else:
        from pera_fast.kernels import packed_attention as kernels  # needs Triton

        kernels.attention_backward(gradient, qkv, groups, scale, out, softmax, qkv_gradient)
    return qkv_gradient


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    qkv, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output)


def _gradients(ctx, gradient, _):  # type: ignore[no-untyped-def]
    return _backward(gradient, *ctx.saved_tensors, *ctx.rest), None, None, None


_forward = _library.define("packed_attention", _attend, _fake, _gradients, _save)
_backward = _library.define(
    "packed_attention_backward", _attend_backward, lambda gradient, qkv, *_: torch.empty_like(qkv)
)


def _kernels(qkv: Tensor, groups: Groups, scale: float) -> Tensor:
    if qkv.dtype == torch.float64:
        return join_parts(_sdpa(qkv, groups, scale))
    # On a GPU no tile of a larger head fits into the registers. The largest product is taken for the largest score.
    is_large = qkv.device.type != "cpu" and qkv.shape[3] > (64 if qkv.dtype == torch.float32 else 128)
    if is_large or scale <= 0:
        return join_parts(_sdpa(qkv, groups, scale))
    if qkv.dtype == torch.float16 and qkv.device.type == "cpu":
        return _kernels(qkv.float(), groups, scale).half()  # rare on a CPU, and exact in float32
    counts, lengths = [n for n, _ in groups], [length for _, length in groups]
    return _forward(qkv.contiguous(), counts, lengths, scale)[0]


def _xformers(qkv: Tensor, groups: Groups, scale: float) -> Tensor:
    from xformers.ops import fmha

    query, key, value = qkv[None].unbind(2)
    mask = _block_diagonal(tuple(map(tuple, groups)), qkv.device)
    return fmha.memory_efficient_attention(query, key, value, attn_bias=mask, scale=scale)[0]


@functools.lru_cache(maxsize=64)
def _block_diagonal(groups: tuple[tuple[int, int], ...], device: torch.device) -> Any:
    """xformers' description of the groups, whose numbers are copied to the device: not in every call."""
    from xformers.ops import fmha

    lengths = [length for sequences, length in groups for _ in range(sequences)]
    return fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=device)


def _why_no_xformers() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if not torch.cuda.is_available():
        return "no GPU visible"
    try:
        from xformers import _has_cpp_library
    except ImportError as error:
        return f"xformers does not load: {error}"
    return None if _has_cpp_library else "xformers' kernels are built for another torch or CUDA"


# Of a longer sequence the library's tiles, 64 or 128 rows of one sequence and head, are full enough.
_SHORT = 32


def _torch(qkv: Tensor, groups: Groups, scale: float) -> Tensor:
    return join_parts(_parts(qkv, groups, scale))


def _parts(qkv: Tensor, groups: Groups, scale: float) -> list[Tensor]:
    """SDPA; on a GPU, unless it is asked for by name, the kernels for sequences that leave its tiles empty."""
    is_by_choice = _dispatch.requested("packed_attention") == "torch"
    has_kernels = qkv.dtype in (torch.bfloat16, torch.float16) and qkv.shape[3] <= 128
    if is_by_choice or qkv.device.type != "cuda" or not has_kernels or _library.why_no_triton() is not None:
        return _sdpa(qkv, groups, scale)
    return _sdpa(qkv, groups, scale, longer_than=_SHORT)


def _sdpa(qkv: Tensor, groups: Groups, scale: float, longer_than: int = 0) -> list[Tensor]:
    """SDPA of each group of sequences that are long enough, the kernels for the others."""
    operands, outputs = iter(_Operands.apply(qkv, groups, longer_than)), []
    for group in groups:
        if group[1] <= longer_than:
            outputs.append(_kernels(next(operands), [group], scale))
            continue
        query, key, value = next(operands), next(operands), next(operands)
        attended = F.scaled_dot_product_attention(query, key, value, scale=scale)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return outputs or [qkv[:, 0]]


def _operands(qkv: Tensor, groups: Groups, longer_than: int) -> list[Tensor]:
    """Of each group of long enough sequences q, k and v [sequences, heads, length, head_dim], of others its rows."""
    operands: list[Tensor] = []
    for part, group in zip(qkv.split([n * length for n, length in groups]), groups, strict=True):
        is_short = group[1] <= longer_than
        operands += [part] if is_short else [x.transpose(1, 2) for x in part.unflatten(0, group).unbind(2)]
    return operands


class _Operands(torch.autograd.Function):
    """`_operands`, whose gradients are each written once, into their place in that of qkv."""

    @staticmethod
    def forward(ctx, qkv, groups, longer_than):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.rest = qkv.shape, (groups, longer_than)
        return tuple(_operands(qkv, groups, longer_than))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        if not gradients:
            return None, None, None
        (groups, longer_than), given = ctx.rest, iter(gradients)
        whole = gradients[0].new_empty(ctx.shape)
        for part, group in zip(whole.split([n * length for n, length in groups]), groups, strict=True):
            if group[1] <= longer_than:
                part.copy_(next(given))
            else:  # of q, k and v at once: where they are contiguous, in wide words
                of_each = [next(given).transpose(1, 2) for _ in range(3)]
                torch.stack(of_each, dim=2, out=part.unflatten(0, group))
        return whole, None, None


_library.without_result("attention_forward", "attention_backward")

_dispatch.register("packed_attention", "cpp", _kernels, _library.why_no_cpp)
# On a GPU the library takes long sequences until the kernels have been measured there (bench_packed_attention.py).
_dispatch.register("packed_attention", "torch", _torch)
_dispatch.register("packed_attention", "triton", _kernels, _library.why_no_triton)
_dispatch.register("packed_attention", "xformers", _xformers, _why_no_xformers)
_dispatch.register("packed_attention", "reference", reference.packed_attention)
