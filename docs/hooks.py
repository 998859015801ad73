"""What the pages do not hold themselves, put in while the site is built.

{{ results: adamw_ema, grad_norm }}   the ops' measurements, from bench/results/*.json
{{ gpu }}                             a sentence about what has been measured on a GPU
{{ null_gpu }}                        a GPU's memory, told without one, from bench/results/null_gpu.json
![what it shows](figures/x.svg)       the drawing itself, which then takes the page's colours
../bench/results/x.svg                a plot of the measurements
"""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
ROWS = [
    row for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text()).get("rows", ())
]
GPUS = sorted({row["device"] for row in ROWS if not row["device"].endswith(" threads")})
results_table = runpy.run_path(str(ROOT / "bench/results.py"))["table"]


def on_files(files: Files, config: Any) -> None:
    for plot in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    on_gpu = f"Measured on {', '.join(GPUS)}." if GPUS else "Nothing has been timed on a GPU yet."
    markdown = markdown.replace("{{ gpu }}", on_gpu).replace("{{ null_gpu }}", null_gpu())
    markdown = re.sub(r"\(\.\./bench/results/(\w+\.svg)\)", r"(results/\1)", markdown)
    return re.sub(r"\{\{ results: (.+?) \}\}", lambda m: "\n\n".join(map(table, m[1].split(", "))), markdown)


def on_page_content(content: str, **_: Any) -> str:
    def drawing(found: re.Match[str]) -> str:
        svg = (ROOT / f"docs/figures/{found[2]}.svg").read_text(encoding="utf-8")
        return f'<figure class="drawing" role="img" aria-label="{found[1]}">{svg}</figure>'

    return re.sub(r'<img alt="([^"]*)" src="[^"]*figures/(\w+)\.svg"\s*/?>', drawing, content)


def table(op: str) -> str:
    """The tables of one op, one per machine, without the column that says which op."""
    if not (rows := [row for row in ROWS if row["op"] == op]):
        raise PluginError(f"results: nothing is measured of {op}")
    text = results_table({"rows": rows}).replace("_", r"\_")  # else _foreach_lerp_ is set in italics
    text = re.sub(r"^\|[^|\n]+\|", "|", text, flags=re.MULTILINE)
    return re.sub(r"^(?=[^|\n])", f"`{op}`, ", text, flags=re.MULTILINE)


def null_gpu() -> str:
    """A row for each preset and size of GPU."""
    rows = json.loads((RESULTS / "null_gpu.json").read_text())["null_gpu"]
    lines = [
        f"torch {rows[0]['torch']}, commit {rows[0]['commit']}.",
        "",
        "| preset | GPU, GB | MB an image, ours / eager | images that fit, ours / eager | automatic batch "
        "| GB predicted | peak, recorded | in blocks | host ms a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        predicted, peak, blocks = (row[f"{name}_bytes"] / 1e9 for name in ("predicted", "peak", "reserved"))
        lines.append(
            f"| {row['preset']} | {row['gpu_mib'] * 2**20 / 1e9:.1f} "
            f"| {row['ours_bytes_per_image'] / 1e6:.0f} / {row['eager_bytes_per_image'] / 1e6:.0f} "
            f"| {row['ours_largest_batch']} / {row['eager_largest_batch']} | {row['automatic_batch']} "
            f"| {predicted:.1f} | {peak:.1f} | {blocks:.1f} | {row['recorded_step_host_ms']:.2f} |"
        )
    return "\n".join(lines).replace("_", r"\_")
