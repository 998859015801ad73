"""What this installation can run: `python -m pera_fast.info [--json]`.

Versions, processor and GPUs, how the compiled libraries were built, and for every op the backend that runs
it and why another does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pera_fast.ops  # noqa: F401  (registers the ops)
from pera_fast import _cli
from pera_fast.config import usable_cores
from pera_fast.ops import _dispatch, _library
from pera_fast.optim import apex


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return {
        "name": found.group(1) if found else name,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _cudnn() -> str | None:
    """Whose attention torch prefers on sm_90 from 9.15 on (torch 2.11)."""
    try:
        found = torch.backends.cudnn.version()
    except RuntimeError as error:  # of a version that does not go with this torch or GPU
        return str(error).splitlines()[0]
    return None if found is None else f"{found // 10000}.{found // 100 % 100}.{found % 100}"


def _backends(op: str, device_type: str) -> dict[str, Any]:
    """The backend of `op` for tensors on `device_type`, and why the ones for such tensors do not run."""
    missing = {}
    for implementation in _dispatch.registered()[op]:
        needs = _dispatch.BACKENDS[implementation.backend]
        if needs is None or needs == device_type:
            reason = implementation.why_missing()
            if reason is not None:
                missing[implementation.backend] = reason
    try:
        chosen, error = _dispatch.resolve(op, device_type).backend, None
    except _dispatch.BackendError as exception:
        chosen, error = None, str(exception)
    return {"backend": chosen, "error": error, "missing": missing}


def collect() -> dict[str, Any]:
    """All facts, in types that JSON knows."""
    return {
        "versions": {
            "pera_fast": _version("pera_fast"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cudnn": _cudnn(),
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "xformers": _version("xformers"),
        },
        "apex": {"version": _version("apex"), **apex()},
        "system": platform.platform(),
        "processor": _processor(),
        "gpus": _gpus(),
        "build": _library.build_info(),
        "libraries": {"cpp": _library.why_no_cpp(), "cuda": _library.why_no_cuda()},
        "requested_backend": os.environ.get("PERA_FAST_BACKEND", "auto"),
        # Both devices, GPU or not: what a CUDA machine would lack is worth knowing before going there.
        "ops": {op: {on: _backends(op, on) for on in ("cpu", "cuda")} for op in _dispatch.registered()},
    }


def render(facts: dict[str, Any]) -> str:
    """`collect()` for people."""
    lines = [f"{name:<12} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines[3] = f"{'torch_cuda':<12} {facts['versions']['torch_cuda'] or 'none: this torch is a CPU build'}"
    version = facts["apex"]["version"]
    lines.append(f"{'apex':<12} {version + ': ' if version else ''}{facts['apex']['note']}")
    processor = facts["processor"]
    lines += [
        "",
        f"{'system':<12} {facts['system']}",
        f"{'processor':<12} {processor['name']}, {processor['isa']}, {processor['usable_cores']} usable "
        f"cores, {processor['torch_threads']} torch threads",
    ]
    lines += [
        f"{f'gpu {i}':<12} {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        for i, gpu in enumerate(facts["gpus"])
    ] or [f"{'gpu':<12} none visible"]
    lines += ["", "compiled libraries"]
    for name, why in facts["libraries"].items():
        lines.append(f"  {name:<10} {'loaded' if why is None else why}")
    for name, value in (facts["build"] or {}).items():
        if isinstance(value, dict):
            lines += [f"  {name + ' ' + key:<22} {_flat(item)}" for key, item in value.items()]
        else:
            lines.append(f"  {name:<22} {_flat(value)}")
    lines += ["", f"backends (PERA_FAST_BACKEND={facts['requested_backend']})"]
    for op, devices in facts["ops"].items():
        for device, state in devices.items():
            missing = "; ".join(f"no {backend}: {why}" for backend, why in state["missing"].items())
            chosen = state["backend"] or state["error"]
            lines.append(f"  {op:<20} {device:<5} {chosen:<10} {missing}".rstrip())
    return "\n".join(lines)


def _flat(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pera_fast.info", description="What this installation can run."
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    as_json = parser.parse_args().json
    # Every reason is in the answer; the log would only say some of them again.
    logging.getLogger("pera_fast").setLevel(logging.ERROR)
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else render(facts))


if __name__ == "__main__":
    _cli.run(main)
