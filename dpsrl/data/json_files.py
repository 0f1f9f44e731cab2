"""JSON lines and JSON lists, strictly: a bad row is its number and a reason, and no other row is touched by it."""

from __future__ import annotations

import codecs
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dpsrl.data.files import MAX_ROW_BYTES, TOO_LARGE, first_line, held_still, likely_kind
from dpsrl.types import UserError

MAX_LIST_BYTES = 1 << 30  # of a .json file, which is parsed in one piece
PIECE_BYTES = 1 << 16


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number from 1, the object or why there is none), without blank lines."""
    with held_still(path), path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            if line is None:
                yield number, TOO_LARGE
            elif line := line.removeprefix(codecs.BOM_UTF8).strip():  # some editors begin a file with the mark
                yield number, _object(line)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines of at most MAX_ROW_BYTES; None for a longer one, of which no more than that is held.

    What is appended meanwhile is not read, so that a file that grows as fast as it is read has an end.
    """
    left = os.fstat(file.fileno()).st_size
    while line := file.readline(min(left, MAX_ROW_BYTES + 1)):
        left -= len(line)
        if len(line) <= MAX_ROW_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(min(left, PIECE_BYTES))
            left -= len(line)
        yield None


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):  # also a number of thousands of digits
        return "not JSON"
    return item if isinstance(item, dict) else "not a JSON object"


def json_list(path: Path) -> list[dict[str, Any] | str]:
    """The objects of a list, or why an item is none. UserError where the file holds no list."""
    with held_still(path):
        size = path.stat().st_size
        if size > MAX_LIST_BYTES:
            raise UserError(
                f"{path} has {size / 2**30:.1f} GiB, and a .json file is parsed in one piece: write one object a "
                "line into a .jsonl file"
            )
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        return []
    try:
        items = _parsed(content.decode())
    except (ValueError, RecursionError) as error:
        hint = likely_kind(path) or ": mend it, or name it .jsonl if it has one object a line"
        raise UserError(f"{path} is not JSON ({first_line(error)}){hint}") from error
    if not isinstance(items, list):
        raise UserError(f"{path} holds no list of objects: give one, or one object a line in a .jsonl file")
    return [item if isinstance(item, dict) else "not a JSON object" for item in items]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # one number of thousands of digits, which must not cost the other rows
        return json.loads(text, parse_int=_whole_number)


def _whole_number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return math.inf  # no answer, as 1e999 is none
