"""Tables in a page of the guide: `<!-- KIND: NAME -->` and `<!-- /KIND -->` stand around what a command puts there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def fill_marks(page: str, kind: str, text_of: Callable[[str], str | None]) -> str:
    """The page with what `text_of` gives for each name between its marks; where that is None, it stays as it is."""
    marked = re.compile(rf"(<!-- {kind}: ([\w/]+) -->\n).*?(<!-- /{kind} -->)", re.DOTALL)

    def put(match: re.Match[str]) -> str:
        text = text_of(match[2])
        return match[0] if text is None else f"{match[1]}\n{text}\n\n{match[3]}"

    return marked.sub(put, page)


def markdown_of(lines: Sequence[Sequence[str]]) -> str:
    """A table, its columns' names first."""
    head, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])
