"""A file that exists is whole: it is written beside its place and renamed. And whether it could be written at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory


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


def try_folder(folder: Path) -> None:
    """OSError where nothing could be made in the folder, which may not be there yet. Leaves nothing behind.

    It tries: what a folder allows is not all that counts, /proc takes none and a disk may be read-only.
    """
    folder = folder.absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    with TemporaryDirectory(prefix=".dpsrl-", dir=nearest):
        pass
