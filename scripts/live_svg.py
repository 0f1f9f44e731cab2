"""Draws docs/live.svg, the live panel in the middle of a run: python scripts/live_svg.py RUN_FOLDER [STEP]."""

import io
import re
import sys
from pathlib import Path

import psutil
from rich.console import Console

from dpsrl.metrics import read_lines
from dpsrl.panel import Figures, Stage, View
from dpsrl.usage import GIB, Machine

COLUMNS, LINES = 80, 24
FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"  # whatever the reader has: nothing is fetched


def main() -> None:
    folder = Path((sys.argv + [""])[1])
    if not (folder / "metrics.jsonl").is_file():
        sys.exit(f"live_svg: {folder}/metrics.jsonl is not there; {__doc__}")
    records, _ = read_lines(folder / "metrics.jsonl")
    num_steps = max(record["step"] for record in records)
    step = int(sys.argv[2]) if len(sys.argv) > 2 else num_steps * 3 // 4
    figures, elapsed_s = Figures(), 0.0
    for record in records:
        if record["step"] <= step:
            figures = figures.take(record)
            elapsed_s += record.get("time/step_s") or 0.0
    memory = psutil.virtual_memory()
    machine = Machine(0.97, ((memory.total - memory.available) / GIB, memory.total / GIB))
    left_s = elapsed_s / step * (num_steps - step)
    num_groups = records[-1].get("selection/num_generated") or 64
    stage = Stage("generating", round(0.58 * num_groups), round(num_groups), "groups", 0.9)
    console = Console(file=io.StringIO(), record=True, width=COLUMNS, height=LINES, force_terminal=True)
    console.print(View(f"runs/{folder.name}", num_steps, step, elapsed_s, left_s, stage, figures, machine))
    svg = console.export_svg(title="python -m dpsrl.train +recipe=quickstart")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: Fira Code, monospace", f"font-family: {FONT}", svg)
    Path("docs/live.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
