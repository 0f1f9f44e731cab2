"""python -m dpsrl.report RUN [RUN ...] [--out FILE] [--png DIR] [--svg DIR] [--watch [--port N]]

Run folders as one self-contained HTML page: what was learned, what selection did, what it cost, and every prompt.
Reads the files of run folders; knows nothing of training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpsrl import plots
from dpsrl.files import write_text
from dpsrl.report.load import Run, load_run
from dpsrl.report.page import metrics_table, render, unique_names
from dpsrl.report.panels import every_figure
from dpsrl.report.watch import DEFAULT_PORT, follow
from dpsrl.run_folder import readable
from dpsrl.types import UserError

__all__ = ["Run", "load_run", "main", "metrics_table", "render", "write_figures", "write_page", "write_report"]


def write_report(run_dir: Path) -> Path:
    """report.html of one run folder. Returns its path."""
    return write_page([load_run(run_dir)], run_dir / "report.html")


def write_page(runs: Sequence[Run], path: Path) -> Path:
    write_text(path, render(runs))
    return path


def write_figures(runs: Sequence[Run], folder: Path, suffix: str, encode: Callable[[Any], bytes]) -> list[Path]:
    """One file per figure: of all runs together, and where there are several, of each run alone."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = every_figure(dict(zip(unique_names(runs), runs, strict=True)))
    for name, figure in drawn.items():
        (folder / f"{name}{suffix}").write_bytes(encode(figure))
    return [folder / f"{name}{suffix}" for name in drawn]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dpsrl.report", description="Run folders as one HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the run folder, or here)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write each figure as a PNG into DIR")
    parser.add_argument("--svg", type=Path, metavar="DIR", help="also write each figure as an SVG into DIR")
    parser.add_argument("--watch", action="store_true", help="serve the page on 127.0.0.1 while the runs go on")
    parser.add_argument("--port", type=int, help=f"for --watch (default {DEFAULT_PORT}; 0: any that is free)")
    options = parser.parse_args(arguments)
    options.runs = list({run.resolve(): run for run in options.runs}.values())
    try:
        if options.watch:
            return follow(options.runs, *checked_watch(options))
        if options.port is not None:
            raise UserError(f"--port {options.port} would have no effect: it belongs to --watch")
        with readable():
            runs = [load_run(run_dir) for run_dir in options.runs]
        out = options.out or (options.runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        if options.out and out.is_dir():
            raise UserError(f"--out {out} is a folder: give a file, as {out / 'report.html'}")
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: the folder {str(out.parent)!r} does not exist: make it first")
        written = write_all(runs, out, options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0


def write_all(runs: Sequence[Run], out: Path, options: argparse.Namespace) -> list[Path]:
    """UserError where a file cannot be written."""
    try:
        written = [write_page(runs, out)]
        if options.png:
            written += write_figures(runs, options.png, ".png", plots.to_png)
        if options.svg:
            written += write_figures(runs, options.svg, ".svg", lambda figure: plots.to_svg(figure).encode())
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written ({error.strerror}): choose a place with --out, or mend this"
        ) from None
    return written


def checked_watch(options: argparse.Namespace) -> tuple[int]:
    for name in ("out", "png", "svg"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} has no effect with --watch, which writes no files: leave one of them out")
    port = DEFAULT_PORT if options.port is None else options.port
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is none: give one from 1 to 65535, or 0 for any that is free")
    return (port,)
