"""bench/gpu.sh, with a stand-in for Python: what it leaves behind when parts fail, hang or find no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *bench/results.py*) cp "${@: -1}" "$SAVED"; echo "$SAVED" ;;
  *test_devices.py*) echo "one failed"; exit 1 ;;
  *test_engine.py*) sleep 30 ;;
  *vit_b*) mkdir -p "${@: -1}/profile"; echo '{"step": 1}' > "${@: -1}/metrics.jsonl"
           echo "Self CUDA" > "${@: -1}/profile/ops.txt" ;;
  *--benchmark-json=*) all="$*"; file="${all#*--benchmark-json=}"; echo "{\\"of\\": \\"$2 $3\\"}" > "$file" ;;
esac
"""


@pytest.fixture
def ran(tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "OUT": str(out),
        "SAVED": str(tmp_path / "nvidia-some.json"),
    }  # fmt: skip
    script = (ROOT / "bench/gpu.sh").read_text().replace("part engine 60", "part engine 1")
    assert "part engine 1 " in script
    copy = tmp_path / "bench/gpu.sh"
    copy.parent.mkdir()
    copy.write_text(script)
    done = subprocess.run(["bash", copy], capture_output=True, text=True, env=environment, timeout=60)
    return done, out


def test_what_it_leaves(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = ran
    assert done.returncode == 1, "a part failed"
    assert sorted(p.name for p in out.iterdir()) == [
        "log.txt", "metrics.jsonl", "ops.txt", "results.json", "summary.txt"
    ]  # fmt: skip
    ended = dict(line.split(": ", 1) for line in (out / "summary.txt").read_text().splitlines())
    assert ended.pop("ops").startswith("exit 1 ") and ended.pop("engine").startswith("exit 124 ")
    assert len(ended) > 15 and all(how.startswith("exit 0 ") for how in ended.values()), ended
    log = (out / "log.txt").read_text()
    for name in ended:
        assert f"===== {name}: " in log
    assert "one failed" in log and "one failed" in done.stdout
    assert json.loads((out / "results.json").read_text())["of"].endswith("bench/bench_residual_norm.py")


def test_every_benchmark_of_the_script_has_one_for_a_gpu() -> None:
    """pytest fails where a file has nothing to run."""
    text = (ROOT / "bench/gpu.sh").read_text()
    names = {word for word in text.replace(";", " ").split() if word.startswith("bench_")}
    assert len(names) > 10
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *(f"bench/{name}.py" for name in names), "-k", "gpu or cuda", "-q",
         "--collect-only"], capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert [name for name in names if f"bench/{name}.py::" not in done.stdout] == [], done.stderr
