"""How many images: sharing out a global batch, fitting the largest, and what is done when it does not fit."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE, needs_cuda, run_here, tiny_config
from test_engine import assert_near, run, state
from test_train import SMALL, lines

from pera_fast.batch import Fit, choose, fit, fit_on_cpu, fit_on_gpu, share_out
from pera_fast.config import PRESETS, Config, ConfigError
from pera_fast.data.statistics import Statistics
from pera_fast.distributed import World
from pera_fast.engine import Engine, TrainingStopped
from pera_fast.model import pera
from pera_fast.model.pera import PerA
from pera_fast.plan import MARGIN, input_bytes, synthetic_patches


@pytest.mark.parametrize(
    ("global_batch", "ranks", "most", "expected"),
    [
        (64, 1, 64, (64, 1)),
        (64, 1, 48, (32, 2)),
        (1024, 4, 96, (64, 4)),
        (6, 2, 2, (1, 3)),
        (7, 1, 3, (1, 7)),
    ],
)
def test_a_global_batch_is_shared_out(
    global_batch: int, ranks: int, most: int, expected: tuple[int, int]
) -> None:
    images, passes = share_out(global_batch, ranks, most)
    assert (images, passes) == expected and images <= most and images * passes * ranks == global_batch


def test_a_global_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch: expected a multiple of the 3 ranks, got 64"):
        share_out(64, 3, 16)
    with pytest.raises(ConfigError, match="accumulate: expected 1 with global_batch, got 2"):
        tiny_config(global_batch=8, accumulate=2)


def test_the_largest_batch_lies_on_the_line_through_the_probes() -> None:
    asked = []

    def measure(images: int) -> float:
        asked.append(images)
        # Something that grows to a limit, as kept logits do, and then the straight line.
        return 1e9 + images * 50e6 + min(images, 16) * 30e6

    found = fit(measure, 24e9)
    assert asked[:2] == [4, 8] and len(asked) == 3 and asked[2] <= found.images
    most = 24e9 * (1 - MARGIN)
    assert found.images % 8 == 0 and 0.95 * most < measure(found.images) <= found.predicted_bytes <= most


def test_a_larger_probe_that_does_not_fit_is_followed_by_a_smaller() -> None:
    asked = []

    def measure(images: int) -> float:
        asked.append(images)
        return 1e9 + images * 50e6 if images <= 60 else math.inf

    found = fit(measure, 24e9)
    assert asked == [4, 8, 208, 104, 48] and found.images == 48, "no more than did fit"
    assert found.predicted_bytes == pytest.approx(1e9 + 48 * 50e6)
    assert fit(lambda n: 1e9 + n * 50e6 if n < 8 else math.inf, 24e9).images == 2


def test_few_images_and_none() -> None:
    assert fit(lambda images: 1e9 * (10 + images), 17e9).images == 5
    with pytest.raises(ConfigError, match="batch_size: expected memory for one image, 11.70 GB, got 9.00 GB"):
        fit(lambda images: 1e9 * (10 + images), 9e9)


def test_auto_on_a_cpu_is_a_number_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(batch_size="auto")
    with pytest.raises(RuntimeError, match="batch_size is still auto"):
        print(config.run.images)
    assert fit_on_cpu(config, ONE).images == 64
    monkeypatch.setattr("pera_fast.batch._available_bytes", lambda: 8e6)
    found = fit_on_cpu(config, ONE)
    assert 0 < found.images < 64 and found.predicted_bytes <= 8e6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fit_on_cpu(config, ONE).images < found.images
    monkeypatch.setattr("pera_fast.batch._available_bytes", lambda: 1e5)
    with pytest.raises(ConfigError, match="batch_size: expected memory for one image"):
        fit_on_cpu(config, ONE)


def test_auto_with_a_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pera_fast.batch.fit_on_cpu", lambda config, world: Fit(24, 1e9))
    config, predicted = choose(None, tiny_config(batch_size="auto", global_batch=64), ONE)  # type: ignore[arg-type]
    assert (config.run.batch_size, config.run.accumulate, predicted) == (16, 4, None)
    config, predicted = choose(None, tiny_config(batch_size="auto"), ONE)  # type: ignore[arg-type]
    assert (config.run.batch_size, config.run.accumulate, predicted) == (24, 1, 1e9)


def test_more_passes_leave_room_for_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the others' patches beside it: 64 images in two passes of 32 would not fit, in four of 16 they do."""
    asked = []

    def fit_on_gpu(engine: object, config: Config, world: World, passes: int) -> Fit:
        asked.append(passes)
        return Fit(40 // passes + 8, 1e9)

    monkeypatch.setattr("pera_fast.batch.fit_on_gpu", fit_on_gpu)
    on = World(0, 1, torch.device("cuda"))
    config, _ = choose(None, tiny_config(batch_size="auto", global_batch=64, device="cuda"), on)  # type: ignore[arg-type]
    assert asked == [1, 2, 4] and (config.run.batch_size, config.run.accumulate) == (16, 4)
    asked.clear()
    config, predicted = choose(None, tiny_config(batch_size="auto", accumulate=3, device="cuda"), on)  # type: ignore[arg-type]
    assert asked == [3] and (config.run.batch_size, config.run.accumulate, predicted) == (21, 3, 1e9)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_what_a_step_holds_beside_a_pass(cuda_graph: bool) -> None:
    config = tiny_config(cuda_graph=cuda_graph)
    source = 3 * config.data.window_px**2
    groups, *rows = synthetic_patches(config, 1, torch.device("cpu"))
    patches = sum(x.nbytes for x in (*rows, *(mask for group in groups for mask in group)))
    assert input_bytes(config) == (3 if cuda_graph else 2) * source
    assert input_bytes(config, 2) == 2 * input_bytes(config)
    assert input_bytes(config, passes=4) - input_bytes(config) == 6 * source + 3 * patches


def test_fewer_images_are_probed_where_four_do_not_fit() -> None:
    probed = []

    def measure(images: int) -> float:
        probed.append(images)
        return 1e9 + images * 1e9 if images < 4 else math.inf

    assert fit(measure, 6e9).images == 4 and probed == [4, 8, 1, 2]
    with pytest.raises(ConfigError, match="batch_size: expected memory for two images, got 6.00 GB"):
        fit(lambda images: math.inf, 6e9)


def fails_above(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU whose memory holds so many images' forward pass."""
    forward = PerA.forward

    def short_of_memory(self: PerA, patches: Any, *arguments: Any) -> Any:
        if len(patches.groups[0].student) > most * self.config.crops.num_global:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, patches, *arguments)

    monkeypatch.setattr(PerA, "forward", short_of_memory)


@pytest.mark.parametrize(("batch_size", "most"), [(8, 4), (8, 7), (9, 3)])
def test_a_step_out_of_memory_is_taken_in_parts_with_the_same_result(
    batch_size: int,
    most: int,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny_config(batch_size=batch_size)
    whole, whole_reports = run(image_folder, config, 3)
    fails_above(most, monkeypatch)
    with caplog.at_level(logging.WARNING, "pera_fast"):
        parts, reports = run(image_folder, config, 3)
    assert_near(state(parts), state(whole), 1e-5)
    for a, b in zip(reports, whole_reports, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-5)
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    passes = 2 if batch_size == 8 else 3
    assert said == [
        f"out of memory in step 1 with {batch_size} images in a forward pass; taken again with "
        f"{batch_size // passes} in each of {passes} passes"
    ]


@pytest.mark.parametrize(("batch_size", "most"), [(8, 3), (1, 0)])
def test_out_of_memory_twice_or_with_one_image_is_the_end(
    batch_size: int, most: int, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_above(most, monkeypatch)
    with pytest.raises(
        TrainingStopped, match="out of memory in step 1 on rank 0 with [14] images in a forward pass"
    ):
        run(image_folder, tiny_config(batch_size=batch_size), 1)


def test_a_probe_changes_nothing(image_folder: Path) -> None:
    config: Config = tiny_config()
    plain, _ = run(image_folder, config, 2)
    probed, _ = run(image_folder, config, 1)
    probed.optimizer.allocate()
    probed.probe(synthetic_patches(config, 3, torch.device("cpu")))
    run(image_folder, config, 2, start=1, engine=probed)
    assert_near(state(probed), state(plain), 0.0)


def test_a_probe_asks_nothing_of_other_ranks(image_folder: Path) -> None:
    """One of them may be short of memory; their outputs' place in KoLeo is taken."""
    engine, _ = run(image_folder, tiny_config(), 1)
    engine.world = World(3, 5, torch.device("cpu"))  # without a process group, which any exchange would need
    seen = []
    koleo = pera.koleo_and_prototypes

    def note(z: torch.Tensor, *weights: torch.Tensor) -> Any:
        seen.append(list(z.shape[:2]))
        return koleo(z, *weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pera, "koleo_and_prototypes", note)
        engine.probe(synthetic_patches(engine.config, 3, torch.device("cpu")))
    assert seen == [[2, 15]] and all(p.grad is None for p in engine.model.parameters())


def test_a_probe_of_several_passes_has_gradients_beside_the_second(image_folder: Path) -> None:
    """And starts without those of a probe that failed; Sinkhorn's sums are its own."""
    config = tiny_config()
    config = replace(config, optim=replace(config.optim, centring="sinkhorn"))
    engine, _ = run(image_folder, config, 1)
    patches, seen = synthetic_patches(config, 3, torch.device("cpu")), []
    forward = engine.model.forward

    def note(*arguments: Any) -> Any:
        seen.append((engine.model.mask_token.grad is not None, engine.model._is_alone))
        return forward(*arguments)

    engine.model.mask_token.grad = torch.ones_like(engine.model.mask_token)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model, "forward", note)
        engine.probe(patches, passes=4)
        engine.probe(patches)
    assert seen == [(False, True), (True, True), (False, True)] and not engine.model._is_alone


def test_command_with_auto_and_global_batch_then_resumed(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    place = SMALL.index("--batch-size")
    options = SMALL[:place] + SMALL[place + 2 :]
    common = ("pera_fast.train", *options, "--data", image_folder, "--out", out)
    done = run_here(*common, "--batch-size", "auto", "--global-batch", 12, "--max-steps", 1)
    assert done.returncode == 0, done.stderr
    assert "12 images a step (12, ranks 1, forward passes 1)" in done.stderr
    done = run_here(*common, "--batch-size", "auto", "--max-steps", 2, "--resume", "--profile", 1)
    assert done.returncode == 0, done.stderr
    assert "12 images a step" in done.stderr and [r["step"] for r in lines(out)] == [1, 2]
    done = run_here(*common, "--batch-size", "many")
    assert done.returncode == 2 and "batch" in done.stderr
    done = run_here(*common, "--batch-size", 5, "--global-batch", 12, "--max-steps", 3, "--profile", 1)
    assert done.returncode == 0, done.stderr
    assert "12 images a step (4, ranks 1, forward passes 3)" in done.stderr
    assert (out / "profile/trace.json").stat().st_size > 1000
    assert "Self CPU" in (out / "profile/ops.txt").read_text()


@needs_cuda
def test_auto_on_a_gpu_foresees_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = (0.0,) * 3
    statistics = Statistics(
        {"uint8": zero}, {"uint8": (255.0,) * 3}, zero, (1.0,) * 3, num_windows=1, num_pixels=1
    )
    device = torch.device("cuda", 0)
    base = PRESETS["vit_ti"]
    config = replace(base, model=replace(base.model, num_prototypes=16384))
    engine = Engine(config, statistics, World(0, 1, device))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (6 * 10**9, 0))
    limit = 6e9 + torch.cuda.memory_reserved(device)
    found = fit_on_gpu(engine, config, engine.world, passes=1)
    torch.cuda.reset_peak_memory_stats(device)
    engine.probe(synthetic_patches(config, found.images, device))
    peak = torch.cuda.max_memory_allocated(device)
    assert found.images % 8 == 0 and peak <= limit
    assert found.predicted_bytes == pytest.approx(peak + found.images * input_bytes(config), rel=0.05)


def test_ranks_take_what_fits_the_fullest() -> None:
    class Two(World):
        def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
            return [values, values * 0.5]

    from pera_fast.batch import _least, _most

    two = replace(Two(0, 2, torch.device("cpu")))
    assert _least(two, 8.0) == 4.0 and _most(two, 8.0) == 8.0
