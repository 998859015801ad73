"""Benchmark results in the repository, and the README's table made from them.

python bench/results.py save FILE …    pytest-benchmark's .json files, or the .jsonl that $BENCH_ROWS named, ->
                                       bench/results/<machine>.json, each benchmark's row in the place of an earlier
                                       one of the same name
python bench/results.py readme         the results -> README.md, between its markers: a line for each op
python bench/results.py show FILE      the table of such a <machine>.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
MARKERS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")


def save(paths: list[str]) -> Path:
    """Keep what matters of benchmark files: one flat row per benchmark and shape."""
    rows = [row for path in paths for row in rows_of(Path(path))]
    if not rows:
        sys.exit(f"error: {', '.join(paths)}: no benchmark of this project")
    device = sorted({row["device"] for row in rows})[-1]
    target = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    RESULTS.mkdir(exist_ok=True)
    earlier = json.loads(target.read_text())["rows"] if target.exists() else []
    merged = {(row["benchmark"], row["shape"], row["peer"]): row for row in (*earlier, *rows)}
    target.write_text(json.dumps({"rows": list(merged.values())}, indent=1) + "\n")
    print(target.relative_to(ROOT))
    return target


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    file = json.loads(path.read_text())
    found = [b for b in file["benchmarks"] if "op" in b["extra_info"]]
    return [{"benchmark": b["name"], "date": file["datetime"][:10], **b["extra_info"]} for b in found]


def by_device(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows under a line that says where and when they were measured."""
    found = {}
    for device in sorted({row["device"] for row in rows}):
        own = [row for row in rows if row["device"] == device]
        when = ", ".join(sorted({f"{row['date']} (commit {row['commit']})" for row in own}))
        found[f"{device}; torch {own[0]['versions']['torch']}; {when}."] = own
    return found


def table(results: dict[str, Any]) -> str:
    """One Markdown table per device, a line for each row."""
    lines = []
    for heading, rows in by_device(results["rows"]).items():
        lines += [
            heading,
            "",
            "| op | backend | shape | dtype | ours ms | peer | peer ms | ratio (min to max) | peak MB, ours / peer "
            "| of the measured peak |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            ratio, (low, high) = row["ratio_vs_peer"], row["ratio_spread"]
            seconds, share = row["ours_ms"] / 1e3, ""
            if "peak_flops" in row:
                share = f"{row['flops'] / seconds / row['peak_flops']:.0%} of FLOP/s"
            elif "bandwidth" in row:
                share = f"{row['bytes_moved'] / seconds / row['bandwidth']:.0%} of bandwidth"
            elif "bytes_per_image" in row:
                share = f"{row['bytes_per_image'] / 1e6:.1f} MB an image"
            if "largest_batch" in row:
                share = f"largest batch {row['largest_batch']}, peer {row['peer_largest_batch']}"
            lines.append(
                f"| {row['op']} | {row['backend']} | {row['shape']} | {row['dtype']} | {digits(row['ours_ms'])} "
                f"| {row['peer']} | {digits(row['peer_ms'])} | **{ratio:.2f}** ({low:.2f} to {high:.2f}) "
                f"| {row['peak_bytes'] / 1e6:.1f} / {row['peer_peak_bytes'] / 1e6:.1f} | {share} |"
            )
        lines.append("")
    return "\n".join(lines).strip()


def digits(ms: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}"


def summary(rows: list[dict[str, Any]]) -> str:
    """One Markdown table, a column per machine: an op's cases in one cell, each against its fastest peer."""
    machines: dict[str, set[str]] = defaultdict(set)
    cases: dict[tuple[str, str], dict[str, dict[tuple[str, str], float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        machine = re.sub(r", \d+ threads$", "", row["device"])
        machines[machine].add(row["date"])
        dtype = row["dtype"].replace("fp32", "float32").replace("bf16", "bfloat16")
        fastest, case = cases[row["op"], dtype][machine], (row["device"], row["shape"])
        fastest[case] = min(row["ratio_vs_peer"], fastest.get(case, inf))
    names = sorted(machines)
    lines = [f"| op | dtype | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for (op, dtype), found in sorted(cases.items()):
        cells = []
        for name in names:
            ratios = sorted(found[name].values())
            one = len(ratios) == 1
            cells.append(
                f"**{median(ratios):.2f}**" + ("" if one else f" ({ratios[0]:.2f} to {ratios[-1]:.2f})")
                if ratios
                else ""
            )
        lines.append(f"| {op} | {dtype} | {' | '.join(cells)} |")
    when = "; ".join(f"{name}: {', '.join(sorted(machines[name]))}" for name in names)
    return "\n".join([*lines, "", f"Measured on {when}."])


def readme() -> None:
    """Replace what stands between the README's markers by each machine's results."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    rows = [row for results in found for row in results.get("rows", ())]
    # The rows of `vit` compare ours with ours: what its backward pass keeps.
    ops = [row for row in rows if row["op"] not in ("step", "vit")]
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(MARKERS[0], 1)
    after = rest.split(MARKERS[1], 1)[1]
    path.write_text(f"{before}{MARKERS[0]}\n{summary(ops)}\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["save", *paths] if paths:
            save(paths)
        case ["readme"]:
            readme()
        case ["show", path]:
            print(table(json.loads(Path(path).read_text())))
        case _:
            sys.exit(__doc__)
