"""adamw_ema: as torch's clipping, AdamW, lerp and copies, on every backend, dtype, layout and instruction set."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from conftest import needs_cuda, run_on_isa
from torch import Tensor, nn

from pera_fast import ops
from pera_fast.ops import _library

_library.why_no_cpp()
BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(7,), (5, 3), (1, 1), (0,), (33, 17), (4096,), (3, 5000), (4097,)]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.99, "eps": 2e-5, "clip_norm": 3.0}


@dataclass
class Tensors:
    """Arguments of ops.adamw_ema, by name."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    teachers: list[Tensor | None]
    shadows: list[Tensor | None]
    teacher_shadows: list[Tensor | None]

    @classmethod
    def new(
        cls,
        param: torch.dtype = FP32,
        teacher: torch.dtype = FP32,
        shapes: list[tuple[int, ...]] | None = None,
        device: str = "cpu",
    ) -> Tensors:
        """Every third parameter without teacher, every other without shadows."""
        random = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=random) for shape in (SHAPES if shapes is None else shapes)]
        params = [p.to(device, param) for p in params]
        numbered = list(enumerate(params))
        return cls(
            params,
            [torch.zeros_like(p) for p in params],
            [torch.zeros_like(p) for p in params],
            [torch.zeros((), device=device) for p in params],
            [p.to(teacher, copy=True) if i % 3 else None for i, p in numbered],
            [torch.zeros_like(p, dtype=BF16) if i % 2 else None for i, p in numbered],
            [torch.zeros_like(p, dtype=BF16) if i % 2 and i % 3 else None for i, p in numbered],
        )

    def flat(self) -> list[Tensor]:
        return [t for f in fields(self) for t in getattr(self, f.name) if t is not None]

    def step(self, grads: list[Tensor], **options: object) -> Tensor:
        lists = {f.name: getattr(self, f.name) for f in fields(self)}
        return ops.adamw_ema(grads=grads, **lists, grad_norm=ops.grad_norm(grads), **{**OPTIONS, **options})


def gradients(step: int, like: list[Tensor], dtype: torch.dtype = FP32) -> list[Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    scale = 10.0 ** (step % 5 - 3)
    return [(torch.randn(p.shape, generator=random) * scale).to(p.device, dtype) for p in like]


def torch_chain(steps: int, dtype: torch.dtype, **options: object) -> list[Tensor]:
    """Parameters and teachers after `steps` of clip_grad_norm_, torch.optim.AdamW and lerp."""
    tensors = Tensors.new()
    params = [nn.Parameter(p.to(dtype)) for p in tensors.params]
    teachers = [None if t is None else t.to(dtype) for t in tensors.teachers]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, eps=2e-5, **options)
    for step in range(steps):
        for p, g in zip(params, gradients(step, tensors.params), strict=True):
            p.grad = g.to(dtype)
        torch.nn.utils.clip_grad_norm_(params, 3.0)
        optimizer.step()
        with torch.no_grad():
            for t, p in zip(teachers, params, strict=True):
                if t is not None:
                    t.lerp_(p, 1 - 0.99)
    return [*(p.detach() for p in params), *(t for t in teachers if t is not None)]


def choose(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"adamw_ema={backend}")


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_fifty_steps_are_no_further_from_float64_than_torchs_fused(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, backend)
    tensors = Tensors.new()
    for step in range(50):
        assert not tensors.step(gradients(step, tensors.params))
    exact, fused = torch_chain(50, torch.float64), torch_chain(50, FP32, fused=True)
    ours = [*tensors.params, *(t for t in tensors.teachers if t is not None)]
    errors = [
        torch.cat([(a.double() - b).flatten() for a, b in zip(side, exact, strict=True)]).norm()
        for side in (ours, fused)
    ]
    # The roundings of 19000 numbers differ in their luck, by less than a hundredth.
    assert errors[0] <= 1.01 * errors[1]
    assert errors[0] > 0 and all(step == 50 for step in tensors.steps)


@pytest.mark.parametrize("param", [FP32, BF16])
@pytest.mark.parametrize("grad", [FP32, BF16])
@pytest.mark.parametrize("teacher", [FP32, BF16])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_every_dtype_equals_the_reference(
    backend: str, param: torch.dtype, grad: torch.dtype, teacher: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, reference = Tensors.new(param, teacher), Tensors.new(param, teacher)
    choose(monkeypatch, backend)
    ours.step(gradients(3, ours.params, grad))
    choose(monkeypatch, "reference")
    reference.step(gradients(3, ours.params, grad))
    for a, b in zip(ours.flat(), reference.flat(), strict=True):
        assert a.dtype == b.dtype
        # bfloat16 moments round in between in the chain; one unit in the last place.
        bound = 2**-7 if BF16 in (param, a.dtype) else 1e-6
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * 1e-1)
    for p, low in zip(ours.params, ours.shadows, strict=True):
        assert low is None or torch.equal(low, p.bfloat16())
    for t, low in zip(ours.teachers, ours.teacher_shadows, strict=True):
        assert low is None or torch.equal(low, t.bfloat16())


def after_two_steps(param: torch.dtype = FP32, device: str = "cpu") -> list[Tensor]:
    tensors = Tensors.new(param, device=device)
    for step in range(2):
        tensors.step(gradients(step, tensors.params, param))
    return tensors.flat()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equal_bits_for_any_number_of_threads(threads: int) -> None:
    before, first = torch.get_num_threads(), after_two_steps()
    torch.set_num_threads(threads)
    try:
        again = after_two_steps()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_equal_bits_on_every_instruction_set(capability: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    expected = [after_two_steps(FP32), after_two_steps(BF16)]
    torch.save(expected, tmp_path / "expected.pt")
    run_on_isa(
        capability,
        f"""
import torch
from test_adamw_ema import after_two_steps
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
for tensors, dtype in zip(expected, (torch.float32, torch.bfloat16)):
    assert all(torch.equal(a, b) for a, b in zip(tensors, after_two_steps(dtype)))
""",
    )


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(
    backend: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, backend)
    tensors = Tensors.new()
    tensors.step(gradients(0, tensors.params))
    before = [t.clone() for t in tensors.flat()]
    grads = gradients(1, tensors.params)
    grads[4][2, 3] = value
    assert tensors.step(grads)
    assert all(torch.equal(a, b) for a, b in zip(tensors.flat(), before, strict=True))


def test_scalars_on_the_device_are_the_same_as_numbers() -> None:
    plain, scalar = Tensors.new(), Tensors.new()
    plain.step(gradients(0, plain.params))
    given = {name: torch.tensor(OPTIONS[name], dtype=torch.float64) for name in ("lr", "momentum")}
    scalar.step(gradients(0, plain.params), **given)
    assert all(torch.equal(a, b) for a, b in zip(plain.flat(), scalar.flat(), strict=True))


def test_float64_goes_to_pytorch() -> None:
    tensors = Tensors.new(torch.float64, torch.float64)
    for step in range(50):
        tensors.step(gradients(step, tensors.params, torch.float64))
    ours = [*tensors.params, *(t for t in tensors.teachers if t is not None)]
    for a, b in zip(ours, torch_chain(50, torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the norm is a float32


def test_layouts() -> None:
    """Transposed and channels_last tensors are dense; a gradient may lie any way; what is strided is refused."""
    plain = Tensors.new(shapes=[(6, 4, 3, 5), (9, 16), (40,)])
    grads = gradients(0, plain.params)
    other = Tensors.new(shapes=[(6, 4, 3, 5), (9, 16), (40,)])
    for name in ("params", "exp_avgs", "exp_avg_sqs", "teachers", "shadows", "teacher_shadows"):
        tensors = getattr(other, name)
        for i, change in (
            (0, lambda x: x.contiguous(memory_format=torch.channels_last)),
            (1, lambda x: x.T.contiguous().T),
            (2, lambda x: torch.cat((x[:1], x))[1:]),  # an address that no vector starts at
        ):
            tensors[i] = None if tensors[i] is None else change(tensors[i])
    plain.step(grads)
    other.step([grads[0], grads[1].T.contiguous().T, torch.stack((grads[2], grads[2]), 1)[:, 0]])
    assert all(torch.equal(a, b) for a, b in zip(plain.flat(), other.flat(), strict=True))
    with pytest.raises(ValueError, match=r"params\[0\]: expected a dense tensor laid out as params\[0\]"):
        strided = Tensors.new(shapes=[(4, 3)])
        strided.params[0] = torch.zeros(4, 6)[:, ::2]
        strided.step([torch.zeros(4, 3)])


def test_no_tensors() -> None:
    assert not ops.adamw_ema([], [], [], [], [], grad_norm=torch.ones(()), lr=0.1)
    assert ops.adamw_ema([], [], [], [], [], grad_norm=torch.tensor(float("nan")), lr=0.1)
    tensors = Tensors.new(shapes=[(0,), (0, 3)])
    assert not tensors.step(gradients(0, tensors.params))


def test_a_backward_pass_through_old_values_is_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    loss = (x * x).sum()
    state = [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())]
    ops.adamw_ema([x], [torch.ones(3)], *state, grad_norm=torch.ones(()), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input() -> None:
    p, s, norm = [torch.zeros(3)], [torch.zeros(())], torch.ones(())

    def refused(sentence: str, **changes: object) -> None:
        arguments = {"params": p, "grads": p, "exp_avgs": p, "exp_avg_sqs": p, "steps": s, "grad_norm": norm}
        with pytest.raises(ValueError, match=sentence):
            ops.adamw_ema(**{**arguments, "lr": 1e-3, **changes})

    refused("grads: expected 1 tensors, one for each of params, got 0", grads=[])
    refused("steps: expected 1 tensors, one for each of params, got 0", steps=[])
    refused(r"teachers\[0\]: expected shape \[3\], got \[4\]", teachers=[torch.zeros(4)])
    refused(r"shadows\[0\]: expected torch.bfloat16, got torch.float32", shadows=p)
    refused(
        r"exp_avgs\[0\]: expected torch.float32, got torch.bfloat16", exp_avgs=[torch.zeros(3).bfloat16()]
    )
    refused(
        r"steps\[0\]: expected float32 \[\], got torch.int64 \[\]", steps=[torch.zeros((), dtype=torch.int64)]
    )
    refused(r"grad_norm: expected float32 \[\], got torch.float32 \[1\]", grad_norm=torch.ones(1))
    refused(r"grads\[0\]: expected device cpu, got meta", grads=[torch.zeros(3, device="meta")])


def test_opcheck() -> None:
    t = Tensors.new(shapes=[(5, 3), (7,)])
    empty = torch.empty(0)
    arguments = (
        t.params, gradients(0, t.params), t.exp_avgs, t.exp_avg_sqs, t.steps, [empty, t.teachers[1]],
        [empty, t.shadows[1]], [empty, t.teacher_shadows[1]], torch.tensor([1e-3, 0.1, 0.9], dtype=torch.float64),
        torch.ones(()), 0.9, 0.999, 1e-8, 3.0, torch.zeros((), dtype=torch.bool),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.pera_fast.adamw_ema.default, arguments)


@needs_cuda
@pytest.mark.parametrize("param", [FP32, BF16])
def test_cuda_equals_cpu(param: torch.dtype) -> None:
    for a, b in zip(after_two_steps(param, "cuda"), after_two_steps(param), strict=True):
        bound = 1e-6 if a.dtype == FP32 and param == FP32 else 2**-7
        torch.testing.assert_close(a.cpu(), b, rtol=bound, atol=bound)


@needs_cuda
def test_cuda_does_not_wait_for_the_host_and_can_be_captured() -> None:
    tensors, twin = (Tensors.new(device="cuda") for _ in range(2))
    grads = gradients(0, tensors.params)
    given = {n: torch.tensor(OPTIONS[n], device="cuda") for n in ("lr", "weight_decay", "momentum")}
    torch.cuda.set_sync_debug_mode("error")
    try:
        twin.step(grads, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors.step(grads, **given)
    graph.replay()
    given["lr"].fill_(5e-3)
    graph.replay()
    twin.step(grads, **given)
    assert all(torch.equal(a, b) for a, b in zip(tensors.flat(), twin.flat(), strict=True))
