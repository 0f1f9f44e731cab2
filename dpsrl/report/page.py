"""The HTML page of runs: one file that loads nothing. Everything that came from a file is escaped or packed."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dpsrl
from dpsrl.metrics import KEYS, Record, key_of
from dpsrl.report import panels
from dpsrl.report.explorer import kept_sentence, pack
from dpsrl.report.load import Run
from dpsrl.report.panels import Panel
from dpsrl.screen import duration, result_rows, time_rows

HERE = Path(__file__).parent
MAX_EVENTS = 200


def render(runs: Sequence[Run], watch: bool = False) -> str:
    """The whole page; with `watch`, one that asks its server for a newer one."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    names = unique_names(runs)
    script = "\n".join((HERE / name).read_text() for name in ("explorer.js", *(["watch.js"] if watch else [])))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    body = comparison(dict(zip(names, runs, strict=True))) if len(runs) > 1 else ""
    body += "".join(
        run_section(run, name if len(runs) > 1 else "", f"r{i}") for i, (run, name) in enumerate(zip(runs, names))
    )
    return PAGE.format(
        title=text(title),
        style=(HERE / "page.css").read_text(),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        f"connect-src {repr('self') if watch else repr('none')}; base-uri 'none'; form-action 'none'",
        path=text(runs[0].dir.resolve()) if len(runs) == 1 else "",
        body=body,
        explorer=explorer(runs, names),
        version=text(dpsrl.__version__),
        data="\n".join(pack(run.history, run.kept, f"r{i}") for i, run in enumerate(runs)),
        script=script,
    )


# --- several runs -------------------------------------------------------------------------------------


def comparison(runs: Mapping[str, Run]) -> str:
    head = ("run", "accuracy", "steps", "rollouts", "mixed", "Brier", "uniform would take", "time")
    rows = [(name, *comparison_cells(run)) for name, run in runs.items()]
    return (
        "<section><h2>Comparison</h2>"
        + table(head, rows, "wide")
        + "<p class='caption'>Brier: squared error of the predicted chance of a mixed group, lower is better; "
        "uniform would take: times this run's rollouts, estimated, for as many mixed groups.</p>"
        + figure_grid(panels.several(runs), "all")
        + "</section>"
    )


def comparison_cells(run: Run) -> tuple[str, ...]:
    summary, known = run.summary, run.spending
    first, last, share = summary["eval_first"], summary["eval_last"], summary["mixed_share"]
    accuracy = ", ".join(f"{b} {first[b]:.3f}" + (f" to {last[b]:.3f}" if b in last else "") for b in first)
    return (
        accuracy or "-",
        f"{summary['steps']:,}",
        f"{summary['num_rollouts']:,}",
        "-" if share is None else f"{share:.1%}",
        "-" if run.calibration is None else f"{run.calibration.brier:.3f}",
        "-" if known is None else f"{known.uniform_T[-1] / known.run_T[-1]:.2f} x",
        duration(summary["wall_s"]),
    )


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Folder names, and whole paths where two are alike."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.dir) for name, run in zip(names, runs, strict=True)]


# --- one run ------------------------------------------------------------------------------------------


def run_section(run: Run, name: str, salt: str) -> str:
    notes = "".join(f"<p class='note'>{text(note)}</p>" for note in run.notes)
    cards = "".join(f"<div><b>{text(value)}</b><span>{text(what)}</span></div>" for what, value in cards_of(run))
    level = "h3" if name else "h2"
    parts = []
    for heading, found in panels.sections(run).items():
        missing = extra = ""
        if heading == panels.COST:
            missing = panels.why_not_estimated(run)
            extra = f"<figure><h4>In numbers</h4>{results_table(run)}</figure>"
        parts.append(
            f"<{level}>{heading}</{level}>"
            + (f"<p class='note'>{text(missing)}</p>" if missing else "")
            + figure_grid(found, salt, extra)
        )
    return (
        "<section class='run'>"
        + (f"<h2>{text(name)}</h2><p class='path'>{text(run.dir.resolve())}</p>" if name else "")
        + f"{notes}<div class='cards'>{cards}</div>{''.join(parts)}"
        + folded("Events", events_table(run.events), bool(run.events))
        + folded("Every metric", metrics_table(run.records))
        + folded("Configuration", f"<pre tabindex='0'>{text(run.config or 'no config.yaml')}</pre>")
        + "</section>"
    )


def folded(title: str, content: str, there: bool = True) -> str:
    return f"<details class='more'><summary>{title}</summary>{content}</details>" if there else ""


def cards_of(run: Run) -> list[tuple[str, str]]:
    """The few numbers that say how it went: (what, value)."""
    summary, cards = run.summary, []
    for benchmark, first in summary["eval_first"].items():
        last = summary["eval_last"].get(benchmark)
        if last is None:
            cards.append((f"{benchmark} before", f"{first:.3f}"))
        else:
            cards.append((f"{benchmark}, {last - first:+.3f}", f"{first:.3f} → {last:.3f}"))
    share, known = summary["mixed_share"], run.spending
    cards.append(("mixed groups", "-" if share is None else f"{share:.0%}"))
    if known is not None:
        ratio = known.uniform_T[-1] / known.run_T[-1]
        cards.append(("the rollouts by uniform sampling, estimated", f"{ratio:.2f} ×"))
    cards.append(("rollouts", f"{summary['num_rollouts']:,}"))
    cards.append(("steps", f"{summary['steps']:,}"))
    cards.append(("wall time", duration(summary["wall_s"])))
    return cards


def figure_grid(found: Sequence[Panel], salt: str, extra: str = "") -> str:
    """extra: stands in the second place."""
    cells = []
    for panel, title, svg in panels.shown(found, salt):
        numbers = table(panel.head, panel.rows, "numbers") if panel.rows else ""
        if numbers and not panel.open:
            numbers = f"<details><summary>Numbers</summary>{numbers}</details>"
        cells.append(
            f"<figure id='{salt}-{panel.name}'><h4>{text(title)}</h4>"
            f"<div role='img' aria-label='{text(f'{title}. {panel.caption}')}'>{svg}</div>"
            f"<figcaption>{text(panel.caption)}</figcaption>{numbers}</figure>"
        )
    cells.insert(1, extra)
    return f"<div class='figures'>{''.join(cells)}</div>"


# --- tables -------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Escaped; the first column names its row, the others stand to the right where the table is one of numbers."""
    top = "".join(f"<th scope='col'>{text(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr><th scope='row'>{text(row[0])}</th>{''.join(f'<td>{text(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    head_row = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f"<div class='scroll' tabindex='0'><table class='{kind}'>{head_row}<tbody>{lines}</tbody></table></div>"


def results_table(run: Run) -> str:
    results = [(name, value, "") for name, value in result_rows(run.summary)]
    times = [(name, duration(seconds), f"{share:.0%}") for name, seconds, share in time_rows(run.summary)]
    return table((), results + times, "results")


def events_table(events: Sequence[Record]) -> str:
    """The last ones, newest first."""
    rows = [(str(e.get("step")), str(e.get("event")), str(e.get("text"))) for e in reversed(events[-MAX_EVENTS:])]
    left_out = f"<p>Only the last {MAX_EVENTS} of {len(events):,}.</p>" if len(events) > MAX_EVENTS else ""
    return left_out + table(("step", "event", "what happened"), rows, "wide")


def metrics_table(records: Sequence[Record]) -> str:
    """Last value of each key, with its unit and meaning."""
    last = {name: value for record in records for name, value in record.items() if value is not None}
    order = {name: index for index, name in enumerate(KEYS)}
    rows = []
    for name in sorted(last, key=lambda name: (order.get(name, 1), name)):  # evaluations after the step
        key = KEYS.get(name)
        if key is None and name.startswith("eval/"):
            try:
                key = key_of(name)
            except AssertionError:  # a file may hold any name
                key = None
        unit, meaning = (key.unit, key.text) if key else ("", "")
        rows.append((name, format_value(last[name]), unit, meaning))
    return table(("key", "last value", "unit", "meaning"), rows, "wide")


def format_value(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def text(value: object) -> str:
    """Escaped, and without what UTF-8 or HTML cannot hold: lone surrogates, null bytes."""
    whole = str(value).encode("utf-8", errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    return html.escape(whole, quote=True)


# --- the explorer's frame -----------------------------------------------------------------------------


def explorer(runs: Sequence[Run], names: Sequence[str]) -> str:
    """What explorer.js fills; nothing where no run has a group."""
    if not any(len(run.history) for run in runs):
        return ""
    options = "".join(f"<option value='r{i}'>{text(name)}</option>" for i, name in enumerate(names))
    choice = f"<label>Run <select id='of-run'>{options}</select></label>"
    sentences = "".join(
        f"<p class='caption' data-run='r{i}'{' hidden' if i else ''}>{text(kept_sentence(run.history, run.kept))}</p>"
        for i, run in enumerate(runs)
    )
    return EXPLORER.format(choice=choice if len(runs) > 1 else choice.replace("<label>", "<label hidden>"),
                           sentences=sentences)  # fmt: skip


EXPLORER = """<section id="explorer" aria-labelledby="explorer-title">
<h2 id="explorer-title">Prompts</h2>
<p class="lead">Find a prompt by its text or id; its groups, what was predicted of them, and its responses side by side.
Arrow keys move through the list, Enter opens, Escape goes back to the search.</p>
<noscript><p class="note">This part needs JavaScript.</p></noscript>
<form id="search" role="search">
{choice}
<label class="wide">Search <input id="find" type="search" autocomplete="off" spellcheck="false"
 aria-controls="found" placeholder="words of the prompt, or its id"></label>
<label>Show <select id="only"><option value="">all</option><option value="kept">with responses</option>
<option value="2">last seen solved</option><option value="1">last seen partial</option>
<option value="0">last seen unsolved</option></select></label>
<label>Order <select id="order"><option value="visits">most groups first</option>
<option value="surprise">worst predicted first</option><option value="changes">most changes of state first</option>
<option value="recent">latest first</option></select></label>
</form>
{sentences}
<p id="count" role="status" aria-live="polite"></p>
<div class="split"><ul id="found" aria-label="Prompts found"></ul>
<article id="prompt" tabindex="-1" aria-label="Prompt"><p class="caption">No prompt is chosen yet.</p></article></div>
</section>"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title} - dpsrl</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#explorer">Skip to the prompts</a>
<header><h1>{title}</h1>
<p class="path">{path}</p>
<p id="live" class="note" role="status" hidden></p></header>
<main>
{body}
{explorer}
</main>
<footer>dpsrl {version}</footer>
{data}
<script>{script}</script>
</body>
</html>
"""
