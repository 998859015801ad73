"""How time and memory of a step grow with the batch, the prototypes, the depth and the ranks.

python bench/growth.py measure    every point in a process of its own -> bench/results/growth_<machine>.json
python bench/growth.py draw       -> bench/results/growth.svg

ViT-Ti at the paper's crop sizes in float32; ours from decoded images, the eager step (baselines/eager_step.py) from
finished views. Memory is the process's peak, with Python and torch in it.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BASE = {"images": 4, "prototypes": 16384, "depth": 12, "ranks": 1}
GROWTH: dict[str, list[int]] = {
    "images": [1, 2, 4, 8, 16],
    "prototypes": [1024, 16384, 65536, 131072],
    "depth": [6, 12, 24],
    "ranks": [1, 2, 4],
}
SIDES = {
    "images": ["ours", "eager"], "prototypes": ["ours", "eager"], "depth": ["ours", "eager"],
    "ranks": ["ours", "ours, --shard all"],
}  # fmt: skip
LABELS = {
    "images": "images a step",
    "prototypes": "prototypes",
    "depth": "blocks",
    "ranks": "ranks of one thread",
}


def point(facts: dict[str, Any]) -> None:
    """Measure one point on this rank; the first prints what was found."""
    import torch
    from baselines import eager_step
    from bench_patch_embed import whole_views
    from workload import batch
    from workload import statistics as image_statistics

    from pera_fast.config import PRESETS
    from pera_fast.distributed import world
    from pera_fast.engine import Engine
    from pera_fast.records import peak_memory_bytes
    from pera_fast.schedules import StepValues

    values = StepValues(lr=1e-4, weight_decay=0.04, momentum=0.992, teacher_temperature=0.04)
    base = PRESETS["vit_ti"]
    config = replace(
        base,
        model=replace(base.model, num_prototypes=facts["prototypes"], depth=facts["depth"]),
        run=replace(base.run, precision="fp32", shard="all" if "shard" in facts["side"] else "none"),
    )
    with world("cpu") as on:
        engine = Engine(config, image_statistics(), on)
        decoded = batch(config, facts["images"])
        step: Callable[[], Any] = lambda: engine.step(0, [decoded], values)  # noqa: E731
        if facts["side"] == "eager":
            model = engine.model
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.04, eps=2e-5, fused=True)
            patches = engine.patches(0, 0, decoded)
            indices = [tuple(masks) for masks in patches.groups]
            sizes = (config.crops.global_px, config.crops.local_px)
            views = [tuple(whole_views(patches, i, px)) for i, px in enumerate(sizes)]
            del engine, patches

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                loss, t_logits = eager_step.step(model, config, views, indices, 0.04)
                loss.backward()
                eager_step.update(model, config, optimizer, 0.992, t_logits)

        step()
        seconds = []
        for _ in range(3):
            on.sum(torch.zeros(1))  # the ranks begin together
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        rate = facts["images"] * on.ranks / statistics.median(seconds)
        if on.is_first:
            print(json.dumps({"images_per_second": rate, "peak_bytes": peak_memory_bytes(on.device)}))
        if facts["side"] != "eager":
            del engine
        del step


def measure() -> None:
    from compare import commit, device_name

    rows = []
    for name, numbers in GROWTH.items():
        for side in SIDES[name]:
            for number in numbers:
                facts = {**BASE, name: number, "side": side}
                # The ranks are compared at one thread each, which two cores have for two of them.
                threads = {"OMP_NUM_THREADS": "1"} if name == "ranks" else {}
                command = [
                    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(facts["ranks"]),
                    __file__, "point", json.dumps(facts),
                ]  # fmt: skip
                if name != "ranks":
                    command = [sys.executable, __file__, "point", json.dumps(facts)]
                environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **threads}
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                rows.append({"against": name, **facts, **json.loads(done.stdout.strip().splitlines()[-1])})
                print(rows[-1], flush=True)
    device = device_name("cpu")
    machine = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    content = {"device": device, "commit": commit(), "growth": rows}
    (RESULTS / f"growth_{machine}.json").write_text(json.dumps(content, indent=1) + "\n")


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    newest = max(RESULTS.glob("growth_*.json"), key=lambda path: path.stat().st_mtime)
    content = json.loads(newest.read_text())
    figure, axes = plt.subplots(2, len(GROWTH), figsize=(11, 4.6), layout="constrained", sharex="col")
    colours = {"ours": "#0072b2", "eager": "#d55e00", "ours, --shard all": "#009e73"}
    for column, (name, numbers) in enumerate(GROWTH.items()):
        for side in SIDES[name]:
            rows = [r for r in content["growth"] if r["against"] == name and r["side"] == side]
            x = [r[name] for r in rows]
            rates, peaks = [r["images_per_second"] for r in rows], [r["peak_bytes"] / 1e9 for r in rows]
            axes[0, column].plot(x, rates, marker="o", color=colours[side], label=side)
            axes[1, column].plot(x, peaks, marker="o", color=colours[side], label=side)
        axes[1, column].set(xscale="log", xlabel=LABELS[name])
        labels = [str(n) if n < 1024 else f"{n // 1024}k" for n in numbers]
        axes[1, column].set_xticks(numbers, labels, fontsize=8)
        axes[1, column].minorticks_off()
        for row in (0, 1):
            axes[row, column].set_ylim(bottom=0)
            axes[row, column].spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("images / s")
    axes[1, 0].set_ylabel("peak memory of a process, GB")
    axes[0, 0].legend(frameon=False)
    axes[0, -1].legend(frameon=False)
    figure.suptitle(f"ViT-Ti, float32, {content['device']}", fontsize=9)
    figure.savefig(RESULTS / "growth.svg")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["point", facts]:
            point(json.loads(facts))
        case ["measure"]:
            measure()
        case ["draw"]:
            draw()
        case _:
            sys.exit(__doc__)
