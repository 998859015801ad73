"""plan: foreseen memory against a real process's, work against counted operations, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import python_path, run_here, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from pera_fast.config import PRESETS, Config, CropConfig
from pera_fast.model.pera import PerA, draw_subsets
from pera_fast.plan import (
    Plan,
    flop_per_image,
    largest_batch,
    line_through,
    main,
    plan,
    plan_for,
    synthetic_patches,
)

CPU = torch.device("cpu")


def small(precision: str, activation: str = "none") -> Config:
    base = PRESETS["vit_ti"]
    return replace(
        base,
        model=replace(base.model, depth=3, num_prototypes=16384, activation=activation),
        run=replace(base.run, precision=precision, device="cpu"),
    )


# A small step goes first: what a process holds besides tensors, modules and the libraries' code, is loaded by then.
PROBE = """
import resource, sys
import torch
from conftest import ONE, tiny_config
from test_plan import CPU, small
from pera_fast.data.statistics import Statistics
from pera_fast.engine import Engine
from pera_fast.plan import synthetic_patches
zero = (0.0,) * 3
statistics = Statistics({"uint8": zero}, {"uint8": (255.0,) * 3}, zero, (1.0,) * 3, num_windows=1, num_pixels=1)

def probe(config, images):
    engine = Engine(config, statistics, ONE)
    patches = synthetic_patches(config, images, CPU)
    engine.optimizer.allocate()
    engine.probe(patches)
    engine.probe(patches)

probe(tiny_config(precision=sys.argv[1]), 1)
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
probe(small(*sys.argv[1:3]), int(sys.argv[3]))
# Not getrusage, whose peak may be that of the process this one was forked from.
with open("/proc/self/status") as file:
    print(before, next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")))
"""


@pytest.mark.parametrize(
    ("precision", "activation", "images"),
    [("fp32", "none", 12), ("bf16", "blocks", 24)],
)
def test_peak_memory_of_a_process_is_foreseen_to_a_tenth(
    precision: str, activation: str, images: int
) -> None:
    """With a malloc that gives memory back as it is freed; the default one's heap keeps some of it."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, precision, activation, str(images)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": python_path(), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    predicted = before + plan(small(precision, activation)).bytes_at(images)
    assert predicted == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("num_local", [0, 2])
def test_work_is_what_the_operations_add_up_to(
    drop_path: float, num_local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the reference ops, which are PyTorch's own, but for the zero rows of CLS tokens, many in so small crops."""
    monkeypatch.setenv("PERA_FAST_BACKEND", "reference")
    base = tiny_config()
    config = replace(
        base, crops=CropConfig(global_px=40, local_px=24, num_local=num_local),
        model=replace(base.model, drop_path=drop_path), optim=replace(base.optim, koleo_weight=0.0),
    )  # fmt: skip
    images = 2
    model, patches = PerA(config), synthetic_patches(config, images, CPU)
    subsets = draw_subsets(patches.groups, drop_path, config.model.depth)
    monkeypatch.setattr(
        "pera_fast.model.pera.koleo_and_prototypes",
        lambda z, v, g: (z.new_zeros(2), torch.zeros(2, dtype=torch.int64), v, g),
    )
    with FlopCounterMode(display=False) as counter:
        model(patches, subsets, 0.04).total.backward()
    assert flop_per_image(config) == pytest.approx(counter.get_total_flops() / images, rel=0.05)


def test_work_of_the_papers_models() -> None:
    """Counted for the authors' implementation: 431 and 2414 GFLOP an image, unread rows of the last MLP among them."""
    for preset, authors in (("vit_b", 431e9), ("vit_g_1024", 2414e9)):
        config = PRESETS[preset]
        model, per_image = config.model, synthetic_patches(config, 1, CPU).groups
        student, teacher = (
            sum(x.numel() for x in patches) for patches in list(zip(*per_image, strict=True))[::2]
        )
        unread = 3 * (1 - model.drop_path) * student + teacher
        unread *= 4 * model.embed_dim * int(model.embed_dim * model.mlp_ratio)
        assert 0.01 * authors < unread < 0.06 * authors
        assert flop_per_image(config) + unread == pytest.approx(authors, rel=0.01)


def test_recomputing_less_memory_per_image() -> None:
    found = [plan(small("bf16", activation)).bytes_per_image for activation in ("none", "norms", "blocks")]
    assert found[0] > 1.03 * found[1] > 1.03 * 1.2 * found[2]


def test_it_is_taken_near_the_largest_batch() -> None:
    """With blocks made again, small steps hold most at the optimiser's side: their line is too flat."""
    config = small("bf16", "blocks")
    found = plan_for(config, 4e9, on_gpu=True)
    images = found.largest_batch(4e9)
    assert images > 64
    near = plan(config, True, (images, images + 8))
    assert found.bytes_at(images) == pytest.approx(near.bytes_at(images), rel=0.02)
    assert plan_for(config, 4e9, most=12) == plan(config)


def test_lines_and_largest_batches() -> None:
    assert line_through([4, 8], [14.0, 18.0]) == pytest.approx((10.0, 1.0))
    assert line_through([0, 1, 2], [1.0, 1.0, 4.0]) == pytest.approx((0.5, 1.5))
    assert largest_batch(10.0, 1.0, 100.0) == 80  # 84 would fit
    assert largest_batch(10.0, 10.0, 100.0) == 8 and largest_batch(10.0, 12.0, 100.0) == 7
    assert largest_batch(10.0, 1.0, 5.0) == 0
    found = Plan(1, fixed_bytes=10, bytes_per_image=2, flop_per_image=1)
    assert found.bytes_at(3) == 16 and found.largest_batch(100) == 40


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("pera_fast.plan", "--preset", "vit_ti", "--depth", 2, "--num-prototypes", 1024)
    done = run_here(*arguments, "--gpu-memory", 24)
    assert done.returncode == 0, done.stderr
    assert "memory per image" in done.stdout and "GFLOP" in done.stdout and " of 24 GB" in done.stdout

    def here(*more: object) -> str:
        monkeypatch.setattr(sys, "argv", list(map(str, (*arguments, *more))))
        main()
        return capsys.readouterr().out

    facts = json.loads(here("--gpu-memory", 24, "--json"))
    assert facts["bytes_at_largest_batch"] <= 24e9 and facts["largest_batch"] % 8 == 0
    assert facts["bytes_at_largest_batch"] + 8 * facts["bytes_per_image"] > 0.94 * 24e9
    assert "none: one image needs" in here("--gpu-memory", 0.1)
    for memory in (-1, "inf"):
        done = run_here(*arguments, "--gpu-memory", memory)
        sentence = f"error: gpu-memory: expected gigabytes above 0, got {memory}\n"
        assert done.returncode == 2 and done.stderr == sentence
    done = run_here(*arguments, "--activation", "everything")
    assert done.returncode == 2 and "activation" in done.stderr
