"""Files of a user's, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from safetensors import SafetensorError

from pera_fast.data.sources import DataError, printable


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`; until then, and if it fails, what was there stays.

    It lies in a folder of its own, since libraries write files beside it. DataError when something cannot be written.
    """
    target = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            partial = Path(folder) / "whole"
            yield partial
            partial.replace(target)
    except (OSError, SafetensorError, RasterioError, CPLE_BaseError) as error:
        raise DataError(f"cannot write {printable(target)}: {one_line(error)}") from None


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all. DataError when it cannot be."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def one_line(error: Exception) -> str:
    """What the error says, without the file's name."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())
