"""JSON files of a study: a damaged one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpsrl.types import UserError


class Damaged(UserError):
    """A file is not what is kept under its name."""


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """What a JSON file holds. Damaged, with the remedy, where that is no object."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Damaged(f"{path} is cut short or broken: {remedy}")
    return found


def of_git(path: Path) -> str:
    """The remedy for a file that is in the repository."""
    return f"bring it back with `git checkout {path}`"
