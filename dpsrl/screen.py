"""What a person sees while a run is under way: progress, one-line messages and the closing table.

Owns the terminal. Libraries (C++ included) print to file descriptors 1 and 2, which `Screen.capture` turns
over to a log file; the screen keeps copies of the real ones. Knows records and summaries of
`dpsrl.metrics`, nothing of how they came about.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.status import Status
from rich.table import Table

from dpsrl.metrics import EVAL_KEY, PHASES, Record

LINE_EVERY_S = 5.0  # without a terminal, steps that follow faster than this share a line


class Screen:
    """Prints to `file`, a progress bar where that is a terminal and plain lines elsewhere.

    A context manager: leaving it, by an exception too, gives the terminal back.
    """

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = Console(file=file, highlight=False, markup=False, emoji=False)
        self._clock = clock
        self._saved: tuple[int, int] | None = None  # the real file descriptors 1 and 2
        self._status: Status | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = self._done = self._done_before = 0
        self._started_s = 0.0
        self._last_line_s = float("-inf")
        self._accuracy = ""

    # --- the terminal ---------------------------------------------------------------------------------

    @classmethod
    def capture(cls, log_path: Path) -> Screen:
        """A screen on the real stdout; from here on everything else that prints goes to the log file."""
        flush_all()
        # os.dup makes descriptors that child processes do not inherit: theirs are the log.
        saved = (os.dup(1), os.dup(2))
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        screen = cls(os.fdopen(os.dup(saved[0]), "w", encoding="utf-8", errors="replace"))
        screen._saved = saved
        return screen

    def restore(self) -> None:
        """Ends the progress bar and undoes `capture`; a second call does nothing."""
        self._stop_status()
        self.stop_progress()
        if self._saved is None:
            return
        flush_all()
        for saved, descriptor in zip(self._saved, (1, 2), strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        self._saved = None
        self.console.file.close()

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    # --- messages -------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """One line that stays, above the progress bar if there is one."""
        self._stop_status()
        self.console.print(text, soft_wrap=True)
        self.console.file.flush()

    def stage(self, text: str) -> None:
        """What is going on now, as "evaluating": moving on a terminal, until something else comes."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, words=text, refresh=True)
        elif self.console.is_terminal:
            self._stop_status()
            self._status = self.console.status(text)
            self._status.start()
        elif self._total == 0:
            self.line(text)

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    # --- progress -------------------------------------------------------------------------------------

    def progress(self, total: int, done: int = 0) -> None:
        """Starts counting steps: `done` of `total` were finished before, by a run that is resumed."""
        self._stop_status()
        self._total, self._done, self._done_before = total, done, done
        self._started_s = self._clock()
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[words]}"),
            console=self.console,
            redirect_stdout=False,  # what libraries print belongs in the log
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=total, completed=done, words="")
        self._bar.start()

    def step(self, record: Record) -> None:
        """Shows a step's record; an evaluation in it gets a line of its own."""
        evals = [(match, value) for name, value in record.items() if (match := EVAL_KEY.fullmatch(name))]
        scores = [(match, value) for match, value in evals if match["measure"] == "avg" and value is not None]
        if scores:
            when = f"step {record['step']}" if record["step"] else "before training"
            self._accuracy = f"accuracy {scores[0][1]:.3f}"
            self.line(f"{when}: " + ", ".join(f"{m['benchmark']} avg@{m['k']} {value:.3f}" for m, value in scores))
        if record["step"] <= self._done_before:
            return
        self._done = record["step"]
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, words=self._words(record), refresh=True)
            return
        now_s = self._clock()
        if now_s - self._last_line_s >= LINE_EVERY_S or self._done in (self._done_before + 1, self._total):
            self._last_line_s = now_s
            self.line(f"step {self._done}/{self._total}  {self._words(record)}")

    def _words(self, record: Record) -> str:
        left_s = self._time_left_s()
        narrow = self.console.is_terminal and self.console.width < 100
        parts = [
            number("reward {:.2f}", record.get("rollout/reward")),
            "" if narrow else number("solved {:.0%}", record.get("rollout/solve_rate")),
            number("mixed {:.0%}", record.get("selection/mixed_share")),
            self._accuracy,
            f"{duration(left_s)} left" if left_s else "",
        ]
        return "  ".join(part for part in parts if part)

    def _time_left_s(self) -> float:
        """At the pace of this process so far, evaluations included."""
        pace_s = (self._clock() - self._started_s) / (self._done - self._done_before)
        return pace_s * (self._total - self._done)

    def stop_progress(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    # --- the end --------------------------------------------------------------------------------------

    def table(self, summary: Mapping[str, Any], run_dir: Path, report: Path | None) -> None:
        """The closing table of a run, from summary.json."""
        self._stop_status()
        self.stop_progress()
        results = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in result_rows(summary):
            results.add_row(name, value)
        times = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for index, (name, seconds, share) in enumerate(time_rows(summary)):
            times.add_row("" if index else "where the time went", name, duration(seconds), f"{share:.0%}")
        for part in ("", results, "", times, ""):
            self.console.print(part)
        self.line(f"run folder  {run_dir}")
        if report is not None:
            self.line(f"report      {report}")


def result_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of the closing table and of the report."""
    rows = []
    for benchmark, first in summary["eval_first"].items():
        last = summary["eval_last"].get(benchmark)
        after = "" if last is None else f", {last:.3f} after ({last - first:+.3f})"
        rows.append((f"{benchmark} {summary['eval_measure'][benchmark]}", f"{first:.3f} before{after}"))
    share = summary["mixed_share"]
    rows.append(("steps", f"{summary['steps']:,}"))
    rows.append(("rollouts used", f"{summary['num_rollouts']:,}"))
    rows.append(("mixed share", "-" if share is None else f"{share:.1%} of generated groups"))
    rows.append(("wall time", duration(summary["wall_s"])))
    return rows


def time_rows(summary: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of the wall time), the rest of the wall time last."""
    wall_s = summary["wall_s"]
    rows = [(PHASES[phase], summary["time_s"][phase]) for phase in PHASES if phase in summary["time_s"]]
    rest_s = wall_s - sum(seconds for _, seconds in rows)
    if rest_s > 0:
        rows.append(("everything else", rest_s))
    return [(name, seconds, seconds / wall_s if wall_s else 0.0) for name, seconds in rows]


def number(template: str, value: float | None) -> str:
    return "" if value is None else template.format(value)


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `2:05:09`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def flush_all() -> None:
    """Empties Python's buffers and C's, so that each line goes where it was meant to go."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
