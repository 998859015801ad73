"""Checks and layouts of the ops that take whole lists of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Lists = dict[str, Sequence[Tensor | None]]
_LOW = (torch.float32, torch.bfloat16)


def check(first: str, lists: Lists) -> None:
    """Every list as long as the first, with tensors of equal shape and device at each place."""
    leading = lists[first]
    for name, tensors in lists.items():
        if len(tensors) != len(leading):
            raise ValueError(
                f"{name}: expected {len(leading)} tensors, one for each of {first}, got {len(tensors)}"
            )
        for place, (tensor, like) in enumerate(zip(tensors, leading, strict=True)):
            if tensor is None or like is None or tensor is like:
                continue
            if tensor.shape != like.shape:
                raise ValueError(
                    f"{name}[{place}]: expected shape {list(like.shape)}, got {list(tensor.shape)}"
                )
            if tensor.device != like.device:
                raise ValueError(f"{name}[{place}]: expected device {like.device}, got {tensor.device}")


def check_shadows(name: str, shadows: Sequence[Tensor | None]) -> None:
    for place, shadow in enumerate(shadows):
        if shadow is not None and shadow.dtype != torch.bfloat16:
            raise ValueError(f"{name}[{place}]: expected torch.bfloat16, got {shadow.dtype}")


def are_low(*lists: Sequence[Tensor | None]) -> bool:
    """Whether all tensors are of the dtypes that the compiled kernels take."""
    return all(tensor is None or tensor.dtype in _LOW for tensors in lists for tensor in tensors)


def check_device(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    for place, tensor in enumerate(tensors):
        if tensor.device != device:
            raise ValueError(f"{name}[{place}]: expected device {device}, got {tensor.device}")


def in_memory_order(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x with its axes from the largest stride to the smallest, of `like` if given; contiguous if x is dense."""
    like = x if like is None else like
    if like.is_contiguous() and x.is_contiguous():
        return x
    strides = like.stride()
    return x.permute(sorted(range(like.dim()), key=lambda axis: -strides[axis]))


def flat(first: str, written: Lists, read: Lists) -> list[list[Tensor]]:
    """The lists with an empty tensor for None, each place in one contiguous order of its numbers.

    Where the first list's tensor is dense but not contiguous (channels_last), all of its place are taken in its
    order. What is read is copied where it lies otherwise; for what is written that is a ValueError.
    """
    lists: list[list[Tensor]] = []
    for name, tensors in (*written.items(), *read.items()):
        found = []
        for place, (tensor, like) in enumerate(zip(tensors, written[first], strict=True)):
            assert like is not None
            x = like.new_empty(0) if tensor is None else in_memory_order(tensor, like)
            if not x.is_contiguous():
                if name in written:
                    raise ValueError(
                        f"{name}[{place}]: expected a dense tensor laid out as {first}[{place}], got strides "
                        f"{list(x.stride())} for shape {list(x.shape)}"
                    )
                x = x.contiguous()
            found.append(x)
        lists.append(found)
    return lists


def scalars(device: torch.device, *values: float | Tensor) -> Tensor:
    """float64 [n] on `device`, of numbers and 0-d tensors, which are not waited for."""

    def on_device(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=device)  # not copied from the host

    return torch.stack([on_device(value) for value in values])
