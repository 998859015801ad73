"""The command as users run it: results on disk, resume, and one sentence for what cannot work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ONE, run_here, run_module, start_ranks, tiny_config
from PIL import Image
from safetensors.torch import load_file

from pera_fast import run as run_of_training
from pera_fast import train
from pera_fast.config import PRESETS
from pera_fast.data.sources import DataError
from pera_fast.engine import Preempted

SMALL = (
    "--embed-dim", 32, "--depth", 2, "--num-heads", 2, "--patch-px", 8, "--global-px", 40, "--local-px", 24,
    "--num-prototypes", 64, "--head-hidden-dim", 32, "--head-bottleneck-dim", 16, "--batch-size", 4,
    "--device", "cpu", "--window-px", 64, "--workers", 1, "--precision", "fp32", "--log-every", 1, "--epochs", 4,
    "--no-report",
)  # fmt: skip


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command in this process, which is quicker where nothing is made of its answer."""
    monkeypatch.setattr(run_of_training, "_keep_freed_memory", lambda: None)  # it would outlast the test

    def run(*options: object) -> None:
        train.train(train.parse([str(option) for option in options]), ONE)

    return run


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_run_resume_and_records(image_folder: Path, tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    data = ("--data", image_folder)
    done = run_module("pera_fast.train", *SMALL, *data, "--out", straight, "--max-steps", 6)
    assert done.returncode == 0, done.stderr
    for extra in ((), ("--resume", "--report")):
        stop = 6 if extra else 3
        done = run_module("pera_fast.train", *SMALL, *data, "--out", halves, "--max-steps", stop, *extra)
        assert done.returncode == 0, done.stderr
    assert "going on from step 3" in done.stderr

    wanted = load_file(straight / "checkpoints/step_00000006/model.safetensors")
    got = load_file(halves / "checkpoints/step_00000006/model.safetensors")
    assert wanted.keys() == got.keys() and all((wanted[k] == got[k]).all() for k in wanted)

    for out in (straight, halves):
        records = lines(out)
        assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
        assert records[-1]["loss"] > 0 and records[-1]["skipped_steps"] == 0
        for name in (
            "lr",
            "weight_decay",
            "momentum",
            "teacher_temperature",
            "grad_norm",
            "images_per_second",
            "data_wait_share",
            "peak_memory_bytes",
            "distill_global",
            "distill_local",
            "koleo",
            "pixel",
        ):
            assert name in records[-1]
        assert list((out / "tensorboard").glob("events.*")) and (out / "config.yaml").exists()
    assert (halves / "report.html").stat().st_size > 10_000
    assert not (straight / "report.html").exists(), "it was left out"


def test_a_second_run_moves_the_first_aside(
    image_folder: Path, tmp_path: Path, train_here: Callable[..., None]
) -> None:
    out = tmp_path / "run"
    for _ in range(2):
        train_here(*SMALL, "--data", image_folder, "--out", out, "--max-steps", 1)
    assert len(lines(out)) == 1 and len(lines(tmp_path / "run.old-1")) == 1


def test_a_run_in_a_mount_point_is_moved_aside_within_it(
    image_folder: Path, tmp_path: Path, train_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "run", Path.rename

    def rename(path: Path, to: Path) -> Path:
        if path == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return plain(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    for _ in range(3):
        train_here(*SMALL, "--data", image_folder, "--out", out, "--max-steps", 1)
    assert [len(lines(folder)) for folder in (out, out / "old-1", out / "old-2")] == [1, 1, 1]


def test_what_a_resumed_run_may_be_told_anew(
    image_folder: Path, tmp_path: Path, train_here: Callable[..., None]
) -> None:
    """What is kept for the backward pass, as an error of memory advises, and other statistics."""
    out, stats = tmp_path / "run", tmp_path / "stats.json"
    command = [*SMALL, "--data", image_folder, "--out", out]
    train_here(*command, "--max-steps", 1)
    state = json.loads((out / "checkpoints/step_00000001/state.json").read_text())
    statistics = {**state["statistics"], "mean": [0.5, 0.25, 0.125]}
    stats.write_text(json.dumps(statistics))
    train_here(*command, "--max-steps", 2, "--resume", "--activation", "blocks", "--stats", stats)
    train_here(*command, "--max-steps", 3, "--resume")  # the same from now on
    for step in (2, 3):
        state = json.loads((out / f"checkpoints/step_{step:08d}/state.json").read_text())
        assert state["statistics"] == statistics


def test_a_damaged_checkpoint_is_named(
    image_folder: Path, tmp_path: Path, train_here: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    command = [*SMALL, "--data", image_folder, "--out", out, "--max-steps", 1]
    train_here(*command)
    (out / "checkpoints/step_00000001/model.safetensors").write_bytes(b"")
    train_here(*command, "--resume", "--lr", 0.25)
    assert "is whole, step_00000001 is not: starting at step 0" in caplog.text
    assert (tmp_path / "run.old-1/checkpoints/step_00000001").exists()


def test_evaluation_that_fails_ends_no_run(
    image_folder: Path, tmp_path: Path, train_here: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "val"):
        for kind in ("a", "b"):
            shutil.copytree(image_folder, tmp_path / name / kind)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])  # with their headers
    folders = ("--eval-train", tmp_path / "train", "--eval-val", tmp_path / "val", "--eval-every", 1)
    out = tmp_path / "run"
    train_here(*SMALL, "--data", image_folder, "--out", out, "--max-steps", 2, *folders)
    assert caplog.text.count("no k-NN after step") == 2 and caplog.text.count("no k-NN at the end") == 1
    assert len(lines(out)) == 2 and not (out / "eval.json").exists()


def test_the_folder_of_another_run_is_refused(
    image_folder: Path, tmp_path: Path, train_here: Callable[..., None]
) -> None:
    out = tmp_path / "run"
    command = [*SMALL, "--data", image_folder, "--out", out, "--max-steps", 1]
    train_here(*command)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    refused = run_here("pera_fast.train", *command, "--lr", 0.25, "--seed", 3)
    lr = PRESETS["demo"].optim.lr
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1] == (
        f"error: out: {out} holds a run with other values (lr {lr}, now 0.25; seed 0, now 3): expected another "
        "--out, --resume to go on with that run, or that folder moved away"
    )
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
    train_here(*command, "--lr", 0.25, "--resume")
    (out / "config.yaml").write_text("run: {no_such_value: 1}")
    train_here(*command)
    assert (tmp_path / "run.old-1").exists()


def test_torchrun_with_two_ranks(image_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pera_fast.train",
         *map(str, SMALL), "--data", str(image_folder), "--out", str(tmp_path / "run"), "--max-steps", "2"],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in lines(tmp_path / "run")] == [1, 2]
    assert done.stderr.count("images a step") == 1  # not by each rank


AS_RANK = """
import os, runpy, sys
sys.argv[1:] = [argument.replace("RANK", os.environ["RANK"]) for argument in sys.argv[1:]]
runpy.run_module("pera_fast.train", run_name="__main__")
"""


@pytest.mark.parametrize("what", ["checkpoint", "data", "seed"])
def test_ranks_that_disagree_are_told_so(what: str, image_folder: Path, tmp_path: Path) -> None:
    """As where --out or --data is a folder of each machine's own: not one step is made."""
    for rank in (0, 1):
        shutil.copytree(image_folder, tmp_path / f"data{rank}")
    command = [*SMALL, "--data", tmp_path / "data0", "--max-steps", 1, "--stats", tmp_path / "stats.json"]
    done = run_here("pera_fast.stats", image_folder, "--out", tmp_path / "stats.json")
    assert done.returncode == 0, done.stderr
    if what == "checkpoint":
        done = run_here("pera_fast.train", *command, "--out", tmp_path / "out0")
        assert done.returncode == 0, done.stderr
    if what == "data":  # the folders may be another, what is in them may not
        next((tmp_path / "data1").iterdir()).unlink()
    own = {
        "checkpoint": ("--out", tmp_path / "outRANK", "--resume"),
        "data": ("--out", tmp_path / "out", "--data", tmp_path / "dataRANK"),
        "seed": ("--out", tmp_path / "out", "--data", tmp_path / "dataRANK", "--seed", "RANK"),
    }[what]
    processes = start_ranks(2, "-c", AS_RANK, *command, *own, stderr=subprocess.PIPE)
    try:
        errors = [p.communicate(timeout=200)[1].decode() for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [2, 2], errors
    assert all(f"{what}: expected the same on every rank, got " in error for error in errors), errors
    assert not list(tmp_path.glob("out*/metrics.jsonl")) or what == "checkpoint"


def test_yaml_config_is_read_and_written(image_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("run: {batch_size: 3, max_steps: 1}\n")
    done = run_here(
        "pera_fast.train", "--config", config, "--embed-dim", 48, "--num-heads", 2, "--data", image_folder, "--depth",
        1, "--workers", 0, "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = run_here("pera_fast.train", "--config", tmp_path / "run/config.yaml", "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert lines(tmp_path / "again")[0]["loss"] == lines(tmp_path / "run")[0]["loss"]


def empty(folder: Path) -> list[object]:
    (folder / "none").mkdir()
    return ["--data", folder / "none"]


def unreadable(folder: Path) -> list[object]:
    (folder / "bad").mkdir()
    (folder / "bad/x.jpg").write_bytes(b"not a jpeg")
    return ["--data", folder / "bad"]


def mostly_bad(folder: Path) -> list[object]:
    (folder / "mixed").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "mixed/good.png")
    for i in range(3):
        (folder / f"mixed/{i}.jpg").write_bytes(b"")
    return ["--data", folder / "mixed"]


def other_files(folder: Path) -> list[object]:
    (folder / "run").mkdir()
    (folder / "run/thesis.txt").write_text("mine")
    return []


def one_band_stats(folder: Path) -> list[object]:
    text = {"low": {"uint8": [0]}, "high": {"uint8": [255]}, "mean": [0.5], "std": [0.2], "num_windows": 1}
    (folder / "stats.json").write_text(json.dumps({**text, "num_pixels": 1}))
    return ["--stats", folder / "stats.json"]


def not_text(folder: Path) -> list[object]:
    Image.new("RGB", (8, 8)).save(folder / "stats.png")
    return ["--stats", folder / "stats.png"]


def other_classes(folder: Path) -> list[object]:
    for name in ("train/a", "train/b", "val/a", "val/c"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(folder / name / "x.png")
    return ["--data", folder, "--eval-train", folder / "train", "--eval-val", folder / "val"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (other_files, "out: expected a new or empty folder or an earlier run's"),
        (one_band_stats, "stats: expected statistics of in_bands = 3 bands, got 1"),
        (not_text, "stats: expected a JSON file"),
        (other_classes, "the val images have a class that the train images lack: c"),
        (lambda folder: ["--epochs", "inf"], "epochs: expected finite numbers"),
        (lambda folder: ["--eval-every", 5], "eval_every: expected eval_train and eval_val with it"),
        (lambda folder: ["--data", folder / "missing"], "missing"),
        (empty, "none"),
        (unreadable, "x.jpg"),
        (mostly_bad, "only 1 of the 4 images"),
        (lambda folder: ["--preset", "vit_xxl"], "preset: expected one of demo, vit_ti"),
        (lambda folder: ["--config", folder / "none.yaml"], "cannot read"),
        (lambda folder: ["--num-heads", 5], "num_heads: expected a divisor"),
        (lambda folder: ["--student-ratio", 0.7], "student_ratio + teacher_ratio: expected at most 1"),
        (lambda folder: ["--data", folder, "--eval-train", folder / "no", "--eval-val", folder], "no"),
        (lambda folder: ["--out", "/dev/null/run"], "out: expected a folder that can be written"),
        (lambda folder: ["--stats", folder / "none.json"], "stats: cannot read"),
        (lambda folder: ["--bands", 1, 2], "bands: expected in_bands = 3 values, got 2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments: object, sentence: str, tmp_path: Path) -> None:
    done = run_here(
        "pera_fast.train",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
        *arguments(tmp_path),  # type: ignore[operator]
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last
    assert "Traceback" not in done.stderr and "──" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        ("banana", "PERA_FAST_BACKEND: expected auto or one of"),
        ("cuda", "disjoint_masks: backend 'cuda' was asked for"),
    ],
)
def test_backend_that_cannot_run(backend: str, sentence: str, image_folder: Path, tmp_path: Path) -> None:
    done = run_module(
        "pera_fast.train",
        *SMALL,
        "--data",
        image_folder,
        "--out",
        tmp_path / "run",
        PERA_FAST_BACKEND=backend,
    )
    assert done.returncode == 2 and sentence in done.stderr.strip().splitlines()[-1], done.stderr


def test_a_run_that_stays_non_finite_stops_with_its_checkpoint(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ("pera_fast.train", *SMALL, "--data", image_folder, "--out", out, "--checkpoint-every", 1)
    assert run_here(*small, "--max-steps", 2).returncode == 0
    hopeless = ("--mean", 1e38, 1e38, 1e38, "--std", 1e-30, 1e-30, 1e-30, "--max-skipped", 3)
    stopped = run_here(*small, "--resume", *hopeless)
    assert stopped.returncode == 1, stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("error: the loss or gradient was not finite in 3 steps") and "step_00000002" in last
    )
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    assert lines(out)[-1]["skipped_steps"] == 3
    assert run_here(*small, "--resume", "--max-steps", 3).returncode == 0


@pytest.mark.parametrize("is_asked_to_stop", [False, True])
def test_a_checkpoint_that_falls_on_a_skipped_step(
    is_asked_to_stop: bool, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written after the next step, or at once by a run that ends there: its weights are those of before."""
    plain = run_of_training.Run.after_step

    def after_step(self: Any, step: int, report: Any, batches: Any) -> None:
        report = replace(report, skipped=step == 3, stop=is_asked_to_stop and step == 3)
        plain(self, step, report, batches)

    monkeypatch.setattr(run_of_training.Run, "after_step", after_step)
    out = tmp_path / "run"
    with pytest.raises(Preempted) if is_asked_to_stop else nullcontext():
        _with_loader(image_folder, out, monkeypatch, lambda number: None)
    kept = [p.name for p in run_of_training.checkpoint.complete(out / "checkpoints")]
    assert kept == (["step_00000004"] if is_asked_to_stop else ["step_00000005", "step_00000006"])


def test_misspelt_option_is_an_error(tmp_path: Path) -> None:
    done = run_module("pera_fast.train", "--learning-ratio", 3, "--out", tmp_path / "run")
    assert done.returncode == 2 and "--learning-ratio" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_help_is_readable() -> None:
    done = run_module("pera_fast.train", "--help")
    assert done.returncode == 0
    for word in ("--preset", "vit_g_1024", "--batch-size", "--bands", "--mean", "--resume", "--embed-dim"):
        assert word in done.stdout
    assert "--model." not in done.stdout


def test_threads_wait_without_spinning() -> None:
    """OpenMP reads the variable when torch brings it, so it has to be set before."""
    program = (
        "import builtins, os\n"
        "plain = builtins.__import__\n"
        "def watch(name, *more):\n"
        "    if name == 'torch' and not seen: seen.append(os.environ.get('OMP_WAIT_POLICY'))\n"
        "    return plain(name, *more)\n"
        "seen, builtins.__import__ = [], watch\n"
        "import pera_fast.train\n"
        "print(*seen)"
    )
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr


FAULTS = """
import platform, resource, sys, torch
from pera_fast.run import _keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
_keep_freed_memory()
faults()
print(platform.libc_ver()[0], before, faults())
"""


@pytest.mark.parametrize("is_set", [False, True])
def test_freed_memory_is_kept_for_the_next_step(is_set: bool) -> None:
    names = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    if is_set:
        environment["MALLOC_TOP_PAD_"] = "0"
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=environment)
    libc, before, after = done.stdout.split()
    if libc != "glibc" or int(before) < 100:
        pytest.skip(f"{libc}'s malloc, {before} page faults")
    assert int(after) * 10 < int(before) if not is_set else int(after) * 2 > int(before)


# --- reading ahead ---


def _with_loader(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]
) -> None:
    """Six steps in this process; before: called with the number of each batch, from 0 on, before it is there."""
    plain = run_of_training.make_loader

    def disturbed(*arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(plain(*arguments)):
            before(number)
            yield batch

    monkeypatch.setattr(run_of_training, "make_loader", disturbed)
    monkeypatch.setattr(run_of_training, "_keep_freed_memory", lambda: None)  # it would outlast the test
    config = tiny_config(max_steps=6, log_every=1, checkpoint_every=4, out=str(out))
    train.train(replace(config, data=replace(config.data, data=str(folder))), ONE)


def test_what_fails_while_reading_ahead_costs_no_finished_step(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        if number == 4:
            raise DataError("the disk is gone")

    with pytest.raises(DataError, match="the disk is gone"):
        _with_loader(image_folder, tmp_path / "run", monkeypatch, fail)
    assert [r["step"] for r in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run/checkpoints/step_00000004").is_dir()


def test_waiting_for_images_is_of_the_line_in_which_it_happens(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_loader(image_folder, tmp_path / "run", monkeypatch, lambda number: time.sleep(2 * (number == 3)))
    shares = [r["data_wait_share"] for r in lines(tmp_path / "run")]
    assert all(0 <= share <= 1 for share in shares)
    # The fourth batch is read while the third step is recorded.
    assert shares[2] > 0.5 and max(shares[3:]) < 0.5


def test_nothing_is_read_for_a_step_that_will_not_be(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(number: int) -> None:
        asked.append(number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        _with_loader(image_folder, tmp_path / "run", monkeypatch, note)
    # The signal comes while the third batch is read, ahead of its step: that step is the last.
    assert asked == [0, 1, 2] and [r["step"] for r in lines(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run/checkpoints/step_00000003").is_dir()
