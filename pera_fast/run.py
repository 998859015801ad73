"""What surrounds the steps of a run: where it starts, what it records, when it stops."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
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

import pera_fast
from pera_fast import batch, checkpoint
from pera_fast.config import Config, ConfigError
from pera_fast.data.index import fingerprint, scan_or_open
from pera_fast.data.loader import Batch, WindowDataset, make_loader
from pera_fast.data.sources import DataError, SceneIndex, printable
from pera_fast.data.statistics import Statistics, compute_statistics
from pera_fast.distributed import World
from pera_fast.engine import Engine, Preempted, StepReport, TrainingStopped
from pera_fast.evaluate import check_tiles, class_folder_tiles, compare_with_untrained, knn, scene_halves
from pera_fast.features import Tile
from pera_fast.files import write_whole
from pera_fast.records import Records, peak_memory_bytes
from pera_fast.run_folder import check_out, check_same_run, differences, settings
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
            check_out(self.out)
            check_same_run(self.out, config)
        self._eval_tiles = self._class_folders()
        found = self._checkpoint() if config.run.resume else None
        # Folders of each machine's own would go unnoticed: ranks would part, or wait for each other.
        world.agree(**settings(config), checkpoint=f"step {found.step}" if found else "none")
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
                "peak memory %.2f GB%s, predicted %.2f GB", peak_memory_bytes(device) / 1e9,
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
        for section, name, then, now in differences(found.config, self.config):
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
