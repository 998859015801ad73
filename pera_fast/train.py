"""Pre-train with PerA: `torchrun -m pera_fast.train [--preset NAME] [--config FILE.yaml] [options]`."""

from __future__ import annotations

import argparse
import sys
from functools import partial

import tyro

from pera_fast import _cli
from pera_fast.config import PRESETS, Config, ConfigError, load_yaml
from pera_fast.distributed import World, world
from pera_fast.run import Run


def parse(arguments: list[str]) -> Config:
    """Command line -> Config: a preset, then a YAML file over it, then options over both."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    first.add_argument("--config")
    known, options = first.parse_known_args(arguments)
    if known.preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {known.preset!r}")
    base = PRESETS[known.preset]
    if known.config:
        base = load_yaml(known.config, base)
    description = (
        f"Pre-train a remote-sensing ViT with PerA. --preset {{{','.join(PRESETS)}}} chooses the defaults "
        f"shown below (now: {known.preset}), --config FILE.yaml changes them, options change both."
    )
    cli = partial(
        tyro.cli, Config, default=base, args=options, prog="pera_fast.train", description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    return _cli.ask(cli)


def train(config: Config, on: World) -> None:
    """The whole run on one rank."""
    run = Run(config, on)
    try:
        with run.watching():
            batches = run.read(run.start_step)
            for step in range(run.start_step, run.total_steps):
                wait = run.engine.start(step, batches, run.values_at(step), run.asked_to_stop)
                following = run.read_ahead(step + 1)  # while the device works
                run.after_step(step, wait(), batches)
                batches = following()
    finally:
        run.close()
    run.finish()


def main() -> None:
    config = parse(sys.argv[1:])
    with world(config.run.device) as on:
        train(config, on)


if __name__ == "__main__":
    _cli.run(main)
