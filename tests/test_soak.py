"""2000 steps on the demo scenes: memory, open files, threads and images per second stay where they were.

A small network by default; PERA_FAST_SOAK=demo takes the demo preset's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_train import SMALL, lines

STEPS = 2000


def of_tree(process: int) -> tuple[float, int, int, float]:
    """(resident MiB without shared pages, open files, threads, seconds of CPU) of a process and its children."""
    memory, files, threads, seconds = 0.0, 0, 0, 0.0
    todo = [process]
    while todo:
        folder = Path(f"/proc/{todo.pop()}")
        try:
            resident, shared = map(int, (folder / "statm").read_text().split()[1:3])
            memory += (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20
            files += len(list((folder / "fd").iterdir()))
            used = (folder / "stat").read_text().rsplit(")")[1].split()[11:13]
            seconds += sum(map(int, used)) / os.sysconf("SC_CLK_TCK")
            tasks = list((folder / "task").iterdir())
            threads += len(tasks)
            todo += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return memory, files, threads, seconds


@pytest.mark.timeout(3600)
def test_2000_steps_are_flat(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    smallest = (*SMALL, "--depth", 1, "--num-local", 1, "--batch-size", 2)
    small = smallest if os.environ.get("PERA_FAST_SOAK") != "demo" else ()
    options = ("--max-steps", STEPS, "--epochs", 2000, "--log-every", 10, "--checkpoint-every", 250)
    found = []
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pera_fast.train", *map(str, (*small, "--out", out, *options))],
            stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"} if small else None,
        )  # fmt: skip
        try:
            while process.poll() is None:
                step = lines(out)[-1]["step"] if (out / "metrics.jsonl").exists() and lines(out) else 0
                # After a first quarter in which caches fill, and before the evaluation at the end.
                if STEPS / 4 <= step < 0.95 * STEPS:
                    found.append((step, *of_tree(process.pid)))
                time.sleep(0.25)
        finally:
            process.kill()
    assert process.returncode == 0, log.read_text()[-3000:]
    assert len(found) >= 10
    steps, memory, files, threads, seconds = np.array(found).T
    # A writing of a checkpoint or of a report opens files for a moment: medians of both halves.
    early, late = steps < np.median(steps), steps >= np.median(steps)
    growth = np.polyfit(steps / 1000, memory, 1)[0]
    assert growth < 0.05 * np.median(memory), f"{growth:.1f} MiB per 1000 steps of {np.median(memory):.0f}"
    # Batches on their way between processes are open files, too: one more or less, by who is at work when it is looked.
    # One left open by each of the eight checkpoints would be three.
    for values in (files, threads):
        assert np.median(values[late]) <= np.median(values[early]) + 1
    middle = len(steps) // 2
    cost = [(seconds[b] - seconds[a]) / (steps[b] - steps[a]) for a, b in ((0, middle), (middle, -1))]
    assert cost[1] < 1.3 * cost[0]  # not of the clock's seconds, which depend on who else is at work
    rates = [record["images_per_second"] for record in lines(out)]
    third = len(rates) // 3
    assert np.median(rates[-third:]) > 0.4 * np.median(rates[third : 2 * third])
