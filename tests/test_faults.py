"""Faults tried for real: processes killed, asked to stop, out of disk; weights afterwards are an undisturbed run's.

PERA_FAST_TRIALS sets how many times ranks are killed (default 2; docs/reliability.md tells of 20).
"""

from __future__ import annotations

import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file
from test_train import SMALL, lines

from pera_fast import checkpoint

TRIALS = int(os.environ.get("PERA_FAST_TRIALS", "2"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(images: Path, out: Path, *options: object, ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "--max-restarts=99",
            "-m",
        ]
    arguments = ("pera_fast.train", *SMALL, "--data", images, "--out", out, *options)
    return [*launcher, *map(str, arguments)]


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the test; its output is in `log`."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            arguments, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        )
        try:
            yield process
        finally:
            ranks = ranks_of(process)  # torchrun gives each a group of its own
            for stop, number in ((os.killpg, process.pid), *((os.kill, rank) for rank in ranks)):
                with suppress(ProcessLookupError):
                    stop(number, signal.SIGKILL)
            process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    stop = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < stop, log.read_text()[-3000:]
        time.sleep(0.002)


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Process numbers of a torchrun's ranks."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "stat").read_text().rsplit(")")[1].split()[1] == str(
                process.pid
            ):
                if b"pera_fast.train" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        except OSError:
            continue
    return found


def last_step(out: Path) -> int:
    found = checkpoint.complete(out / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def weights(out: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.newest(out)
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def assert_same(a: Path, b: Path) -> None:
    assert last_step(a) == last_step(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


# --- killed ---


def test_ranks_killed_at_any_moment_end_with_the_weights_of_an_undisturbed_run(
    image_folder: Path, tmp_path: Path
) -> None:
    steps = 12 + 4 * TRIALS
    options = ("--checkpoint-every", 1, "--max-steps", steps, "--resume", "--epochs", 50)
    straight, killed, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    done = subprocess.run(
        command(image_folder, straight, *options, ranks=2), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seeded = random.Random(0)
    targets = sorted(seeded.sample(range(1, steps - 1), TRIALS))
    in_writing = 0
    with started(command(image_folder, killed, *options, ranks=2), log) as torchrun:
        for starts, target in enumerate(targets):
            # Those killed before have gone on: else a target that they had reached would be the next one's, too.
            wait_for(lambda n=starts: log.read_text().count("going on from step") >= n, torchrun, log)  # type: ignore[misc]
            wait_for(lambda target=target: last_step(killed) >= target, torchrun, log)  # type: ignore[misc]
            if seeded.random() < 0.5:  # while a checkpoint is being written
                partial = killed / "checkpoints"
                wait_for(lambda p=partial: any(p.glob(".partial_*/*")), torchrun, log)  # type: ignore[misc]
                in_writing += 1
            else:
                time.sleep(seeded.random() * 0.1)
            ranks = ranks_of(torchrun)
            for rank in ranks if seeded.random() < 0.5 else [seeded.choice(ranks)]:
                os.kill(rank, signal.SIGKILL)
        assert torchrun.wait(timeout=200) == 0, log.read_text()[-3000:]
    starts = re.findall(r"going on from step (\d+)", log.read_text())
    assert len(starts) >= TRIALS and in_writing > 0
    assert "Unable to shutdown" not in log.read_text()  # no survivor waits for its reading workers
    assert_same(killed, straight)
    assert not list((killed / "checkpoints").glob(".partial_*"))
    assert [r["step"] for r in lines(killed)] == list(range(1, steps + 1))


# --- asked to stop ---


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_run_with_a_checkpoint_of_that_step(
    asked: signal.Signals, image_folder: Path, tmp_path: Path
) -> None:
    out, straight, log = tmp_path / "out", tmp_path / "straight", tmp_path / "log"
    with started(command(image_folder, out, "--max-steps", 2000, "--epochs", 1000), log) as process:
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) >= 3, process, log)
        before = len(lines(out))
        process.send_signal(asked)
        assert process.wait(timeout=60) == 75
    assert "stopped: a signal asked for it after step" in log.read_text()
    stopped = last_step(out)
    assert stopped == lines(out)[-1]["step"] <= before + 2
    options = ("--max-steps", stopped + 3, "--epochs", 1000)
    assert run_here(*command(image_folder, out, *options, "--resume")[2:]).returncode == 0
    assert run_here(*command(image_folder, straight, *options)[2:]).returncode == 0
    assert_same(out, straight)


@pytest.mark.parametrize("whom", ["one rank", "torchrun"])
def test_one_rank_that_is_asked_or_torchrun_itself_stops_all(
    whom: str, image_folder: Path, tmp_path: Path
) -> None:
    """torchrun passes SIGTERM on to its ranks and to the workers that read for them."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = command(image_folder, out, "--max-steps", 5000, "--epochs", 3000, ranks=2)
    arguments[arguments.index("--max-restarts=99")] = "--max-restarts=0"
    with started(arguments, log) as torchrun:
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) >= 3, torchrun, log)
        os.kill(torchrun.pid if whom == "torchrun" else ranks_of(torchrun)[-1], signal.SIGTERM)
        assert torchrun.wait(timeout=60) == 1
    assert log.read_text().count("stopped: a signal asked for it after step") == 2
    assert last_step(out) == lines(out)[-1]["step"]


# --- the disk ---


def limit(process: subprocess.Popen[bytes], size: int) -> None:
    """No file of the process may become larger: writing more fails as on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_ends_a_run_with_the_checkpoint_before_whole(image_folder: Path, tmp_path: Path) -> None:
    out, log, straight = tmp_path / "out", tmp_path / "log", tmp_path / "straight"
    options = ("--epochs", 1000, "--checkpoint-every", 5)
    with started(command(image_folder, out, *options, "--max-steps", 4000), log) as process:
        wait_for(lambda: last_step(out) >= 5, process, log)
        limit(process, 20_000)
        assert process.wait(timeout=60) == 1
    last = log.read_text().strip().splitlines()[-1]
    assert re.match(
        r"error: (the (checkpoint|records) of step \d+|TensorBoard.s events.*) cannot be written to .*: ",
        last,
    ), last
    kept = last_step(out)
    assert kept >= 5 and not list((out / "checkpoints").glob(".partial_*"))
    more = (*options, "--max-steps", kept + 2)
    assert run_here(*command(image_folder, out, *more, "--resume")[2:]).returncode == 0
    assert run_here(*command(image_folder, straight, *more)[2:]).returncode == 0
    assert_same(out, straight)


def test_a_run_may_go_on_without_its_records_until_there_is_room(image_folder: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    options = ("--epochs", 1000, "--checkpoint-every", 5, "--on-write-error", "go_on", "--max-steps", 4000)
    with started(command(image_folder, out, *options), log) as process:
        wait_for(lambda: last_step(out) >= 5, process, log)
        limit(process, 10_000)  # more than the log, less than the weights, soon less than the records
        kinds = ("the checkpoint of step", "the records of step", "the run goes on")
        wait_for(lambda: all(kind in log.read_text() for kind in kinds), process, log)
        kept = last_step(out)
        limit(process, resource.RLIM_INFINITY)
        wait_for(lambda: last_step(out) > kept, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, log.read_text()[-2000:]
    assert lines(out)[-1]["step"] == last_step(out), "every line can be read"


def test_a_report_that_cannot_be_written_leaves_the_one_before(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_here(*command(image_folder, out, "--max-steps", 1, "--report")[2:]).returncode == 0
    before = (out / "report.html").read_bytes()
    most = max(path.stat().st_size for path in (out / "checkpoints").rglob("*"))
    assert most + 4096 < len(before)
    done = subprocess.run(
        command(image_folder, out, "--max-steps", 2, "--resume", "--report"), env=ENVIRONMENT,
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most + 4096,) * 2),
    )  # fmt: skip
    assert done.returncode == 2 and last_step(out) == 2
    assert done.stderr.splitlines()[-1] == f"error: cannot write {out}/report.html: File too large"
    assert (out / "report.html").read_bytes() == before and not list(out.glob(".*"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_really_full(image_folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        options = ("--epochs", 1000, "--checkpoint-every", 1, "--keep-checkpoints", 100, "--max-steps", 400)
        done = subprocess.run(
            command(image_folder, disk / "out", *options), env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 1 and "No space left on device" in done.stderr.strip().splitlines()[-1], (
            done.stderr
        )
        assert last_step(disk / "out") >= 1
        checkpoint.Checkpoint.open(disk / "out").teacher()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_checkpoints_that_are_kept(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--checkpoint-every", 2, "--keep-checkpoints", 2, "--keep-every", 6, "--max-steps", 17)
    assert run_here(*command(image_folder, out, *options, "--epochs", 50)[2:]).returncode == 0
    assert [int(p.name.removeprefix("step_")) for p in checkpoint.complete(out / "checkpoints")] == [
        6,
        12,
        16,
        17,
    ]


# --- other ranks, workers, batches ---


def test_a_run_goes_on_with_other_workers_accumulation_and_ranks(image_folder: Path, tmp_path: Path) -> None:
    """The global order of images is kept: losses are those of the undisturbed run, to rounding."""
    out, straight = tmp_path / "out", tmp_path / "straight"
    steps = ("--epochs", 50, "--max-steps")
    no_drop = ("--drop-path", 0)
    for path, parts in ((straight, ((8, 1, ()),)), (out, ((3, 1, ()), (6, 1, ("--batch-size", 2, "--accumulate", 2,
                        "--workers", 2)), (8, 2, ("--batch-size", 2, "--accumulate", 1))))):  # fmt: skip
        for stop, ranks, options in parts:
            arguments = command(image_folder, path, *steps, stop, *no_drop, *options, "--resume", ranks=ranks)
            if ranks == 1:
                done = run_here(*arguments[2:])
            else:
                done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert [r["loss"] for r in lines(out)] == pytest.approx([r["loss"] for r in lines(straight)], rel=1e-5)


def test_a_batch_of_another_size_goes_on_at_the_next_image(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_here(*command(image_folder, out, "--max-steps", 3)[2:]).returncode == 0
    done = run_here(*command(image_folder, out, "--batch-size", 2, "--resume")[2:])
    assert done.returncode == 0 and "batch_size was 4, is now 2" in done.stderr
    found = [checkpoint.Checkpoint.open(p) for p in checkpoint.complete(out / "checkpoints")]
    # Four epochs of 24 windows: twelve in three steps of four, the others in steps of two.
    assert [(c.step, c.images_seen) for c in found] == [(3, 12), (45, 96)]
    assert lines(out)[-1]["epoch"] == 4.0


# --- trust ---


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(image_folder: Path, tmp_path: Path) -> None:
    """A pickle that would create a file, in the place of every file that is read."""
    made, out = tmp_path / "made", tmp_path / "out"
    poison = pickle.dumps(Payload(made))
    pickle.loads(poison)
    assert made.exists(), "it would work"
    made.unlink()
    assert (
        run_here(*command(image_folder, out, "--max-steps", 1, "--index", tmp_path / "index")[2:]).returncode
        == 0
    )
    read = checkpoint.newest(out)
    places = [*sorted(read.iterdir()), *sorted((tmp_path / "index").iterdir())]
    assert len(places) == 6
    for place in places:
        kept = place.read_bytes()
        place.write_bytes((poison + b"." * len(kept))[: len(kept)])
        done = run_here(
            *command(image_folder, out, "--max-steps", 2, "--resume", "--index", tmp_path / "index")[2:]
        )
        if place.parent == read and place.name == "state.json":
            assert "no checkpoint in" in done.stderr  # it is none any more; the run before is moved aside
            shutil.rmtree(out)
            (tmp_path / "out.old-1").rename(out)
        else:
            assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: "), place
        place.write_bytes(kept)
        assert not made.exists(), place
    for option in ("--config", "--stats"):
        (tmp_path / "file").write_bytes(poison)
        assert (
            run_here(*command(image_folder, tmp_path / "new", option, tmp_path / "file")[2:]).returncode == 2
        )
    (tmp_path / "file").write_text(f"run: !!python/object/apply:pathlib.Path.touch [{made}]")
    assert (
        run_here(*command(image_folder, tmp_path / "new", "--config", tmp_path / "file")[2:]).returncode == 2
    )
    for image in ("a.jpg", "a.tif", "a.tar"):
        (image_folder / image).write_bytes(poison)
    done = run_here(*command(image_folder, tmp_path / "new", "--max-steps", 1, "--max-bad-share", 0.5)[2:])
    assert done.returncode == 0 and not made.exists()


OBSERVED = """
import runpy, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "os.system", "os.exec", "os.posix_spawn"):
        print("SEEN", event, arguments[1:], file=sys.stderr)
    if event == "subprocess.Popen":
        print("SEEN", event, arguments[:2], file=sys.stderr)
    if event == "pickle.find_class":
        print("SEEN", event, arguments, file=sys.stderr)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_module("pera_fast.train", run_name="__main__")
"""


def test_a_run_opens_no_connection_and_starts_no_program(image_folder: Path, tmp_path: Path) -> None:
    arguments = command(image_folder, tmp_path / "out", "--max-steps", 2, "--workers", 0)[3:]
    done = subprocess.run(
        [sys.executable, "-c", OBSERVED, "pera_fast.train", *arguments], env=ENVIRONMENT, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("SEEN")] == []
