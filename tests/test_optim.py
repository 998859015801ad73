"""The optimisers: torch's states both ways, groups, teachers, shards, and libraries' optimisers by name."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ONE, several_ranks, tiny_config
from test_engine import assert_near, run, state
from torch import Tensor, nn

from pera_fast import checkpoint
from pera_fast.config import ConfigError
from pera_fast.engine import Engine
from pera_fast.model.shadow import give_shadows, shadows_of
from pera_fast.optim import OPTIMIZERS, AdamWEMA, apex, make


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    model(x).square().sum().backward()


def pairs(model: nn.Module, teacher: nn.Module) -> list[tuple[str, nn.Parameter, Tensor | None]]:
    taught = dict(teacher.named_parameters())
    return [(name, p, taught.get(name)) for name, p in model.named_parameters()]


@pytest.mark.parametrize("fused", [False, True])
def test_state_moves_to_torch_adamw_and_back(fused: bool) -> None:
    """Ten steps that change hands twice equal ten of torch's."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 2e-5}
    model, twin = network(), network()
    theirs = torch.optim.AdamW(twin.parameters(), fused=fused, **options)
    for step in range(10):
        backward(twin, step)
        theirs.step()
    optimizer: torch.optim.Optimizer = AdamWEMA(model.parameters(), **options)
    for step in range(10):
        if step in (3, 7):
            made = [torch.optim.AdamW(model.parameters(), lr=5.0), AdamWEMA(model.parameters(), lr=5.0)][
                step == 7
            ]
            made.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = made
        backward(model, step)
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    ours, wanted = optimizer.state_dict(), theirs.state_dict()
    assert ours["param_groups"][0]["lr"] == 1e-2 and ours["state"].keys() == wanted["state"].keys()
    for place, values in wanted["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(ours["state"][place][key], value, rtol=1e-5, atol=1e-7)


def test_a_state_of_other_mathematics_is_refused() -> None:
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad: expected False, got True"):
        AdamWEMA(model.parameters()).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_takes_the_same_steps(how: str) -> None:
    """Of the optimiser with its parameters and teachers."""
    model = nn.Linear(3, 2)
    teacher = copy.deepcopy(model).requires_grad_(False)
    pairs = dict(zip(model.parameters(), teacher.parameters(), strict=True))
    whole = (
        model,
        teacher,
        AdamWEMA(model.parameters(), lr=0.1, teachers=pairs, momentum=0.5, clip_norm=1.0),
    )

    def step(model: nn.Module, _: nn.Module, optimizer: AdamWEMA) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    step(*whole)
    other = copy.deepcopy(whole) if how == "deepcopy" else pickle.loads(pickle.dumps(whole))
    for each in (whole, other):
        step(*each)
    for a, b in zip(whole[:2], other[:2], strict=True):
        assert all(
            torch.equal(x, y) and x is not y for x, y in zip(a.parameters(), b.parameters(), strict=True)
        )


def test_groups_and_parameters_without_teacher_or_gradient() -> None:
    bias, weight, still = (
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(3, 3)),
        nn.Parameter(torch.ones(2, 2)),
    )
    teacher = torch.zeros(3, 3)
    optimizer = make(
        "adamw_ema", [("a.bias", bias, None), ("a.weight", weight, teacher), ("b.weight", still, None)],
        betas=(0.9, 0.999), eps=1e-8, clip_norm=3.0, decay_all=False,
    )  # fmt: skip
    bias.grad, weight.grad = torch.zeros(3), torch.zeros(3, 3)
    optimizer.schedule(lr=0.1, weight_decay=0.5, momentum=0.9)
    optimizer.step()
    assert bias.tolist() == [1.0] * 3 and torch.equal(still, torch.ones(2, 2))
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), 0.95))
    torch.testing.assert_close(teacher, torch.full((3, 3), 0.095))
    assert still not in optimizer.state and float(optimizer.state[weight]["step"]) == 1


def test_schedules_fill_tensors_that_a_graph_may_hold() -> None:
    lr, momentum = torch.tensor(0.0), torch.tensor(0.5)
    model = network()
    optimizer = AdamWEMA(model.parameters(), lr=lr, momentum=momentum, weight_decay=torch.tensor(0.0))
    optimizer.schedule(lr=0.25, weight_decay=0.5, momentum=0.75)
    assert (float(lr), float(momentum)) == (0.25, 0.75) and optimizer.param_groups[0]["lr"] is lr


def test_closure_and_scheduler_as_with_any_optimizer() -> None:
    model = network()
    optimizer = AdamWEMA(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)

    def closure() -> float:
        backward(model, 0)
        return 4.5

    assert optimizer.step(closure) == 4.5
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ["adamw_ema", "torch_adamw"])
def test_every_name_takes_the_same_steps(name: str) -> None:
    model, exact = network(), network().double()
    teacher, exact_teacher = (
        copy.deepcopy(model).requires_grad_(False),
        copy.deepcopy(exact).requires_grad_(False),
    )
    optimizer = make(name, pairs(model, teacher), betas=(0.9, 0.99), eps=1e-8, clip_norm=0.5, decay_all=True)
    theirs = torch.optim.AdamW(exact.parameters(), betas=(0.9, 0.99))
    for step in range(5):
        backward(model, step)
        optimizer.schedule(lr=1e-2 / (step + 1), weight_decay=0.1 * step, momentum=0.9)
        optimizer.step()
        exact.zero_grad()
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.double()
        if name == "adamw_ema":  # torch_adamw has clipped it already
            nn.utils.clip_grad_norm_(exact.parameters(), 0.5)
        theirs.param_groups[0].update(lr=1e-2 / (step + 1), weight_decay=0.1 * step)
        theirs.step()
        with torch.no_grad():
            for t, p in zip(exact_teacher.parameters(), exact.parameters(), strict=True):
                t.lerp_(p, 0.1)
    for side, other in ((model, exact), (teacher, exact_teacher)):
        for a, b in zip(side.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    before = [p.clone() for p in (*model.parameters(), *teacher.parameters())]
    model[0].bias.grad[0] = float("nan")
    optimizer.step()
    assert optimizer.skipped
    after = (*model.parameters(), *teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["adamw_ema", "torch_adamw"])
def test_a_frozen_parameter_is_still_followed_by_its_teacher(name: str) -> None:
    model = network()
    teacher = copy.deepcopy(model).requires_grad_(False)
    for p in teacher.parameters():
        p.zero_()
    give_shadows(teacher)
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "clip_norm": 3.0, "decay_all": True}
    optimizer = make(name, pairs(model, teacher), shadows=shadows_of(teacher), **options)
    backward(model, 0)
    model[2].weight.grad = None
    optimizer.schedule(lr=0.0, weight_decay=0.0, momentum=0.75)
    optimizer.step()
    torch.testing.assert_close(teacher[2].weight, 0.25 * model[2].weight.detach())
    assert all(torch.equal(shadow.copy, shadow.weight.bfloat16()) for shadow in shadows_of(teacher))
    model[0].weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert optimizer.skipped
    torch.testing.assert_close(teacher[2].weight, 0.25 * model[2].weight.detach())


@pytest.mark.parametrize("name", ["adamw_ema", "torch_adamw"])
def test_shadows_follow_in_training(name: str, image_folder: Path) -> None:
    config = tiny_config(precision="bf16")
    engine, reports = run(image_folder, replace(config, optim=replace(config.optim, optimizer=name)), 3)
    assert not any(r.skipped for r in reports)
    shadows = shadows_of(engine.model)
    assert len(shadows) == 2 * (4 * 2 + 1 + 3) + 3  # blocks, patches and head of both, the pixel head
    for shadow in shadows:
        made = shadow.copy.clone()
        assert name != "adamw_ema" or torch.equal(made, shadow.weight.bfloat16()), (
            "written by the update itself"
        )
        assert torch.equal(shadow.fresh(), shadow.weight.bfloat16())


def test_training_with_shadows_equals_autocast(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: the same weights are rounded the same way."""
    config = tiny_config(precision="bf16")
    engine, _ = run(image_folder, config, 3)
    monkeypatch.setattr("pera_fast.engine.give_shadows", lambda network: None)
    plain, _ = run(image_folder, config, 3)
    assert not shadows_of(plain.model) and shadows_of(engine.model)
    assert_near(state(engine), state(plain), 0.0)


def test_a_checkpoint_of_one_optimizer_is_gone_on_from_with_another(
    image_folder: Path, tmp_path: Path
) -> None:
    configs = {
        name: replace(tiny_config(), optim=replace(tiny_config().optim, optimizer=name))
        for name in ("adamw_ema", "torch_adamw")
    }
    straight, _ = run(image_folder, configs["adamw_ema"], 6)
    engine, _ = run(image_folder, configs["adamw_ema"], 2)
    for stop, name in ((4, "torch_adamw"), (6, "adamw_ema")):
        start = stop - 2
        checkpoint.save(
            tmp_path,
            start,
            engine.model,
            engine.optimizer,
            configs[name],
            engine.statistics,
            keep=2,
            world=ONE,
        )
        opened = checkpoint.Checkpoint.open(tmp_path)
        engine = Engine(opened.config, opened.statistics, ONE)
        opened.restore(engine.model, engine.optimizer)
        run(image_folder, opened.config, stop, start=start, engine=engine)
    assert_near(state(engine), state(straight), 1e-5)


def install_apex(folder: Path, is_nvidia: bool) -> None:
    """A stand-in with the interface that is used; FusedAdam counts steps in its groups, as NVIDIA's does."""
    (folder / "apex").mkdir()
    (folder / "apex/__init__.py").write_text("")
    if not is_nvidia:
        return
    (folder / "amp_C.py").write_text("")
    (folder / "apex/optimizers.py").write_text("""
import torch
class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
                 set_grad_none=True):
        assert adam_w_mode
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    def zero_grad(self):
        super().zero_grad()
    def step(self, closure=None, grads=None):
        super().step()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
class FusedLAMB(FusedAdam):
    def __init__(self, params, max_grad_norm=1.0, **options):
        assert max_grad_norm > 1e9
        super().__init__(params, **options)
""")


@pytest.mark.parametrize("name", ["apex_adam", "apex_lamb"])
def test_apex(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if apex()["note"] != "not installed":
        pytest.skip("apex is installed here")
    model = network()
    teacher = copy.deepcopy(model).requires_grad_(False)
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "clip_norm": 3.0, "decay_all": True}
    with pytest.raises(ConfigError, match=f"for {name}, got not installed"):
        make(name, pairs(model, teacher), **options)
    install_apex(tmp_path, is_nvidia=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"for {name}, got an unrelated package of that name"):
        make(name, pairs(model, teacher), **options)
    (tmp_path / "nvidia").mkdir()
    install_apex(tmp_path / "nvidia", is_nvidia=True)
    monkeypatch.syspath_prepend(tmp_path / "nvidia")
    for module in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, module, None)  # so that it is forgotten again afterwards
        del sys.modules[module]
    optimizer = make(name, pairs(model, teacher), **options)
    before = [p.clone() for p in (*model.parameters(), *teacher.parameters())]
    backward(model, 0)
    optimizer.schedule(lr=1e-2, weight_decay=0.1, momentum=0.9)
    optimizer.step()
    optimizer.zero_grad()
    after = (*model.parameters(), *teacher.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_bad_arguments() -> None:
    model = network()
    for name, value, expected in (
        ("lr", -1.0, "at least 0"), ("weight_decay", -1.0, "at least 0"), ("eps", -1.0, "at least 0"),
        ("betas", (0.9, 1.0), "below 1"), ("momentum", 1.5, "0 to 1"), ("clip_norm", 0.0, "above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected {expected}, got"):
            AdamWEMA(model.parameters(), **{name: value})
    with pytest.raises(ValueError, match="teachers: expected parameters of this optimiser as its keys"):
        AdamWEMA(model[0].parameters(), teachers={model[2].weight: torch.zeros(3, 7)})
    with pytest.raises(ConfigError, match=f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got 'sgd'"):
        make("sgd", [], betas=(0.9, 0.99), eps=1e-8, clip_norm=1.0, decay_all=True)


# --- FSDP2: two ranks on the CPU ---


def steps(model: nn.Module, teacher: nn.Module, scale: float) -> AdamWEMA:
    """Three steps, the gradient clipped; the second is not finite and is skipped on every rank."""
    optimizer = AdamWEMA(
        model.parameters(), lr=1e-2, clip_norm=0.5, momentum=0.9, weight_decay=0.1,
        teachers=dict(zip(model.parameters(), teacher.parameters(), strict=True)),
    )  # fmt: skip
    for step in range(3):
        backward(model, step)
        if step == 1:
            next(model.parameters()).grad.mul_(float("nan") if scale < 0 else 1)
        optimizer.step()
        assert bool(optimizer.skipped) == (step == 1 and scale < 0)
    return optimizer


def _sharded_rank(out: str, scale: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model, teacher = network(), network()
    for owner in (model, teacher):
        for layer in (owner[0], owner[2], owner):
            fully_shard(layer)
    optimizer = steps(model, teacher, float(scale))
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    tensors = [t.full_tensor().detach() for t in (*model.parameters(), *teacher.parameters(), *moments)]
    if dist.get_rank() == 0:
        torch.save(tensors, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("scale", [1, -1])
def test_shards_of_fsdp2_are_updated_in_place(scale: int, tmp_path: Path) -> None:
    several_ranks(__file__, 2, tmp_path / "sharded.pt", scale)
    model, teacher = network(), network()
    optimizer = steps(model, teacher, scale)
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    whole = [t.detach() for t in (*model.parameters(), *teacher.parameters(), *moments)]
    for a, b in zip(torch.load(tmp_path / "sharded.pt", weights_only=True), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    _sharded_rank(*sys.argv[1:])
