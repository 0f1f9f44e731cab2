"""Tables of a study as they are printed: the columns that 80 characters have room for; files have the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def show(console: Console, title: str, lines: Sequence[Sequence[str]], columns: Collection[str]) -> None:
    """lines: as for a page, the columns' names first; columns: the names of those to show."""
    head, *rows = lines
    shown = [place for place, name in enumerate(head) if name in columns]
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place in shown:  # names stay in one line, the heads of figures need not
        justify: Literal["left", "right"] = "left" if place == shown[0] else "right"
        table.add_column(plain(head[place]), justify=justify, overflow="fold", no_wrap=place in shown[:2])
    for row in rows:
        table.add_row(*(Text(plain(row[place])) for place in shown))
    console.print()
    console.print(table, highlight=False)


def tell(console: Console, heading: str, sentences: Sequence[str]) -> None:
    """Sentences under a heading, set in from it."""
    console.print()
    if heading:
        console.print(Text(plain(heading), style="bold"))
    for sentence in sentences:
        console.print(Padding(Text(plain(sentence)), (0, 0, 0, 2 if heading else 0)))


def plain(text: str) -> str:
    """Without Markdown's marks."""
    return text.replace("`", "").replace("**", "")
