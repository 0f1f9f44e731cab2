"""A file that exists is whole: it is written beside its place and renamed. And whether it could be written at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from dpsrl.types import UserError


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Where to write in the meantime. After an error what was at `path` is there as before, and nothing else is."""
    partial = path.with_name(path.name + ".new")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def written_to(folder: Path, key: str) -> Iterator[None]:
    """UserError that names the key which gave the folder, where something inside could not be written."""
    try:
        yield
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise UserError(f"{key}={folder} cannot be written to ({why}): make it writable or choose another") from error


def check_writable(folder: Path, key: str) -> None:
    """UserError where nothing could be made in the folder, which may not be there yet. Leaves nothing behind.

    It tries: what a folder allows is not all that counts, /proc takes none and a disk may be read-only.
    """
    place = folder.absolute()
    with written_to(folder, key):
        nearest = next(place for place in (place, *place.parents) if place.exists())
        with TemporaryDirectory(prefix=".dpsrl-", dir=nearest):
            pass
