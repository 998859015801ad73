"""x · weightᵀ + bias by the library that is quickest at it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pera_fast import reference
from pera_fast.ops import _dispatch, _library

Norm = tuple[Tensor, Tensor, Tensor]  # rows [R, F], weight [F] and bias [F]


def linear(
    x: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None
) -> Tensor:
    """torch.nn.functional.linear of rows: x · weightᵀ + bias.

    x: float [R, F], or its parts [Rᵢ, F] in order: then nobody need join them. weight: float [D, F] in x's dtype, or
    any where autocast says which. bias: float [D].
    norm: (n [R, F], weight [F], bias [F]) of which x = n * weight + bias. `residual_norm` keeps n for its backward
    pass: so does this one then, instead of x. Of a gradient G of the output, Gᵀx = (Gᵀn) * weight + (Σ G) ⊗ bias.
    Gradients go to x, weight and bias, none through norm.

    Returns [R, D]. Raises ValueError when the shapes do not fit.
    """
    parts = [x] if isinstance(x, Tensor) else list(x)
    if not parts:
        raise ValueError("x: expected one part at least, got none")
    for part in parts:
        if part.dim() != 2:
            raise ValueError(f"x: expected shape [R, F], got {list(part.shape)}")
        if weight.dim() != 2 or weight.shape[1] != part.shape[1]:
            raise ValueError(f"weight: expected shape [D, {part.shape[1]}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{len(weight)}], got {list(bias.shape)}")
    if norm is not None:
        rows, features = sum(len(part) for part in parts), weight.shape[1]
        shapes = [(rows, features), (features,), (features,)]
        for name, value, shape in zip(("rows", "weight", "bias"), norm, shapes, strict=True):
            if value.shape != shape:
                raise ValueError(f"norm.{name}: expected shape {list(shape)}, got {list(value.shape)}")
    return _dispatch.function("linear", weight.device.type)(parts, weight, bias, norm)


_is_plain = False


@contextmanager
def plain() -> Iterator[None]:
    """F.linear alone, as on a GPU, to foresee its memory here: this processor may need wider operands."""
    global _is_plain
    before, _is_plain = _is_plain, True
    try:
        yield
    finally:
        _is_plain = before


def _library_product(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None, norm: Norm | None
) -> Tensor:
    dtype, is_compiling = _dtype_of(parts[0], weight), torch.compiler.is_compiling()
    if dtype is not None and len(parts) > 1 and not is_compiling and not _is_own(parts[0], dtype):
        parts, weight, bias = [x.to(dtype) for x in parts], weight.to(dtype), _to(bias, dtype)
        return _filled(_PartsProduct.apply(weight, bias, *parts), lambda: _of_parts(parts, weight, bias))
    x = join_parts(parts)
    if dtype is None or (norm is None and not _is_own(x, dtype)):
        return F.linear(x, weight, bias)
    x, weight, bias = x.to(dtype), weight.to(dtype), _to(bias, dtype)
    if is_compiling:  # its gradients follow from what is traced
        with torch.autocast(x.device.type, enabled=False):
            return _product(x, weight, bias)
    return _filled(_Product.apply(x, weight, bias, *(norm or (None,) * 3)), lambda: _product(x, weight, bias))


def _filled(out: Tensor, numbers: Callable[[], Tensor]) -> Tensor:
    """Now and not within the function that made `out`: a checkpoint that makes an operand again for the backward pass
    stops once that is saved, before this."""
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        out.data = numbers()
    return out


def _dtype_of(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """That of a product whose operands are made of one dtype; None: F.linear knows what to do."""
    if x.is_meta or 0 in (x.numel(), weight.numel()) or torch.float64 in (x.dtype, weight.dtype):
        return None
    dtype = dtype_of_products(x)
    is_low = dtype in (torch.bfloat16, torch.float16)
    return dtype if is_low or dtype == x.dtype == weight.dtype else None


def dtype_of_products(x: Tensor) -> torch.dtype:
    """Autocast's where it is on, else x's."""
    on = x.device.type
    return torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else x.dtype


def join_parts(parts: Sequence[Tensor]) -> Tensor:
    """Rows that come in parts as one matrix, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _to(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of tensors of one dtype, in it."""
    dtype = x.dtype
    if _is_wide(x, dtype):
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    return _rows_times(x, weight, bias).to(dtype)


def _is_own(x: Tensor, dtype: torch.dtype) -> bool:
    """Not as F.linear would take it."""
    return _takes_onednn(x, dtype) or _is_wide(x, dtype)


def _takes_onednn(x: Tensor, dtype: torch.dtype) -> bool:
    """F.linear gives float32 to MKL, which on an AMD processor uses AVX2 at most, half the speed of AVX-512. In
    bfloat16 it does ask oneDNN, but adds the bias in a pass of its own. A compiler has products of its own."""
    if _is_plain or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    is_amd_avx512, has_bfloat16, has_onednn, has_onednn_bfloat16 = _traits()
    if dtype == torch.bfloat16:
        return has_onednn_bfloat16 and has_bfloat16
    return dtype == torch.float32 and has_onednn and is_amd_avx512


def _is_wide(x: Tensor, dtype: torch.dtype) -> bool:
    """Without instructions for bfloat16, torch's products of it are up to a hundred times slower than float32's."""
    if _is_plain or x.device.type != "cpu":
        return False
    return dtype == torch.bfloat16 and not _traits().has_bfloat16


class _Traits(NamedTuple):
    is_amd_avx512: bool
    has_bfloat16: bool  # instructions for its products; taken to be so where nothing is known
    has_onednn: bool
    has_onednn_bfloat16: bool


def _traits() -> _Traits:
    """What the processor and this build of torch have."""
    return _known_traits()


_traits._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in _dispatch


@functools.cache
def _known_traits() -> _Traits:
    has_onednn = torch.backends.mkldnn.is_available()
    onednn = has_onednn, has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if _library.why_no_cpp() is not None:
        return _Traits(False, True, *onednn)
    traits = torch.ops.pera_fast
    return _Traits(traits.is_amd() and traits.isa() >= 2, traits.has_bfloat16(), *onednn)


class _Product(torch.autograd.Function):
    """A product of one dtype, each of its gradients as it is quickest; what is kept for the backward pass is of that
    dtype, too. The numbers are put in by the caller."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        normalised: Tensor | None,
        *affine: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x if normalised is None else normalised.to(x.dtype), weight, *affine)
        return x.new_empty_strided((len(x), len(weight)), (0, 0))  # not expanded: a view cannot be added to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, norm_weight, norm_bias = ctx.saved_tensors
        dtype = kept.dtype
        if _is_wide(kept, dtype):
            gradient, kept, weight = gradient.float(), kept.float(), weight.float()
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        # Without a bias to add, torch's own products of bfloat16 are those of oneDNN, and quicker in transposing.
        is_float32 = gradient.dtype == torch.float32
        of_norm = norm_weight is not None and of_weight
        x_gradient = weight_gradient = None
        with torch.autocast(kept.device.type, enabled=False):
            bias_gradient = gradient.sum(0) if of_bias or of_norm else None
            if of_x:
                x_gradient = _rows_times(gradient, weight.T) if is_float32 else gradient @ weight
            if of_weight:
                weight_gradient = _transposed_times(gradient, kept) if is_float32 else gradient.T @ kept
            if of_norm and bias_gradient is not None:
                weight_gradient = weight_gradient * norm_weight.float()
                weight_gradient.addr_(bias_gradient.float(), norm_bias.float())
        found = x_gradient, weight_gradient, bias_gradient if of_bias else None
        return *(None if g is None else g.to(dtype) for g in found), None, None, None


class _PartsProduct(torch.autograd.Function):
    """A product of several matrices of rows, all of one dtype. The numbers are put in by the caller."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        return weight.new_empty_strided((sum(len(x) for x in parts), len(weight)), (0, 0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        of_weight, of_bias, *of_parts = ctx.needs_input_grad
        gradients = gradient.split([len(x) for x in parts])
        with torch.autocast(gradient.device.type, enabled=False):
            weight_gradient = bias_gradient = None
            if of_weight:  # rounded once
                products = [(g.T @ x).float() for g, x in zip(gradients, parts, strict=True)]
                weight_gradient = sum(products[1:], products[0]).to(weight.dtype)
            if of_bias:
                bias_gradient = gradient.sum(0)
            of_each = [g @ weight if needed else None for g, needed in zip(gradients, of_parts, strict=True)]
        return weight_gradient, bias_gradient, *of_each


def _of_parts(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of tensors of one dtype, each part's product at its place."""
    out = weight.new_empty(sum(len(x) for x in parts), len(weight))
    for x, place in zip(parts, out.split([len(x) for x in parts]), strict=True):
        if bias is None:
            torch.mm(x, weight.T, out=place)
        else:
            torch.addmm(bias, x, weight.T, out=place)
    return out


_MANY_ROWS = 3072  # as a convolution of one pixel they are up to a tenth quicker (bench_linear.py)


def _rows_times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias of tensors of one dtype."""
    if not _takes_onednn(x, x.dtype):
        return F.linear(x, weight, bias)
    if len(x) >= _MANY_ROWS and weight.is_contiguous() and _traits().is_amd_avx512:
        pixels = x.contiguous().view(1, 1, *x.shape).permute(0, 3, 1, 2)  # channels come last in memory
        kernel = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
        return F.conv2d(pixels, kernel, bias).permute(0, 2, 3, 1).flatten(0, 2)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _transposed_times(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ · b of float32 [R, D] and [R, F]."""
    if not _takes_onednn(a, a.dtype):
        return a.T @ b
    # oneDNN is handed a copy of its first matrix, transposed: of the narrower one.
    if a.shape[1] > b.shape[1]:
        return _rows_times(b.T, a.T).T.contiguous()
    return _rows_times(a.T, b.T)


_dispatch.register("linear", "torch", _library_product)
_dispatch.register(
    "linear", "reference", lambda parts, weight, bias, _: reference.linear(join_parts(parts), weight, bias)
)
