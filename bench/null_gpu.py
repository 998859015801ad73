"""What can be told of a GPU's memory and of the host's work without one: PyTorch's own CUDA allocator, graphs and
launches over csrc/testing/null_gpu.cpp, which computes nothing.

python bench/null_gpu.py    with a CUDA build of torch, nvcc, Triton and this package's dependencies: each preset's
                            automatic batch and the eager step's (baselines/eager_step.py) largest one, host work and
                            waiting of a recorded step -> bench/results/null_gpu.json

Times of a GPU it does not tell, nor memory that the driver and cuDNN take for themselves. SDPA is PyTorch's flash
attention here.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench/results/null_gpu.json"
# (preset, MiB that the GPU reports): an RTX 4090, an A100 or H100 of 80 GB, an H200
CASES = [("vit_s", 24564), ("vit_b", 24564), ("vit_b", 81559), ("vit_l", 81559), ("vit_b", 143771)]
PROTOTYPES, DROP_PATH = 131072, 0.3


def on_the_host(work: Path) -> None:
    """Build the CUDA library and the null GPU for it, and start this file again on that one."""
    sys.path.insert(0, str(ROOT))  # the package need not be installed
    import torch
    from compare import commit

    if torch.version.cuda is None:
        sys.exit(f"error: torch: expected a CUDA build, got {torch.__version__}")
    library, copy = work / "libcuda.so.1", work / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "*.so", "gpu_out", "site"))
    (copy / "pera_fast/kernels").symlink_to(copy / "kernels")  # as an installation has it
    # The CUDA library brings a runtime of its own, which would look for a driver.
    build = {**os.environ, "NVCC_APPEND_FLAGS": "-cudart shared", "TORCH_CUDA_ARCH_LIST": "9.0"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=copy, env=build, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    built = json.loads((copy / "pera_fast/_build_info.json").read_text())
    if "toolkit" not in built["cuda"]:
        sys.exit(f"error: nvcc: expected a CUDA toolkit to build with: {built['cuda'].get('missing')}")
    subprocess.run(
        [built["compiler"], "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
         f"-I{built['cuda']['toolkit']}/include", str(copy / "csrc/testing/null_gpu.cpp"), "-o", str(library)],
        check=True,
    )  # fmt: skip
    environment = {
        **os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(work), "TRITON_LIBCUDA_PATH": str(work),
        "TRITON_CACHE_DIR": str(work / "triton"), "PYTHONPATH": os.pathsep.join(
            [str(copy), str(copy / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ), "PYTORCH_NVML_BASED_CUDA_CHECK": "0", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    rows = []
    for preset, mebibytes in CASES:
        environment["NULL_GPU_MIB"] = str(mebibytes)
        done = subprocess.run(
            [sys.executable, str(copy / "bench/null_gpu.py"), preset], env=environment, check=True, cwd=work,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"preset": preset, "gpu_mib": mebibytes, "commit": commit(), **found})
        print(rows[-1], flush=True)
    RESULT.write_text(json.dumps({"null_gpu": rows}, indent=1) + "\n")


def on_the_null_gpu(preset: str) -> dict[str, Any]:
    """Of one preset on a GPU of this size."""
    import torch
    from bench_step import VALUES, config_of, peaks_of
    from workload import batch
    from workload import statistics as image_statistics

    from pera_fast.batch import choose
    from pera_fast.distributed import world
    from pera_fast.engine import Engine
    from pera_fast.plan import largest_batch, line_through

    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN looks for a driver by itself
    torch.backends.cudnn.enabled = False
    null_gpu = ctypes.CDLL("libcuda.so.1")
    to_host = Engine._to_host

    def zeros_to_host(self: Engine, numbers: torch.Tensor) -> Callable[[], list[float]]:
        """What happens to be in memory could say that a step had failed."""
        waited = to_host(self, numbers)
        return lambda: [0.0 for _ in waited()]

    facts: dict[str, Any] = {"torch": torch.__version__}
    with world("cuda") as on, patch.object(Engine, "_to_host", zeros_to_host):
        config, sizes = config_of(preset, PROTOTYPES, DROP_PATH, "bf16"), (32, 64)
        for name, side in (("ours", 0), ("eager", 1)):
            with masks_of_known_size():
                line = line_through(sizes, peaks_of(config, side, sizes))
            facts[f"{name}_bytes_per_image"] = line[1]
            facts[f"{name}_largest_batch"] = largest_batch(*line, torch.cuda.mem_get_info()[0])
        engine = Engine(config, image_statistics(), on)
        config, predicted = choose(engine, config, on)
        engine.config = config
        batches = [batch(config, config.run.images)]
        torch.cuda.reset_peak_memory_stats()
        engine.prepare(0, batches)
        host: list[tuple[float, int]] = []
        for step in range(40):
            waits, begun = null_gpu.null_gpu_waits(), time.perf_counter()
            wait = engine.start(step, batches, VALUES)
            engine.prepare(step + 1, batches)
            wait()
            host.append((1e3 * (time.perf_counter() - begun), null_gpu.null_gpu_waits() - waits))
        if engine._graph is None or engine._passes_per_batch > 1:
            raise RuntimeError("the step was expected to be recorded, in one pass")
        facts |= {
            "automatic_batch": config.run.images, "predicted_bytes": predicted,
            "peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(),
            "recorded_step_host_ms": statistics.median(milliseconds for milliseconds, _ in host[20:]),
            "recorded_step_waits": max(waits for _, waits in host[20:]),
        }  # fmt: skip
        engine.release()
    return facts


@contextmanager
def masks_of_known_size() -> Iterator[None]:
    """How many patches a boolean mask chooses is asked of the device, which cannot tell here: as many as were drawn."""
    import torch
    from baselines import eager_step

    index, masks = torch.Tensor.__getitem__, eager_step.masks
    chosen: dict[int, int] = {}

    def noted(indices: torch.Tensor, num_patches: int) -> torch.Tensor:
        mask = masks(indices, num_patches)
        chosen[mask.data_ptr()] = indices.numel()
        return mask

    def by_mask(self: torch.Tensor, key: Any) -> torch.Tensor:
        if isinstance(key, torch.Tensor) and key.dtype == torch.bool:
            rows, columns = torch.zeros(2, chosen[key.data_ptr()], dtype=torch.int64, device=key.device)
            return index(self, (rows, columns))
        return index(self, key)

    with patch.object(eager_step, "masks", noted), patch.object(torch.Tensor, "__getitem__", by_mask):
        yield


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(on_the_null_gpu(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            on_the_host(Path(folder))
