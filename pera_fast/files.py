"""Files of a user's, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from pera_fast.data.sources import DataError, printable


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`; until then, and if it fails, what was there stays.

    DataError when it cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot write {printable(target)}: {reason}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all. DataError when it cannot be."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
