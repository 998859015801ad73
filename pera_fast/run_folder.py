"""A run's folder: whether it can be one, and what becomes of an earlier run in it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from pera_fast.config import Config, ConfigError, load_yaml, to_dict

_log = logging.getLogger("pera_fast")
_MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")  # a folder with one of these holds a run


def check_out(out: Path) -> None:
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


def differences(then: Config, now: Config) -> list[tuple[str, str, Any, Any]]:
    """(section, name, then, now) of each value that differs, but for where a run is and how far it goes."""
    a, b = to_dict(then), to_dict(now)
    return [
        (section, name, a[section][name], value)
        for section in b
        for name, value in b[section].items()
        if a[section][name] != value and name not in ("resume", "max_steps", "out", "workers", "report")
    ]


def settings(config: Config) -> dict[str, Any]:
    """What all ranks must be told alike: folders may have other names on another machine."""
    own = ("data", "index", "stats", "out", "workers")
    return {
        name: value
        for section in to_dict(config).values()
        for name, value in section.items()
        if name not in own
    }


def check_same_run(out: Path, config: Config) -> None:
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
        for _, name, before, value in differences(then, config)
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
