"""Our step against the authors' recorded steps, on every backend an op has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import shared_file


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["train_step.pt", "train_step_drop_path.pt"])
def test_recorded_steps(name: str, backend: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("parity_check.py")),
            str(shared_file(f"oracle/{name}")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PERA_FAST_BACKEND": backend},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 3 and report["within_bounds"]
    assert report["tensors_compared"] == {"gradients": 71, "parameters": 133}
