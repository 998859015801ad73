"""Compile a Triton kernel ahead of time and report what it uses; no GPU is needed.

report = compile_kernel(kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": 128}, capability=90)
assert report.spill_bytes == 0 and report.shared_bytes <= SHARED_MEMORY_LIMIT[90]
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Most shared memory that one block may use, in bytes, by compute capability.
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class KernelReport:
    """Resources of one compiled kernel; registers and spills are per thread, shared memory per block."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    cubin: bytes


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    *,
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    multiples_of_16: Collection[str] = (),
) -> KernelReport:
    """Compile `kernel`, a function under `@triton.jit` (under autotune or heuristics, pass its `.fn`).

    signature: Triton type of every run-time argument, e.g. "*bf16", "i32", "fp32".
    constants: value of every `tl.constexpr` argument.
    multiples_of_16: integer arguments that are taken for multiples of 16, as all pointers are: a launch does the same
        where it finds them so.
    Raises RuntimeError when Triton's interpreter is on: it then has no kernel to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"kernel: expected a triton.jit function outside the interpreter (TRITON_INTERPRET=0), got "
            f"{type(kernel).__name__}"
        )
    constants = dict(constants or {})
    names = kernel.arg_names
    missing = [name for name in names if name not in signature and name not in constants]
    unknown = [name for name in (*signature, *constants, *multiples_of_16) if name not in names]
    if missing or unknown:
        raise ValueError(f"signature, constants: missing {missing}, not arguments of the kernel {unknown}")
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name].startswith("*") or name in multiples_of_16
    }
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    cubin = compiled.asm["cubin"]
    registers, spill_bytes = resource_usage(cubin)
    return KernelReport(
        name=compiled.metadata.name,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        cubin=cubin,
    )


def cuobjdump() -> str:
    """Path of the cuobjdump that Triton ships."""
    import triton

    assert triton.__file__ is not None
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not path.is_file():
        raise FileNotFoundError(f"this Triton ships no cuobjdump at {path}")
    return str(path)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, spill bytes) per thread of the one kernel in `cubin`.

    Triton kernels have no arrays of their own on the stack, so what the stack and local memory hold is
    spilled registers.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        text = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", file], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump: no resource usage in its answer: {text!r}")
    registers, stack, local = map(int, match.groups())
    return registers, stack + local
