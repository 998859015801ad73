"""Our step against the authors' recorded steps, on every backend an op has."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import parity_check
import pytest
import torch
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


@pytest.mark.parametrize("spoiled", ["gradient", "parameter", "loss"])
def test_a_recording_that_differs_is_noticed(spoiled: str, tmp_path: Path) -> None:
    recorded = torch.load(shared_file("oracle/train_step.pt"), weights_only=True)
    first = copy.deepcopy(recorded["steps"][0])
    if spoiled == "gradient":
        first["grads_before_clip"]["s_mask_token"].fill_(float("nan"))
    elif spoiled == "parameter":
        first["state_after"]["teacher.backbone.norm.bias"][0] += 1e-5
    else:
        first["loss_components"]["mae_loss"] *= 1.0001
    torch.save({**recorded, "steps": [first]}, tmp_path / "spoiled.pt")
    assert parity_check.check(str(tmp_path / "spoiled.pt"))["within_bounds"] is False
