"""The live panel as text: figures of a run -> rows, for a terminal of any width.

Pure: what is drawn follows from a `View` and a size. Who draws it, and when, is in `screen.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.text import Text

from dpsrl.metrics import EVAL_KEY, Record, phase_seconds
from dpsrl.usage import Machine

MAX_WIDTH = 110
SPARE_COLUMNS = 3  # room for the ^C that a terminal writes at the cursor, so that it does not fold the last row
NUM_ROWS = 10  # of the whole panel
MIN_WIDTH = 50  # below, or on fewer rows than the panel has with some lines above it, there are two lines
MIN_HEIGHT = NUM_ROWS + 3
LABEL = 11  # columns of a row's name
HISTORY = 64  # steps kept for the small curves
SPARKS = "▁▂▃▄▅▆▇█"
MIN_SPAN = 0.1
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PHASE_STYLES = {
    "generate": "cyan", "score": "bright_cyan", "train": "magenta", "sync": "yellow", "eval": "blue",
    "checkpoint": "green", "select": "red",
}  # fmt: skip
BAR, BAR_END, BAR_REST = "━", "╸", "─"  # told apart without colours too


@dataclass(frozen=True)
class Figures:
    """What a run's records say so far; `take` gives the next. Frozen, since another thread draws it."""

    record: Record = field(default_factory=dict)  # of the last step
    reward: tuple[float, ...] = ()  # of the last HISTORY steps, the others too
    mixed: tuple[float, ...] = ()
    predicted: tuple[float, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, since the run began
    accuracy: float | None = None  # the last one of the first benchmark
    best: float | None = None
    best_step: int = 0

    def take(self, record: Record) -> Figures:
        record = {name: value for name, value in record.items() if value == value}  # NaN is nothing
        seconds = dict(self.seconds)
        for phase, more in phase_seconds(record).items():
            seconds[phase] = seconds.get(phase, 0.0) + more
        new = replace(self, seconds=seconds, record=record if record["step"] else self.record)
        for name, key in (
            ("reward", "rollout/reward"), ("mixed", "selection/mixed_share"), ("predicted", "selection/predicted_share")
        ):  # fmt: skip
            if record.get(key) is not None:
                longer: dict[str, Any] = {name: (*getattr(new, name), record[key])[-HISTORY:]}
                new = replace(new, **longer)
        scores = [value for name, value in record.items() if is_accuracy(name) and value is not None]
        if scores:
            new = replace(new, accuracy=scores[0])
            if new.best is None or scores[0] > new.best:
                new = replace(new, best=scores[0], best_step=record["step"])
        return new


def is_accuracy(name: str) -> bool:
    match = EVAL_KEY.fullmatch(name)
    return match is not None and match["measure"] == "avg"


@dataclass(frozen=True)
class Stage:
    """What is going on: `generating`, 37 of 64 groups, for so many seconds. total 0: nothing to count."""

    text: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    seconds: float = 0.0

    @property
    def words(self) -> str:
        return f"{self.text} {self.done:,}/{self.total:,} {self.unit}".rstrip() if self.total else self.text


@dataclass(frozen=True)
class View:
    """All that the panel shows. num_steps 0: the run has not begun, and there is one line."""

    title: str = ""
    num_steps: int = 0
    done: int = 0
    elapsed_s: float = 0.0
    left_s: float | None = None
    stage: Stage = Stage()
    figures: Figures = Figures()
    machine: Machine | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width - SPARE_COLUMNS, MAX_WIDTH)
        if self.num_steps and width >= MIN_WIDTH - SPARE_COLUMNS and options.size.height >= MIN_HEIGHT:
            rows = [row_of(text, width - 4) for text in panel_rows(self, width - 4)]
            title = row_of(Text(self.title, "dim"), width - 6)
            yield Panel(Group(*rows), box=box.ROUNDED, width=width, title=title, title_align="left", border_style="dim")
        else:
            lines = [step_row(self, width)] * bool(self.num_steps) + [stage_row(self.stage, width)]
            yield Group(*(row_of(text, width) for text in lines))

    def height(self, columns: int, lines: int) -> int:
        """Rows it takes on a terminal of that size."""
        if self.num_steps and columns >= MIN_WIDTH and lines >= MIN_HEIGHT:
            return NUM_ROWS
        return 1 + bool(self.num_steps)


def row_of(text: Text, width: int) -> Text:
    """One row, whatever it holds."""
    text.no_wrap, text.overflow = True, "ellipsis"
    text.truncate(width, overflow="ellipsis")
    return text


def panel_rows(view: View, width: int) -> list[Text]:
    """The panel's content, `width` columns wide: progress, figures in two columns, time, machine."""
    figures, record = view.figures, view.figures.record
    num = max(4, width // 2 - 21)  # steps that the small curves show
    shares = [*figures.mixed[-num:], *figures.predicted[-num:]]  # on one scale, to be compared
    left = [
        figure("reward", "{:.2f}", record.get("rollout/reward"), sparks(figures.reward[-num:])),
        figure("mixed", "{:.0%}", record.get("selection/mixed_share"), sparks(figures.mixed[-num:], shares)),
        figure(
            "predicted", "{:.0%}", record.get("selection/predicted_share"), sparks(figures.predicted[-num:], shares)
        ),
    ]
    generated, trained = record.get("rollout/num_rollouts"), record.get("rollout/num_trained")
    share = f"  {trained / generated:.0%}" if trained is not None and generated else ""
    right = [
        label("accuracy", accuracy_words(figures, width - 2 * LABEL - 8 - num), "green"),
        label("rollouts", "-" if generated is None else f"{generated:,}"),
        label("trained on", "-" if trained is None else f"{trained:,}{share}"),
    ]
    for text, beside in zip(left, right, strict=True):
        text.truncate(LABEL + 8 + num, pad=True)
        text.append_text(beside)
    progress, machine = [step_row(view, width), stage_row(view.stage, width)], machine_words(view.machine)
    return [*progress, *left, *time_rows(figures.seconds, width), label("machine", machine)]


def label(name: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{name:<{LABEL}}", "dim"), (value, style))


def figure(name: str, template: str, value: float | None, curve: str) -> Text:
    """A number and the curve that led to it."""
    shown = "-" if value is None else template.format(value)
    return Text.assemble((f"{name:<{LABEL}}", "dim"), f"{shown:>5}", " ", (curve, "cyan"))


def sparks(values: Sequence[float], among: Sequence[float] = ()) -> str:
    """One block per value, from the smallest to the largest of `among`, or of the values themselves."""
    low, high = min(among or values, default=0.0), max(among or values, default=0.0)
    span = max(high - low, MIN_SPAN)  # noise is not blown up
    return "".join(SPARKS[min(7, max(0, int(8 * (value - low) / span)))] for value in values)


def accuracy_words(figures: Figures, room: int) -> str:
    if figures.accuracy is None:
        return "-"
    last, best = f"{figures.accuracy:.3f}", f"  best {figures.best:.3f}"
    longest_first = (f"{last}{best} at step {figures.best_step}", last + best)
    return next((words for words in longest_first if len(words) <= room), last)


def step_row(view: View, width: int) -> Text:
    left = f", {duration(view.left_s)} left" if view.left_s else ""
    before = f"step {view.done}/{view.num_steps} "
    return with_bar(before, f" {duration(view.elapsed_s)}{left}", view.done, view.num_steps, width, "green")


def stage_row(stage: Stage, width: int) -> Text:
    spinner = SPINNER[int(4 * stage.seconds) % len(SPINNER)]
    before = f"{spinner} {stage.words or 'working'} "
    return with_bar(before, f" {duration(stage.seconds)}", stage.done, stage.total, width, "cyan")


def with_bar(before: str, after: str, done: int, total: int, width: int, style: str) -> Text:
    """Words on both sides of a bar that takes the room between them, if there is something to count and room."""
    room = width - len(before) - len(after)
    text = Text.assemble((before, "bold"))
    if total and room >= 4:
        halves = min(2 * room, int(2 * room * done / total))
        text.append(BAR * (halves // 2) + BAR_END * (halves % 2), style)
        text.append(BAR_REST * (room - halves // 2 - halves % 2), "bright_black")
    return text.append(after)


def time_rows(seconds: dict[str, float], width: int) -> list[Text]:
    """Where the time of the steps went: a bar in parts, and as many of their names as there is room for."""
    shares = {phase: seconds[phase] for phase in PHASE_STYLES if seconds.get(phase)}
    total = sum(shares.values())
    if not total:
        return [label("time", "-"), Text()]
    shares = {phase: spent / total for phase, spent in shares.items()}
    names = {phase: f"{phase} {share:.0%}  " for phase, share in shares.items()}
    room, fitting = width - LABEL + 2, []
    for phase in sorted(shares, key=lambda phase: shares[phase], reverse=True):
        if len(names[phase]) <= room:
            room -= len(names[phase])
            fitting.append(phase)
    bar, legend, place, done = label("time", ""), label("", ""), 0.0, 0
    for phase, share in shares.items():
        place += share * (width - LABEL)
        bar.append(BAR * (round(place) - done), PHASE_STYLES[phase])
        done = round(place)
        if phase in fitting:
            legend.append(names[phase], PHASE_STYLES[phase])
    legend.rstrip()
    return [bar, legend]


def machine_words(machine: Machine | None) -> str:
    """GPUs first, one block each, so that an idle one stands out."""
    if machine is None:
        return "-"
    used, there_is = machine.memory
    cores = f"CPU {machine.cpu:.0%}  memory {used:.0f}/{there_is:.0f} GiB"
    if not machine.gpus:
        return cores
    busy, gpu_used, gpu_total = (sum(values) for values in zip(*machine.gpus, strict=True))
    blocks = sparks([share for share, _, _ in machine.gpus], (0.0, 1.0))
    return f"GPU {blocks} {busy / len(machine.gpus):.0%}  {gpu_used:.0f}/{gpu_total:.0f} GiB  {cores}"


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `2:05:09`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
