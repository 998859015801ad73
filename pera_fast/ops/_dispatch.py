"""Which implementation of an op runs, and why.

Every op registers its implementations by backend name:

    reference   pera_fast.reference: plain PyTorch, any float dtype, the specification
    torch       fast PyTorch library calls
    cpp         this project's C++ library, CPU tensors
    cuda        this project's CUDA library, CUDA tensors
    triton      pera_fast.kernels, CUDA tensors
    xformers    the xformers library, CUDA tensors

`PERA_FAST_BACKEND` selects: `auto` (default), one name for every op that has it, or a comma-separated
list such as `disjoint_masks=cpp,packed_attention=reference`. A backend asked for by name fails loudly;
`auto` takes the first usable one and logs what it fell back to once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Each with the device of the tensors it takes, None for any.
BACKENDS = {
    "reference": None, "torch": None, "cpp": "cpu", "cuda": "cuda", "triton": "cuda", "xformers": "cuda",
}  # fmt: skip
_log = logging.getLogger("pera_fast")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""

    exit_code = 2


@dataclass(frozen=True)
class Implementation:
    backend: str
    function: Callable[..., Any]
    why_missing: Callable[[], str | None]  # None when usable, else the reason in a few words


_registry: dict[str, list[Implementation]] = {}
_functions: dict[tuple[str, str], Callable[..., Any]] = {}  # by op and backend
_warned: set[tuple[str, str]] = set()


def register(
    op: str, backend: str, function: Callable[..., Any], why_missing: Callable[[], str | None] = lambda: None
) -> None:
    """Add an implementation of `op`; those registered first are preferred by `auto`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    _registry.setdefault(op, []).append(Implementation(backend, function, why_missing))
    _functions[op, backend] = function


def registered() -> dict[str, list[Implementation]]:
    """Every op with its implementations in order of preference."""
    return _registry


def requested(op: str) -> str:
    """The backend name `PERA_FAST_BACKEND` asks for `op`, or "auto"."""
    return _requested(op, os.environ.get("PERA_FAST_BACKEND", "auto"))


@functools.cache  # a step asks hundreds of times
def _requested(op: str, of_all: str) -> str:
    choice = "auto"
    for entry in filter(None, of_all.split(",")):
        name, _, backend = entry.strip().rpartition("=")
        if backend not in (*BACKENDS, "auto"):
            raise BackendError(
                f"PERA_FAST_BACKEND: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        if name and name not in _registry:
            raise BackendError(f"PERA_FAST_BACKEND: expected an op of {', '.join(_registry)}, got {name!r}")
        if name and name == op and backend not in ("auto", *(i.backend for i in _registry[op])):
            raise BackendError(f"PERA_FAST_BACKEND: {op} has no backend {backend!r}")
        # A bare name speaks for every op that has such a backend; the others stay on auto.
        if name == op or (not name and backend in ("auto", *(i.backend for i in _registry[op]))):
            choice = backend
    return choice


def resolve(op: str, device_type: str) -> Implementation:
    """The implementation of `op` for tensors on `device_type` ("cpu" or "cuda").

    Raises BackendError when the requested backend cannot run there.
    """
    choice = requested(op)
    skipped: list[str] = []
    for implementation in _registry[op]:
        if choice not in ("auto", implementation.backend):
            continue
        needs = BACKENDS[implementation.backend]
        if needs is not None and needs != device_type:
            reason: str | None = f"needs {needs} tensors, got {device_type}"
        else:
            reason = implementation.why_missing()
        if reason is None:
            if skipped and (op, device_type) not in _warned:
                _warned.add((op, device_type))
                _log.warning("%s runs on backend %s: %s", op, implementation.backend, "; ".join(skipped))
            return implementation
        if choice != "auto":
            raise BackendError(f"{op}: backend {choice!r} was asked for but is not usable: {reason}")
        if needs == device_type:
            skipped.append(f"{implementation.backend} {reason}")
    raise BackendError(f"{op}: no backend is usable for {device_type} tensors")


def check_constant(**arguments: Any) -> None:
    """ValueError for a tensor that asks for a gradient where none is computed: it would stay as it is, unnoticed."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a constant, got a tensor that requires a gradient")


# What torch.compiler.assume_constant_result does once it has imported the compiler, which takes two seconds.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


def function(op: str, device_type: str) -> Callable[..., Any]:
    """The function of `resolve`; torch.compile sees through the choice, which it takes for constant."""
    return _functions[op, resolve(op, device_type).backend]
