"""Tables as commands print them: names and figures stay whole, also in 80 columns, where less is shown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAP = 2


def show(console: Console, title: str, lines: Sequence[Sequence[str]], least: Collection[str]) -> None:
    """lines: those of a Markdown table, the columns' names first; least: the columns that stay where not all fit."""
    head, *rows = [[plain(cell) for cell in line] for line in lines]
    least = {plain(name) for name in least}
    widths = [max(map(len, [*name.split(), *(row[i] for row in rows)]), default=0) for i, name in enumerate(head)]
    fit = sum(widths) + GAP * (len(widths) - 1) <= console.width
    shown = [place for place, name in enumerate(head) if fit or name in least]
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, GAP, 0, 0)
    )
    for place in shown:
        justify: Literal["left", "right"] = "left" if place == shown[0] else "right"
        table.add_column(head[place], justify=justify, overflow="fold", width=widths[place])
    for row in rows:
        table.add_row(*(Text(row[place]) for place in shown))
    console.print()
    console.print(table, highlight=False)


def tell(console: Console, sentences: Sequence[str], heading: str = "") -> None:
    """Sentences, set in from their heading where they have one."""
    console.print()
    if heading:
        console.print(Text(plain(heading), style="bold"))
    for sentence in sentences:
        console.print(Padding(Text(plain(sentence)), (0, 0, 0, 2 if heading else 0)))


def plain(text: str) -> str:
    """Without Markdown's marks."""
    return text.replace("`", "").replace("**", "")
