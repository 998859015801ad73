"""Loads the compiled libraries, each once, and says in a few words why one is missing.

`_C.so` holds the schemas and the CPU kernels, `_C_cuda.so` the CUDA kernels; setup.py builds both. Nothing
here raises: a machine without them runs the other backends.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def build_info() -> dict[str, Any] | None:
    """How the libraries were built (compiler, flags, torch, CUDA architectures); None when they were not."""
    try:
        info = json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) else None


def _load(name: str, why_not_built: str) -> str | None:
    file = _PACKAGE / f"{name}.so"
    if not file.is_file():
        return why_not_built
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"library does not load: {error}"
    return None


@functools.cache
def why_no_cpp() -> str | None:
    """None when the CPU library is loaded (the first call loads it), else the reason."""
    return _load("_C", "library not built (pip install -e . builds it)")


def without_result(*names: str) -> None:
    """Kernels of the CPU library that write to their arguments alone: under fake tensors they do nothing."""
    if why_no_cpp() is None:
        for name in names:
            torch.library.register_fake(f"pera_fast::{name}", lambda *_: None)


@functools.cache
def _why_no_cuda_library() -> str | None:
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    if (reason := why_no_cpp()) is not None:  # it holds the schemas
        return reason
    built = (build_info() or {}).get("cuda", {})
    return _load("_C_cuda", f"library not built ({built.get('missing', 'pip install -e . builds it')})")


@functools.cache
def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU visible"
    built = (build_info() or {}).get("cuda", {}).get("archs")
    capability = torch.cuda.get_device_capability()
    if built and not any(_runs_on(arch, capability) for arch in built):
        return f"library built for {', '.join(built)}, GPU is sm_{capability[0]}{capability[1]}"
    return None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` ("80", "90a", "90+PTX") runs on a GPU of this compute capability."""
    number = arch.removesuffix("+PTX")
    major, minor = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):  # this very architecture only
        return (major, minor) == capability
    if major == capability[0] and minor <= capability[1]:
        return True
    return arch.endswith("+PTX") and (major, minor) <= capability


def define(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], gradients: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """An op of Python code, to autograd, fake tensors and torch.compile one whole: `function`, with its schema.

    torch.library.custom_op would have it, too, but brings torch's compiler into the process when it is first called,
    two seconds and 140 MB. fake, gradients, save: as there, of register_fake and register_autograd.
    """

    def none(*_: Any) -> Any:
        raise RuntimeError(f"{name}: its gradients cannot be differentiated again")

    op = f"pera_fast::{name}"
    torch.library.define(op, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(op, "default", function)
    torch.library.register_fake(op, fake)
    torch.library.register_autograd(op, gradients or none, setup_context=save)
    defined: Callable[..., Any] = getattr(torch.ops.pera_fast, name).default
    return defined


def why_no_cuda() -> str | None:
    """None when the CUDA library is loaded (the first call does it) and a GPU can run it, else the reason."""
    return _why_no_cuda_library() or _why_no_gpu()


@functools.cache
def why_no_triton() -> str | None:
    """None when Triton is installed, sees a GPU and can compile what launches its kernels, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "no GPU visible"
    if "CC" not in os.environ and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "Triton needs a C compiler"
    has_headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file()
    return None if has_headers else "Triton needs Python's C headers (the system's package python3-dev)"


# As in _dispatch: torch.compile takes the answer for constant and looks for the mark under the cache.
why_no_triton.__wrapped__._dynamo_marked_constant = True  # type: ignore[attr-defined]
