"""bench/gpu.sh, with a stand-in for Python: what it leaves behind when parts fail, hang or find no time."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *results.py\\ save*) cp "${@: -1}" "$SAVED"; echo "$SAVED" ;;
  *results.py\\ show*) echo "the table" ;;
  *import\\ xdist*) exit 1 ;;
  *test_devices.py*) echo "one failed"; exit 1 ;;
  *test_engine.py*) sleep 30 ;;
  *pera_fast.train*) mkdir -p "${@: -1}/profile"; echo '{"step": 1}' > "${@: -1}/metrics.jsonl"
                     echo "Self CUDA" > "${@: -1}/profile/ops.txt" ;;
  *--benchmark-only*) echo "{\\"of\\": \\"$4\\"}" >> "$BENCH_ROWS"; echo "measured" ;;
esac
"""


@pytest.fixture
def ran(tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    for name in ("python", "nvidia-smi"):
        (tmp_path / name).write_text(STAND_IN)
    (tmp_path / "compute-sanitizer").write_text('#!/usr/bin/env bash\necho "ERROR SUMMARY: 0 errors"')
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "OUT": str(out),
        "SAVED": str(tmp_path / "nvidia-some.json"),
    }  # fmt: skip
    script = (ROOT / "bench/gpu.sh").read_text().replace("tests engine 60", "tests engine 1")
    assert "tests engine 1 " in script
    copy = tmp_path / "bench/gpu.sh"
    copy.parent.mkdir()
    copy.write_text(script)
    done = subprocess.run(["bash", copy], capture_output=True, text=True, env=environment, timeout=60)
    return done, out


def test_what_it_leaves(ran: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = ran
    assert done.returncode == 1, "a part failed"
    assert sorted(p.name for p in out.iterdir()) == [
        "log.txt", "metrics_demo.jsonl", "metrics_vit_b_128.jsonl", "metrics_vit_b_auto.jsonl", "ops.txt",
        "results.json", "rows.jsonl", "summary.txt",
    ]  # fmt: skip
    ended = dict(line.split(": ", 1) for line in (out / "summary.txt").read_text().splitlines())
    assert ended["memcheck"].endswith("ERROR SUMMARY: 0 errors") and ended["kernels"].endswith("; measured")
    assert ended.pop("ops").startswith("exit 1 ") and ended.pop("engine").startswith("exit 124 ")
    assert len(ended) > 15 and all(how.startswith("exit 0 ") for how in ended.values()), ended
    log = (out / "log.txt").read_text()
    for name in ended:
        assert f"===== {name}: " in log
    assert "one failed" in log and "one failed" in done.stdout and "the table" in done.stdout
    rows = [json.loads(line) for line in (out / "results.json").read_text().splitlines()]
    assert len(rows) == sum(how.endswith("; measured") for how in ended.values()) > 5


def test_all_that_it_runs_is_there() -> None:
    """pytest fails where a file has nothing to run, or none of what is asked for."""
    text = (ROOT / "bench/gpu.sh").read_text().replace("\\\n", " ")
    for name, value in re.findall(r'^(steps|sizes)="?([^"\n]+)"?$', text, re.MULTILINE):
        text = text.replace(f"${name}", value)
    parts = [shlex.split(line) for line in text.splitlines() if line.startswith("benchmarks ")]
    files = sorted({f"{file}.py" for _, _, _, _, *files in parts for file in files})
    assert len(parts) > 5 and len(files) > 10
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-k", "gpu or cuda", "-q", "--collect-only"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if "::" in line]

    def is_taken(line: str, which: str) -> bool:
        words = re.sub(r"\w+", lambda m: m[0] if m[0] in ("and", "or", "not") else str(m[0] in line), which)
        return bool(eval(words))

    for _, name, _, which, *files in parts:
        for file in files:
            of_file = [line for line in found if line.startswith(f"{file}.py::")]
            assert any(is_taken(line.split("::")[1], which) for line in of_file), (name, file, done.stderr)
    tests = {word for word in text.split() if word.startswith("tests/test_")}
    assert len(tests) > 10 and [name for name in tests if not (ROOT / name).exists()] == []
