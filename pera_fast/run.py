"""What surrounds the steps of a run: where it starts, what it records, when it stops."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import pera_fast
from pera_fast import batch, checkpoint
from pera_fast.config import Config, ConfigError, load_yaml, save_yaml, to_dict
from pera_fast.data.index import fingerprint, scan_or_open
from pera_fast.data.loader import Batch, WindowDataset, make_loader
from pera_fast.data.sources import DataError, SceneIndex, printable
from pera_fast.data.statistics import Statistics, compute_statistics
from pera_fast.distributed import World
from pera_fast.engine import Engine, Preempted, StepReport, TrainingStopped
from pera_fast.evaluate import check_tiles, class_folder_tiles, compare_with_untrained, knn, scene_halves
from pera_fast.features import Tile
from pera_fast.files import whole, write_whole
from pera_fast.health import Watch
from pera_fast.schedules import Schedules, StepValues

_log = logging.getLogger("pera_fast")
DEMO_SCENES = Path(pera_fast.__file__).parent / "demo"


class Run:
    """Data, engine, schedules and records of one run on one rank."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.out = Path(config.run.out).resolve()
        # Before the work rather than after it: folders that cannot be written or evaluated are refused here.
        if world.is_first:
            _check_out(self.out)
            _check_same_run(self.out, config)
        self._eval_tiles = self._class_folders()
        found = self._checkpoint() if config.run.resume else None
        # Folders of each machine's own would go unnoticed: ranks would part, or wait for each other.
        world.agree(**_settings(config), checkpoint=f"step {found.step}" if found else "none")
        self.index = self._index()
        checksum = fingerprint(self.index.scenes, config.data.data or DEMO_SCENES)
        world.agree(data=f"{len(self.index.scenes)} images of checksum {checksum:08x}")
        # Another file than the one it began with is asked for on purpose.
        is_kept = found is not None and config.data.stats in (None, found.config.data.stats)
        self.statistics = found.statistics if found and is_kept else self._statistics()
        world.agree(stats=self.statistics)
        if self._eval_tiles:
            check_tiles(*self._eval_tiles, self.statistics)
        self.engine = Engine(config, self.statistics, world)
        if found and config.run.batch_size == "auto":  # a run goes on as it began
            config = replace(config, run=replace(config.run, batch_size=found.config.run.batch_size))
        config, self._predicted_bytes = batch.choose(self.engine, config, world)
        self.config = self.engine.config = config
        self.dataset = WindowDataset(self.index, self.statistics, config)
        self._schedules = Schedules.of(config, len(self.dataset), world.ranks)
        self.start_step = self._first_image = self._steps_ahead = 0
        if found:
            found.restore(self.engine.model, self.engine.optimizer)
            self.start_step, self._first_image = found.step, found.images_seen
            # Where batches were of another size, the images seen tell how far the schedules are.
            self._steps_ahead = found.images_seen // self._images_per_step - found.step
            _log.info("going on from step %d of %s", found.step, found.path)
        self.total_steps = min(
            self._schedules.total_steps - self._steps_ahead, config.run.max_steps or 10**12
        )
        self.records = Records(
            self.out, config, world, self.start_step, self.total_steps, is_new=found is None
        )
        steps = max(0, self.total_steps - self.start_step)  # a run may go on from beyond --max-steps
        self._loader = make_loader(
            self.dataset, self._first_image, steps, world.rank, world.ranks, world.device
        )  # fmt: skip
        self.asked_to_stop, self._waited = False, 0.0
        self._profiler: torch.profiler.profile | None = None
        self._bad: dict[str, str] = {}
        self._skipped_in_a_row, self._is_due = 0, False
        _log.info("%d images, %d windows an epoch", len(self.index.scenes), len(self.dataset))

    def read(self, step: int) -> list[Batch]:
        """This rank's batches of a step, one for each forward pass, whose crops are begun; none after the last step."""
        if step >= self.total_steps:
            return []
        started = time.perf_counter()
        batches = [next(self._loader) for _ in range(self.config.run.accumulate)]
        self._waited += min(time.perf_counter() - started, self.engine.idle_seconds())
        self.engine.prepare(step, batches)
        return batches

    def read_ahead(self, step: int) -> Callable[[], list[Batch]]:
        """`read`, before the step before has been recorded: what fails is raised when the batches are asked for."""
        if self.asked_to_stop:  # there will hardly be such a step
            return partial(self.read, step)
        done: Future[list[Batch]] = Future()
        try:
            done.set_result(self.read(step))
        except Exception as error:
            done.set_exception(error)
        return done.result

    def close(self) -> None:
        """Records, reading workers and the recorded step: a process that an error ends would wait for them."""
        self.records.close()
        self._loader.close()
        with suppress(RuntimeError):  # of a GPU that has failed; it must not hide why
            self.engine.release()

    def values_at(self, step: int) -> StepValues:
        """Learning rate and the like of a step."""
        return self._schedules.at(step + self._steps_ahead)

    @property
    def _images_per_step(self) -> int:
        run = self.config.run
        return run.images * run.accumulate * self.world.ranks

    def _images_seen(self, step: int) -> int:
        """Before the first image of a step, in this run and those it goes on from."""
        return self._first_image + (step - self.start_step) * self._images_per_step

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record early steps where --profile asks for it; take note of signals that ask to stop."""
        steps = self.config.run.profile
        before = {asked: signal.signal(asked, self._note) for asked in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            if not steps or not self.world.is_first:
                yield
                return
            before_those = self.total_steps - self.start_step - steps - 1  # in a run of few steps
            wait = max(0, min(self.engine.first_steps, before_those))
            plan = torch.profiler.schedule(wait=wait, warmup=1, active=steps, repeat=1)
            with torch.profiler.profile(schedule=plan, on_trace_ready=self._write_profile) as self._profiler:
                yield
        finally:
            for asked, handler in before.items():
                signal.signal(asked, handler)

    def _note(self, asked: int, _: Any) -> None:
        self.asked_to_stop = True

    def _write_profile(self, profiler: torch.profiler.profile) -> None:
        folder = self.out / "profile"
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        by = "self_device_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=100, max_name_column_width=60)
        (folder / "ops.txt").write_text(table, encoding="utf-8")
        _log.info("profile: %s", folder)

    def after_step(self, step: int, report: StepReport, batches: Sequence[Batch]) -> None:
        """Record the step, count what was skipped, write checkpoints, evaluate; stop a hopeless run."""
        run, done = self.config.run, step + 1
        if step == self.start_step and self.world.device.type == "cpu":
            _keep_freed_memory()  # not before: the workers that read have been started without it
        if self._profiler is not None:
            self._profiler.step()
        self._count_bad(batches)
        # With the first of the steps that are like all others: what a recorded one holds on to counts.
        first_usual = min(self.start_step + self.engine.first_steps, self.total_steps - 1)
        if self._predicted_bytes is not None and step == first_usual:
            device = self.world.device
            _log.info(
                "peak memory %.2f GB%s, predicted %.2f GB", _peak_memory_bytes(device) / 1e9,
                f" in {torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB of blocks" if device.type == "cuda" else "",
                self._predicted_bytes / 1e9,
            )  # fmt: skip
        epoch = self._images_seen(done) / len(self.dataset)
        is_logged = done % run.log_every == 0 or done == self.total_steps
        health = self.engine.health() if is_logged and (self.world.is_first or run.shard != "none") else {}
        self.records.step(
            done, epoch, report, self.values_at(step), self._images_per_step, self._waited, len(self._bad),
            health,
        )  # fmt: skip
        self._waited = 0.0
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if report.skipped else 0
        if self._skipped_in_a_row >= run.max_skipped:
            kept = checkpoint.complete(self.out / "checkpoints")
            raise TrainingStopped(
                f"the loss or gradient was not finite in {run.max_skipped} steps in a row up to step {done}; "
                f"the last good checkpoint: {kept[-1] if kept else 'none was written yet'}"
            )
        # Weights that the next step could not use must not push a good checkpoint out: what was due is written after
        # the next good step.
        self._is_due |= done % run.checkpoint_every == 0
        if (self._is_due and not report.skipped) or report.stop or done == self.total_steps:
            self._save(done, run.keep_checkpoints + report.skipped)
            self._is_due = False
        if report.stop and done < self.total_steps:
            raise Preempted(
                f"a signal asked for it after step {done}; --resume goes on from the newest checkpoint"
            )
        if run.eval_every and done % run.eval_every == 0:
            self._evaluate_now(done)

    def _save(self, step: int, keep: int) -> None:
        run = self.config.run
        try:
            checkpoint.save(
                self.out / "checkpoints", step, self.engine.model, self.engine.optimizer, self.config,
                self.statistics, keep, self.world, run.keep_every, self._images_seen(step),
            )  # fmt: skip
        except checkpoint.WriteError as error:
            if run.on_write_error == "stop" or step == self.total_steps:
                raise TrainingStopped(str(error)) from error
            _log.warning("%s; the run goes on", error)

    def finish(self) -> None:
        """k-NN against the untrained network where there is something to classify, and the report if it is wanted."""
        if not self.world.is_first:
            return
        found = checkpoint.Checkpoint.open(self.out)
        teacher = found.teacher().to(self.world.device)
        tiles = self._eval_tiles
        if tiles is None and self.config.data.data is None:
            tiles = scene_halves(self.index.scenes)
        if tiles is not None and all(tiles):
            try:
                result = compare_with_untrained(
                    teacher, self.config, self.statistics, *tiles, device=self.world.device
                )
                write_whole(self.out / "eval.json", json.dumps(result, indent=2))
                _log.info(
                    "k-NN top-1 %.1f %%, untrained network %.1f %%",
                    100 * result["top1"], 100 * result["untrained_top1"],
                )  # fmt: skip
            except DataError as error:
                _log.warning("no k-NN at the end: %s", error)
        if not self.config.run.report:
            return
        from pera_fast.report import write_report  # with matplotlib and scikit-learn: seconds

        images: list[tuple[str, np.ndarray, int | None]] = []
        path = write_report(
            self.out, backbone=teacher, config=self.config, statistics=self.statistics,
            scenes=self.index.scenes, show=lambda *image: images.append(image),
        )  # fmt: skip
        _log.info("report: %s", path)
        self.records.images(found.step, images)

    def _evaluate_now(self, step: int) -> None:
        """k-NN of the teacher as it is, on rank 0, into metrics.jsonl and TensorBoard."""
        teacher = self.engine.teacher()
        if not (self.world.is_first and self._eval_tiles):
            return
        try:
            result = knn(teacher, self.config, self.statistics, *self._eval_tiles, device=self.world.device)
        except DataError as error:
            _log.warning("no k-NN after step %d: %s", step, error)
        else:
            self.records.value(step, "knn_top1", result["top1"])

    def _index(self) -> SceneIndex:
        """What the images' headers say; with --index one rank reads them, or none where it is there already."""
        data = self.config.data
        root = data.data or DEMO_SCENES
        if data.index is not None:  # the others wait for it, and need not read it whole again
            failed = self.world.share(self._index_or_error(root) if self.world.is_first else None)
            if failed:
                raise DataError(failed)
        return scan_or_open(root, data.index, data.max_bad_share, is_checked=True)

    def _index_or_error(self, root: str | Path) -> str | None:
        try:
            scan_or_open(root, self.config.data.index, self.config.data.max_bad_share)
        except (DataError, OSError) as error:
            return str(error)
        return None

    def _class_folders(self) -> tuple[list[Tile], list[Tile]] | None:
        run = self.config.run
        if run.eval_train is None or run.eval_val is None:
            return None
        return class_folder_tiles(run.eval_train), class_folder_tiles(run.eval_val)

    def _checkpoint(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, None when there is none yet; it must be of the same networks."""
        folder = self.out / "checkpoints"
        if not checkpoint.complete(folder):
            if damaged := checkpoint.named(folder):
                _log.warning(
                    "no checkpoint in %s is whole, %s is not: starting at step 0", folder, damaged[-1].name
                )
            else:
                _log.info("no checkpoint in %s yet: starting at step 0", self.out)
            return None
        found = checkpoint.Checkpoint.open(self.out)
        for section, name, then, now in _differences(found.config, self.config):
            # What the network sees and is must stay; the rest may change, and is said.
            if (section in ("model", "crops") and name != "activation") or name == "bands":
                raise ConfigError(
                    f"{name}: expected {then} as in {found.path}, which --resume goes on from, got {now}"
                )
            _log.info("%s was %s, is now %s", name, then, now)
        return found

    def _statistics(self) -> Statistics:
        """Of the --stats file, or of a sample of the data, computed on rank 0."""
        data = self.config.data
        if data.stats:
            return Statistics.read(data.stats, self.config.model.in_bands)
        computed = None
        if self.world.is_first:
            computed = compute_statistics(
                self.index.scenes, bands=data.bands, in_bands=self.config.model.in_bands, nodata=data.nodata
            )
        return self.world.share(computed)

    def _count_bad(self, batches: Sequence[Batch]) -> None:
        for one in batches:
            for path, reason in one.bad:
                if path not in self._bad:
                    self._bad[path] = reason
                    _log.warning("skipped %s: %s", printable(path), reason)
        bad, all_images = len(self._bad) + len(self.index.bad), len(self.index.scenes) + len(self.index.bad)
        if bad > self.config.data.max_bad_share * all_images:
            raise DataError(
                f"{bad} of {all_images} images cannot be read, more than max_bad_share = "
                f"{self.config.data.max_bad_share:g} allows"
            )


class Records:
    """metrics.jsonl, TensorBoard events, config.yaml and the progress bar; silent on ranks after the first."""

    def __init__(
        self, out: Path, config: Config, world: World, start_step: int, total_steps: int, is_new: bool
    ) -> None:
        self.out, self.config, self.world = out, config, world
        self._skipped_steps, self._images, self._waited = 0, 0, 0.0
        self._watch = Watch(config.model.num_prototypes)
        self._tensorboard: SummaryWriter | None = None
        self._since = time.perf_counter()
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not world.is_first, dynamic_ncols=True,
            mininterval=1.0,
        )  # fmt: skip
        if not world.is_first:
            return
        if is_new:
            move_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        self._metrics_path = out / "metrics.jsonl"
        try:
            with whole(out / "config.yaml") as partial:
                save_yaml(config, partial)
            self._forget_after(start_step)
            self._tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)
        except (DataError, OSError) as error:
            self._not_written("the records of a run that begins", error)

    def step(
        self,
        step: int,
        epoch: float,
        report: StepReport,
        values: StepValues,
        images: int,
        waited: float,
        bad: int,
        health: dict[str, float],
    ) -> None:
        """Take note of one step; every log_every steps, and at the last, write what came together."""
        self._skipped_steps += report.skipped
        self._images += images
        self._waited += waited
        self._bar.update()
        if step % self.config.run.log_every and step != self._bar.total:
            return
        seconds = time.perf_counter() - self._since
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": report.losses["total"],
            **{name: value for name, value in report.losses.items() if name != "total"},
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            "momentum": values.momentum,
            "teacher_temperature": values.teacher_temperature,
            "grad_norm": report.grad_norm,
            "images_per_second": self._images / seconds,
            "data_wait_share": self._waited / seconds,
            "peak_memory_bytes": _peak_memory_bytes(self.world.device),
            "skipped_steps": self._skipped_steps,
            "bad_images": bad,
            **health,
        }
        if health and self.world.is_first:  # all ranks have it where prototypes are shared out
            for sentence in self._watch.look(line):
                _log.warning("%s", sentence)
        self._bar.set_postfix(
            loss=f"{line['loss']:.3f}", images_per_second=f"{line['images_per_second']:.1f}"
        )
        self._write(line)
        self._images, self._waited, self._since = 0, 0.0, time.perf_counter()

    def value(self, step: int, name: str, value: float) -> None:
        """Record one value outside the regular lines; the time since the last line does not count."""
        self._write({"step": step, name: value})
        self._images, self._waited, self._since = 0, 0.0, time.perf_counter()

    def images(self, step: int, images: Sequence[tuple[str, np.ndarray, int | None]]) -> None:
        """The report's images into TensorBoard, in a file of their own, as they are made after the last step.

        images: tag, pixels [H, W, 3] in 0..1, and the step they show, or None for `step`, the last one.
        """
        try:
            with SummaryWriter(str(self.out / "tensorboard"), filename_suffix=".images") as events:
                for tag, image, at in images:
                    events.add_image(tag, image, step if at is None else at, dataformats="HWC")
        except OSError as error:
            self._not_written("TensorBoard's images", error)

    def close(self) -> None:
        self._bar.close()
        if self._tensorboard is not None:
            try:
                self._tensorboard.close()
            except OSError as error:
                _log.warning("TensorBoard's events are not whole: %s", error.strerror or error)

    def _write(self, line: dict[str, Any]) -> None:
        if not self.world.is_first:
            return
        # JSON has no NaN; null keeps the line readable by every parser.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        size = self._metrics_path.stat().st_size if self._metrics_path.exists() else 0
        try:
            with self._metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._metrics_path, size)  # no half line
            self._not_written(f"the records of step {line['step']}", error)
        try:
            for name, value in line.items():
                if name != "step" and self._tensorboard is not None:
                    self._tensorboard.add_scalar(name, value, line["step"])
        except OSError as error:
            self._tensorboard = None  # its writer does not recover; metrics.jsonl holds the same
            self._not_written("TensorBoard's events, which end here,", error)

    def _not_written(self, what: str, error: Exception) -> None:
        sentence = f"{what} cannot be written to {self.out}: {getattr(error, 'strerror', None) or error}"
        if self.config.run.on_write_error == "stop":
            raise TrainingStopped(sentence) from error
        _log.warning("%s; the run goes on", sentence)

    def _forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run does again, and a line cut short by a crash."""
        if not self._metrics_path.exists():
            return
        kept = []
        for text in self._metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(text)["step"] <= step:
                    kept.append(text + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_whole(self._metrics_path, "".join(kept))


_MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")  # a folder with one of these holds a run


def _check_out(out: Path) -> None:
    """ConfigError unless `out` is or can become a folder of ours: new, empty, or an earlier run's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"out: expected a folder that can be written, got {out}: {error.strerror}"
        ) from None
    if any(out.iterdir()) and not any((out / mark).exists() for mark in _MARKS):
        raise ConfigError(
            f"out: expected a new or empty folder or an earlier run's, got {out} with other files"
        )


def _differences(then: Config, now: Config) -> list[tuple[str, str, Any, Any]]:
    """(section, name, then, now) of each value that differs, but for where a run is and how far it goes."""
    a, b = to_dict(then), to_dict(now)
    return [
        (section, name, a[section][name], value)
        for section in b
        for name, value in b[section].items()
        if a[section][name] != value and name not in ("resume", "max_steps", "out", "workers", "report")
    ]


def _settings(config: Config) -> dict[str, Any]:
    """What all ranks must be told alike: folders may have other names on another machine."""
    own = ("data", "index", "stats", "out", "workers")
    return {
        name: value
        for section in to_dict(config).values()
        for name, value in section.items()
        if name not in own
    }


def _check_same_run(out: Path, config: Config) -> None:
    """ConfigError where `out` holds a run with other values, unless --resume goes on with it."""
    if config.run.resume or not (out / "config.yaml").exists():
        return
    try:
        then = load_yaml(out / "config.yaml")
    except ConfigError:
        return  # cut off, or of another version: moved aside like a run of the same values
    # Where these are left to be chosen, numbers are recorded.
    chosen = ("batch_size", "accumulate", "global_batch")
    is_chosen = config.run.batch_size == "auto" or config.run.global_batch is not None
    found = [
        f"{name} {before}, now {value}"
        for _, name, before, value in _differences(then, config)
        if not (is_chosen and name in chosen)
    ]
    if found:
        raise ConfigError(
            f"out: {out} holds a run with other values ({'; '.join(found)}): expected another --out, "
            "--resume to go on with that run, or that folder moved away"
        )


def move_aside(out: Path) -> None:
    """Rename an earlier run's folder, so that a new run of the same name loses nothing."""
    if not any((out / mark).exists() for mark in _MARKS):
        return
    aside = _unused(out.parent, f"{out.name}.old")
    try:
        out.rename(aside)
    except OSError:  # a mount point, or in a folder of somebody else's: within it, then
        entries = [entry for entry in out.iterdir() if not entry.name.startswith("old-")]
        aside = _unused(out, "old")
        try:
            aside.mkdir()
            for entry in entries:
                entry.rename(aside / entry.name)
        except OSError as error:
            raise ConfigError(
                f"out: {out} holds an earlier run that cannot be moved aside: {error.strerror}; expected another --out"
            ) from None
    _log.info("the earlier run in %s is now in %s", out, aside)


def _unused(folder: Path, name: str) -> Path:
    number = 1
    while (path := folder / f"{name}-{number}").exists():
        number += 1
    return path


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _keep_freed_memory() -> None:
    """Have malloc keep what one step frees for the next, unless the environment says how it works.

    To give large blocks back and have them zeroed anew takes a twentieth of a ViT-S step and a tenth of a ViT-Ti one.
    glibc's; others are left as they are.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # getrusage's peak may be that of the process this one was forked from
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
