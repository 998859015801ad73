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
from conftest import ROOT, shared_file

from pera_fast.model.names import from_official
from pera_fast.model.pera import PerA


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


def test_the_eager_baseline_is_the_same_mathematics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmarks are measured against, on the recorded steps: losses, gradients, parameters, centre."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from baselines import eager_step

    recorded = torch.load(shared_file("oracle/train_step.pt"), weights_only=True)
    hparams = recorded["hparams"]
    config = parity_check.config_of(hparams, 3)
    model = PerA(config)
    initial = {from_official(name): value for name, value in recorded["init_state"].items()}
    model.load_state_dict({**initial, "centre": torch.zeros_like(model.centre)})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=tuple(hparams["betas"]), eps=hparams["eps"], fused=True)
    for step in recorded["steps"]:
        views, chosen = [], []
        for kind in ("global", "local"):
            counts = hparams[f"{kind}_counts"]
            cuts = (counts["student"], counts["student_plus_target"])
            order = step[f"{kind}_noise_sort"].argsort(dim=1)
            chosen.append(tuple(part.sort(dim=1).values for part in order.tensor_split(cuts, dim=1)))
            views.append((step["inputs"][f"S_{kind}"], step["inputs"][f"T_{kind}"]))
        optimizer.zero_grad()
        loss, t_logits = eager_step.step(model, config, views, chosen, step["teacher_temp"])
        loss.backward()
        assert parity_check.relative(loss.detach(), step["total_loss"]) < 1e-5
        for name, gradient in step.get("grads_before_clip", {}).items():
            assert parity_check.relative(model.get_parameter(from_official(name)).grad, gradient) < 1e-5, name
        optimizer.param_groups[0].update(lr=step["lr"], weight_decay=step["wd"])
        eager_step.update(model, config, optimizer, step["momentum"], t_logits)
        if "center_after" in step:
            assert parity_check.absolute(model.centre, step["center_after"].flatten()) < 2e-6
        for name, value in step.get("state_after", {}).items():
            assert parity_check.absolute(model.state_dict()[from_official(name)], value) < 2e-6, name


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
