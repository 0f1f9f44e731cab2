"""A file that exists is whole: it is written beside its place and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
