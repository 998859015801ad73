"""packed_attention forward and backward against what one would use otherwise, at PerA's lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import all_close, compare, near, needs_bfloat16, needs_gpu, peak_flops
from torch import Tensor

from pera_fast import ops
from pera_fast.ops import _dispatch

HEADS, HEAD_DIM = {"ViT-S": 6, "ViT-B": 12, "ViT-G": 16}, 64
# Crops an image, and their tokens: the student's before and after the targets enter, the teacher's.
MIXES = {
    "student, first half": [(2, 158), (8, 8)],
    "student, second half": [(2, 315), (8, 8)],
    "teacher": [(2, 471), (8, 23)],
    "locals, student": [(8, 8)],
    "locals, teacher": [(8, 23)],
    "globals, student": [(2, 315)],
}
Groups = list[tuple[int, int]]


def per_group(qkv: Tensor, groups: Groups) -> Tensor:
    outputs = []
    for part, (sequences, length) in zip(qkv.split([n * m for n, m in groups]), groups, strict=True):
        query, key, value = part.unflatten(0, (sequences, length)).permute(2, 0, 3, 1, 4)
        outputs.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def padded(qkv: Tensor, groups: Groups) -> Tensor:
    lengths = torch.tensor([length for n, length in groups for _ in range(n)])
    longest = int(lengths.max())
    inside = torch.arange(longest) < lengths[:, None]
    batch = qkv.new_zeros(len(lengths), longest, *qkv.shape[1:]).masked_scatter(
        inside[:, :, None, None, None], qkv
    )
    query, key, value = batch.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=inside[:, None, None])
    return attended.transpose(1, 2)[inside]


def per_sequence(qkv: Tensor, groups: Groups) -> Tensor:
    outputs = []
    for part in qkv.split([length for n, length in groups for _ in range(n)]):
        query, key, value = part.permute(1, 2, 0, 3)[:, None]
        outputs.append(F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1))
    return torch.cat(outputs)


PEERS: dict[str, Callable[[Tensor, Groups], Tensor]] = {
    "SDPA, per group": per_group,
    "SDPA, padded": padded,
    "SDPA, per sequence": per_sequence,
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize(
    ("mix", "images", "model", "peer"),
    [
        *((mix, 4, "ViT-S", "SDPA, per group") for mix in MIXES),
        *((mix, n, "ViT-S", "SDPA, per group") for mix in list(MIXES)[3:] for n in (16, 64)),
        ("student, second half", 4, "ViT-B", "SDPA, per group"),
        ("student, second half", 4, "ViT-G", "SDPA, per group"),
        ("student, second half", 4, "ViT-S", "SDPA, padded"),
        ("student, second half", 4, "ViT-S", "SDPA, per sequence"),
        ("locals, student", 16, "ViT-S", "SDPA, per sequence"),
    ],
)
def bench_packed_attention(
    benchmark, mix: str, images: int, model: str, peer: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    groups = [(crops * images, length) for crops, length in MIXES[mix]]
    rows, heads = sum(n * length for n, length in groups), HEADS[model]
    qkv = torch.randn(rows, 3, heads, HEAD_DIM).to(dtype).requires_grad_()
    gradient = torch.randn(rows, heads, HEAD_DIM).to(dtype)

    def run(function: Callable[[Tensor, Groups], Tensor]) -> list[Tensor]:
        output = function(qkv, groups)
        return [output, *torch.autograd.grad(output, qkv, gradient)]

    name = str(dtype).removeprefix("torch.")
    compare(
        benchmark, op="packed_attention",
        peer=peer, ours=lambda: run(ops.packed_attention), theirs=lambda: run(PEERS[peer]),
        same=all_close(2e-2 if dtype == torch.bfloat16 else 1e-4), pairs=9,
        dtype=name, peak_flops=peak_flops(name),
        flops=14 * sum(n * length**2 for n, length in groups) * heads * HEAD_DIM,
        shape=f"{mix}: {' + '.join(f'{n}x{length}' for n, length in groups)}, {model}, fwd+bwd",
    )  # fmt: skip


# --- on a GPU ---


@functools.cache
def _starts(groups: tuple[tuple[int, int], ...]) -> Tensor:
    lengths = [length for n, length in groups for _ in range(n)]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")


def varlen(qkv: Tensor, groups: Groups) -> Tensor:
    attention = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has none").varlen_attn
    starts, longest = _starts(tuple(groups)), max(length for _, length in groups)
    return attention(*qkv.unbind(1), starts, starts, longest, longest)


@functools.cache
def _document_mask(groups: tuple[tuple[int, int], ...]) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor([length for n, length in groups for _ in range(n)], device="cuda")
    document = torch.arange(len(lengths), device="cuda").repeat_interleave(lengths)
    rows = len(document)
    return create_block_mask(lambda b, h, q, k: document[q] == document[k], None, None, rows, rows)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(qkv: Tensor, groups: Groups) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    return _compiled_flex()(query, key, value, block_mask=_document_mask(tuple(groups)))[0].transpose(0, 1)


def xformers(qkv: Tensor, groups: Groups) -> Tensor:
    from xformers.ops import fmha

    query, key, value = qkv[None].unbind(2)
    mask = _xformers_mask(tuple(groups))
    return fmha.memory_efficient_attention(query, key, value, attn_bias=mask)[0]


@functools.cache
def _xformers_mask(groups: tuple[tuple[int, int], ...]) -> Any:
    from xformers.ops import fmha

    return fmha.attn_bias.BlockDiagonalMask.from_seqlens([n for count, n in groups for _ in range(count)])


GPU_PEERS = {
    "SDPA, per group": per_group,
    "torch varlen": varlen,
    "FlexAttention, document mask": flex,
    "xformers, BlockDiagonalMask": xformers,
}


@needs_gpu
@pytest.mark.parametrize("peer", GPU_PEERS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("images", [16, 64])
def bench_packed_attention_on_a_gpu(
    benchmark, images: int, mix: str, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton kernels in bfloat16 at ViT-B's heads."""
    backends = {known.backend: known for known in _dispatch.registered()["packed_attention"]}
    if GPU_PEERS[peer] is xformers and (reason := backends["xformers"].why_missing()):
        pytest.skip(reason)
    monkeypatch.setenv("PERA_FAST_BACKEND", "packed_attention=triton")
    torch.manual_seed(0)
    groups, heads = [(crops * images, length) for crops, length in MIXES[mix]], HEADS["ViT-B"]
    rows = sum(n * length for n, length in groups)
    qkv = torch.randn(rows, 3, heads, HEAD_DIM, device="cuda").bfloat16().requires_grad_()
    gradient = torch.randn(rows, heads, HEAD_DIM, device="cuda").bfloat16()

    def run(function: Callable[[Tensor, Groups], Tensor]) -> list[Tensor]:
        output = function(qkv, groups)
        return [output, *torch.autograd.grad(output, qkv, gradient)]

    compare(
        benchmark, op="packed_attention", backend="triton", peer=peer, device="cuda", same=near, pairs=9,
        ours=lambda: run(ops.packed_attention), theirs=lambda: run(GPU_PEERS[peer]), dtype="bfloat16",
        flops=14 * sum(n * length**2 for n, length in groups) * heads * HEAD_DIM,
        peak_flops=peak_flops("bfloat16", "cuda"),
        shape=f"{mix}: {' + '.join(f'{n}x{length}' for n, length in groups)}, ViT-B, fwd+bwd",
    )  # fmt: skip
