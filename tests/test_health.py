"""What tells of a collapse or a spike, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from test_engine import run

from pera_fast.health import Watch, assignment_health

K, D = 256, 16
NORMAL = {
    "step": 1,
    "loss": 5.0,
    "grad_norm": 1.0,
    "feature_std": 0.8,
    "prototype_entropy": 4.0,
    "teacher_entropy": 2.0,
}


def random(rows: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, D, dtype=torch.float64), dim=1)


def test_values_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    z_s, z_t, v_s, v_t = random(6), random(6), random(K) * 3, random(K) * 2
    g, centre = torch.rand(K, 1, dtype=torch.float64) + 0.5, torch.randn(K, dtype=torch.float64) / 10
    found = assignment_health(z_s, z_t, (v_s, g), (v_t, g), centre, 0.1, torch.tensor(0.04))
    p = (((z_t @ (F.normalize(v_t) * g).T).float() - centre) / 0.04).softmax(1)
    q = ((z_s @ (F.normalize(v_s) * g).T).float() / 0.1).softmax(1)
    assert found["kl"] == pytest.approx(float(F.kl_div(q.log(), p, reduction="batchmean")), rel=1e-4)
    assert found["teacher_entropy"] == pytest.approx(
        float(torch.distributions.Categorical(p).entropy().mean()), rel=1e-4
    )
    mean = torch.distributions.Categorical(p.mean(0)).entropy()
    assert found["prototype_entropy"] == pytest.approx(float(mean), rel=1e-4)
    assert found["feature_std"] == pytest.approx(math.sqrt(1 - float(z_t.mean(0).square().sum())), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feature_std": 0.01}, "it has collapsed. Likely causes: a learning rate too high"),
        ({"prototype_entropy": 0.1}, "nearly all images go to the same prototypes"),
        ({"teacher_entropy": 0.99 * math.log(K)}, "spreads each image evenly"),
    ],
)
def test_each_collapse_is_said_once_with_its_likely_cause(changes: dict[str, float], said: str) -> None:
    watch = Watch(K)
    assert watch.look(NORMAL) == []
    bad = {**NORMAL, **changes, "step": 7}
    sentences = watch.look(bad)
    assert len(sentences) == 1 and sentences[0].startswith("step 7: ") and said in sentences[0]
    assert watch.look(bad) == [], "not again"
    assert watch.look(NORMAL) == [] and len(watch.look(bad)) == 1, "it came back"


def test_a_spike_is_told_from_a_noisy_loss() -> None:
    watch, noise = Watch(K), torch.randn(200, generator=torch.Generator().manual_seed(0)) * 0.2
    for step, x in enumerate(noise.tolist()):
        assert watch.look({**NORMAL, "loss": 5 - step / 100 + x}) == []
    (sentence,) = watch.look({**NORMAL, "loss": 9.0, "grad_norm": 123.0})
    assert "the loss is 9.000" in sentence and "gradient norm of 123" in sentence
    assert watch.look({**NORMAL, "loss": math.nan}) == [], "a step that is skipped is told of elsewhere"


def test_a_network_that_has_collapsed_is_noticed(image_folder: Path) -> None:
    engine, _ = run(image_folder, tiny_config(), 1)
    watch = Watch(engine.config.model.num_prototypes)
    assert watch.look({**NORMAL, **engine.health()}) == []
    for network in (engine.model.student, engine.model.teacher):
        torch.nn.init.zeros_(network.cls_head.mlp[-1].weight)
        torch.nn.init.ones_(network.cls_head.mlp[-1].bias)
    run(image_folder, engine.config, 2, start=1, engine=engine)
    assert "it has collapsed" in watch.look({**NORMAL, **engine.health()})[0]
