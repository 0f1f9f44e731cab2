"""What holds for every data file: how large a row may be, and that a file stays as it is while it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpsrl.types import UserError

MAX_ROW_BYTES = 4 << 20
TOO_LARGE = "larger than 4 MiB"

_KINDS = [
    (b"PAR1", ".parquet", "a Parquet file: name it .parquet"),
    (b"ARROW1", ".arrow", "an Arrow file: name it .arrow"),
    (b"\x1f\x8b", "", "compressed by gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "", "compressed by zstd: unpack it"),
    (b"PK\x03\x04", "", "a zip archive: unpack it"),
    (b"\xff\xfe", "", "UTF-16 text: write it as UTF-8"),
    (b"\xfe\xff", "", "UTF-16 text: write it as UTF-8"),
    (b"version https://git-lfs", "", "a pointer of Git LFS: fetch the file with git lfs pull"),
]


@contextmanager
def held_still(path: Path) -> Iterator[None]:
    """UserError where the file cannot be read, or was written to or exchanged within the block."""
    before = stamp(path)
    try:
        yield
    except Exception as error:
        if stamp(path) != before:
            raise UserError(_changed(path)) from error
        if isinstance(error, OSError):
            raise UserError(
                f"{path} cannot be read ({first_line(error)}): check its disk and its permissions"
            ) from error
        raise
    if stamp(path) != before:
        raise UserError(_changed(path))


def _changed(path: Path) -> str:
    return f"{path} changed while it was read: start again when nothing writes to it"


def stamp(path: Path) -> tuple[int, ...]:
    """Another one when the file has been written to or exchanged; () where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def likely_kind(path: Path) -> str:
    """`; it is a Parquet file: name it .parquet`, where the first bytes are those of another format, else nothing."""
    try:
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError:
        return ""
    words = [words for magic, suffix, words in _KINDS if head.startswith(magic) and path.suffix != suffix]
    return f"; it is {words[0]}" if words else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
