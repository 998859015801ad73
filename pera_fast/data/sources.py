"""Finding images in folders and tar shards and reading windows of them: JPEG, PNG, TIFF and GeoTIFF, 8 bit to float.

What is inside a file is decided by its first bytes, not by its extension, so a PNG named .jpg is read as PNG.
Sidecar files (.aux.xml, .msk, .ovr) are not looked at, nor are scale and offset tags: what counts is the
image file itself. EXIF orientation is ignored on purpose: every crop is flipped at random anyway, and the
camera's idea of "up" means nothing in an overhead view.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import struct
import tarfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from pera_fast.data import shards
from pera_fast.data.shards import Place

try:
    import simplejpeg  # 1.1 to 1.4 times Pillow's speed, the same pixels (bench_data.py)
except ImportError:
    simplejpeg = None

LOG = logging.getLogger("pera_fast")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
# A JPEG or PNG is decoded whole, and a TIFF block too: more pixels than this are a decompression bomb.
MAX_DECODED_PIXELS = 2**30

_HEADER_THREADS = 16  # headers wait for the disk, not for the processor
_HEADER_BATCH = 4096  # bounds the futures alive at once in folders of millions
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_READ_AS = dict.fromkeys(
    ("int8", "int16", "uint32", "int32", "uint64", "int64", "float16", "float64"), "float32"
) | {name: name for name in ("uint8", "uint16", "float32")}
_GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # else every open lists a folder of maybe millions
    "GDAL_PAM_ENABLED": "NO",  # never read or write .aux.xml next to the user's data
}
_REASON_CHARS = 160


class DataError(ValueError):
    """The data cannot be used; the message is one sentence for the user."""

    exit_code = 2


class UnreadableImage(Exception):
    """One image file cannot be read. `path` and a short `reason` say which and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that it survives pickling between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


@dataclass(frozen=True)
class Scene:
    """What the header of one image says.

    `num_bands` counts colour bands after interpretation: grey 1, RGB and palette 3, alpha not counted.
    `dtype` is the dtype of the pixels that `read_window` returns: "uint8", "uint16" or "float32".
    `place` is where a member of a tar shard lies, whose `path` is the shard's and its own name in it.
    """

    path: str
    height: int
    width: int
    num_bands: int
    dtype: str
    place: Place | None = None


@dataclass(frozen=True)
class SceneIndex:
    """The readable `scenes` of a folder in path order, and (path, reason) of each `bad` file."""

    scenes: Sequence[Scene]
    bad: list[tuple[str, str]]


def printable(path: str | os.PathLike[str]) -> str:
    """`path` with bytes that are not UTF-8 written as escapes, so that every log and terminal takes it."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")


# Finding files


def list_images(root: str | os.PathLike[str], extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Paths of the files with `extensions`, in any case, at any depth under `root`, sorted; or `root` if a file.

    Hidden files and folders (leading dot) are skipped. Symbolic links to folders are followed, each folder
    being visited once. Links to files that are gone are listed, so that they count as unreadable.

    Raises DataError if `root` does not exist, is another kind of file, or holds no image.
    """
    root = os.fspath(root)
    try:
        mode = os.stat(root).st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {printable(root)}: {_reason(error, root)}") from error
    if stat.S_ISREG(mode) and root.lower().endswith(extensions):
        return [root]
    if not stat.S_ISDIR(mode):
        raise DataError(f"{printable(root)} is neither a folder nor a JPEG, PNG or TIFF image")
    paths = sorted(_walk(root, extensions))
    if not paths:
        raise DataError(f"no image ({', '.join(extensions)}) found under {printable(root)}")
    return paths


def _walk(root: str, extensions: tuple[str, ...]) -> Iterator[str]:
    """Their paths in no particular order, each folder once, real folders before linked ones."""
    seen: set[tuple[int, int]] = set()
    real = [root]
    linked: list[str] = []
    while real or linked:
        folder = real.pop() if real else linked.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            LOG.warning("skipped folder %s: %s", printable(folder), _reason(error, folder))
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_dir(entry):
                (linked if entry.is_symlink() else real).append(entry.path)
            elif entry.name.lower().endswith(extensions) and _is_file_or_broken_link(entry):
                yield entry.path


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    """Sockets and pipes are left out: opening a pipe would wait for ever."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def scan(root: str | os.PathLike[str], max_bad_share: float = 0.1, log: logging.Logger = LOG) -> SceneIndex:
    """Read the header of every image under `root`, in tar shards, too; log each unreadable file with its reason.

    Images come in the order of their paths, those of a shard as they are stored in it.

    Raises DataError if there is no image, none is readable, or more than `max_bad_share` of the files
    (0 to 1) are unreadable.
    """
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share: expected a share from 0 to 1, got {max_bad_share}")
    paths = list_images(root, (*EXTENSIONS, *shards.EXTENSIONS, *shards.COMPRESSED))
    scenes: list[Scene] = []
    bad: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        for start in range(0, len(paths), _HEADER_BATCH):
            for result in chain.from_iterable(pool.map(_scenes_of, paths[start : start + _HEADER_BATCH])):
                if isinstance(result, Scene):
                    scenes.append(result)
                    continue
                log.warning("skipped %s: %s", printable(result.path), result.reason)
                bad.append((result.path, result.reason))
    found = len(scenes) + len(bad)
    if found == 0:
        raise DataError(f"no image ({', '.join(EXTENSIONS)}) found in the tar shards under {printable(root)}")
    if bad and (not scenes or len(bad) > max_bad_share * found):
        count = "none" if not scenes else f"only {len(scenes)}"
        allowed = f" (at most {max_bad_share:.0%} may be unreadable)" if scenes else ""
        first = f"the first bad one is {printable(bad[0][0])}: {bad[0][1]}"
        raise DataError(
            f"{count} of the {found} images under {printable(root)} can be read{allowed}; {first}"
        )
    return SceneIndex(scenes, bad)


_HIDDEN = re.compile(r"(^|/)\.(?!\.?(/|$))")  # a part of a path that begins with a dot, but . and ..


def _scenes_of(path: str) -> list[Scene | UnreadableImage]:
    """The scene of an image's file, or those in a shard, and what cannot be read of it."""
    if path.lower().endswith(shards.COMPRESSED):
        return [UnreadableImage(path, "a compressed tar can only be read from its start: decompress it")]
    if not path.lower().endswith(shards.EXTENSIONS):
        return [_scene_or_error(path, None)]
    found: list[Scene | UnreadableImage] = []
    try:
        for name, place in shards.members(path):
            # Hidden files are left out, as in folders: macOS's tar adds one to each.
            if not name.lower().endswith(EXTENSIONS) or _HIDDEN.search(name):
                continue
            member = f"{path}/{name}"
            found.append(
                UnreadableImage(
                    member, "a link in a tar shard: write it with `tar --dereference --hard-dereference`"
                )
                if place is None
                else _scene_or_error(member, place)
            )
    except (tarfile.TarError, OSError, ValueError) as error:
        found.append(UnreadableImage(path, _reason(error, path)))
    return found


def _scene_or_error(path: str, place: Place | None) -> Scene | UnreadableImage:
    try:
        return open_scene(path, place)
    except UnreadableImage as error:
        return error


# Headers


def open_scene(path: str | os.PathLike[str], place: Place | None = None) -> Scene:
    """Read the header of one image, not its pixels. place: of a member of a tar shard.

    Raises UnreadableImage: no such file, empty, truncated header, unsupported kind or dtype, or too large.
    """
    path = os.fspath(path)
    with _unreadable_on_error(path):
        kind = _kind_of(path, place)
        if kind in ("TIFF", "PNG16"):
            with open_raster(path, place, kind) as dataset:
                layout = _layout_of(dataset, path)
                return Scene(path, dataset.height, dataset.width, layout.num_bands, layout.dtype, place)
        with shards.open_image(path, place) as file:
            image = _open_pillow(file, kind, path)
            num_bands = 1 if image.mode in _GREY_MODES else 3
            return Scene(path, image.height, image.width, num_bands, "uint8", place)


def _kind_of(path: str, place: Place | None) -> str:
    """ "JPEG", "PNG", "PNG16" or "TIFF", from the first bytes."""
    with shards.open_image(path, place) as file:
        head = file.read(29)
    if not head:
        raise UnreadableImage(path, "empty file")
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(_TIFF_MAGIC):
        return "TIFF"
    if not head.startswith(_PNG_MAGIC):
        raise UnreadableImage(path, "not a JPEG, PNG or TIFF file")
    if len(head) < 29:
        raise UnreadableImage(path, "truncated PNG header")
    width, height, bit_depth = struct.unpack(">IIB", head[16:25])
    _check_size(path, height, width)  # before any decoder reserves memory for it
    return "PNG16" if bit_depth == 16 else "PNG"


def _check_size(path: str, height: int, width: int) -> None:
    if height <= 0 or width <= 0:
        raise UnreadableImage(path, f"image of {width}x{height} pixels")
    if height * width > MAX_DECODED_PIXELS:
        limit = f"{MAX_DECODED_PIXELS} that are decoded at once"
        raise UnreadableImage(path, f"{width}x{height} pixels are more than the {limit}; use a tiled GeoTIFF")


@contextmanager
def _unreadable_on_error(path: str) -> Iterator[None]:
    """Decoders raise nearly anything on corrupt input; all of it becomes UnreadableImage."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(path, _reason(error, path)) from error


def _reason(error: BaseException, path: str) -> str:
    """One short line for `error`, without the path (the caller names it)."""
    while error.__cause__ is not None:  # rasterio says "see previous exception": GDAL's words are there
        error = error.__cause__
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.replace(path, "file").removeprefix(f"{os.path.basename(path)}: ")
    text = " ".join(text.split()) or type(error).__name__
    return printable(text)[:_REASON_CHARS]


# JPEG and 8-bit PNG through Pillow

_GREY_MODES = ("1", "L", "LA")
_CROP_PIXELS = 2**24  # above, cut the array instead: crop() would warn of a decompression bomb


def _open_pillow(file: Any, kind: str, path: str) -> ImageFile.ImageFile:
    """Parse the header. Image.open is avoided: its size limit is one global for the whole process."""
    image = JpegImageFile(file) if kind == "JPEG" else PngImageFile(file)
    _check_size(path, image.height, image.width)
    return image


def _decode(path: str, place: Place | None, kind: str) -> Image.Image | np.ndarray:
    """A JPEG or PNG as an image of Pillow's, or as uint8 [height, width, 1 or 3] where that is quicker."""
    with shards.open_image(path, place) as file:
        data = file.read()
    # Pillow notices a JPEG that just stops, but decodes one whose tail is zeros (a download into a
    # preallocated file) to grey: require the end marker after the last scan began.
    if kind == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise UnreadableImage(path, "truncated JPEG: no end-of-image marker")
    if kind == "JPEG" and simplejpeg and (pixels := _decode_simplejpeg(data, path)) is not None:
        return pixels
    image = _open_pillow(BytesIO(data), kind, path)
    image.load()
    return image


def _decode_simplejpeg(data: bytes, path: str) -> np.ndarray | None:
    """uint8 [height, width, 1 or 3], bit for bit what Pillow decodes; None: let Pillow decide.

    It is the stricter of the two: what it refuses, and colours that it converts otherwise, are Pillow's.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "RGB", "Gray"):
            return None
        _check_size(path, height, width)
        return simplejpeg.decode_jpeg(data, "GRAY" if space == "Gray" else "RGB")
    except (ValueError, KeyError):  # KeyError: a subsampling that it has no name for
        return None


def _decoded_window(image: Image.Image | np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Colour bands [1 or 3, height, width] uint8 and validity [height, width] of a decoded image."""
    top, left, bottom, right = _corners(window)
    if isinstance(image, np.ndarray):
        channels = np.ascontiguousarray(image[top:bottom, left:right].transpose(2, 0, 1))
        return channels, np.ones(channels.shape[1:], dtype=bool)
    transparent = image.has_transparency_data
    mode = ("LA" if transparent else "L") if image.mode in _GREY_MODES else ("RGBA" if transparent else "RGB")
    cropped = (bottom - top) * (right - left) <= _CROP_PIXELS
    if cropped and (right - left, bottom - top) != image.size:
        image = image.crop((left, top, right, bottom))
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    pixels = pixels if cropped else pixels[top:bottom, left:right]
    channels = np.ascontiguousarray(np.moveaxis(pixels[..., None] if pixels.ndim == 2 else pixels, -1, 0))
    if transparent:
        return channels[:-1], channels[-1] != 0
    return channels, np.ones(channels.shape[1:], dtype=bool)


# TIFF and 16-bit PNG through rasterio

_WARNINGS_LOCK = threading.Lock()


@dataclass(frozen=True)
class _Layout:
    """How the bands of a dataset are to be understood; band numbers are GDAL's, from 1."""

    colour: tuple[int, ...]
    alpha: int | None
    palette: np.ndarray | None  # [values, RGBA] uint8
    dtype: str

    @property
    def num_bands(self) -> int:
        return len(self.colour) if self.palette is None else 3


@contextmanager
def open_raster(path: str, place: Place | None = None, kind: str = "TIFF") -> Iterator[Any]:
    """A TIFF or PNG as rasterio's dataset; nothing but its own file is read. Raises UnreadableImage, rasterio's errors.

    place: where it lies in a tar shard.
    """
    _silence_not_georeferenced()
    with _gdal_path(path, place) as name, rasterio.Env(**_GDAL_OPTIONS):
        with rasterio.open(name, driver="GTiff" if kind == "TIFF" else "PNG") as dataset:
            _check_raster(dataset, path)
            yield dataset


@contextmanager
def _gdal_path(path: str, place: Place | None) -> Iterator[Path]:
    """GDAL takes UTF-8 names only; any other file is handed over open. A Path is never taken for a URL."""
    file = path if place is None else place.shard
    part = "" if place is None else f"/vsisubfile/{place.start}_{place.size},"
    try:
        file.encode("utf-8")
    except UnicodeEncodeError:
        with open(file, "rb") as opened:
            yield Path(f"{part}/dev/fd/{opened.fileno()}")
    else:
        yield Path(part + (os.path.abspath(file) if part else file))


def _silence_not_georeferenced() -> None:
    """rasterio warns at each open of a plain TIFF. (warnings.catch_warnings is not safe with threads.)

    Asked at each open, because test runners and notebooks put their own filters back in front.
    """
    with _WARNINGS_LOCK:  # adding a filter anew takes it out for a moment
        for action, message, category, module, _ in warnings.filters:
            if message is None and module is None and issubclass(NotGeoreferencedWarning, category):
                if action == "ignore":
                    return
                break
        warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def _check_raster(dataset: Any, path: str) -> None:
    if dataset.count == 0 or dataset.height <= 0 or dataset.width <= 0:
        size = f"{dataset.width}x{dataset.height} pixels"
        raise UnreadableImage(path, f"image of {size} in {dataset.count} bands")
    for block_height, block_width in dataset.block_shapes[:1]:
        if block_height * block_width > MAX_DECODED_PIXELS:
            raise UnreadableImage(path, f"one block holds {block_width}x{block_height} pixels; tile the file")


def _layout_of(dataset: Any, path: str) -> _Layout:
    dtype = dataset.dtypes[0]
    if dtype not in _READ_AS:
        raise UnreadableImage(path, f"unsupported pixel type {dtype}")
    meaning = dataset.colorinterp
    if meaning[0] == ColorInterp.cyan:
        raise UnreadableImage(path, "CMYK TIFF is not supported")
    alpha = next((band for band, what in enumerate(meaning, 1) if what == ColorInterp.alpha), None)
    colour = tuple(band for band, what in enumerate(meaning, 1) if what != ColorInterp.alpha)
    if not colour:
        raise UnreadableImage(path, "no band besides alpha")
    if meaning[0] != ColorInterp.palette or dtype not in ("uint8", "uint16"):
        return _Layout(colour, alpha, None, _READ_AS[dtype])
    table = np.zeros((256 if dtype == "uint8" else 65536, 4), dtype=np.uint8)
    for value, rgba in dataset.colormap(1).items():
        table[value] = rgba
    return _Layout(colour[:1], alpha, table, "uint8")


def _raster_window(
    dataset: Any, layout: _Layout, bands: tuple[int, ...], window: Window, nodata: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """GDAL bands `bands` [len, height, width] in the layout's dtype, and validity [height, width]."""
    pixels = dataset.read(list(bands), window=window)
    valid = np.ones(pixels.shape[1:], dtype=bool)
    flags = dataset.mask_flag_enums[bands[0] - 1]
    if layout.alpha is not None and layout.alpha not in bands:
        valid &= dataset.read(layout.alpha, window=window) != 0
    elif MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
        valid &= dataset.read_masks(bands[0], window=window) != 0
    pixels, valid = _drop_invalid(pixels, valid, nodata, layout.dtype if layout.palette is None else None)
    if layout.palette is None:
        return pixels, valid
    colours = layout.palette[pixels[0]]
    return np.moveaxis(colours[..., :3], -1, 0), valid & (colours[..., 3] != 0)


def _drop_invalid(
    pixels: np.ndarray, valid: np.ndarray, nodata: float | None, dtype: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cast [C, height, width] to `dtype` (None: as is) and mark pixels where any band has no value.

    The nodata value is compared before the cast, in the file's own type, where it is exact. Floats without
    a value become 0, so that no NaN can reach the arithmetic; integers keep what the file says.
    """
    if nodata is None and pixels.dtype.kind in "iu" and dtype in (None, str(pixels.dtype)):
        return pixels, valid
    missing = np.zeros(pixels.shape, dtype=bool)
    with np.errstate(over="ignore", invalid="ignore"):
        if nodata is not None and np.isfinite(nodata):
            whole = float(nodata).is_integer() and pixels.dtype.kind in "iu"
            missing |= pixels == (int(nodata) if whole else nodata)
        pixels = pixels if dtype is None else pixels.astype(dtype, copy=False)
        if pixels.dtype.kind == "f":
            missing |= ~np.isfinite(pixels)
            pixels = np.where(missing, np.zeros((), pixels.dtype), pixels)
    return pixels, valid & ~missing.any(axis=0)


# Windows


def read_window(
    scene: Scene,
    top: int,
    left: int,
    height: int,
    width: int,
    *,
    bands: tuple[int, ...] | None,
    in_bands: int,
    nodata: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [in_bands, height, width] in `scene.dtype` and validity [height, width] bool of one window.

    bands: band numbers from 1, as GDAL counts them; None takes the first `in_bands` colour bands and repeats
        a single band. A TIFF's alpha band asked for by number is read as data, since 4-band aerial TIFFs
        often have their infrared band marked as alpha.
    nodata: value without data; None takes the file's own tag.

    A pixel is valid if no band of it is nodata, NaN or infinite and neither mask nor alpha hides it.
    Floats without a value are returned as 0. TIFFs are read by block, other files are decoded whole.

    Raises ValueError for a window outside the image or bad `bands`; UnreadableImage if the file cannot be
    decoded or has too few bands.
    """
    windows = [(top, left, height, width)]
    return next(read_windows(scene, windows, bands=bands, in_bands=in_bands, nodata=nodata))


def read_windows(
    scene: Scene,
    windows: Iterable[Sequence[int]],
    *,
    bands: tuple[int, ...] | None,
    in_bands: int,
    nodata: float | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`read_window` for several (top, left, height, width) of one scene, opening or decoding it once."""
    checked = [_checked_window(scene, *window) for window in windows]
    _check_bands(bands, in_bands)
    with _unreadable_on_error(scene.path):
        kind = _kind_of(scene.path, scene.place)
    read = _read_raster if kind in ("TIFF", "PNG16") else _read_decoded
    return read(scene, kind, checked, bands, in_bands, nodata)


def _read_raster(
    scene: Scene,
    kind: str,
    windows: list[Window],
    bands: tuple[int, ...] | None,
    in_bands: int,
    nodata: float | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with _unreadable_on_error(scene.path), open_raster(scene.path, scene.place, kind) as dataset:
        layout = _layout_of(dataset, scene.path)
        _check_unchanged(scene, dataset.height, dataset.width, layout.dtype)
        if layout.palette is not None:
            chosen, picked = layout.colour, _choose(scene, (1, 2, 3), bands, in_bands, 3)
        else:
            chosen = picked = _choose(scene, layout.colour, bands, in_bands, dataset.count)
        for window in windows:
            missing = dataset.nodata if nodata is None else nodata
            pixels, valid = _raster_window(dataset, layout, chosen, window, missing)
            if layout.palette is not None:
                pixels = pixels[[band - 1 for band in picked]]
            yield np.ascontiguousarray(pixels), valid


def _read_decoded(
    scene: Scene,
    kind: str,
    windows: list[Window],
    bands: tuple[int, ...] | None,
    in_bands: int,
    nodata: float | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with _unreadable_on_error(scene.path):
        image = _decode(scene.path, scene.place, kind)
        if isinstance(image, np.ndarray):
            height, width, num_bands = image.shape
        else:
            height, width, num_bands = image.height, image.width, 1 if image.mode in _GREY_MODES else 3
        _check_unchanged(scene, height, width, "uint8")
        colour = tuple(range(1, num_bands + 1))
        picked = [band - 1 for band in _choose(scene, colour, bands, in_bands, len(colour))]
        for window in windows:
            pixels, valid = _decoded_window(image, window)
            pixels = pixels if picked == list(range(len(pixels))) else pixels[picked]
            pixels, valid = _drop_invalid(pixels, valid, nodata, None)
            yield np.ascontiguousarray(pixels), valid


def _checked_window(scene: Scene, top: int, left: int, height: int, width: int) -> Window:
    for name, start, size, limit in (("top", top, height, scene.height), ("left", left, width, scene.width)):
        extent = "height" if name == "top" else "width"
        if size < 1:
            raise ValueError(f"{extent}: expected at least 1, got {size}")
        if start < 0 or start + size > limit:
            raise ValueError(
                f"{name}: expected a window inside 0..{limit} ({extent} of the image), "
                f"got {start}..{start + size}"
            )
    return Window(left, top, width, height)


def _corners(window: Window) -> tuple[int, int, int, int]:
    """top, left, bottom, right"""
    top, left = window.row_off, window.col_off
    return top, left, top + window.height, left + window.width


def _check_bands(bands: tuple[int, ...] | None, in_bands: int) -> None:
    if in_bands < 1:
        raise ValueError(f"in_bands: expected at least 1, got {in_bands}")
    if bands is not None and len(bands) != in_bands:
        raise ValueError(f"bands: expected {in_bands} (in_bands) band numbers, got {tuple(bands)}")
    if bands is not None and min(bands) < 1:
        raise ValueError(f"bands: expected band numbers from 1, got {tuple(bands)}")


def _choose(
    scene: Scene, colour: tuple[int, ...], bands: tuple[int, ...] | None, in_bands: int, count: int
) -> tuple[int, ...]:
    """The in_bands band numbers to read, out of the `colour` bands of an image with `count` in all."""
    if bands is not None:
        if max(bands) > count:
            raise UnreadableImage(scene.path, f"band {max(bands)} asked for, the image has {count}")
        return tuple(bands)
    if len(colour) == 1:
        return colour * in_bands
    if len(colour) < in_bands:
        hint = "" if count == len(colour) else " (and alpha; name that band to use it as data)"
        raise UnreadableImage(scene.path, f"{in_bands} bands asked for, the image has {len(colour)}{hint}")
    return colour[:in_bands]


def _check_unchanged(scene: Scene, height: int, width: int, dtype: str) -> None:
    if (height, width, dtype) != (scene.height, scene.width, scene.dtype):
        raise UnreadableImage(
            scene.path,
            f"changed since it was indexed: {scene.width}x{scene.height} {scene.dtype} is now "
            f"{width}x{height} {dtype}",
        )
