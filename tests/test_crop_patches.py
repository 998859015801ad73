"""crop_patches: geometry, colours and gathering, against Pillow's own results and against plain loops."""

import json

import numpy as np
import pytest
import torch
from conftest import shared_file

from pera_fast import ops, reference

NONE = torch.full((4,), -1)


def table(boxes: list[list[int]], flips: list[list[bool]] | None = None) -> ops.CropTable:
    n = len(boxes)
    return ops.CropTable(
        image=torch.zeros(n, dtype=torch.int64),
        box=torch.tensor(boxes),
        flip=torch.tensor(flips or [[False, False]] * n),
        factor=torch.ones(n, 2, 4),
        order=NONE.expand(n, 2, 4),
        grey=torch.zeros(n, 2, dtype=torch.bool),
    )


def call(image: torch.Tensor, crops: ops.CropTable, **changes: object) -> tuple[torch.Tensor, ...]:
    n, bands = len(crops.image), image.shape[0]
    patches = torch.arange(4).expand(n, 4)
    arguments = {
        "images": [image], "low": torch.zeros(1, bands), "high": torch.full((1, bands), 255.0), "table": crops,
        "student_patches": patches[:, :1], "target_patches": patches[:, 1:2], "teacher_patches": patches[:, 2:],
        "crop_px": 8, "patch_px": 4, "mean": torch.zeros(bands), "std": torch.ones(bands),
    }  # fmt: skip
    return ops.crop_patches(**{**arguments, **changes})


def test_identity_crop_gathers_the_right_pixels() -> None:
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    student, target, teacher = call(image, table([[0, 0, 8, 8]]))
    scaled = image / 255
    torch.testing.assert_close(student[0, 0], scaled[:, :4, :4].flatten())
    torch.testing.assert_close(target[0, 0], scaled[:, :4, 4:].permute(1, 2, 0).flatten())
    torch.testing.assert_close(teacher[0, 1], scaled[:, 4:, 4:].flatten())


@pytest.mark.parametrize(("horizontal", "vertical"), [(True, False), (False, True), (True, True)])
def test_flips(horizontal: bool, vertical: bool) -> None:
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    flipped = image.flip([axis for axis, on in ((2, horizontal), (1, vertical)) if on])
    got = call(image, table([[0, 0, 8, 8]], [[horizontal, vertical]]))
    for ours, want in zip(got, call(flipped, table([[0, 0, 8, 8]])), strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("box", [[0, 0, 1, 1], [15, 15, 1, 1], [3, 5, 2, 7], [0, 0, 160, 160]])
def test_flat_image_stays_flat(dtype: torch.dtype, box: list[int]) -> None:
    side = 160 if box[2] == 160 else 16
    got = call(torch.full((2, side, side), 51).to(dtype), table([box]))
    for rows in got:
        torch.testing.assert_close(rows, torch.full_like(rows, 0.2))


def test_normalisation_scale_and_one_to_six_bands() -> None:
    for bands in (1, 2, 6):
        image = torch.full((bands, 8, 8), 3000).to(torch.uint16)
        student, _, _ = call(
            image, table([[0, 0, 8, 8]]), low=torch.full((1, bands), 1000.0), high=torch.full((1, bands), 5000.0),
            mean=torch.full((bands,), 0.25), std=torch.full((bands,), 0.5),
        )  # fmt: skip
        torch.testing.assert_close(student, torch.full_like(student, 0.5))


def test_colour_is_per_view() -> None:
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    crops = table([[0, 0, 8, 8]])
    factor, order = crops.factor.clone(), crops.order.clone()
    factor[0, 0, reference.BRIGHTNESS], order[0, 0, 0] = 1.2, reference.BRIGHTNESS
    student, target, teacher = call(image, crops._replace(factor=factor, order=order))
    for rows, value in ((student, 120), (target, 120), (teacher, 100)):
        torch.testing.assert_close(rows, torch.full_like(rows, value / 255))


def test_hue_by_thirds_moves_primaries() -> None:
    red = torch.tensor([1.0, 0.2, 0.2])[:, None, None]
    torch.testing.assert_close(reference.shift_hue(red, 1 / 3)[:, 0, 0], torch.tensor([0.2, 1.0, 0.2]))
    torch.testing.assert_close(reference.shift_hue(red, -1 / 3)[:, 0, 0], torch.tensor([0.2, 0.2, 1.0]))
    pixels = torch.rand(3, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(reference.shift_hue(reference.shift_hue(pixels, 0.07), -0.07), pixels)


def test_against_the_recorded_pillow_pipeline() -> None:
    """Without 8-bit rounding between stages we differ from Pillow by its rounding: a level or two."""
    recorded = np.load(shared_file("oracle/augment.npz"))
    for image in range(2):
        source = torch.from_numpy(recorded[f"image{image}"]).double() / 255
        for crop in json.loads(str(recorded["sets_json"])):
            resized = reference.cut(source, crop["box"], (crop["hflip"], crop["vflip"]), crop["size"])
            for view in range(2):
                how = crop[f"view{view}"]
                factor, order, bound = torch.ones(4), NONE, 0.4
                if how["kind"] == "jitter":
                    factor = torch.tensor([how[k] for k in ("brightness", "contrast", "saturation", "hue")])
                    order, bound = torch.tensor(how["order"]), 2.5
                got = reference.colour(resized, factor, order, how["kind"] == "gray") * 255
                want = torch.from_numpy(recorded[f"image{image}_{crop['name']}_view{view}"])
                assert (got - want).abs().mean() < bound, (image, crop["name"], view)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"crop_px": 10}, "crop_px: expected a multiple of patch_px = 4, got 10"),
        (
            {"student_patches": torch.tensor([[4]])},
            "student_patches: expected indices from 0 to 3, got 4 to 4",
        ),
        (
            {"target_patches": torch.zeros(2, 1, dtype=torch.int64)},
            r"target_patches: expected shape \[1, count\]",
        ),
        ({"low": torch.zeros(1, 2)}, r"low: expected shape \[1, 3\], got \[1, 2\]"),
        ({"table": table([[0, 0, 9, 8]])}, r"table.box\[0\]: expected a box inside the 8x8 image"),
        ({"table": table([[-1, 0, 8, 8]])}, r"table.box\[0\]: .* got top -1"),
        ({"table": table([[0, 0, 0, 8]])}, r"table.box\[0\]: .* height 0"),
        (
            {"table": table([[0, 0, 8, 8]])._replace(image=torch.tensor([1]))},
            r"table.image\[0\]: expected 0 to 0, got 1",
        ),
    ],
)
def test_bad_input(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(3, 8, 8, dtype=torch.uint8), **{"crops": table([[0, 0, 8, 8]]), **change})
