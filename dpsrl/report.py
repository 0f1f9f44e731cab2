"""python -m dpsrl.report RUN [RUN ...] [--out FILE] [--png DIR]: run folders as one self-contained HTML page.

Reads metrics.jsonl, summary.json and config.yaml of each run folder; a run that was killed, and files cut
short, still give a page, with a note. Knows nothing of training.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dpsrl
from dpsrl import plots
from dpsrl.metrics import KEYS, Record, key_of, read_lines, summarize
from dpsrl.screen import duration, result_rows, time_rows
from dpsrl.types import UserError

CAPTIONS = {
    "accuracy": "Mean accuracy on prompts that are never trained on.",
    "reward": "Rollouts made for training; selection decides which prompts they come from.",
    "mixed": "Groups with both right and wrong answers: the ones that carry a learning signal.",
    "occupancy": "Every training prompt by how its last group went.",
    "phases": "Where each step's time went.",
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as far as it could be read; `notes` says what could not."""

    name: str
    dir: Path
    records: list[Record]
    summary: dict[str, Any]
    config: str
    notes: list[str]


def load_run(run_dir: Path) -> Run:
    """UserError where there is no run folder."""
    if not run_dir.is_dir():
        raise UserError(f"run folder {str(run_dir)!r} does not exist: give one that dpsrl.train made")
    metrics, config = run_dir / "metrics.jsonl", run_dir / "config.yaml"
    if not metrics.exists() and not config.exists():
        raise UserError(
            f"{str(run_dir)!r} is not a run folder: it has neither metrics.jsonl nor config.yaml; "
            "give one that dpsrl.train made"
        )
    records, num_unreadable = read_lines(metrics) if metrics.exists() else ([], 0)
    notes = []
    if num_unreadable:
        notes.append(f"Lines of metrics.jsonl that could not be read and are left out: {num_unreadable}.")
    summary = read_summary(run_dir / "summary.json")
    if summary is None:
        summary = summarize(records, policy_version=0, wall_s=time_so_far_s(records))
        last = f"after step {summary['steps']}" if records else "before its first step ended"
        notes.append(f"This run has no summary.json: it is under way, or stopped {last}.")
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    return Run(run_dir.resolve().name, run_dir, records, summary, text, notes)


def read_summary(path: Path) -> dict[str, Any] | None:
    """None where it is missing or not whole."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    whole = isinstance(summary, dict) and summarize([], 0, 0.0).keys() <= summary.keys()
    return summary if whole else None


def time_so_far_s(records: Iterable[Record]) -> float:
    keys = ("time/start_s", "time/step_s")
    return sum(record.get(key) or 0.0 for record in records for key in keys)


# --- the page -----------------------------------------------------------------------------------------


def render(runs: Sequence[Run]) -> str:
    """The whole page. Everything that came from a file is escaped."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = "".join(run_section(run, alone=len(runs) == 1) for run in runs)
    return PAGE.format(
        title=text(title),
        style=STYLE,
        body=(comparison(runs) if len(runs) > 1 else "") + sections,
        version=text(dpsrl.__version__),
    )


def comparison(runs: Sequence[Run]) -> str:
    names = unique_names(runs)
    head = "".join(f"<th>{column}</th>" for column in ("run", "accuracy", "steps", "rollouts", "mixed", "time"))
    rows = "".join(f"<tr>{comparison_cells(name, run.summary)}</tr>" for name, run in zip(names, runs, strict=True))
    figures = plots.figures({name: run.records for name, run in zip(names, runs, strict=True)})
    return f"<table class='wide'><tr>{head}</tr>{rows}</table>{figure_grid(figures)}"


def comparison_cells(name: str, summary: Mapping[str, Any]) -> str:
    first, last, share = summary["eval_first"], summary["eval_last"], summary["mixed_share"]
    accuracy = ", ".join(f"{b} {first[b]:.3f}" + (f" to {last[b]:.3f}" if b in last else "") for b in first)
    cells = (
        name,
        accuracy or "-",
        f"{summary['steps']:,}",
        f"{summary['num_rollouts']:,}",
        "-" if share is None else f"{share:.1%}",
        duration(summary["wall_s"]),
    )
    return "".join(f"<td>{text(cell)}</td>" for cell in cells)


def run_section(run: Run, alone: bool) -> str:
    notes = "".join(f"<p class='note'>{text(note)}</p>" for note in run.notes)
    figures = plots.figures({run.name: run.records})
    cards = "".join(f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for name, value in cards_of(run))
    return (
        ("" if alone else f"<h2>{text(run.name)}</h2>")
        + f"<p class='path'>{text(run.dir.resolve())}</p>{notes}<div class='cards'>{cards}</div>"
        + figure_grid(figures, results_table(run))
        + folded("Every metric", metrics_table(run.records))
        + folded("Configuration", f"<pre>{text(run.config or 'no config.yaml')}</pre>")
    )


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def cards_of(run: Run) -> list[tuple[str, str]]:
    """The few numbers that say how it went: (what, value)."""
    summary, cards = run.summary, []
    for benchmark, first in summary["eval_first"].items():
        last = summary["eval_last"].get(benchmark)
        if last is None:
            cards.append((f"{benchmark} before", f"{first:.3f}"))
        else:
            cards.append((f"{benchmark}, {last - first:+.3f}", f"{first:.3f} → {last:.3f}"))
    share = summary["mixed_share"]
    cards.append(("mixed groups", "-" if share is None else f"{share:.0%}"))
    cards.append(("rollouts", f"{summary['num_rollouts']:,}"))
    cards.append(("steps", f"{summary['steps']:,}"))
    cards.append(("wall time", duration(summary["wall_s"])))
    return cards


def figure_grid(figures: Mapping[str, Any], table: str = "") -> str:
    cells = (
        f"<figure role='img' aria-label='{text(CAPTIONS[name])}'>{plots.to_svg(figure)}"
        f"<figcaption>{text(CAPTIONS[name])}</figcaption></figure>"
        for name, figure in figures.items()
    )
    return f"<div class='figures'>{''.join(cells)}{table and f'<figure>{table}</figure>'}</div>"


def results_table(run: Run) -> str:
    results = [(name, value, "") for name, value in result_rows(run.summary)]
    times = [(name, duration(seconds), f"{share:.0%}") for name, seconds, share in time_rows(run.summary)]
    rows = "".join(
        f"<tr><td>{text(name)}</td><td class='num'>{text(value)}</td><td>{text(extra)}</td></tr>"
        for name, value, extra in results + times
    )
    return f"<table class='results'>{rows}</table>"


def metrics_table(records: Sequence[Record]) -> str:
    """Last value of each key, with its unit and meaning."""
    last = {name: value for record in records for name, value in record.items() if value is not None}
    order = {name: index for index, name in enumerate(KEYS)}
    rows = ""
    for name in sorted(last, key=lambda name: (order.get(name, 1), name)):  # evaluations after the step
        key = KEYS.get(name) or (key_of(name) if name.startswith("eval/") else None)
        unit, meaning = (key.unit, key.text) if key else ("", "")
        cells = f"<td><code>{text(name)}</code></td><td class='num'>{text(format_value(last[name]))}</td>"
        rows += f"<tr>{cells}<td>{text(unit)}</td><td>{text(meaning)}</td></tr>"
    head = "<tr><th>key</th><th>last value</th><th>unit</th><th>meaning</th></tr>"
    return f"<table class='wide'>{head}{rows}</table>"


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Folder names, and whole paths where two are alike."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.dir) for name, run in zip(names, runs, strict=True)]


def text(value: object) -> str:
    return html.escape(str(value), quote=True)


STYLE = """
:root { color-scheme: light; }
body, figure svg text { font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif !important; }
body { font-size: 15px; line-height: 1.5; color: #222; background: #fafafa;
  max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 2px; padding-top: 20px; border-top: 1px solid #ddd;
  overflow-wrap: anywhere; }
.path, footer { color: #777; font-size: 13px; margin: 0 0 14px; overflow-wrap: anywhere; }
.note { background: #FFF4DC; border-left: 4px solid #E69F00; padding: 8px 12px; margin: 12px 0; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0 20px; }
.cards div { background: #fff; border: 1px solid #e4e4e4; border-radius: 8px; padding: 10px 18px; }
.cards b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.cards span { color: #666; font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 16px; }
figure { background: #fff; border: 1px solid #e4e4e4; border-radius: 8px; margin: 0; padding: 12px 12px 8px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #666; font-size: 13px; margin-top: 4px; }
details { background: #fff; border: 1px solid #e4e4e4; border-radius: 8px; margin: 16px 0 0;
  padding: 10px 16px; overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; }
table { border-collapse: collapse; margin: 10px 0 4px; }
table.wide { width: 100%; background: #fff; }
td, th { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid #eee; vertical-align: top; }
table.results { width: 100%; font-size: 13px; margin: 0; }
table.results td { padding: 2px 12px 2px 0; }
table.wide td, table.wide th { padding-left: 10px; }
th { color: #666; font-weight: 600; font-size: 13px; }
.num { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { overflow-x: auto; font-size: 13px; line-height: 1.4; }
footer { margin-top: 40px; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - dpsrl</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>dpsrl {version}</footer>
</body>
</html>
"""


# --- writing and the command line ---------------------------------------------------------------------


def write_report(run_dir: Path) -> Path:
    """report.html of one run folder, written beside and renamed. Returns its path."""
    return write_page([load_run(run_dir)], run_dir / "report.html")


def write_page(runs: Sequence[Run], path: Path) -> Path:
    partial = path.with_name(path.name + ".new")
    partial.write_text(render(runs), encoding="utf-8")
    os.replace(partial, path)
    return path


def write_pngs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """One PNG per figure: of all runs together, and where there are several, of each run alone."""
    folder.mkdir(parents=True, exist_ok=True)
    names = unique_names(runs)
    everything = plots.figures({name: run.records for name, run in zip(names, runs, strict=True)})
    pngs = {name: figure for name, figure in everything.items()}
    if len(runs) > 1:
        for index, run in enumerate(runs, 1):
            alone = plots.figures({run.name: run.records})
            pngs |= {f"run{index}-{name}": figure for name, figure in alone.items()}
    for name, figure in pngs.items():
        (folder / f"{name}.png").write_bytes(plots.to_png(figure))
    return [folder / f"{name}.png" for name in pngs]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dpsrl.report", description="Run folders as one HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the run folder, or here)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write each figure as a PNG into DIR")
    options = parser.parse_args(arguments)
    try:
        runs = [load_run(run_dir) for run_dir in options.runs]
        out = options.out or (options.runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: the folder {str(out.parent)!r} does not exist: make it first")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(write_page(runs, out))
    if options.png:
        for path in write_pngs(runs, options.png):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
