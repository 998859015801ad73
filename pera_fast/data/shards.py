"""Tar shards, as webdataset and `tar` write them: their members are read in any order, at their place in the file.

webdataset's own reader streams a shard from its start, and which image comes when then depends on the number of
ranks and workers; by its place an image is found again whatever the number, and after a restart.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

EXTENSIONS = (".tar",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Place(NamedTuple):
    """Where the bytes of an image lie."""

    shard: str
    start: int
    size: int


def members(shard: str) -> Iterator[tuple[str, Place | None]]:
    """(name, place) of every file in a shard, as they are stored, and of links, which have no place of their own. Their
    bytes are not read.

    tarfile.TarError or OSError at the place where the shard is damaged, after what came before it.
    """
    with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
        length = os.fstat(file.fileno()).st_size
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # kept for extraction, which is not done here
            if member.issym() or member.islnk():
                yield member.name, None
            if not member.isreg():
                continue
            if member.issparse():
                raise tarfile.TarError(f"member {member.name} is stored sparse")
            if member.offset_data + member.size > length:
                raise tarfile.TarError(f"cut off within member {member.name}")
            yield member.name, Place(shard, member.offset_data, member.size)
        # tarfile takes a header it cannot read for the end, which really is a block of zeros.
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.TarError(f"no header at byte {tar.offset}")
        while rest := file.read(1 << 20):  # zeros to the end of a record, but for archives that were joined
            if rest.strip(b"\0"):
                raise tarfile.TarError(
                    f"more after its end at byte {tar.offset}: another archive was joined to it"
                )


class _Part(io.RawIOBase):
    """Some bytes of an open file as a file."""

    def __init__(self, file: IO[bytes], place: Place) -> None:
        self._file, self._place, self._at = file, place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        count = max(0, min(len(buffer), self._place.size - self._at))
        self._file.seek(self._place.start + self._at)
        read = self._file.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._at += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def open_image(path: str, place: Place | None) -> IO[bytes]:
    """The bytes of an image: a file of its own, or at its place in a shard."""
    if place is None:
        return open(path, "rb")
    return io.BufferedReader(_Part(open(place.shard, "rb", buffering=0), place))
