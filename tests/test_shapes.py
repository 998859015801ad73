"""Every op on every backend that runs here, with shapes that nobody chose: against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DRAWN, EXAMPLES, interpreted, three_way
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pera_fast import ops, reference
from pera_fast.ops import _dispatch, _library

needs_cpp = pytest.mark.skipif(_library.why_no_cpp() is not None, reason=f"cpp: {_library.why_no_cpp()}")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Above the error of the reference in the same dtype, as a share of the whole tensor's norm.
SLACK = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}
LENGTH = 90  # at most
HEAD_DIMS = [1, 7, 16, 32, 48, 64, 80, 96, 128, 144]


def backends() -> list[Any]:
    """(op, backend, device) of every implementation; those that cannot run here are skipped with the reason."""
    found = []
    for op, implementations in _dispatch.registered().items():
        for one in implementations:
            devices = {"cpp": ["cpu"], "torch": ["cpu", "cuda"]}.get(one.backend, ["cuda"])
            for device in [] if one.backend == "reference" else devices:
                why = one.why_missing()
                if why is None and device == "cuda" and not torch.cuda.is_available():
                    why = "no GPU visible"
                mark = pytest.mark.skipif(why is not None, reason=f"{one.backend}: {why}")
                found.append(
                    pytest.param(op, one.backend, device, marks=mark, id=f"{op}-{one.backend}-{device}")
                )
    return found


class Draw:
    """Shapes from hypothesis, values from a seeded generator."""

    def __init__(self, data: st.DataObject, device: str) -> None:
        self.data, self.device = data, device
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))

    def int(self, low: int, high: int, name: str) -> int:
        return self.data.draw(st.integers(low, high), name)

    def of(self, values: list[Any], name: str) -> Any:
        return self.data.draw(st.sampled_from(values), name)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device) + 0.5

    def rows(self, count: int) -> Tensor | None:
        """Some of `count` rows, each once, or None for all."""
        chosen = self.int(0, count, "rows chosen")
        if chosen == count:
            return None
        order = torch.randperm(count, generator=self.generator)[:chosen]
        return order.to(self.device)


def packed_attention(draw: Draw) -> None:
    groups = [
        (draw.int(0, 4, "sequences"), draw.int(1, LENGTH, "length")) for _ in range(draw.int(1, 4, "runs"))
    ]
    heads, dim = draw.int(1, 3, "heads"), draw.of(HEAD_DIMS, "head_dim")
    dtype = DTYPES[draw.of(list(DTYPES), "dtype")]
    scale = draw.of([None, 0.3], "scale")
    qkv = draw.normal(sum(n * length for n, length in groups), 3, heads, dim, dtype=dtype)
    kept = [(n, length) for n, length in groups if n]

    def eager(x: Tensor) -> Tensor:
        return reference.packed_attention(x, kept, scale or dim**-0.5) if kept else x[:, 0]

    three_way(lambda x: ops.packed_attention(x, groups, scale), eager, qkv, slack=SLACK[dtype])


def residual_norm(draw: Draw) -> None:
    count, dim = draw.int(1, 70, "rows"), draw.int(1, 200, "dim")
    dtype = DTYPES[draw.of(list(DTYPES), "dtype")]
    rows, next_rows = draw.rows(count), draw.rows(count)
    added = count if rows is None else len(rows)
    scale = draw.positive(added) if draw.of([True, False], "scaled") else None
    x, branch = draw.normal(count, dim), draw.normal(added, dim, dtype=dtype)
    affine = draw.of([True, False], "affine")
    weight, bias = draw.positive(dim), draw.normal(dim)

    def ours(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = (weight, bias) if affine else (None, None)
        a, y = ops.residual_norm(x, branch, rows, scale, next_rows, *given, dtype=dtype)
        return torch.cat([a.flatten(), y.to(x.dtype).flatten()]) + 0 * (weight.sum() + bias.sum())

    def eager(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = (weight, bias) if affine else (None, None)
        s = scale if scale is None else scale.to(x.dtype)
        a, y = reference.residual_norm(x, branch.to(x.dtype), rows, s, next_rows, *given, 1e-6)
        y = y if x.dtype == torch.float64 else y.to(dtype).to(x.dtype)
        return torch.cat([a.flatten(), y.flatten()]) + 0 * (weight.sum() + bias.sum())

    three_way(ours, eager, x, branch, weight, bias, slack=SLACK[dtype])


def distill_loss(draw: Draw) -> None:
    groups = [draw.int(1, 9, "rows of a crop") for _ in range(draw.int(1, 4, "crops"))]
    prototypes, dim = draw.int(2, 400, "prototypes"), draw.int(2, 70, "dim")
    z, z_teacher = (F.normalize(draw.normal(sum(groups), dim), dim=1) for _ in range(2))
    v, v_teacher = draw.normal(prototypes, dim), draw.normal(prototypes, dim)
    g, centre = draw.positive(prototypes, 1), draw.normal(prototypes) / 10
    fixed = (z_teacher, v_teacher, g, centre)

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(z: Tensor, v: Tensor, g: Tensor) -> Tensor:
            zt, vt, gt, c = (x.to(z.dtype) for x in fixed)
            return function(z, zt, (v, g), (vt, gt), c, 0.1, 0.04, groups)

        return loss

    three_way(
        of(ops.distill_loss), of(reference.distill_loss), z, v, g, slack=SLACK[torch.float32], floor=1.0
    )


def koleo(draw: Draw) -> None:
    crops, images, dim = draw.int(1, 3, "crops"), draw.int(2, 12, "images"), draw.int(2, 70, "dim")
    z = F.normalize(draw.normal(crops, images, dim), dim=2)
    v, g = draw.normal(draw.int(2, 300, "prototypes"), dim), draw.positive(1, 1)
    g = g.expand(len(v), 1).contiguous()
    # A distance through the Gram matrix is a difference of products: error grows as neighbours come close.
    logits = F.normalize(reference.prototype_logits(z.double(), v.double(), g.double()), dim=2)
    distances = torch.cdist(logits, logits) + 9 * torch.eye(images, device=z.device)
    nearest = distances.topk(2 if images > 2 else 1, dim=2, largest=False).values
    if nearest.min() < 0.2 or (images > 2 and (nearest[..., 1] - nearest[..., 0]).min() < 1e-3):
        return  # two neighbours as near: either is right
    three_way(
        lambda *x: ops.koleo(*x)[0], lambda *x: reference.koleo(*x)[0], z, v, g, slack=SLACK[torch.float32]
    )


def linear(draw: Draw) -> None:
    dtype = DTYPES[draw.of(list(DTYPES), "dtype")]
    rows, features, out = draw.int(0, 200, "rows"), draw.int(1, 130, "features"), draw.int(1, 130, "out")
    tensors = (draw.normal(rows, features), draw.normal(out, features), draw.normal(out))
    three_way(ops.linear, F.linear, *(t.to(dtype) for t in tensors), slack=SLACK[dtype])


def patch_embed(draw: Draw) -> None:
    dtype = DTYPES[draw.of(["float32", "bfloat16"], "dtype")]
    tokens, features, dim = draw.int(1, 90, "tokens"), draw.int(1, 130, "features"), draw.int(1, 130, "dim")
    place = draw.rows(tokens)
    rows = draw.normal(tokens if place is None else len(place), features, dtype=dtype)
    table = draw.normal(draw.int(1, 20, "table"), dim)
    index = torch.randint(0, len(table), (tokens,), generator=draw.generator).to(draw.device)
    weight = draw.normal(dim, features) / features**0.5

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def embed(weight: Tensor, table: Tensor) -> Tensor:
            if table.dtype == torch.float64:
                return function(rows.double(), weight, table, index, place)
            return function(rows, weight.to(dtype), table, index, place)

        return embed

    three_way(of(ops.patch_embed), of(reference.patch_embed), weight, table, slack=SLACK[dtype])


def shapes(draw: Draw) -> list[tuple[int, ...]]:
    """Of one to five tensors of 0 to 3 dimensions, empty ones among them; two of them beyond a kernel's chunk."""
    sides = st.lists(st.integers(0, 40), max_size=3).map(tuple)
    found = draw.data.draw(st.lists(sides, min_size=1, max_size=5), "shapes")
    return [*found, *draw.of([[], [(70_001,)], [(33_000,), (3, 16_411)]], "large")]


def parameters(draw: Draw, dtype: torch.dtype, drawn: list[tuple[int, ...]], positive: bool) -> list[Tensor]:
    """One tensor per shape, some of them in another memory order."""
    found = [(draw.positive if positive else draw.normal)(*shape).to(dtype) for shape in drawn]
    return [t.transpose(0, -1).clone().transpose(0, -1) if t.dim() == 3 else t for t in found]


def close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=4 * SLACK[dtype], atol=SLACK[dtype] / 10)


def ema_update(draw: Draw) -> None:
    dtype = DTYPES[draw.of(["float32", "bfloat16"], "dtype")]
    drawn, momentum = shapes(draw), draw.of([0.0, 0.9, 0.996, 1.0], "momentum")
    teachers, params = (parameters(draw, dtype, drawn, False) for _ in range(2))
    shadows = [
        torch.empty_like(t, dtype=torch.bfloat16) if draw.of([True, False], "low") else None for t in teachers
    ]
    exact, low = [t.double() for t in teachers], [None if s is None else s.double() for s in shadows]
    ops.ema_update(teachers, params, momentum, shadows)
    reference.ema_update(
        exact, [p.double() for p in params], torch.tensor(momentum, dtype=torch.float64), low
    )
    close(teachers, exact, dtype)
    for shadow, teacher in zip(shadows, teachers, strict=True):
        assert shadow is None or torch.equal(shadow, teacher.bfloat16())


def grad_norm(draw: Draw) -> None:
    dtype = DTYPES[draw.of(["float32", "bfloat16"], "dtype")]
    grads = parameters(draw, dtype, shapes(draw), False)
    torch.testing.assert_close(ops.grad_norm(grads), reference.grad_norm(grads), rtol=5e-6, atol=0)


def adamw_ema(draw: Draw) -> None:
    drawn, dtype = shapes(draw), torch.float32
    lists = [parameters(draw, dtype, drawn, positive) for positive in (False, False, False, True, False)]
    steps = [torch.tensor(float(i), device=draw.device) for i in range(len(drawn))]
    has_teacher = [draw.of([True, False], "teacher") for _ in drawn]
    lists[4] = [t if has else None for t, has in zip(lists[4], has_teacher, strict=True)]  # type: ignore[misc]
    shadows = [
        [torch.empty_like(p, dtype=torch.bfloat16) if draw.of([True, False], "low") and has else None
         for p, has in zip(lists[0], mask, strict=True)] for mask in ([True] * len(drawn), has_teacher)
    ]  # fmt: skip
    norm = torch.tensor(draw.of([0.5, 7.0, float("nan"), float("inf")], "norm"), device=draw.device)
    exact = [[None if t is None else t.double() for t in each] for each in (*lists, steps, *shadows)]
    values = draw.of([(0.1, 0.2, 0.9), (0.0, 0.0, 1.0), (1e-3, 0.0, 0.0)], "lr, decay, momentum")
    ops.adamw_ema(
        *lists[:4], steps, lists[4], *shadows, grad_norm=norm, lr=values[0], weight_decay=values[1],
        momentum=values[2], clip_norm=3.0,
    )  # fmt: skip
    reference.adamw_ema(
        *exact[:4], exact[5], exact[4], *exact[6:], torch.tensor(values, dtype=torch.float64), norm,  # type: ignore[arg-type]
        betas=(0.9, 0.999), eps=1e-8, clip_norm=3.0,
    )  # fmt: skip
    kept = (0, 2, 3, 4)  # not the gradients, which the torch backend leaves clipped
    for ours, theirs in zip(
        [*(lists[i] for i in kept), steps], [*(exact[i] for i in kept), exact[5]], strict=True
    ):
        close([t for t in ours if t is not None], [t for t in theirs if t is not None], dtype)
    if norm.isfinite():
        for low, full in zip(shadows, (lists[0], lists[4]), strict=True):
            assert all(s is None or torch.equal(s, t.bfloat16()) for s, t in zip(low, full, strict=True))


def drawn_masks(draw: Draw, crops: int, patches: int) -> tuple[Tensor, Tensor, Tensor]:
    student = draw.int(1, patches - 1, "student")
    target = draw.int(0, patches - 1 - student, "target")
    seed, step = draw.int(0, 2**64 - 1, "seed of masks"), draw.int(0, 2**32 - 1, "step")
    index = torch.randint(0, 2**62, (crops,), generator=draw.generator)
    counts = {"num_patches": patches, "num_student": student, "num_target": target}
    found = ops.disjoint_masks(index.to(draw.device), seed=seed, step=step, **counts)
    expected = reference.disjoint_masks(index, seed, step, *counts.values())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    return found


def disjoint_masks(draw: Draw) -> None:
    drawn_masks(draw, draw.int(0, 5, "crops"), draw.int(2, 900, "patches"))


def crop_patches(draw: Draw) -> None:
    bands, images = draw.of([1, 2, 3, 5], "bands"), draw.int(1, 3, "images")
    sources = []
    for _ in range(images):
        shape = (bands, draw.int(1, 60, "height"), draw.int(1, 60, "width"))
        dtype, largest = draw.of(
            [(torch.uint8, 255), (torch.uint16, 65535), (torch.float32, 1)], "type and largest"
        )
        sources.append((torch.rand(shape, generator=draw.generator) * largest).to(dtype))
    packed = ops.pack_images(sources)
    crops = draw.int(1, 4, "crops")
    image = torch.randint(0, images, (crops,), generator=draw.generator)
    boxes = []
    for i in image.tolist():
        _, height, width = sources[i].shape
        h, w = draw.int(1, height, "box height"), draw.int(1, width, "box width")
        boxes.append((draw.int(0, height - h, "top"), draw.int(0, width - w, "left"), h, w))
    exact = bands == 3 and draw.of([True, False], "exact")
    patch_px, grid = draw.int(1, 9, "patch"), draw.int(2, 6, "grid")
    table = ops.CropTable(
        image=image, box=torch.tensor(boxes),
        flip=torch.randint(0, 2, (crops, 2), generator=draw.generator).bool(),
        factor=torch.rand(crops, 2, 4, generator=draw.generator) + torch.tensor([0.5, 0.5, 0.5, -0.5]),
        order=torch.stack([torch.randperm(4, generator=draw.generator) for _ in range(crops * 2)]).view(crops, 2, 4),
        grey=torch.randint(0, 2, (crops, 2), generator=draw.generator).bool(),
    )  # fmt: skip
    patches = drawn_masks(draw, crops, grid * grid)
    options = {
        "crop_px": grid * patch_px, "patch_px": patch_px, "exact": exact, "leading_rows": draw.int(0, 2, "leading"),
    }  # fmt: skip
    mean, std = draw.normal(bands) / 5 + 0.5, draw.positive(bands)
    inputs = [type(t)(*(x.to(draw.device) for x in t)) for t in (packed, table)]
    found = ops.crop_patches(*inputs, *patches, mean=mean, std=std, **options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PERA_FAST_BACKEND", "crop_patches=reference")
        expected = ops.crop_patches(
            packed, table, *(p.cpu() for p in patches), mean=mean.cpu(), std=std.cpu(), **options
        )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=2e-4)


def try_shapes(op: str, device: str) -> None:
    check = globals()[op]

    @DRAWN
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(Draw(data, device))

    run()


@pytest.mark.parametrize(("op", "backend", "device"), backends())
def test_any_shape(op: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", f"{op}={backend}")
    try_shapes(op, device)


def test_every_op_is_tried() -> None:
    assert {parameter.values[0] for parameter in backends()} == set(_dispatch.registered())


def distill_kernels(draw: Draw, kernels: Any) -> None:
    """What lies between the products of distill_loss, in Triton and in C++."""
    prototypes, rows = draw.int(1, 300, "prototypes"), draw.int(1, 140, "rows")
    raw, scales = (
        [draw.normal(prototypes, rows) for _ in range(2)],
        [draw.positive(prototypes) for _ in range(2)],
    )
    arguments = (*raw, *scales, draw.normal(prototypes) / 10, 25.0, 10.0)
    weights, found = draw.positive(rows), []
    for module in (kernels, torch.ops.pera_fast):
        state = torch.zeros(5, rows)
        state[[0, 3]] = -torch.inf
        for _ in range(2):  # the second chunk goes on from the first
            module.distill_sums(*arguments, state)
        logs = [state[m] + state[s].log() for m, s in ((0, 1), (3, 4))]
        gradient = torch.full_like(raw[0], torch.nan), torch.full((prototypes,), torch.nan)
        module.distill_gradient(*arguments, *logs, weights, *gradient)
        found.append((state, *gradient))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


INTERPRETED = """
import sys
from importlib import import_module
import torch
import test_shapes as tests

op = sys.argv[1]
module, kernels = import_module(f"pera_fast.ops.{op}"), import_module(f"pera_fast.kernels.{op}")

def sequences(starts):
    return tuple((1, length) for length in starts.diff().tolist())

# The kernels for tensors on the CPU, as on a GPU.
if op == "residual_norm":
    module._of = lambda x: kernels
elif op == "distill_loss":
    tests.distill_loss = lambda draw: tests.distill_kernels(draw, kernels)
else:
    torch.ops.pera_fast.attention_forward = lambda qkv, starts, *rest: kernels.attention_forward(
        qkv, sequences(starts), *rest)
    torch.ops.pera_fast.attention_backward = lambda gradient, qkv, starts, *rest: kernels.attention_backward(
        gradient, qkv, sequences(starts), *rest)
tests.DTYPES = {"float32": torch.float32}
tests.LENGTH = 40
tests.HEAD_DIMS = [dim for dim in tests.HEAD_DIMS if dim <= 64]  # larger ones go to the library
tests.try_shapes(op, "cpu")
"""


@needs_cpp
@pytest.mark.parametrize("op", ["packed_attention", "residual_norm", "distill_loss"])
def test_triton_kernels_take_any_shape_in_the_interpreter(op: str) -> None:
    interpreted(INTERPRETED, op, PERA_FAST_BACKEND=f"{op}=cpp", PERA_FAST_EXAMPLES=str(max(4, EXAMPLES // 3)))
