"""Draw the k-NN accuracy of a run over its steps, for the README.

python bench/curve.py RUN OUT.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main(run: str, out: str) -> None:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((Path(run) / "eval.json").read_text())
    points = [(line["step"], 100 * line["knn_top1"]) for line in lines if "knn_top1" in line]
    points = [(0, 100 * result["untrained_top1"]), *points, (lines[-1]["step"], 100 * result["top1"])]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(*zip(*sorted(set(points)), strict=True), marker="o", color="#0072b2")
    axes.axhline(points[0][1], color="#777777", linewidth=1, linestyle="--", label="untrained network")
    axes.set(xlabel="optimiser step (batch 32)", ylabel="k-NN top-1, %", title="RSSCN7, 224 held-out scenes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
