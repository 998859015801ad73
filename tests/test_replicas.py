"""Memory that is short on one rank of several: all of them take the step again in smaller passes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import several_ranks, tiny_config
from test_engine import assert_near, run, state
from torch import Tensor

from pera_fast import engine as engine_module
from pera_fast.config import Config
from pera_fast.distributed import World, world
from pera_fast.engine import Engine, TrainingStopped
from pera_fast.model import pera

PLACES = ("patches", "gather", "last gather", "forward", "backward", "end of backward")


class Short:
    """Raises as a GPU that is full does, once, where and when it is asked to.

    Patches are cropped while the step before is taken, and where that fails, again: so they are short of memory twice.
    """

    def __init__(self, place: str, step: int, gathers: int) -> None:
        self.place, self.countdown = place, step
        self.failures = 2 if place == "patches" and step > 0 else 1
        self._gathers = {"gather": 1, "last gather": gathers}.get(place, 0)

    def at(self, place: str) -> None:
        if place.endswith("gather") and self.place.endswith("gather"):
            self._gathers -= self.countdown == 0
            place = self.place if self._gathers == 0 else ""
        if place == self.place and self.countdown == 0 and self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    def before(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            self.at(place)
            return function(*arguments, **options)

        return called

    def start(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self.countdown -= 1
            return result

        return called


class Again:
    """In place of a recorded step: takes it, without buffers of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.inputs = engine, [(None,)] * engine.config.run.accumulate

    def __call__(self, inputs: Any) -> Tensor:
        return self._engine._update(self._engine._sums(self._engine._gradients(inputs)), len(inputs))

    def release(self) -> None:
        pass


def disturbed(
    folder: Path,
    config: Config,
    on: World,
    place: str,
    step: int,
    ranks: tuple[int, ...],
    is_recorded: bool = False,
    passes: int = 1,
) -> Engine:
    """Three steps, of which memory is short in one, on some of the ranks. is_recorded: in a graph, as on a GPU.
    passes: of each batch, as after an earlier time."""
    gathers = config.run.accumulate
    short = Short(place if on.rank in ranks else "nowhere", step, gathers)
    engine, _ = run(folder, config, 0, on=on)
    engine._passes_per_batch = passes
    if is_recorded:
        engine._graph = Again(engine)  # type: ignore[assignment]
    blocks = engine.model.student.backbone.blocks
    # A block's gradients are made in reverse order: the last block's first.
    for name, layer in (("backward", blocks[-1].norm2), ("end of backward", blocks[0].norm1)):
        layer.weight.register_hook(lambda _, name=name: short.at(name))
    with (
        patch.object(Engine, "patches", short.before("patches", Engine.patches)),
        patch.object(World, "gather", short.before("gather", World.gather)),
        patch.object(pera, "koleo_and_prototypes", short.before("forward", pera.koleo_and_prototypes)),
        patch.object(Engine, "start", short.start(Engine.start)),
    ):
        _, reports = run(folder, config, 3, engine=engine, on=on)
    assert (short.failures == 0) == (on.rank in ranks), "memory was not short where the test says"
    assert not any(report.skipped for report in reports)
    return engine


def _on_each_rank(folder: Path, on: World) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pera_fast").addHandler(handler)
    one_pass = [place for place in PLACES if place != "last gather"]
    for options, cases in (
        # DDP changes the order of its buckets in step 1.
        ({"batch_size": 4}, [*product(one_pass, range(3), [(1,)]), *product(one_pass, [1], [(0,), (0, 1)])]),
        ({"batch_size": 4}, product(["patches"], [2], [(1,)], [True], [1, 2])),
        ({"batch_size": 2, "accumulate": 2}, product(PLACES, [1], [(1,)])),
        ({"batch_size": 4, "reduce_in": "bf16"}, product(["backward"], [1], [(1,)])),
    ):
        config = tiny_config(**options)
        undisturbed = state(run(folder, config, 3, on=on)[0])
        for place, step, ranks, *is_recorded in cases:
            said.clear()
            case = f"{options}, {place} of step {step} on ranks {ranks}"
            engine = disturbed(folder, config, on, place, step, ranks, *is_recorded)
            try:
                assert_near(state(engine), undisturbed, 1e-5 if "reduce_in" not in options else 5e-3)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from None
            images = config.run.images
            how = (
                "beside the recorded step, which is let go of" if is_recorded else
                f"with {images} images in a forward pass; taken again with {images // 2} in each of 2 passes"
            )  # fmt: skip
            sentence = f"out of memory in step {step + 1} on {len(ranks)} of 2 ranks {how}"
            assert said == [sentence] * on.is_first, case


def test_all_ranks_take_the_step_again(image_folder: Path) -> None:
    several_ranks(__file__, 2, image_folder, "again")


def test_where_one_rank_cannot_record_none_does(image_folder: Path) -> None:
    several_ranks(__file__, 2, image_folder, "recording")


def _recording(folder: Path, on: World) -> None:
    """A recording that fails in the backward pass leaves DDP waiting for gradients; nothing of it is left behind."""

    def fail(_: Tensor) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    def record(_: Callable[[Any], Tensor], inputs: Any) -> Again:
        if on.rank == 1:  # the other has nothing to exchange while it records
            hooks = [p.register_hook(fail) for p in engine.model.parameters() if p.requires_grad]
            try:
                engine._gradients(inputs)
            finally:
                for hook in hooks:
                    hook.remove()
        return Again(engine)

    for accumulate in (1, 2):
        config = tiny_config(batch_size=2, accumulate=accumulate)
        config = replace(config, optim=replace(config.optim, koleo_weight=0.0))  # nor in its forward pass
        undisturbed = state(run(folder, config, 4, on=on)[0])
        engine, _ = run(folder, config, 2, on=on)
        engine._steps_to_record = 0
        with patch.object(engine_module, "StepGraph", record):
            run(folder, config, 4, start=2, engine=engine, on=on)
        assert engine._graph is None
        assert_near(state(engine), undisturbed, 1e-5)

        # One that has no memory for a step's inputs when it is to be recorded.
        config = replace(config, run=replace(config.run, batch_size=4 // accumulate))
        undisturbed = state(run(folder, config, 4, on=on)[0])
        engine, _ = run(folder, config, 2, on=on)
        engine._steps_to_record = 0
        short = Short("inputs" if on.rank == 1 else "nowhere", 0, 0)
        with (
            patch.object(engine_module, "StepGraph", lambda _, inputs, engine=engine: Again(engine)),
            patch.object(Engine, "_inputs_prepared", short.before("inputs", Engine._inputs_prepared)),
        ):
            run(folder, config, 4, start=2, engine=engine, on=on)
        assert (
            engine._graph is None
            and engine._passes_per_batch == 2
            and (short.failures == 0) == (on.rank == 1)
        )
        assert_near(state(engine), undisturbed, 1e-5)


def test_where_ranks_share_something_out_it_is_a_sentence(image_folder: Path) -> None:
    several_ranks(__file__, 2, image_folder, "sharded")


def _sharded(folder: Path, on: World) -> None:
    """Parts of the model, or Sinkhorn's sums."""
    copies = tiny_config(batch_size=4)
    sinkhorn = replace(copies, optim=replace(copies.optim, centring="sinkhorn"))
    for config in (tiny_config(batch_size=4, shard="all"), sinkhorn):
        with pytest.raises(
            TrainingStopped, match=f"step 2 on rank {on.rank} with 4 images in a forward pass"
        ):
            disturbed(folder, config, on, "patches", 1, (0, 1))


if __name__ == "__main__":
    with world("cpu") as on:
        {"again": _on_each_rank, "recording": _recording, "sharded": _sharded}[sys.argv[2]](
            Path(sys.argv[1]), on
        )
