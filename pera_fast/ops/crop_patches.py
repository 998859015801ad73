"""From source images to the patches that are used: crop, resize, colour, normalise, gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pera_fast import reference
from pera_fast.ops import _dispatch, _library
from pera_fast.reference import PIXEL_DTYPES, CropTable, SourceImages

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CROP_PX = 16384
_ALIGN = 16  # bytes; every image of a packed buffer starts where any dtype may be viewed


def pack_images(
    images: Sequence[Tensor], low: Tensor | None = None, high: Tensor | None = None
) -> SourceImages:
    """Copy images of any sizes, uint8, uint16 or float32 [bands, H, W] each, into one buffer.

    low, high: float32 [images, bands], the values that become 0 and 1; by default 0 and the largest value of
    an integer dtype, 0 and 1 for float32. Raises ValueError when there is no image or they do not fit.
    """
    bands = {image.shape[0] if image.dim() == 3 else -1 for image in images}
    if not images or len(bands) != 1 or bands == {-1}:
        shapes = [list(image.shape) for image in images]
        raise ValueError(f"images: expected at least one, all [bands, H, W] with equal bands, got {shapes}")
    for i, image in enumerate(images):
        if image.dtype not in PIXEL_DTYPES:
            raise ValueError(f"images[{i}]: expected uint8, uint16 or float32, got {image.dtype}")
    device = images[0].device
    parts, offsets, end = [], [], 0
    for image in images:
        raw = image.contiguous().view(torch.uint8).flatten()
        padding = -len(raw) % _ALIGN
        parts += [raw, raw.new_zeros(padding)]
        offsets.append(end)
        end += len(raw) + padding
    largest = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}
    shape = (len(images), bands.pop())
    if low is None:
        low = torch.zeros(shape, device=device)
    if high is None:
        tops = torch.tensor([largest[image.dtype] for image in images], device=device)
        high = tops[:, None].expand(shape).contiguous()
    return SourceImages(
        buffer=torch.cat(parts),
        offsets=torch.tensor(offsets, device=device),
        shapes=torch.tensor([image.shape for image in images], device=device),
        dtypes=torch.tensor([PIXEL_DTYPES.index(image.dtype) for image in images], device=device),
        low=low,
        high=high,
    )


def crop_patches(
    images: SourceImages,
    table: CropTable,
    student_patches: Tensor,
    target_patches: Tensor,
    teacher_patches: Tensor,
    *,
    crop_px: int,
    patch_px: int,
    mean: Tensor,
    std: Tensor,
    exact: bool = False,
    leading_rows: int = 0,
    dtype: torch.dtype = torch.float32,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    check_values: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Augment n crop pairs and write only the patches that are used, each pixel once.

    A crop's box is resized to crop_px (antialiased bilinear), flipped, and for each of its two views changed
    in colour and normalised. Student and target patches are of view 0, teacher patches of view 1.

    Args:
        images: the source images (see `pack_images`).
        table: how each crop pair is cut and coloured.
        student_patches, target_patches, teacher_patches: int64 [n, S], [n, P], [n, T], raster indices; each
            row ascending, a crop's three sets disjoint, S and T at least 1 (`disjoint_masks` draws such).
        crop_px, patch_px: sides in pixels; crop_px is a multiple of patch_px and at most 16384.
        mean, std: float32 [bands], of levels in 0..1.
        exact: round to 8 bits after each pass and colour operation, as Pillow does. Otherwise levels stay
            float32 and agree with Pillow's in the mean. Values are first scaled from low..high to 0..1.
        leading_rows: rows of zeros before each crop's student and teacher patches, for a CLS token.
        dtype: of the rows, float32, bfloat16 or float16.
        out: where to write, contiguous tensors of the shapes below, each of any of these dtypes; instead of
            `dtype`.
        check_values: look at the values of tables and indices too, not only at shapes and dtypes. On CUDA
            this waits for the device; switch it off only for values that are known to be right: wrong ones
            then read and write outside of the tensors.

    Returns:
        (student rows [n, leading_rows + S, bands·patch_px²] in the patch embedding's (band, p, q) order,
        target pixels [n, P, patch_px²·bands] in (p, q, band) order, teacher rows as the student's [n, …]).

    Raises:
        ValueError: an argument outside of the above, before anything is computed. BackendError: see
            `pera_fast.ops.BackendError`.

    Source: PerA (arXiv 2505.19447); resampling and colours follow Pillow's resize and ImageEnhance.
    """
    patches = (student_patches, target_patches, teacher_patches)
    _check_shapes(images, table, patches, mean, std, crop_px, patch_px, leading_rows)
    if check_values:
        _check_images(images)
        _check_table(images, table)
        _check_patches(patches, (crop_px // patch_px) ** 2)
        _check_statistics(mean, std)
    crops, row = len(table.image), images.low.shape[1] * patch_px**2
    leading = (leading_rows, 0, leading_rows)
    shapes = [(crops, lead + p.shape[1], row) for lead, p in zip(leading, patches, strict=True)]
    if out is None:
        if dtype not in ROW_DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        out = tuple(torch.empty(shape, dtype=dtype, device=mean.device) for shape in shapes)  # type: ignore[assignment]
    else:
        for rows, shape in zip(out, shapes, strict=True):
            if (
                tuple(rows.shape) != shape
                or rows.dtype not in ROW_DTYPES
                or rows.device != mean.device
                or not rows.is_contiguous()
            ):
                raise ValueError(
                    f"out: expected contiguous {list(shape)} on {mean.device} in float32, bfloat16 or float16, "
                    f"got {list(rows.shape)} {rows.dtype} on {rows.device}"
                )
    assert out is not None
    _dispatch.function("crop_patches", mean.device.type)(
        images, table, patches, crop_px, patch_px, mean, std, exact, leading_rows, out
    )
    return out


def _check_shapes(
    images: SourceImages, table: CropTable, patches: tuple[Tensor, ...], mean: Tensor, std: Tensor,
    crop_px: int, patch_px: int, leading_rows: int,
) -> None:  # fmt: skip
    if not 1 <= patch_px <= crop_px <= _MAX_CROP_PX or crop_px % patch_px:
        raise ValueError(
            f"crop_px: expected a multiple of patch_px = {patch_px} up to {_MAX_CROP_PX}, got {crop_px}"
        )
    if leading_rows < 0:
        raise ValueError(f"leading_rows: expected at least 0, got {leading_rows}")
    count = images.low.shape[0] if images.low.dim() else 0
    bands = images.low.shape[-1] if images.low.dim() == 2 else 1
    crops = table.image.shape[0] if table.image.dim() else 0
    if min(count, bands, crops) < 1:
        raise ValueError(
            f"images, table: expected at least one image, band and crop, got {count} images of {bands} bands "
            f"and {crops} crops"
        )
    expected: list[tuple[str, Tensor, torch.dtype, tuple[int | None, ...]]] = [
        ("images.buffer", images.buffer, torch.uint8, (None,)),
        ("images.offsets", images.offsets, torch.int64, (count,)),
        ("images.shapes", images.shapes, torch.int64, (count, 3)),
        ("images.dtypes", images.dtypes, torch.int64, (count,)),
        ("images.low", images.low, torch.float32, (count, bands)),
        ("images.high", images.high, torch.float32, (count, bands)),
        ("mean", mean, torch.float32, (bands,)),
        ("std", std, torch.float32, (bands,)),
        ("table.image", table.image, torch.int64, (crops,)),
        ("table.box", table.box, torch.int64, (crops, 4)),
        ("table.flip", table.flip, torch.bool, (crops, 2)),
        ("table.factor", table.factor, torch.float32, (crops, 2, 4)),
        ("table.order", table.order, torch.int64, (crops, 2, 4)),
        ("table.grey", table.grey, torch.bool, (crops, 2)),
        ("student_patches", patches[0], torch.int64, (crops, None)),
        ("target_patches", patches[1], torch.int64, (crops, None)),
        ("teacher_patches", patches[2], torch.int64, (crops, None)),
    ]
    for name, tensor, dtype, shape in expected:
        fits = tensor.dim() == len(shape) and all(
            size in (None, got) for size, got in zip(shape, tensor.shape, strict=False)
        )
        if tensor.dtype != dtype or not fits or tensor.device != mean.device:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{name}: expected {_name(dtype)} [{sizes}] on {mean.device}, "
                f"got {_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
            )
    for name, tensor in (("student_patches", patches[0]), ("teacher_patches", patches[2])):
        if tensor.shape[1] < 1:
            raise ValueError(f"{name}: expected at least one patch per crop, got {list(tensor.shape)}")


def _check_images(images: SourceImages) -> None:
    sizes = torch.tensor([dtype.itemsize for dtype in PIXEL_DTYPES], device=images.buffer.device)
    known = (images.dtypes >= 0) & (images.dtypes < len(PIXEL_DTYPES))
    _require_all(known, "images.dtypes", "0, 1 or 2", images.dtypes)
    bands = images.low.shape[1]
    fits = (images.shapes[:, 0] == bands) & (images.shapes >= 1).all(1) & (images.shapes < 2**30).all(1)
    _require_all(fits, "images.shapes", f"{bands} bands and sizes from 1 to below 2**30", images.shapes)
    item = sizes[images.dtypes]
    end = images.offsets + images.shapes.prod(1) * item
    inside = (images.offsets >= 0) & (images.offsets % item == 0) & (end <= len(images.buffer))
    inside &= images.shapes.double().prod(1) * item <= len(images.buffer)  # the product above may wrap
    _require_all(
        inside, "images.offsets", f"aligned images inside the buffer of {len(images.buffer)} bytes",
        images.offsets,
    )  # fmt: skip
    ordered = (torch.isfinite(images.low) & torch.isfinite(images.high) & (images.low < images.high)).all(1)
    _require_all(ordered, "images.low", "finite values below images.high", images.low)


def _check_table(images: SourceImages, table: CropTable) -> None:
    known = (table.image >= 0) & (table.image < len(images.offsets))
    _require_all(known, "table.image", f"0 to {len(images.offsets) - 1}", table.image)
    inside = ((table.box[:, :2] >= 0) & (table.box[:, 2:] >= 1)).all(1)
    # Sides against what is left, not sums against sizes: a sum might wrap.
    inside &= (table.box[:, 2:] <= images.shapes[table.image, 1:] - table.box[:, :2]).all(1)
    _require_all(
        inside, "table.box", "a box (top, left, height, width) inside its image", table.box,
        lambda i: f" in an image of {'x'.join(map(str, images.shapes[table.image[i], 1:].tolist()))}",
    )  # fmt: skip
    order = table.order
    drawn = order >= 0
    in_range = ((order >= -1) & (order <= 3)).flatten(1).all(1)
    once = torch.stack([(order == operation).sum(-1) <= 1 for operation in range(4)]).all(0).all(-1)
    no_gaps = (drawn[..., :-1] | ~drawn[..., 1:]).flatten(1).all(1)
    _require_all(
        in_range & once & no_gaps, "table.order", "each operation 0 to 3 at most once, then -1", order
    )
    _require_all(
        torch.isfinite(table.factor).flatten(1).all(1) & (table.factor[..., 3].abs() <= 1).all(-1),
        "table.factor", "finite factors, that of hue from -1 to 1", table.factor,
    )  # fmt: skip


def _check_patches(patches: tuple[Tensor, ...], num_patches: int) -> None:
    names = ("student_patches", "target_patches", "teacher_patches")
    for name, chosen in zip(names, patches, strict=True):
        if chosen.numel() and not (0 <= int(chosen.min()) and int(chosen.max()) < num_patches):
            raise ValueError(
                f"{name}: expected indices from 0 to {num_patches - 1}, got {int(chosen.min())} to "
                f"{int(chosen.max())}"
            )
        _require_all((chosen.diff(dim=1) > 0).all(1), name, "ascending indices in every crop", chosen)
    joined = torch.cat(patches, dim=1)
    times = joined.new_zeros((len(joined), num_patches), dtype=torch.uint8)
    times.scatter_add_(1, joined, torch.ones_like(joined, dtype=torch.uint8))
    shared = times.amax(1) > 1
    if bool(shared.any()):
        crop = int(shared.nonzero()[0])
        raise ValueError(
            f"{', '.join(names)}: expected disjoint sets, got patch {int(times[crop].argmax())} of crop "
            f"{crop} in more than one"
        )


def _check_statistics(mean: Tensor, std: Tensor) -> None:
    if not bool(torch.isfinite(mean).all()):
        raise ValueError(f"mean: expected finite numbers, got {mean.tolist()}")
    if not bool((torch.isfinite(std) & (std > 0)).all()):
        raise ValueError(f"std: expected finite numbers above 0, got {std.tolist()}")


def _require_all(fits: Tensor, name: str, expected: str, values: Tensor, more=lambda i: "") -> None:
    """ValueError about the first row that does not fit."""
    if not bool(fits.all()):
        i = int((~fits).nonzero()[0])
        raise ValueError(f"{name}[{i}]: expected {expected}, got {values[i].tolist()}{more(i)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compiled(
    images: SourceImages, table: CropTable, patches: tuple[Tensor, ...], crop_px: int, patch_px: int,
    mean: Tensor, std: Tensor, exact: bool, leading_rows: int, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    tensors = (*images, *table, *patches, mean, std)
    torch.ops.pera_fast.crop_patches(*(t.contiguous() for t in tensors), crop_px, patch_px, exact, *out)


@torch.no_grad()
def _reference(
    images: SourceImages, table: CropTable, patches: tuple[Tensor, ...], crop_px: int, patch_px: int,
    mean: Tensor, std: Tensor, exact: bool, leading_rows: int, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    rows = reference.crop_patches(
        images, table, *patches, crop_px=crop_px, patch_px=patch_px, mean=mean, std=std, exact=exact,
        leading_rows=leading_rows,
    )  # fmt: skip
    for to, computed in zip(out, rows, strict=True):
        to.copy_(computed)


_library.without_result("crop_patches")

_dispatch.register("crop_patches", "cuda", _compiled, _library.why_no_cuda)
_dispatch.register("crop_patches", "cpp", _compiled, _library.why_no_cpp)
_dispatch.register("crop_patches", "reference", _reference)
