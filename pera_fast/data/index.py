"""A scanned folder as columns on disk: millions of scenes, opened at once and shared between processes.

    index/
        index.json    format, root, the dtypes that rows refer to, unreadable files, checksums
        rows.bin      one row per scene, in path order; shard: 0, or 1 + bytes of its text that name its tar shard
        text.bin      what follows root in their paths, one after the other, as bytes

Rows and text are mapped into memory, so processes of a machine share what they read of them.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from pera_fast.data.shards import Place
from pera_fast.data.sources import DataError, Scene, SceneIndex, printable, scan

_FORMAT = 4
_COLUMNS = ("rows.bin", "text.bin")
_ROW = np.dtype(
    [
        ("end", "u8"), ("height", "u4"), ("width", "u4"), ("num_bands", "u2"), ("dtype", "u1"),
        ("shard", "u2"), ("start", "u8"), ("size", "u8"),
    ]
)  # fmt: skip


class SceneTable(Sequence[Scene]):
    """The scenes of an index, made when they are asked for. Raises DataError when it cannot be used."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self._facts: dict[str, Any] = json.loads((self.folder / "index.json").read_text())
            self._rows = np.memmap(self.folder / "rows.bin", _ROW, "r")
            self._text = np.memmap(self.folder / "text.bin", np.uint8, "r")
            is_whole = self._facts["format"] == _FORMAT and int(self._rows[-1]["end"]) == len(self._text)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"index: {printable(self.folder)} cannot be read: {error}") from None
        if not is_whole:
            raise DataError(
                f"index: expected format {_FORMAT}, whole, got another in {printable(self.folder)}: remove it"
            )
        self.root = os.fsdecode(bytes.fromhex(self._facts["root"]))
        self.bad = [(os.fsdecode(bytes.fromhex(path)), reason) for path, reason in self._facts["bad"]]

    def __reduce__(self) -> tuple[Any, ...]:
        return SceneTable, (self.folder,)  # another process maps the files, too

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Scene: ...
    @overload
    def __getitem__(self, place: slice) -> list[Scene]: ...
    def __getitem__(self, place: int | slice) -> Scene | list[Scene]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = range(len(self))[place]  # counts from the end, or an IndexError
        row = self._rows[number]
        start = int(self._rows[number - 1]["end"]) if number else 0
        text = self._text[start : int(row["end"])].tobytes()
        member = None
        if row["shard"]:
            shard = self.root + os.fsdecode(text[: int(row["shard"]) - 1])
            member = Place(shard, int(row["start"]), int(row["size"]))
        return Scene(
            path=self.root + os.fsdecode(text),
            place=member,
            height=int(row["height"]),
            width=int(row["width"]),
            num_bands=int(row["num_bands"]),
            dtype=self._facts["dtypes"][row["dtype"]],
        )

    def check(self) -> None:
        """Read it once, whole: a DataError if it is not as it was written."""
        for name in _COLUMNS:
            if _checksum(self.folder / name) != self._facts["crc32"][name]:
                raise DataError(f"index: {printable(self.folder / name)} is damaged; remove it to scan anew")

    @property
    def dtypes(self) -> list[str]:
        """Of the scenes, each once; the column "dtype" counts in them."""
        return list(self._facts["dtypes"])

    @property
    def checksum(self) -> int:
        return zlib.crc32(repr(sorted(self._facts["crc32"].items())).encode())

    def column(self, name: str) -> np.ndarray:
        """height, width, num_bands or dtype of every scene."""
        return self._rows[name]


def _checksum(path: Path) -> int:
    """CRC-32, read piece by piece, so that the file does not count as this process's memory."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            found = zlib.crc32(piece, found)
    return found


def _after(root: str, path: str) -> bytes:
    if not path.startswith(root):
        raise ValueError(f"scenes: expected paths that begin with {printable(root)}, got {printable(path)}")
    return os.fsencode(path[len(root) :])


def window_counts(scenes: Sequence[Scene], window_px: int) -> np.ndarray:
    """How many windows fit each scene, partly filled ones included, int64 [scenes]."""
    if isinstance(scenes, SceneTable):
        height, width = (scenes.column(name).astype(np.int64) for name in ("height", "width"))
    else:
        height, width = (
            np.array([getattr(s, name) for s in scenes], np.int64) for name in ("height", "width")
        )
    return -(-height // window_px) * -(-width // window_px)


def dtype_codes(scenes: Sequence[Scene]) -> tuple[list[str], np.ndarray]:
    """(dtypes, each once; every scene's place among them)."""
    if isinstance(scenes, SceneTable):
        return scenes.dtypes, scenes.column("dtype")
    names = sorted({s.dtype for s in scenes})
    return names, np.array([names.index(s.dtype) for s in scenes])


def fingerprint(scenes: Sequence[Scene], root: str | os.PathLike[str]) -> int:
    """A checksum of the scenes' paths below root, sizes and dtypes: of the columns, where they are on disk."""
    if isinstance(scenes, SceneTable):
        return scenes.checksum
    found = 0
    for s in scenes:
        facts = f"\0{s.height} {s.width} {s.dtype}\0".encode()
        found = zlib.crc32(_after(os.fspath(root), s.path) + facts, found)
    return found


def write(
    folder: str | os.PathLike[str], root: str, scenes: Iterable[Scene], bad: Sequence[tuple[str, str]]
) -> None:
    """Write an index, whole or not at all. scenes: in path order, below root."""
    target = Path(folder)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    dtypes: dict[str, int] = {}
    end = 0
    try:
        partial.mkdir(parents=True)
        with (partial / "rows.bin").open("wb") as rows, (partial / "text.bin").open("wb") as text:
            for scene in scenes:
                place = scene.place or Place("", 0, 0)
                end += text.write(_after(root, scene.path))
                row = (
                    end, scene.height, scene.width, scene.num_bands, dtypes.setdefault(scene.dtype, len(dtypes)),
                    1 + len(_after(root, place.shard)) if scene.place else 0, place.start, place.size,
                )  # fmt: skip
                rows.write(np.array(row, _ROW).tobytes())
        facts = {
            "format": _FORMAT,
            "root": os.fsencode(root).hex(),
            "dtypes": list(dtypes),
            "bad": [(os.fsencode(path).hex(), reason) for path, reason in bad],
            "crc32": {name: _checksum(partial / name) for name in _COLUMNS},
        }
        (partial / "index.json").write_text(json.dumps(facts))
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise DataError(f"index: cannot write {printable(target)}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def scan_or_open(
    root: str | os.PathLike[str],
    index: str | os.PathLike[str] | None,
    max_bad_share: float,
    is_checked: bool = False,
) -> SceneIndex:
    """The scenes below root, from `index` if it is there; where it is not yet, they are scanned and it is written.

    An index is taken as it is: files that came or went since are not looked for. Raises DataError as `scan` does,
    and for an index that cannot be read, is damaged (looked for unless is_checked) or is of another folder.
    """
    if index is None:
        return scan(root, max_bad_share)
    if not Path(index).exists():
        found = scan(root, max_bad_share)
        write(index, os.fspath(root), found.scenes, found.bad)
    table = SceneTable(index)
    if not is_checked:
        table.check()
    if os.path.realpath(table.root) != os.path.realpath(root):
        raise DataError(
            f"index: expected one of {printable(root)}, got one of {printable(table.root)} in {printable(index)}"
        )
    return SceneIndex(table, table.bad)
