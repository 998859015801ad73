"""adamw_ema and the optimiser around it: as torch's AdamW, clipping and lerp, over many steps."""

import copy

import pytest
import torch
from torch import nn

from pera_fast import ops
from pera_fast.optim import AdamWEMA

SHAPES = [(7,), (5, 3), (1, 1), (33, 17)]


def torch_reference(steps: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and teachers after `steps` of clip_grad_norm_, torch.optim.AdamW and lerp."""
    params = [nn.Parameter(p.to(dtype)) for p in start()]
    teachers = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, eps=2e-5)
    for step in range(steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(dtype)
        torch.nn.utils.clip_grad_norm_(params, 3.0)
        optimizer.step()
        with torch.no_grad():
            for t, p in zip(teachers, params, strict=True):
                t.lerp_(p, 1 - 0.99)
    return [p.detach() for p in params], teachers


def start() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=random) * 10 ** (step % 5 - 3) for shape in SHAPES]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_fifty_steps(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"adamw_ema={backend}")
    params = [nn.Parameter(p) for p in start()]
    teachers = [p.detach().clone() for p in params]
    names = [f"p{i}.weight" for i in range(len(params))]
    optimizer = AdamWEMA(list(zip(names, params, teachers, strict=True)))
    for step in range(50):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step(lr=1e-2, weight_decay=0.1, momentum=0.99)
    exact, torchs = torch_reference(50, torch.float64), torch_reference(50, torch.float32)
    for ours, single, double in zip((*params, *teachers), sum(torchs, []), sum(exact, []), strict=True):
        error, theirs = (ours - double).abs().max(), (single - double).abs().max()
        assert error <= theirs + 1e-6


def test_undecayed_parameters_and_those_without_teacher() -> None:
    bias, weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 3))
    teacher = torch.zeros(3, 3)
    optimizer = AdamWEMA([("a.bias", bias, None), ("a.weight", weight, teacher)], decay_all=False)
    bias.grad, weight.grad = torch.zeros(3), torch.zeros(3, 3)
    optimizer.step(lr=0.1, weight_decay=0.5, momentum=0.9)
    assert bias.tolist() == [1.0] * 3
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), 0.95))
    torch.testing.assert_close(teacher, torch.full((3, 3), 0.095))


def test_state_is_that_of_torch_adamw() -> None:
    model = nn.Linear(4, 2)
    twin = copy.deepcopy(model)
    ours = AdamWEMA([(n, p, None) for n, p in model.named_parameters()])
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1, eps=2e-5)
    for m, step in ((model, lambda: ours.step(lr=1e-2, weight_decay=0.1, momentum=1.0)), (twin, theirs.step)):
        m(torch.ones(1, 4)).sum().backward()
        nn.utils.clip_grad_norm_(m.parameters(), 3.0)
        step()
    for place, state in theirs.state_dict()["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(ours.state_dict()["state"][place][key], value)


def test_bad_input() -> None:
    p = [torch.zeros(3)]
    good = {"step": 1, "lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    with pytest.raises(ValueError, match="grads: expected 1 tensors, one per parameter, got 0"):
        ops.adamw_ema(p, [], p, p, [None], **good, clip_coefficient=1.0, momentum=0.9)
    with pytest.raises(ValueError, match=r"teachers\[0\]: expected shape \[3\], got \[4\]"):
        ops.adamw_ema(p, p, p, p, [torch.zeros(4)], **good, clip_coefficient=1.0, momentum=0.9)
    with pytest.raises(ValueError, match="step: expected at least 1, got 0"):
        ops.adamw_ema(p, p, p, p, [None], **{**good, "step": 0}, clip_coefficient=1.0, momentum=0.9)
