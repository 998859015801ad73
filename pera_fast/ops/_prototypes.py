"""Weight-normalised prototypes in chunks, so that their logits are never held as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Raw logits of a chunk of prototypes fill at most about this much, to stay in cache on a CPU and to bound the memory
# on a GPU; both networks' are there at once, and the gradient.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}


def check(name: str, prototypes: tuple[Tensor, Tensor], z: Tensor) -> None:
    v, g = prototypes
    if v.dim() != 2 or v.shape[1] != z.shape[1]:
        raise ValueError(f"{name}: expected v of shape [K, {z.shape[1]}], got {list(v.shape)}")
    if len(v) == 0:
        raise ValueError(f"{name}: expected at least one prototype, got v of shape {list(v.shape)}")
    if list(g.shape) != [len(v), 1]:
        raise ValueError(f"{name}: expected g of shape [{len(v)}, 1], got {list(g.shape)}")
    if not v.device == g.device == z.device:
        raise ValueError(f"{name}: expected v and g on {z.device} as z, got {v.device} and {g.device}")


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float64 where one of them is, else in float32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def chunks_of(prototypes: int, rows: int, dtype: torch.dtype, device: str) -> list[slice]:
    """The prototypes in slices of a power of two from 256 to 4096 (CPU) or 4096 to 16384 (GPU)."""
    fitting = CHUNK_BYTES[device] // (rows * dtype.itemsize)
    # A GPU's program takes 32 prototypes: fewer than 4096 would leave multiprocessors idle, however many the rows.
    least, most = (256, 4096) if device == "cpu" else (4096, 16384)
    size = 2 ** int(math.log2(min(max(fitting, least), most)))
    return [slice(start, min(start + size, prototypes)) for start in range(0, prototypes, size)]


def weights(v: Tensor, g: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """The weight-normalised prototypes chunk by chunk."""
    for chunk in chunks_of(len(v), rows, v.dtype, v.device.type):
        norm = torch.linalg.vector_norm(v[chunk], dim=1, keepdim=True)
        yield chunk, v[chunk] * (g[chunk] / norm)


def padding(rows: int) -> int:
    """Rows to add for whole vectors of 16, as the C++ kernels want them."""
    return -rows % 16


def columns(z: Tensor) -> Tensor:
    """z transposed and padded, [d, stride]; in bfloat16 two columns side by side, [d / 2, stride, 2]."""
    z = F.pad(z, (0, 0, 0, padding(len(z))))
    return (z.T if z.dtype == torch.float32 else z.unflatten(1, (-1, 2)).transpose(0, 1)).contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; on a GPU in float32, without rounding in between."""
    is_summed_so = a.dtype == torch.float32 or a.device.type == "cpu"
    return a @ b if is_summed_so else torch.mm(a, b, out_dtype=torch.float32)
