"""What a person sees while a run is under way: a live panel or plain lines, messages, and the closing table.

Owns the terminal. Libraries (C++ included) print to file descriptors 1 and 2, which `Screen.capture` turns
over to a log file; the screen keeps copies of the real ones. Knows records and summaries of
`dpsrl.metrics`, nothing of how they came about. What the panel looks like is in `panel.py`.
"""

from __future__ import annotations

import ctypes
import io
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.table import Table

from dpsrl.metrics import EVAL_KEY, PHASES, Record
from dpsrl.panel import Figures, Stage, View, duration
from dpsrl.usage import Usage

LINE_EVERY_S = 5.0  # without a terminal, steps that follow faster than this share a line
STAGE_EVERY_S = 60.0  # and a step that takes longer says how far it is
FRAMES_PER_S = 2.0  # a frame takes about 3 ms of a core
TAKEN_WITHIN_S = 0.2  # a terminal that takes nothing must not stop the run
KEPT_LINES = 100  # to be shown again when the panel was drawn anew


def output_to(log_path: Path | str) -> int:
    """From here on what this process and its children write to stdout and stderr goes to that file, at its end.

    The file's descriptor, which the caller closes.
    """
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return log


class Outlet:
    """A stream that may go away, a lost terminal or a closed pipe: what is written then is dropped, without an error.

    A run outlives whoever looks at it.
    """

    def __init__(self, file: TextIO) -> None:
        self.file, self.lost = file, False
        self.encoding, self.isatty, self.fileno = file.encoding, file.isatty, file.fileno

    def write(self, text: str) -> int:
        self._unless_lost(lambda: self.file.write(text))
        return len(text)

    def flush(self) -> None:
        self._unless_lost(self.file.flush)

    def close(self) -> None:
        self._unless_lost(self.file.close)

    def _unless_lost(self, action: Callable[[], Any]) -> None:
        if not self.lost:
            try:
                action()
            except (OSError, ValueError):  # ValueError: it is closed
                self.lost = True


class Terminal(io.FileIO):
    """A terminal that is not waited for, stopped by Ctrl-S or shown by a connection that hangs: what it does not take
    in time is dropped.

    Opened anew by its name, so that whoever shares the old descriptor still has one that blocks.
    """

    def __init__(self, descriptor: int) -> None:
        name = os.ttyname(descriptor)
        super().__init__(os.open(name, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC), "w")
        self.garbled = False

    def write(self, data: Any) -> int:
        left, end = memoryview(data), time.monotonic() + TAKEN_WITHIN_S
        while left:
            if taken := super().write(left):
                left = left[taken:]
            elif not select.select([], [self], [], max(0.0, end - time.monotonic()))[1]:
                self.garbled = True
                break
        return len(data)


class OwnConsole(Console):
    """Asks the file it writes to for its size: rich asks stdin, stdout and stderr, and here these are logs.

    Escape codes go to terminals alone, whatever FORCE_COLOR says.
    """

    def __init__(self, file: Outlet) -> None:
        # rich asks for a whole IO, of which it calls what an Outlet has
        super().__init__(
            file=file, force_terminal=file.isatty(), highlight=False, markup=False, emoji=False  # type: ignore[arg-type]
        )  # fmt: skip

    @property  # type: ignore[misc]  # rich lets it be set, which nobody does here
    def size(self) -> ConsoleDimensions:
        try:
            columns, lines = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError):
            columns = lines = 0
        return ConsoleDimensions(columns, lines) if columns and lines else super().size


class Screen:
    """Prints to `file`: a live panel where that is a terminal, plain lines elsewhere.

    A context manager: leaving it, by an exception too, gives the terminal back.
    """

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic, title: str = "") -> None:
        self.console = OwnConsole(Outlet(file))
        self._clock = clock
        self._saved: tuple[int, int] | None = None  # the real file descriptors 1 and 2
        self._terminal: Terminal | None = None  # what `file` writes to
        self._live: Live | None = None
        self._usage: Usage | None = None
        self._size = ConsoleDimensions(0, 0)  # of the terminal when it was last drawn on
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._view = View(title)
        self._stage_s = self._started_s = clock()
        self._done_before = 0
        self._step_s = self._last_line_s = self._last_step_line_s = float("-inf")

    # --- the terminal ---------------------------------------------------------------------------------

    @classmethod
    def capture(cls, log_path: Path) -> Screen:
        """A screen on the real stdout; from here on everything else that prints goes to the log file."""
        flush_all()
        # os.dup makes descriptors that child processes do not inherit: theirs are the log.
        saved = (os.dup(1), os.dup(2))
        os.close(output_to(log_path))
        words: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
        terminal: Terminal | None
        file: TextIO
        try:
            terminal = Terminal(saved[0])
            file = io.TextIOWrapper(terminal, write_through=True, **words)
        except OSError:  # none, or one of another user's or container's
            terminal, file = None, os.fdopen(os.dup(saved[0]), "w", **words)
        screen = cls(file, title=str(log_path.parent.parent))
        screen._saved, screen._terminal = saved, terminal
        return screen

    def restore(self) -> None:
        """Ends the panel and undoes `capture`; a second call does nothing."""
        if self._live is not None and self._done_before < self._view.done < self._view.num_steps:
            self.line(self._step_words())  # what was the last of the panel
        self.stop_panel()
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
        """One line that stays, above the panel if there is one."""
        self._lines.append(text)
        self._last_line_s = self._clock()
        self.console.print(text, soft_wrap=True)
        self.console.file.flush()

    def stage(self, text: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """What is going on now, as `evaluating`, and how much of it is done.

        Live on a terminal. Elsewhere a line where it begins before the first step, and one a minute while it lasts.
        """
        now_s, begins = self._clock(), text != self._view.stage.text
        if begins:
            self._stage_s = now_s
        self._view = replace(self._view, stage=Stage(text, done, total, unit))
        if self._has_panel():
            self._show()
        elif begins and not self._view.num_steps:
            self.line(text)
        elif now_s - self._last_line_s >= STAGE_EVERY_S:
            step = f"step {self._view.done + 1}/{self._view.num_steps}: " if self._view.num_steps else ""
            self.line(f"{step}{self._view.stage.words}")

    # --- the panel ------------------------------------------------------------------------------------

    def _has_panel(self) -> bool:
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def _show(self) -> None:
        """Starts the panel, which a thread of rich's draws from then on."""
        if self._live is None:
            self._size = self.console.size
            self._usage = Usage()
            self._live = Live(
                console=self.console, get_renderable=self._frame, refresh_per_second=FRAMES_PER_S, transient=True,
                redirect_stdout=False, redirect_stderr=False,  # what libraries print belongs in the log
            )  # fmt: skip
            self._live.start(refresh=True)

    def stop_panel(self) -> None:
        """Takes it from the terminal."""
        if self._live is not None and self._usage is not None:  # they come together
            self._live.stop()
            self._usage.stop()
            self._live = self._usage = None

    def _frame(self) -> View:
        """What the panel shows now."""
        size, before = self.console.size, self._size
        self._size, garbled = size, self._terminal is not None and self._terminal.garbled
        if garbled or size.width < before.width or size.height < before.height:
            self._wipe(size, self._view.height(*before))
        now_s, view = self._clock(), self._view
        return replace(
            view, stage=replace(view.stage, seconds=now_s - self._stage_s), elapsed_s=now_s - self._started_s,
            left_s=self._time_left_s(now_s), machine=self._usage.machine if self._usage else None,
        )  # fmt: skip

    def _wipe(self, size: ConsoleDimensions, panel_height: int) -> None:
        """Draws a terminal anew whose cursor does not find the panel's top: it became smaller and folded the rows."""
        if self._terminal is not None:
            self._terminal.garbled = False
        room, shown = size.height - panel_height, []
        for line in reversed(self._lines):
            room -= max(1, -(-cell_len(line) // size.width))
            if room < 0:
                break
            shown.append(line + "\r\n")
        # rich goes up from the last row of a panel that it takes to be there.
        self.console.file.write("\x1b[2J\x1b[H" + "".join(reversed(shown)) + "\r\n" * (panel_height - 1))

    # --- progress -------------------------------------------------------------------------------------

    def progress(self, total: int, done: int = 0, records: Iterable[Record] | None = None) -> None:
        """Starts counting steps: `done` of `total` were finished before.

        records: of a run that is taken up, all there are; None leaves those that `step` was given.
        """
        figures = self._view.figures if records is None else Figures()
        for record in records or ():
            figures = figures.take(record)
        self._done_before = done
        self._started_s = self._step_s = self._last_line_s = self._clock()
        self._last_step_line_s = float("-inf")
        self._view = replace(self._view, num_steps=total, done=done, figures=figures)
        if self._has_panel():
            self._show()

    def step(self, record: Record) -> None:
        """Shows a step's record; an evaluation in it gets a line of its own."""
        evals = [(match, value) for name, value in record.items() if (match := EVAL_KEY.fullmatch(name))]
        scores = [(match, value) for match, value in evals if match["measure"] == "avg" and value is not None]
        self._view = replace(self._view, figures=self._view.figures.take(record))
        if scores:
            when = f"step {record['step']}" if record["step"] else "before training"
            self.line(f"{when}: " + ", ".join(f"{m['benchmark']} avg@{m['k']} {value:.3f}" for m, value in scores))
        if record["step"] <= self._done_before:
            return
        self._step_s = self._clock()
        self._view = replace(self._view, done=record["step"])
        is_due = self._step_s - self._last_step_line_s >= LINE_EVERY_S
        if not self._has_panel() and (is_due or self._view.done == self._view.num_steps):
            self._last_step_line_s = self._step_s
            self.line(self._step_words())

    def _step_words(self) -> str:
        """A step in one line, its columns where they were in the line before."""
        view, record, figures = self._view, self._view.figures.record, self._view.figures
        left_s = self._time_left_s(self._clock())
        return "  ".join((
            f"step {view.done:>{len(str(view.num_steps))}}/{view.num_steps}",
            f"reward {number('{:5.2f}', record.get('rollout/reward'))}",
            f"solved {number('{:4.0%}', record.get('rollout/solve_rate'))}",
            f"mixed {number('{:4.0%}', record.get('selection/mixed_share'))}",
            f"predicted {number('{:4.0%}', record.get('selection/predicted_share'))}",
            f"accuracy {number('{:.3f}', figures.accuracy)}",
            f"{duration(left_s)} left" if left_s else "",
        )).rstrip()  # fmt: skip

    def _time_left_s(self, now_s: float) -> float | None:
        """At the pace of this process so far, evaluations included; None before there is one."""
        view, num_done = self._view, self._view.done - self._done_before
        if num_done <= 0:
            return None
        pace_s, num_left = (self._step_s - self._started_s) / num_done, view.num_steps - view.done
        return max(pace_s * num_left - (now_s - self._step_s), pace_s * (num_left - 1), 0.0)

    # --- the end --------------------------------------------------------------------------------------

    def table(self, summary: Mapping[str, Any], run_dir: Path, report: Path | None) -> None:
        """The closing table of a run, from summary.json."""
        self.stop_panel()
        results = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in result_rows(summary):
            results.add_row(name, value)
        times = [(name, duration(seconds), share) for name, seconds, share in time_rows(summary)]
        rollouts = [(name, f"{count:,}", share) for name, count, share in rollout_rows(summary)]
        for part in (
            "", results, "", shares_table("where the time went", times), "",
            *([shares_table("where the rollouts went", rollouts), ""] if rollouts else []),
        ):  # fmt: skip
            self.console.print(part)
        self.line(f"run folder  {run_dir}")
        if report is not None:
            self.line(f"report      {report}")


def shares_table(title: str, rows: Iterable[tuple[str, str, float]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(min_width=len("where the rollouts went"))
    table.add_column(min_width=len("dropped: not mixed"))
    table.add_column(justify="right", min_width=9)
    table.add_column(justify="right")
    for index, (name, amount, share) in enumerate(rows):
        table.add_row("" if index else title, name, amount, f"{share:.0%}")
    return table


def result_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of the closing table and of the report."""
    rows = []
    best, best_step = summary.get("eval_best", {}), summary.get("eval_best_step", {})
    for benchmark, first in summary["eval_first"].items():
        last = summary["eval_last"].get(benchmark)
        after = "" if last is None else f", {last:.3f} after ({last - first:+.3f})"
        if last is not None and best.get(benchmark, last) > last:
            after += f", best {best[benchmark]:.3f} at step {best_step[benchmark]}"
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


def rollout_rows(summary: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """(way, rollouts, share of those generated) by the ledger; none where a summary has no ledger."""
    ledger = summary.get("rollouts")
    if ledger is None:
        return []
    rows = [("trained on", ledger["trained"]), ("carried over", ledger["carried"])]
    rows += [(f"dropped: {reason}", count) for reason, count in ledger["dropped"].items()]
    return [(name, count, count / ledger["generated"]) for name, count in rows if count]


def number(template: str, value: float | None) -> str:
    """The value, or a dash as wide."""
    return template.format(value) if value is not None else f"{'-':>{len(template.format(0.0))}}"


def flush_all() -> None:
    """Empties Python's buffers and C's, so that each line goes where it was meant to go."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
