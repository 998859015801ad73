"""What a run leaves behind step by step: metrics.jsonl, TensorBoard events, the progress bar, warnings."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pera_fast.config import Config, save_yaml
from pera_fast.data.sources import DataError
from pera_fast.distributed import World
from pera_fast.engine import StepReport, TrainingStopped
from pera_fast.files import whole, write_whole
from pera_fast.health import Watch
from pera_fast.run_folder import move_aside
from pera_fast.schedules import StepValues

_log = logging.getLogger("pera_fast")


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
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
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


def peak_memory_bytes(device: torch.device) -> int:
    """The most so far: of the GPU's memory in tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # getrusage's peak may be that of the process this one was forked from
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
