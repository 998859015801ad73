"""A recorded step: replayed, it is the step. CUDA's graphs are played here by a list of the operations and tensors."""

from __future__ import annotations

import ast
import gc
import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE, ROOT, needs_cuda, tiny_config
from test_engine import assert_near, run, state
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pera_fast import engine as engine_module
from pera_fast.config import Config
from pera_fast.distributed import World
from pera_fast.graph import StepGraph
from pera_fast.schedules import StepValues


class Recorder(TorchDispatchMode):
    """Notes every operation with its very tensors; replaying does them again, into the tensors they had made.

    Like a CUDA graph it keeps what the host put in as a number, and has no part in what the host does; unlike one
    it computes while it records.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a value"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, first in self.calls:
            if func is torch.ops.aten.new_empty_strided.default:  # holds nothing
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(first), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self.calls.clear()


def record(function: Callable[[], Tensor]) -> tuple[Tensor, Recorder]:
    with Recorder() as recorder:
        output = function()
    return output, recorder


class Copies(TorchDispatchMode):
    """Notes what is copied into the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[list[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.copied.append(args[0])
        return func(*args, **(kwargs or {}))


def test_replayed_on_new_inputs() -> None:
    weight = torch.ones(3)

    def function(inputs: Any) -> Tensor:
        (x, names), y = inputs
        weight.add_(x.sum())
        return (x * weight + y) * len(names)

    graph = StepGraph(function, ((torch.zeros(3), ["a", "b"]), torch.zeros(())), record)
    for i in range(1, 4):
        x, before = torch.full((3,), float(i)), weight.clone()
        got = graph(((x, ["a", "b"]), torch.tensor(0.5)))
        assert torch.equal(got, (x * (before + 3 * i) + 0.5) * 2)


def test_inputs_put_where_they_are_read() -> None:
    graph = StepGraph(lambda inputs: inputs[0] * inputs[1], (torch.zeros(3), torch.zeros(3)), record)
    graph.inputs[0].fill_(2)
    with Copies() as seen:
        got = graph((graph.inputs[0].view(3), torch.ones(3)))
    assert torch.equal(got, torch.full((3,), 2.0))
    assert [len(targets) for targets in seen.copied] == [1]


def test_inputs_are_not_kept() -> None:
    """A batch's patches would else lie in memory several times until cycles are collected."""
    graph = StepGraph(lambda inputs: inputs[0][0] * 2, ((torch.zeros(3), 1), [2]), record)
    gc.disable()
    try:
        x = torch.ones(3)
        kept = StorageWeakRef(x.untyped_storage())
        graph(((x, 1), [2]))
        del x
        assert kept.expired()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            (torch.zeros(3), 2),
            r"expected torch.float32 \[2\] as recorded in place 0, got torch.float32 \[3\]",
        ),
        ((torch.zeros(2, dtype=torch.float64), 2), "got torch.float64"),
        ((torch.zeros(2), 3), "expected 2 as recorded in place 1, got 3"),
        ((torch.zeros(2), torch.zeros(2)), r"expected 2 as recorded in place 1, got tensor"),
        ((2, 2), r"expected tensor.* as recorded in place 0, got 2"),
        ((torch.zeros(2), 2, 2), "structure"),
        ([(torch.zeros(2), 2)], "structure"),
        ((torch.zeros(2), (2,)), "structure"),
    ],
)
def test_other_inputs_than_recorded_are_refused(inputs: Any, sentence: str) -> None:
    graph = StepGraph(lambda inputs: inputs[0] * 2, (torch.zeros(2), 2), record)
    with pytest.raises(ValueError, match=sentence):
        graph(inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"run": {"precision": "fp32", "batch_size": 4}},
        {"run": {"precision": "bf16", "batch_size": 2, "accumulate": 2}},
        {"model": {"activation": "blocks"}, "optim": {"centring": "sinkhorn"}},
    ],
)
def test_training_through_the_graph_is_training(
    image_folder: Path, changes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedules, masks, subsets and pixels all reach the recorded step: it equals the plain one to the bit."""
    config = tiny_config()
    # Rates that change from step to step, subsets that are drawn.
    config = replace(config, model=replace(config.model, drop_path=0.5))
    config = replace(config, optim=replace(config.optim, decay_all=False, warmup_epochs=2))
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    plain, plain_reports = run(image_folder, config, 6)

    monkeypatch.setattr(engine_module, "StepGraph", lambda f, inputs: StepGraph(f, inputs, record))
    recorded, reports = run(image_folder, config, 2)
    before = {key: value.clone() for key, value in state(recorded).items()}
    recorded._steps_to_record = -1
    calls = []
    update = recorded._update
    monkeypatch.setattr(recorded, "_update", lambda *of: calls.append(of) or update(*of))
    with torch.no_grad():  # the recording computes, as a GPU's does not
        inputs = recorded._inputs(2, _batches(image_folder, config, recorded))
    assert recorded._recorded(inputs)
    _put_back(recorded, before)
    prepared = recorded._inputs(5, _batches(image_folder, config, recorded))
    for (patches, _), (buffers, _) in zip(prepared, recorded._graph.inputs, strict=True):
        assert [x.data_ptr() for x in patches[1:]] == [x.data_ptr() for x in buffers[1:]], (
            "no second copy of pixels"
        )
    _, later = run(image_folder, config, 6, start=2, engine=recorded)
    assert len(calls) == 1, "the steps are replayed, not taken"
    for key, value in state(plain).items():
        assert torch.equal(state(recorded)[key], value), key
    graph = recorded._graph
    recorded.release()
    assert recorded._graph is None and graph is not None and not graph._recorded.calls  # type: ignore[attr-defined]
    assert [r.losses for r in reports + later] == [r.losses for r in plain_reports]


def _batches(folder: Path, config: Config, engine: Any) -> list[Any]:
    from pera_fast.data.loader import WindowDataset, make_loader
    from pera_fast.data.sources import scan

    loader = make_loader(
        WindowDataset(scan(folder), engine.statistics, config),
        2 * config.run.images * config.run.accumulate,
        1,
    )
    return [next(loader) for _ in range(config.run.accumulate)]


@torch.no_grad()
def _put_back(engine: Any, before: dict[str, Tensor]) -> None:
    """Undo the step that was taken while it was recorded."""
    now = state(engine)
    for key, value in before.items():
        now[key].copy_(value)
    for shadow in engine.optimizer._shadows.values():
        shadow.copy.copy_(shadow.weight)
        shadow.mark()


def test_where_recording_fails_steps_go_on(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(function: Any, inputs: Any) -> None:
        function(inputs)  # as far as it came
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    config = tiny_config()
    plain, _ = run(image_folder, config, 4)
    engine, _ = run(image_folder, config, 2)
    engine._steps_to_record = -1
    monkeypatch.setattr(engine_module, "StepGraph", fail)
    monkeypatch.setattr(engine, "_update", lambda *of: None)
    caplog.set_level(logging.WARNING, "pera_fast")
    assert not engine._recorded(engine._inputs(2, _batches(image_folder, config, engine)))
    monkeypatch.undo()
    run(image_folder, config, 4, start=2, engine=engine)
    assert_near(state(engine), state(plain), 0)
    assert caplog.messages == [
        "the step is not recorded in a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_a_recorded_step_that_leaves_no_room_is_let_go_of(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rather than all passes made smaller, which would last."""
    config = tiny_config()
    plain, plain_reports = run(image_folder, config, 4)
    engine, reports = run(image_folder, config, 2)
    engine._graph = StepGraph(
        lambda inputs: torch.zeros(9), engine._inputs(2, _batches(image_folder, config, engine)), record
    )
    crop_patches = engine_module.ops.crop_patches

    def short_beside_the_graph(*arguments: Any, **options: Any) -> Any:
        if engine._graph is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return crop_patches(*arguments, **options)

    monkeypatch.setattr(engine_module.ops, "crop_patches", short_beside_the_graph)
    caplog.set_level(logging.WARNING, "pera_fast")
    _, later = run(image_folder, config, 4, start=2, engine=engine)
    assert engine._passes_per_batch == 1 and engine._graph is None
    assert caplog.messages == ["out of memory in step 3 beside the recorded step, which is let go of"]
    assert_near(state(engine), state(plain), 0)
    assert [r.losses for r in reports + later] == [r.losses for r in plain_reports]


def test_only_what_can_be_recorded_is(image_folder: Path) -> None:
    statistics = run(image_folder, tiny_config(), 0)[0].statistics
    for on_cpu in (tiny_config(), tiny_config(cuda_graph=False)):
        assert engine_module.Engine(on_cpu, statistics, ONE)._steps_to_record == float("inf")


class WithoutDevice(TorchFunctionMode):
    """Notes who makes a tensor without saying where: on the host, from which a graph cannot copy."""

    MAKERS = (
        "zeros",
        "ones",
        "full",
        "empty",
        "arange",
        "tensor",
        "as_tensor",
        "eye",
        "linspace",
        "from_numpy",
        "rand",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_empty = func.__name__ == "empty" and args == (
            (0,),
        )  # torch 2.11's checkpoint makes one; nothing is copied
        if func.__name__ in self.MAKERS and kwargs.get("device") is None and not is_empty:
            self.found.append(traceback.format_stack(limit=4)[0])
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": {"activation": "blocks"}, "optim": {"centring": "sinkhorn"}}],
    ids=["plain", "others"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_in_a_recorded_step_is_made_on_the_host(
    image_folder: Path, precision: str, changes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(loss: Tensor) -> None:
        run_backward = torch.autograd.Variable._execution_engine.run_backward
        one = torch.ones_like(loss)
        run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    config = tiny_config(precision=precision)
    config = replace(config, model=replace(config.model, drop_path=0.5))
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    engine, _ = run(image_folder, config, 1)
    inputs = engine._inputs(1, _batches(image_folder, config, engine))
    monkeypatch.setattr(
        Tensor, "backward", backward
    )  # a mode is off in the functions it sees, as the plain one is
    with WithoutDevice() as mode:
        engine._update(engine._sums(engine._gradients(inputs)), 1)
    assert mode.found == []
    engine.model.mask_token.register_hook(lambda g: g * torch.ones(()))  # backward passes are seen, too
    with WithoutDevice() as mode:
        engine._gradients(inputs)
    assert len(mode.found) == 1


def test_no_tensor_is_indexed_by_a_list() -> None:
    """Which is copied from the host, out of sight of every mode: no recording survives it."""
    files = [ROOT / "pera_fast" / name for name in ("engine.py", "optim.py", "replicas.py")]
    for folder in ("pera_fast/ops", "pera_fast/model", "kernels"):
        files += (ROOT / folder).glob("*.py")
    found = [
        f"{file.name}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.List)
    ]
    assert len(files) > 20 and found == []


@needs_cuda
@pytest.mark.parametrize("changes", [{}, {"optim": {"centring": "sinkhorn"}}], ids=["ema", "sinkhorn"])
def test_a_step_on_cuda_waits_for_nothing(image_folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    """What waits raises where it does, which a failed recording would not tell."""
    torch.cuda.set_stream(torch.cuda.Stream())
    config = tiny_config(device="cuda", precision="bf16")
    config = replace(config, model=replace(config.model, drop_path=0.5))
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    on = World(0, 1, torch.device("cuda"))
    engine, _ = run(image_folder, config, 2, on=on)
    batches = [batch.to(on.device) for batch in _batches(image_folder, config, engine)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wait = engine.start(2, batches, StepValues(1e-3, 0.04, 0.99, 0.04))
        engine.prepare(3, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not wait().skipped


@needs_cuda
@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_on_a_gpu(image_folder: Path, accumulate: int) -> None:
    """Fifteen steps with the graph from the twelfth on are fifteen steps without it."""
    torch.cuda.set_stream(torch.cuda.Stream())
    on = World(0, 1, torch.device("cuda"))
    runs = [
        run(
            image_folder,
            tiny_config(
                device="cuda", cuda_graph=graph, precision="bf16", batch_size=4, accumulate=accumulate
            ),
            15,
            on=on,
        )
        for graph in (True, False)
    ]
    assert runs[0][0]._graph is not None and runs[1][0]._graph is None
    assert_near(state(runs[0][0]), state(runs[1][0]), 1e-4)


@needs_cuda
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.005), ("bf16", 0.1)])
def test_fifty_steps_on_a_gpu_follow_the_cpus(image_folder: Path, precision: str, bound: float) -> None:
    """Most of them recorded; with crops, masks, subsets and schedules of its own making on each side."""
    torch.cuda.set_stream(torch.cuda.Stream())
    base = tiny_config(epochs=20)
    config = replace(base, model=replace(base.model, drop_path=0.3))
    _, wanted = run(image_folder, config, 50)
    on_gpu = replace(config, run=replace(config.run, device="cuda", precision=precision))
    engine, got = run(image_folder, on_gpu, 50, on=World(0, 1, torch.device("cuda")))
    assert engine._graph is not None
    assert abs(wanted[-1].losses["total"] - wanted[0].losses["total"]) > 0.5
    for a, b in zip(got, wanted, strict=True):
        for name in set(a.losses) - {"koleo"}:  # where what is nearest may change in a jump
            assert a.losses[name] == pytest.approx(b.losses[name], rel=bound)


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def test_little_is_left_to_the_host(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a recorded step it starts the masks, crops, subsets, copies and the graph: a few microseconds each."""
    config = tiny_config()
    config = replace(config, model=replace(config.model, depth=12, drop_path=0.5))
    engine, _ = run(image_folder, config, 1)
    batches = _batches(image_folder, config, engine)
    engine._graph = StepGraph(
        lambda inputs: torch.zeros(9), engine._inputs(1, batches), lambda f: (f(), Recorder())
    )
    crop_patches = engine_module.ops.crop_patches
    monkeypatch.setattr(  # as on a GPU, where the loader's numbers are not read back
        engine_module.ops, "crop_patches", lambda *a, **k: crop_patches(*a, **{**k, "check_values": False})
    )
    with Counter() as counter:
        engine.step(2, batches, StepValues(1e-3, 0.04, 0.99, 0.04))
    # Views launch nothing.
    views = (
        "view",
        "unbind",
        "split",
        "slice",
        "select",
        "expand",
        "detach",
        "alias",
        "empty",
        "unsqueeze",
        "t.",
    )
    launched = [name for name in counter.operations if not any(view in name for view in views)]
    assert 5 < len(launched) < 20, launched
