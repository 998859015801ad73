"""The step: equal results however a batch is shared out, resume to the bit, steps that must not count."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE, several_ranks, tiny_config

from pera_fast import checkpoint
from pera_fast.config import Config
from pera_fast.data.loader import WindowDataset, make_loader
from pera_fast.data.sources import scan
from pera_fast.data.statistics import compute_statistics
from pera_fast.distributed import World, world
from pera_fast.engine import Engine, StepReport
from pera_fast.model.shard import whole
from pera_fast.plan import synthetic_patches
from pera_fast.schedules import Schedules


def run(
    folder: Path, config: Config, stop: int, start: int = 0, engine: Engine | None = None, on: World = ONE
) -> tuple[Engine, list[StepReport]]:
    """Steps start..stop on the images of a folder, as `train` takes them."""
    index = scan(folder)
    statistics = compute_statistics(index.scenes, bands=None, in_bands=config.model.in_bands)
    dataset = WindowDataset(index, statistics, config)
    engine = engine or Engine(config, statistics, on)
    schedules = Schedules.of(config, len(dataset), on.ranks)
    whole = config.run.images * config.run.accumulate * on.ranks
    batches = make_loader(dataset, start * whole, stop - start, on.rank, on.ranks)
    reports, following = [], None
    for step in range(start, stop):
        now = following or [next(batches) for _ in range(config.run.accumulate)]
        wait = engine.start(step, now, schedules.at(step))
        if step + 1 < stop:
            following = [next(batches) for _ in range(config.run.accumulate)]
            engine.prepare(step + 1, following)
        reports.append(wait())
    return engine, reports


def state(engine: Engine) -> dict[str, torch.Tensor]:
    moments = {
        f"{key}.{i}": value
        for i, s in engine.optimizer.state_dict()["state"].items()
        for key, value in s.items()
    }
    return {**engine.model.state_dict(), **moments}


def assert_near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], bound: float) -> None:
    assert got.keys() == want.keys()
    worst = max((float((got[k] - want[k]).abs().max()), k) for k in want)
    assert worst[0] <= bound, worst


def test_accumulation_equals_the_large_batch(image_folder: Path) -> None:
    large, large_reports = run(image_folder, tiny_config(batch_size=8), 3)
    parts, parts_reports = run(image_folder, tiny_config(batch_size=2, accumulate=4), 3)
    assert_near(state(parts), state(large), 1e-5)
    for a, b in zip(parts_reports, large_reports, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


def test_without_local_crops(image_folder: Path) -> None:
    config = tiny_config()
    engine, reports = run(image_folder, replace(config, crops=replace(config.crops, num_local=0)), 2)
    assert reports[-1].losses["distill_local"] == 0 and reports[-1].losses["total"] > 0


@pytest.mark.parametrize("bands", [1, 4])
def test_other_band_counts(tmp_path: Path, bands: int) -> None:
    import numpy as np
    import rasterio

    for i in range(4):
        with rasterio.open(
            tmp_path / f"{i}.tif", "w", driver="GTiff", height=50, width=60, count=bands, dtype="uint16"
        ) as file:
            file.write(np.random.default_rng(i).integers(0, 9000, (bands, 50, 60), dtype=np.uint16))
    config = tiny_config()
    engine, reports = run(tmp_path, replace(config, model=replace(config.model, in_bands=bands)), 2)
    assert not reports[-1].skipped and reports[-1].losses["pixel"] > 0


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_resume_is_bit_exact(image_folder: Path, tmp_path: Path, drop_path: float) -> None:
    config = tiny_config(batch_size=5)  # twelve images: step 3 ends in the middle of epoch 2
    config = replace(config, model=replace(config.model, drop_path=drop_path))
    straight, _ = run(image_folder, config, 6)
    first, _ = run(image_folder, config, 3)
    checkpoint.save(tmp_path, 3, first.model, first.optimizer, config, first.statistics, keep=2, world=ONE)
    opened = checkpoint.Checkpoint.open(tmp_path)
    again = Engine(opened.config, opened.statistics, ONE)
    opened.restore(again.model, again.optimizer)
    resumed, _ = run(image_folder, opened.config, 6, start=opened.step, engine=again)
    for key, value in state(straight).items():
        assert torch.equal(state(resumed)[key], value), key


def test_the_first_step_moves_student_and_teacher(image_folder: Path) -> None:
    config = tiny_config()
    config = replace(config, optim=replace(config.optim, warmup_epochs=0))
    fresh = Engine(config, run(image_folder, config, 0)[0].statistics, ONE)
    before = {k: v.clone() for k, v in fresh.model.state_dict().items()}
    after = run(image_folder, config, 1)[0].model.state_dict()
    still = [k for k in before if torch.equal(before[k], after[k])]
    assert still == [], "every parameter, its teacher and the centre change in one step"


def test_sinkhorn_centring_replaces_the_moving_average(image_folder: Path) -> None:
    config = tiny_config()
    _, plain = run(image_folder, config, 3)
    config = replace(config, optim=replace(config.optim, centring="sinkhorn"))
    engine, reports = run(image_folder, config, 3)
    assert all(not r.skipped for r in reports)
    assert plain[0].losses["distill_global"] != reports[0].losses["distill_global"]
    twin, _ = run(image_folder, config, 3)
    twin.model.centre.copy_(torch.linspace(-5, 5, config.model.num_prototypes))  # not looked at
    after = [run(image_folder, config, 4, start=3, engine=e)[1][0].losses for e in (engine, twin)]
    assert after[0] == after[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_reads_values_back_once(
    image_folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches, forward, backward, update, centre: a GPU is waited for where the report is made, and nowhere else."""
    config = tiny_config(precision=precision)
    config = replace(config, model=replace(config.model, drop_path=0.5))
    engine, _ = run(image_folder, config, 1)
    patches = synthetic_patches(config, 4, torch.device("cpu"))
    monkeypatch.setattr(engine, "patches", lambda *_: patches)  # the CPU's check of the tables reads them
    values, batch, reads = Schedules.of(config, 12, 1).at(1), [None] * 4, []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        plain = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *arguments: Any, plain: Any = plain, name: str = name) -> Any:
            reads.append(name)
            return plain(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    wait = engine.start(1, [batch], values)  # type: ignore[list-item]
    engine.prepare(2, [batch])  # type: ignore[list-item]
    assert reads == [], "the host is free until it waits"
    assert not wait().skipped
    assert reads == ["tolist"]


@pytest.mark.parametrize("prepared", ["for another step", "for other batches", "without memory", "not"])
def test_a_step_does_not_depend_on_what_was_prepared(
    image_folder: Path, prepared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(accumulate=2)
    config = replace(config, model=replace(config.model, drop_path=0.5))
    ahead, _ = run(image_folder, config, 3)
    engine, _ = run(image_folder, config, 0)
    dataset = WindowDataset(scan(image_folder), engine.statistics, config)
    batches = list(make_loader(dataset, 0, 3))
    schedules, patches, cropped = Schedules.of(config, len(dataset), 1), engine.patches, []

    def counted(step: int, part: int, batch: Any, into: Any) -> Any:
        cropped.append((step, part))
        if prepared == "without memory" and len(cropped) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return patches(step, part, batch, into)

    monkeypatch.setattr(engine, "patches", counted)
    for step in range(3):
        now, other = batches[2 * step : 2 * step + 2], batches[::-1][:2]
        for_what = {"for another step": (step + 1, now), "for other batches": (step, other)}
        if prepared != "not":
            engine.prepare(*for_what.get(prepared, (step, now)))
        engine.step(step, now, schedules.at(step))
    assert len(cropped) == {"not": 6, "without memory": 7}.get(prepared, 12)
    for key, value in state(ahead).items():
        assert torch.equal(state(engine)[key], value), key


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    image_folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    engine, _ = run(image_folder, config, 1)
    before = {k: v.clone() for k, v in state(engine).items()}
    if where == "loss":
        engine.model.mask_token.data.fill_(float("nan"))
        before["mask_token"] = engine.model.mask_token.data.clone()
    else:
        engine.model.pixel_head.mlp[0].weight.register_hook(lambda grad: grad * float("inf"))
    _, reports = run(image_folder, config, 2, start=1, engine=engine)
    assert reports[0].skipped
    for key, value in state(engine).items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0)), key


# --- several ranks on the CPU ---


def _train_and_save(folder: str, out: str, options: str) -> None:
    """Body of one rank: three steps, then rank 0 saves the state, whole."""
    with world("cpu") as on:
        _on_this_rank(Path(folder), Path(out), json.loads(options), on)


def _on_this_rank(folder: Path, out: Path, options: dict[str, Any], on: World) -> None:
    """Returns before the process group ends, so that nothing of the engine outlives it."""
    poisoned = options.pop("poisoned", None)
    engine, reports = run(folder, tiny_config(**options), 3, on=on)
    if poisoned is not None:  # a gradient on one rank alone
        before = {name: whole(value).clone() for name, value in state(engine).items()}
        factor = float("nan") if on.rank == poisoned else 1.0

        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: gradient * factor)

        hook = engine.model.pixel_head.register_forward_hook(spoil)
        _, after = run(folder, tiny_config(**options), 4, 3, engine, on)
        hook.remove()
        assert after[0].skipped, on.rank
        for name, value in state(engine).items():
            assert torch.equal(whole(value), before[name]), name
        _, after = run(folder, tiny_config(**options), 4, 3, engine, on)
        assert not after[0].skipped
    sharded = [name for name, p in engine.model.named_parameters() if hasattr(p, "to_local")]
    teacher = engine.teacher().state_dict()
    found = {name: whole(value) for name, value in state(engine).items()}
    if on.is_first:
        for name, value in teacher.items():
            assert torch.equal(value, found[f"teacher.backbone.{name}"]), name
        torch.save(
            {"state": found, "losses": [r.losses for r in reports], "sharded": len(sharded)},
            out,
        )


@pytest.mark.parametrize(
    ("ranks", "per_node", "options"),
    [
        (2, 2, {}),
        (2, 2, {"reduce_in": "bf16"}),
        (2, 2, {"shard": "all", "batch_size": 2, "accumulate": 2}),
        (4, 2, {"shard": "node", "batch_size": 2}),
    ],
    ids=["ddp", "ddp-bf16", "fsdp", "fsdp-in-each-node"],
)
def test_several_ranks_equal_one(
    image_folder: Path, tmp_path: Path, ranks: int, per_node: int, options: dict[str, Any]
) -> None:
    options = {"batch_size": 4, **options}
    out = tmp_path / "several.pt"
    several_ranks(__file__, ranks, image_folder, out, json.dumps(options), per_node=per_node)
    several: dict[str, Any] = torch.load(out, weights_only=True)
    one, reports = run(image_folder, tiny_config(batch_size=8), 3)
    is_exact = options.get("reduce_in") != "bf16"
    # A gradient rounded to bfloat16 may turn a small one's sign, and with it Adam's first steps.
    assert_near(several["state"], state(one), 1e-5 if is_exact else 5e-3)
    for got, report in zip(several["losses"], reports, strict=True):
        assert got == pytest.approx(report.losses, rel=1e-5 if is_exact else 1e-2)
    same = all(torch.equal(several["state"][k], v) for k, v in state(one).items())
    assert is_exact or not same, "the option does nothing"
    every = len(list(one.model.parameters()))
    assert several["sharded"] == (every if "shard" in options else 0)


@pytest.mark.parametrize("shard", ["none", "all"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    shard: str, image_folder: Path, tmp_path: Path
) -> None:
    options = {"batch_size": 4, "shard": shard, "poisoned": 1}
    several_ranks(__file__, 2, image_folder, tmp_path / "out.pt", json.dumps(options))


if __name__ == "__main__":
    _train_and_save(*sys.argv[1:])
