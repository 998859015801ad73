"""packed_attention forward and backward against one padded batch, at the student's lengths."""

import pytest
import torch
import torch.nn.functional as F
from compare import all_close, compare

from pera_fast import ops
from pera_fast.ops import _dispatch

GROUPS = [(8, 315), (32, 8)]  # four images: two global and eight local crops each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_packed_attention(benchmark, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, head_dim, longest = 6, 64, max(length for _, length in GROUPS)
    qkv = torch.randn(sum(n * length for n, length in GROUPS), 3, heads, head_dim).to(dtype).requires_grad_()
    lengths = torch.tensor([length for n, length in GROUPS for _ in range(n)])
    inside = torch.arange(longest) < lengths[:, None]

    def ours() -> list[torch.Tensor]:
        output = ops.packed_attention(qkv, GROUPS)
        return [output, *torch.autograd.grad(output.float().square().sum(), qkv)]

    def theirs() -> list[torch.Tensor]:
        padded = qkv.new_zeros(len(lengths), longest, 3, heads, head_dim)
        padded = padded.masked_scatter(inside[:, :, None, None, None], qkv)
        query, key, value = padded.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=inside[:, None, None])
        output = attended.transpose(1, 2)[inside]
        return [output, *torch.autograd.grad(output.float().square().sum(), qkv)]

    compare(
        benchmark, op="packed_attention", backend=_dispatch.resolve("packed_attention", "cpu").backend,
        peer="SDPA, padded", ours=ours, theirs=theirs, same=all_close(2e-2 if dtype == torch.bfloat16 else 1e-4),
        dtype=str(dtype).removeprefix("torch."), shape="8x315 + 32x8, 6 heads of 64, fwd+bwd",
    )  # fmt: skip
