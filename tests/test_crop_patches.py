"""crop_patches: geometry, colours and gathering, against Pillow, float64 and plain loops, on every backend."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_cuda, shared_file
from PIL import Image, ImageEnhance
from torch import Tensor

from pera_fast import ops, reference
from pera_fast.ops import _library
from pera_fast.reference import BRIGHTNESS, CONTRAST, HUE, SATURATION

needs_cpp = pytest.mark.skipif(_library.why_no_cpp() is not None, reason=f"cpp: {_library.why_no_cpp()}")
every_backend = pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("cpp", marks=needs_cpp), pytest.param("cuda", marks=needs_cuda)],
)


@pytest.fixture
def on(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that `backend`, which runs from here on, needs."""
    monkeypatch.setenv("PERA_FAST_BACKEND", f"crop_patches={backend}")
    return "cuda" if backend == "cuda" else "cpu"


def table(
    boxes: list[list[int]], flips: list[list[bool]] | None = None, image: list[int] | None = None
) -> ops.CropTable:
    n = len(boxes)
    return ops.CropTable(
        image=torch.tensor(image or [0] * n),
        box=torch.tensor(boxes),
        flip=torch.tensor(flips or [[False, False]] * n),
        factor=torch.ones(n, 2, 4),
        order=torch.full((n, 2, 4), -1),
        grey=torch.zeros(n, 2, dtype=torch.bool),
    )


def with_colours(crops: ops.CropTable, view: int, operations: dict[int, float]) -> ops.CropTable:
    """All crops' view changed by {operation: factor} in that order."""
    factor, order = crops.factor.clone(), crops.order.clone()
    for place, (operation, amount) in enumerate(operations.items()):
        order[:, view, place] = operation
        factor[:, view, operation] = amount
    return crops._replace(factor=factor, order=order)


def to(device: str, value: Any) -> Any:
    """Tensors, also those in (named) tuples, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [to(device, x) for x in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def call(
    image: Tensor | ops.SourceImages, crops: ops.CropTable, device: str = "cpu", **changes: Any
) -> tuple[Tensor, ...]:
    """Crops of 8 px in patches of 4: one student, one target and two teacher patches; results on the CPU."""
    images = image if isinstance(image, ops.SourceImages) else ops.pack_images([image])
    n, bands = len(crops.image), images.low.shape[1]
    patches = torch.arange(4).repeat(n, 1)
    arguments: dict[str, Any] = {
        "images": images, "table": crops, "student_patches": patches[:, :1].contiguous(),
        "target_patches": patches[:, 1:2].contiguous(), "teacher_patches": patches[:, 2:].contiguous(),
        "crop_px": 8, "patch_px": 4, "mean": torch.zeros(bands), "std": torch.ones(bands),
    }  # fmt: skip
    arguments.update(changes)
    return to("cpu", ops.crop_patches(**{name: to(device, value) for name, value in arguments.items()}))


def full_views(
    image: Tensor | ops.SourceImages,
    crops: ops.CropTable,
    crop_px: int,
    patch_px: int,
    device: str = "cpu",
    **options: Any,
) -> list[Tensor]:
    """Both views as levels of 255, put together again from all patches: each [n, bands, crop_px, crop_px]."""
    grid = crop_px // patch_px
    every = torch.arange(grid**2).repeat(len(crops.image), 1)
    odd, even = every[:, 1::2].contiguous(), every[:, ::2].contiguous()
    swapped = crops._replace(
        factor=crops.factor.flip(1), order=crops.order.flip(1), grey=crops.grey.flip(1)
    )  # view 0 where the teacher looks
    views = []
    for table_of_view in (swapped, crops):
        halves = [
            call(
                image, table_of_view, device, student_patches=other[:, :1].contiguous(),
                target_patches=every[:, :0].contiguous(), teacher_patches=teacher, crop_px=crop_px,
                patch_px=patch_px, **options,
            )[2]
            for teacher, other in ((even, odd), (odd, even))
        ]  # fmt: skip
        rows = torch.empty(len(every), grid**2, halves[0].shape[2])
        rows[:, ::2], rows[:, 1::2] = halves
        tiles = rows.view(len(every), grid, grid, -1, patch_px, patch_px).permute(0, 3, 1, 4, 2, 5)
        views.append(tiles.reshape(len(every), -1, crop_px, crop_px) * 255)
    return views


# --- geometry and gathering ---


@every_backend
def test_identity_crop_gathers_the_right_pixels(on: str) -> None:
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    student, target, teacher = call(image, table([[0, 0, 8, 8]]), on)
    scaled = image / 255
    torch.testing.assert_close(student[0, 0], scaled[:, :4, :4].flatten())
    torch.testing.assert_close(target[0, 0], scaled[:, :4, 4:].permute(1, 2, 0).flatten())
    torch.testing.assert_close(teacher[0, 1], scaled[:, 4:, 4:].flatten())


@every_backend
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("horizontal", "vertical"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("box", [[0, 0, 8, 8], [1, 2, 30, 5], [0, 3, 40, 37]])
def test_flips(on: str, exact: bool, horizontal: bool, vertical: bool, box: list[int]) -> None:
    image = torch.randint(256, (1, 40, 40), dtype=torch.uint8)
    straight = full_views(image, table([box]), 8, 4, on, exact=exact)[1]
    flipped = full_views(image, table([box], [[horizontal, vertical]]), 8, 4, on, exact=exact)[1]
    axes = [axis for axis, is_flipped in ((3, horizontal), (2, vertical)) if is_flipped]
    torch.testing.assert_close(flipped, straight.flip(axes), rtol=0, atol=1e-3)


@every_backend
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize(
    "box", [[0, 0, 1, 1], [15, 15, 1, 1], [3, 5, 2, 7], [0, 0, 160, 160], [0, 7, 160, 1]]
)
def test_flat_image_stays_flat(on: str, exact: bool, dtype: torch.dtype, box: list[int]) -> None:
    side = 160 if box[2] == 160 else 16
    images = ops.pack_images([torch.full((2, side, side), 51).to(dtype)], high=torch.full((1, 2), 255.0))
    for rows in call(images, table([box]), on, exact=exact):
        torch.testing.assert_close(rows, torch.full_like(rows, 0.2))


@every_backend
def test_a_crop_sees_nothing_outside_its_box(on: str) -> None:
    image = torch.zeros(1, 40, 40, dtype=torch.uint8)
    image[:, 10:20, 5:35] = 200
    for exact in (False, True):
        for rows in call(image, table([[10, 5, 10, 30]]), on, exact=exact):
            torch.testing.assert_close(rows, torch.full_like(rows, 200 / 255))


@every_backend
def test_normalisation_scale_and_one_to_six_bands(on: str) -> None:
    for bands in (1, 2, 6):
        image = torch.full((bands, 8, 8), 3000).to(torch.uint16)
        images = ops.pack_images([image], torch.full((1, bands), 1000.0), torch.full((1, bands), 5000.0))
        mean, std = torch.full((bands,), 0.25), torch.full((bands,), 0.5)
        student, _, _ = call(images, table([[0, 0, 8, 8]]), on, mean=mean, std=std)
        torch.testing.assert_close(student, torch.full_like(student, 0.5))


@every_backend
def test_values_that_are_no_number_become_the_lowest(on: str) -> None:
    image = torch.tensor([float("nan"), float("-inf"), -3.0, float("inf"), 7.0, 0.5]).view(1, 1, 6)
    for exact in (False, True):
        views = full_views(image, table([[0, 0, 1, 6]]), 6, 3, on, exact=exact)
        want = torch.tensor([0.0, 0, 0, 255, 255, 128 if exact else 127.5])
        torch.testing.assert_close(views[1][0, 0, 0], want, rtol=0, atol=1e-3)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 3e6, 1e-6])  # normal, subnormal in float16, beyond its largest
def test_rows_of_two_bytes_are_the_rounded_float32_rows(on: str, dtype: torch.dtype, std: float) -> None:
    images = ops.pack_images([torch.rand(3, 30, 30)])
    options = {"mean": torch.tensor([0.2, 0.5, 0.9]), "std": torch.full((3,), std), "leading_rows": 1}
    wide = call(images, table([[0, 0, 30, 30]]), on, **options)
    for narrow, rows in zip(
        call(images, table([[0, 0, 30, 30]]), on, dtype=dtype, **options), wide, strict=True
    ):
        assert narrow.dtype == dtype and torch.equal(narrow, rows.to(dtype))


@every_backend
def test_rows_go_where_they_are_asked_to(on: str) -> None:
    images, crops = ops.pack_images([torch.rand(3, 30, 30)]), table([[0, 0, 30, 30], [2, 3, 9, 20]])
    want = call(images, crops, on)
    packed = torch.full((2 * (2 + 1 + 4), 48), float("nan"), dtype=torch.bfloat16, device=on)
    student, target, teacher = (x.view(2, -1, 48) for x in packed.split([4, 2, 8]))
    target = target.float()
    call(images, crops, on, leading_rows=1, out=(student, target, teacher[:, :3].contiguous()))
    assert torch.equal(student[:, 0].cpu(), torch.zeros(2, 48, dtype=torch.bfloat16))
    assert torch.equal(student[:, 1:].cpu(), want[0].bfloat16()) and torch.equal(target.cpu(), want[1])


@every_backend
def test_a_crop_does_not_depend_on_its_batch(on: str) -> None:
    images, crops, sets = random_case(5, bands=3, crop_px=32, patch_px=8)
    options = {"crop_px": 32, "patch_px": 8}

    def run(rows: slice) -> tuple[Tensor, ...]:
        named = zip(("student_patches", "target_patches", "teacher_patches"), sets, strict=True)
        chosen = {name: patches[rows].contiguous() for name, patches in named}
        return call(images, ops.CropTable(*(x[rows].contiguous() for x in crops)), on, **options, **chosen)

    whole = run(slice(None))
    for crop in range(len(crops.image)):
        for alone, together in zip(run(slice(crop, crop + 1)), whole, strict=True):
            assert torch.equal(alone[0], together[crop])


# --- colour ---


@every_backend
def test_colour_is_per_view(on: str) -> None:
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    crops = with_colours(table([[0, 0, 8, 8]]), 0, {BRIGHTNESS: 1.2})
    for exact, changed in ((True, 120), (False, 119.5)):  # float: less the half level that cutting off takes
        student, target, teacher = call(image, crops, on, exact=exact)
        for rows, value in ((student, changed), (target, changed), (teacher, 100)):
            torch.testing.assert_close(rows, torch.full_like(rows, value / 255))


@every_backend
def test_bands_other_than_three_have_their_own_contrast_and_no_hue(on: str) -> None:
    image = torch.randint(256, (4, 16, 16), dtype=torch.uint8)
    operations = {HUE: 0.3, CONTRAST: 0.6, SATURATION: 0.1, BRIGHTNESS: 1.3}
    crops = with_colours(table([[0, 0, 16, 16]]), 1, operations)
    crops = crops._replace(grey=torch.tensor([[True, False]]))
    got = full_views(image, crops, 16, 8, on, exact=True)
    assert torch.equal(got[0][0].round(), image.float())
    for band in range(4):
        want = Image.fromarray(image[band].numpy())
        want = ImageEnhance.Brightness(ImageEnhance.Contrast(want).enhance(0.6)).enhance(1.3)
        assert np.array_equal(got[1][0, band].round().numpy(), np.array(want))


def test_hue_by_thirds_moves_primaries() -> None:
    red = torch.tensor([1.0, 0.2, 0.2])[:, None, None]
    torch.testing.assert_close(reference.shift_hue(red, 1 / 3)[:, 0, 0], torch.tensor([0.2, 1.0, 0.2]))
    torch.testing.assert_close(reference.shift_hue(red, -1 / 3)[:, 0, 0], torch.tensor([0.2, 0.2, 1.0]))
    pixels = torch.rand(3, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(reference.shift_hue(reference.shift_hue(pixels, 0.07), -0.07), pixels)


# --- exact: Pillow to the bit ---


def pillow_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int16) + int(turn * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


@dataclass
class Case:
    """One crop of an image and what Pillow makes of it."""

    box: list[int]
    flip: list[bool]
    operations: list[dict[int, float]]
    grey: list[bool]

    @staticmethod
    def draw(random: np.random.Generator, height: int, width: int) -> Case:
        sides = [int(random.integers(1, side + 1)) for side in (height, width)]
        corner = [
            int(random.integers(0, side - box + 1)) for side, box in zip((height, width), sides, strict=True)
        ]
        drawn = {
            BRIGHTNESS: random.uniform(0.2, 1.8), CONTRAST: random.uniform(0.2, 1.8),
            SATURATION: random.uniform(0, 2), HUE: random.uniform(-0.5, 0.5),
        }  # fmt: skip
        operations: list[dict[int, float]] = [
            {int(i): float(np.float32(drawn[i])) for i in random.permutation(4)[: random.integers(0, 5)]}
            for _ in range(2)
        ]
        return Case(
            corner + sides, (random.random(2) < 0.5).tolist(), operations, [False, random.random() < 0.2]
        )

    def table(self) -> ops.CropTable:
        crops = table([self.box], [self.flip])._replace(grey=torch.tensor([self.grey]))
        for view in range(2):
            crops = with_colours(crops, view, self.operations[view])
        return crops

    def pillow(self, image: np.ndarray, crop_px: int) -> list[np.ndarray]:
        top, left, height, width = self.box
        crop = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        crop = crop.crop((left, top, left + width, top + height))
        crop = crop.resize((crop_px, crop_px), Image.Resampling.BILINEAR)
        for turned, how in zip(
            self.flip, (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM), strict=True
        ):
            crop = crop.transpose(how) if turned else crop
        views = []
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for operations, grey in zip(self.operations, self.grey, strict=True):
            view = crop.convert("L").convert("RGB") if grey else crop
            for operation, amount in {} if grey else operations.items():
                view = (
                    pillow_hue(view, amount)
                    if operation == HUE
                    else enhancers[operation](view).enhance(amount)
                )
            views.append(np.array(view).transpose(2, 0, 1))
        return views


@every_backend
@pytest.mark.parametrize("crop_px", [16, 96])
def test_exact_equals_pillow_to_the_bit(on: str, crop_px: int) -> None:
    random = np.random.default_rng(crop_px)
    for _ in range(40):
        height, width = (int(side) for side in random.integers(1, 400, 2))
        coarse = random.integers(0, 256, (-(-height // 7), -(-width // 5), 3), dtype=np.uint8)
        image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        noisy = image.transpose(2, 0, 1) ^ random.integers(0, 8, (3, height, width), dtype=np.uint8)
        case = Case.draw(random, height, width)
        views = full_views(torch.from_numpy(noisy), case.table(), crop_px, 8, on, exact=True)
        for got, want in zip(views, case.pillow(noisy, crop_px), strict=True):
            assert np.array_equal(got[0].round().numpy(), want), case


@needs_cpp
def test_exact_hue_equals_pillow_for_every_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", "crop_patches=cpp")
    side = 1024
    for part in range(16):
        colours = np.arange(part * side**2, (part + 1) * side**2, dtype=np.uint32)
        image = np.stack([colours >> 16, colours >> 8, colours]).astype(np.uint8).reshape(3, side, side)
        case = Case([0, 0, side, side], [False, False], [{}, {HUE: (part - 8) / 17}], [False, False])
        got = full_views(torch.from_numpy(image), case.table(), side, 64, exact=True)[1]
        assert np.array_equal(got[0].round().numpy(), case.pillow(image, side)[1])


def recorded_cases() -> tuple[list[tuple[str, Tensor, Case, int]], Any]:
    """(key, image, case, crop_px) of the recorded authors' pipeline, and the recording."""
    recorded = np.load(shared_file("oracle/augment.npz"))
    cases = []
    for image in range(2):
        for crop in json.loads(str(recorded["sets_json"])):
            operations: list[dict[int, float]] = []
            for how in (crop["view0"], crop["view1"]):
                factors = [how.get(name) for name in ("brightness", "contrast", "saturation", "hue")]
                operations.append({i: factors[i] for i in how.get("order", [])})
            grey = [crop[f"view{view}"]["kind"] == "gray" for view in range(2)]
            case = Case(crop["box"], [bool(crop["hflip"]), bool(crop["vflip"])], operations, grey)
            pixels = torch.from_numpy(recorded[f"image{image}"])
            cases.append((f"image{image}_{crop['name']}", pixels, case, crop["size"]))
    return cases, recorded


@every_backend
def test_exact_reproduces_the_recorded_pipeline_and_float_agrees_in_the_mean(on: str) -> None:
    cases, recorded = recorded_cases()
    for key, image, case, crop_px in cases:
        exact = full_views(image, case.table(), crop_px, 16, on, exact=True)
        smooth = full_views(image, case.table(), crop_px, 16, on)
        for view in range(2):
            want = torch.from_numpy(recorded[f"{key}_view{view}"]).float()
            difference = (exact[view][0].round() - want).abs()
            assert (difference == 0).float().mean() >= 0.999 and difference.max() <= 1, (key, view)
            assert (smooth[view][0] - want).abs().mean() < 1, (key, view)


def test_the_authors_colours_on_other_images_agree_in_the_mean() -> None:
    """float against exact over drawn jitters, each view for itself."""
    random = np.random.default_rng(0)
    for _ in range(20):
        image = torch.from_numpy(smooth_image(random, 3, 90, 120))
        drawn = {
            BRIGHTNESS: random.uniform(0.6, 1.4), CONTRAST: random.uniform(0.6, 1.4),
            SATURATION: random.uniform(0.8, 1.2), HUE: random.uniform(-0.1, 0.1),
        }  # fmt: skip
        operations = {int(i): drawn[i] for i in random.permutation(4)}
        crops = with_colours(table([[0, 0, 90, 120]]), 1, operations)
        exact, smooth = (full_views(image, crops, 64, 16, exact=exact)[1] for exact in (True, False))
        assert (exact - smooth).abs().mean() < 1, operations


# --- any case, against float64 ---


def smooth_image(random: np.random.Generator, bands: int, height: int, width: int) -> np.ndarray:
    """uint8 [bands, height, width] with gradients and some noise."""
    coarse = torch.from_numpy(random.random((1, bands, 1 + height // 9, 1 + width // 9)))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].numpy()
    return np.clip(255 * fine + random.normal(0, 6, fine.shape), 0, 255).astype(np.uint8)


def random_case(
    seed: int, bands: int, crop_px: int, patch_px: int, crops: int = 6
) -> tuple[ops.SourceImages, ops.CropTable, tuple[Tensor, ...]]:
    """Three images of random size and dtype, crops of all kinds of them, and drawn sets of patches."""
    random = np.random.default_rng(seed)
    images, low, high = [], [], []
    for code in random.integers(0, 3, 3):
        pixels = torch.from_numpy(smooth_image(random, bands, *random.integers(1, 150, 2)))
        images.append([pixels, (pixels.int() * 160).to(torch.uint16), pixels.float() / 80 - 1][code])
        low.append([0.0, 1000.0, -0.8][code])
        high.append([255.0, 36000.0, 1.9][code])
    image = random.integers(0, 3, crops)
    cases = [Case.draw(random, *images[i].shape[1:]) for i in image]
    tables = [case.table() for case in cases]
    joined = ops.CropTable(*(torch.cat(column) for column in zip(*tables, strict=True)))
    joined = joined._replace(image=torch.from_numpy(image))
    patches = (crop_px // patch_px) ** 2
    students = max(1, patches // 5)
    sets = ops.disjoint_masks(
        torch.arange(crops), seed=seed, step=0, num_patches=patches, num_student=students,
        num_target=max(0, min(students, patches - students - 1)),
    )  # fmt: skip
    packed = ops.pack_images(
        images,
        torch.tensor(low)[:, None].expand(-1, bands).contiguous(),
        torch.tensor(high)[:, None].expand(-1, bands).contiguous(),
    )
    return packed, joined, sets


SIZES = [(32, 8), (48, 16), (28, 14), (64, 32), (20, 4), (6, 3), (9, 1)]


@pytest.mark.parametrize(
    "backend", [pytest.param("cpp", marks=needs_cpp), pytest.param("cuda", marks=needs_cuda)]
)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", range(28))
def test_error_against_float64_is_no_larger_than_eager_pytorch(on: str, exact: bool, seed: int) -> None:
    crop_px, patch_px = SIZES[seed % len(SIZES)]
    bands = (3, 1, 3, 5)[seed % 4]
    images, crops, sets = random_case(seed, bands, crop_px, patch_px)
    options = {
        "crop_px": crop_px, "patch_px": patch_px, "exact": exact, "leading_rows": seed % 2,
        "mean": torch.rand(bands), "std": torch.rand(bands) + 0.2,
    }  # fmt: skip
    named = dict(zip(("student_patches", "target_patches", "teacher_patches"), sets, strict=True))
    got = call(images, crops, on, **options, **named)
    eager = reference.crop_patches(images, crops, *sets, **options)
    wide = {**options, "mean": options["mean"].double(), "std": options["std"].double()}
    oracle = reference.crop_patches(images, crops, *sets, **wide)
    for ours, theirs, want in zip(got, eager, oracle, strict=True):
        assert ours.shape == want.shape
        if want.numel():
            error, allowed = ((x - want).abs().max().item() for x in (ours, theirs))
            assert error <= allowed + 4e-6


def digest() -> str:
    """Of the rows of many cases in both kinds."""
    state = hashlib.sha256()
    for seed in range(14):
        crop_px, patch_px = SIZES[seed % len(SIZES)]
        images, crops, sets = random_case(seed, (3, 1, 5)[seed % 3], crop_px, patch_px)
        named = dict(zip(("student_patches", "target_patches", "teacher_patches"), sets, strict=True))
        for exact in (False, True):
            for rows in call(images, crops, crop_px=crop_px, patch_px=patch_px, exact=exact, **named):
                state.update(rows.numpy().tobytes())
    return state.hexdigest()


@needs_cpp
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_bits(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERA_FAST_BACKEND", "auto")
    environment = {**os.environ, "PERA_FAST_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "3"}
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import test_crop_patches as t; print(t.digest())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == digest(), done.stderr


# --- bad input ---


@needs_cpp
def test_opcheck() -> None:
    images, crops, sets = random_case(3, bands=3, crop_px=32, patch_px=8)
    rows = tuple(torch.zeros(6, patches.shape[1], 192) for patches in sets)
    arguments = (*images, *crops, *sets, torch.zeros(3), torch.ones(3), 32, 8, True, *rows)
    torch.library.opcheck(torch.ops.pera_fast.crop_patches.default, arguments)


@needs_cpp
def test_the_op_itself_checks_shapes_and_dtypes() -> None:
    images, crops, sets = random_case(3, bands=3, crop_px=32, patch_px=8)
    rows = tuple(torch.zeros(6, patches.shape[1], 192) for patches in sets)
    good = [*images, *crops, *sets, torch.zeros(3), torch.ones(3), 32, 8, True, *rows]
    for place, bad in (
        (7, crops.box.int()),
        (7, crops.box[:3]),
        (12, sets[0].int()),
        (17, 30),
        (20, rows[0][:, :1].contiguous()),
    ):
        with pytest.raises(RuntimeError, match="expected|wrong dtype"):
            torch.ops.pera_fast.crop_patches(*good[:place], bad, *good[place + 1 :])


TWO = torch.arange(4).repeat(2, 1)


def changed(**changes: Any) -> ops.CropTable:
    return table([[0, 0, 8, 8]])._replace(**changes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"crop_px": 10}, "crop_px: expected a multiple of patch_px = 4 up to 16384, got 10"),
        ({"crop_px": 2**15}, "crop_px: expected .* got 32768"),
        ({"patch_px": 0}, "crop_px: expected a multiple of patch_px = 0"),
        ({"leading_rows": -1}, "leading_rows: expected at least 0, got -1"),
        ({"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16, got torch.float64"),
        ({"student_patches": torch.tensor([[4]])}, "student_patches: expected indices from 0 to 3, got 4 to 4"),
        ({"teacher_patches": torch.tensor([[-1, 2]])}, "teacher_patches: .* from 0 to 3, got -1 to 2"),
        ({"student_patches": torch.tensor([[0.0]])}, r"student_patches: expected int64 \[1, any\] on cpu, got float32"),
        ({"target_patches": TWO[:, 1:2]}, r"target_patches: expected int64 \[1, any\] on cpu, got int64 \[2, 1\]"),
        ({"teacher_patches": TWO[:1, :0]}, r"teacher_patches: expected at least one patch per crop, got \[1, 0\]"),
        ({"teacher_patches": torch.tensor([[3, 2]])}, r"teacher_patches\[0\]: expected ascending indices .* \[3, 2\]"),
        ({"teacher_patches": torch.tensor([[2, 2]])}, r"teacher_patches\[0\]: expected ascending"),
        ({"teacher_patches": torch.tensor([[1, 3]])}, "expected disjoint sets, got patch 1 of crop 0 in more than one"),
        ({"mean": torch.zeros(2)}, r"mean: expected float32 \[3\] on cpu, got float32 \[2\]"),
        ({"mean": torch.full((3,), float("nan"))}, "mean: expected finite numbers"),
        ({"std": torch.tensor([1.0, 0.0, 1.0])}, r"std: expected finite numbers above 0, got \[1.0, 0.0, 1.0\]"),
        ({"std": torch.ones(3).double()}, r"std: expected float32 \[3\] on cpu, got float64"),
        ({"crops": table([[0, 0, 9, 8]])}, r"table.box\[0\]: .* inside its image, got \[0, 0, 9, 8\] in .* 8x8"),
        ({"crops": table([[-1, 0, 8, 8]])}, r"table.box\[0\]: .* got \[-1, 0, 8, 8\]"),
        ({"crops": table([[0, 0, 0, 8]])}, r"table.box\[0\]: .* got \[0, 0, 0, 8\]"),
        ({"crops": table([[2**62, 0, 2**62, 8]])}, r"table.box\[0\]: "),
        ({"crops": changed(image=torch.tensor([1]))}, r"table.image\[0\]: expected 0 to 0, got 1"),
        ({"crops": changed(box=torch.zeros(1, 4))}, r"table.box: expected int64 \[1, 4\] on cpu, got float32"),
        ({"crops": changed(order=torch.full((1, 2, 4), 4))}, r"table.order\[0\]: expected each operation 0 to 3"),
        ({"crops": changed(order=torch.ones(1, 2, 4).long())}, r"table.order\[0\]: .* at most once"),
        ({"crops": changed(order=torch.tensor([-1, 1, -1, -1]).expand(1, 2, 4))}, r"table.order\[0\]: .* then -1"),
        ({"crops": changed(factor=torch.full((1, 2, 4), float("inf")))}, r"table.factor\[0\]: expected finite"),
        ({"crops": changed(factor=torch.full((1, 2, 4), 1.5))}, r"table.factor\[0\]: .* hue from -1 to 1"),
        ({"out": (torch.zeros(1, 1, 48),) * 3}, r"out: expected contiguous \[1, 2, 48\] on cpu"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], sentence: str) -> None:
    crops = change.pop("crops", table([[0, 0, 8, 8]]))
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(3, 8, 8, dtype=torch.uint8), crops, **change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"offsets": torch.tensor([8])}, r"images.offsets\[0\]: expected aligned images inside .* 192 bytes"),
        ({"offsets": torch.tensor([-1])}, r"images.offsets\[0\]: .* got -1"),
        ({"dtypes": torch.tensor([3])}, r"images.dtypes\[0\]: expected 0, 1 or 2, got 3"),
        ({"dtypes": torch.tensor([1])}, r"images.offsets\[0\]: "),
        ({"shapes": torch.tensor([[3, 8, 2**61]])}, r"images.shapes\[0\]: "),
        ({"shapes": torch.tensor([[3, 2**29, 2**29]])}, r"images.offsets\[0\]: "),
        ({"shapes": torch.tensor([[2, 8, 8]])}, r"images.shapes\[0\]: expected 3 bands and sizes"),
        ({"low": torch.full((1, 3), 255.0)}, r"images.low\[0\]: expected finite values below images.high"),
        ({"low": torch.full((1, 3), float("nan"))}, r"images.low\[0\]: "),
        ({"high": torch.zeros(1, 2)}, r"images.high: expected float32 \[1, 3\]"),
        ({"buffer": torch.zeros(192)}, r"images.buffer: expected uint8 \[any\]"),
    ],
)  # fmt: skip
def test_bad_images(change: dict[str, Any], sentence: str) -> None:
    images = ops.pack_images([torch.zeros(3, 8, 8, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=sentence):
        call(images._replace(**change), table([[0, 0, 8, 8]]))


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([], r"images: expected at least one, all \[bands, H, W\] with equal bands, got \[\]"),
        ([torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)], r"images: .*got \[\[3, 2, 2\], \[1, 2, 2\]\]"),
        ([torch.zeros(2, 2)], r"images: .*got \[\[2, 2\]\]"),
        (
            [torch.zeros(3, 2, 2).double()],
            r"images\[0\]: expected uint8, uint16 or float32, got torch.float64",
        ),
    ],
)
def test_images_that_do_not_pack(images: list[Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.pack_images(images)
