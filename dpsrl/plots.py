"""Figures of one or several runs from the records of their metrics.jsonl, and the look that all figures share.

Each figure function takes `runs` (name -> records) or one run's `records`, and returns a matplotlib figure,
or None where the records hold nothing to draw. Colours are Okabe and Ito's, told apart by every eye.
matplotlib is imported when a figure is drawn, not before.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from dpsrl.metrics import EVAL_KEY, PHASES, Record, phase_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[Record]]

ORANGE, SKY, GREEN, BLUE, RED, PINK = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
CYCLE = (BLUE, RED, GREEN, ORANGE, PINK, SKY, "#000000")
DASHES = ("-", "--", ":", "-.")  # after a round of colours
STATES = {"solved": GREEN, "partial": ORANGE, "unsolved": "#777777", "unseen": "#E3E3E3"}
PHASE_COLORS = dict(zip(PHASES, ("#BBBBBB", RED, BLUE, SKY, ORANGE, GREEN, PINK, "#777777"), strict=True))

ROLLOUTS = "rollout/num_rollouts"
X_LABELS = {"step": "step", ROLLOUTS: "rollouts generated"}
TITLE_WORDS = {"step": "steps", ROLLOUTS: "rollouts"}

MAX_LABEL = 44  # characters, of which the last are kept
MAX_POINTS = 250  # a longer curve is drawn from this many means of equal stretches of steps

STYLE = {
    "figure.figsize": (5.2, 3.15),
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text: small files, found by the browser's search
    "text.parse_math": False,  # a run's name may hold dollars
}


# --- series -------------------------------------------------------------------------------------------


def series(records: Sequence[Record], key: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """(x, values) where the key has a value, float64; over: a key that only grows, its last value holds on."""
    points, x = [], 0.0
    for record in records:
        x = number(record.get(over), x)
        value = number(record.get(key))
        if value is not None:
            points.append((x, value))
    table = np.array(points, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@overload
def number(value: object, default: float) -> float: ...
@overload
def number(value: object, default: None = None) -> float | None: ...
def number(value: object, default: float | None = None) -> float | None:
    """A file may hold anything under a key."""
    if isinstance(value, (int, float)) and abs(value) < 1e300:  # neither NaN nor an integer of thousands of digits
        return float(value)
    return default


def thin(values: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS means of equal stretches along the first axis."""
    if len(values) <= MAX_POINTS:
        return values
    edges = np.linspace(0, len(values), MAX_POINTS + 1).astype(int)
    return np.add.reduceat(values, edges[:-1], axis=0) / np.diff(edges).reshape(-1, *[1] * (values.ndim - 1))


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a tenth of the series, narrower at its ends."""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def curve(
    axes: Axes, records: Sequence[Record], key: str, label: str, color: str, dash: str = "-", over: str = "step"
) -> bool:
    """Draws the key's moving mean, its single values faint behind; False where there are none."""
    steps, values = series(records, key, over)
    if not len(steps):
        return False
    steps, values = thin(steps), thin(values)
    marker = "o" if len(steps) == 1 else ""
    smoothed = smooth(values)
    if not np.array_equal(smoothed, values):
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed, dash, color=color, label=label, marker=marker)
    return True


def eval_keys(records: Iterable[Record]) -> list[str]:
    names = {name: None for record in records for name in record}
    return [name for name in names if (match := EVAL_KEY.fullmatch(name)) and match["measure"] == "avg"]


# --- figures over several runs ------------------------------------------------------------------------


def accuracy(runs: Runs, over: str = "step") -> Figure | None:
    """Held-out accuracy at each evaluation, a line per run and benchmark."""
    lines = []
    for run, records in runs.items():
        for key in eval_keys(records):
            benchmark, measure = key.removeprefix("eval/").rsplit("/", 1)
            name = label_of(f"{benchmark} {measure}" if len(runs) == 1 else f"{run}: {benchmark} {measure}")
            lines.append((name, *series(records, key, over)))
    lines = [line for line in lines if len(line[1])]
    if not lines:
        return None
    figure, axes = new_figure(f"Held-out accuracy over {TITLE_WORDS[over]}", "accuracy", xlabel=X_LABELS[over])
    for index, (name, steps, values) in enumerate(lines):
        color, dash = style_of(index)
        # As many markers as tell evaluations apart.
        axes.plot(
            steps,
            values,
            dash,
            marker="o" if len(steps) <= 40 else "",
            markersize=4.5,
            color=color,
            label=name,
        )
        if len(runs) == 1 and len(lines) <= 3:
            label_ends(axes, steps, values, color)
    axes.margins(x=0.08, y=0.2)
    widen(axes)
    return finish(figure, axes)


def label_ends(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    """First and last value in figures, on the side that the line leaves free."""
    for here, next_to in {0: 1, len(steps) - 1: -2}.items():
        above = len(steps) == 1 or values[here] >= values[next_to]
        offset = {"xytext": (0, 6 if above else -14), "textcoords": "offset points"}
        axes.annotate(
            f"{values[here]:.3f}",
            (steps[here], values[here]),
            ha="center",
            color=color,
            fontsize=8.5,
            **offset,
        )


def reward(runs: Runs, over: str = "step") -> Figure | None:
    """Reward and solve rate of the training rollouts; with several runs, the solve rate of each."""
    ylabel = "reward, share solved" if len(runs) == 1 else "share solved"
    figure, axes = new_figure(f"Training rollouts over {TITLE_WORDS[over]}", ylabel, xlabel=X_LABELS[over])
    drawn = []
    for index, (name, records) in enumerate(runs.items()):
        color, dash = style_of(index)
        if len(runs) == 1:
            drawn.append(curve(axes, records, "rollout/reward", "reward", ORANGE, "--", over))
        label = "solve rate" if len(runs) == 1 else label_of(name)
        drawn.append(curve(axes, records, "rollout/solve_rate", label, color, dash, over))
    widen(axes)
    return finish(figure, axes) if any(drawn) else None


def mixed(runs: Runs) -> Figure | None:
    """Share of generated groups that carry a learning signal, and for one run what the beliefs expected."""
    figure, axes = new_figure("Mixed groups", "share of generated groups", share=True)
    drawn = []
    for index, (name, records) in enumerate(runs.items()):
        color, dash = style_of(index)
        if len(runs) == 1:
            curve(axes, records, "selection/predicted_share", "predicted at selection", PINK, "--")
        label = "mixed" if len(runs) == 1 else label_of(name)
        drawn.append(curve(axes, records, "selection/mixed_share", label, color, dash))
    return finish(figure, axes) if any(drawn) else None


# --- figures of one run -------------------------------------------------------------------------------


def occupancy(records: Sequence[Record]) -> Figure | None:
    """Share of prompts last seen in each solving state, stacked."""
    keys = [f"selection/occupancy/{state}" for state in STATES]
    rows = [[r["step"], *(r[k] for k in keys)] for r in records if all(number(r.get(k)) is not None for k in keys)]
    if not rows:
        return None
    table = thin(np.array(rows, dtype=float))
    shares_TS = table[:, 1:] / np.maximum(table[:, 1:].sum(axis=1, keepdims=True), 1e-12)
    figure, axes = new_figure("Solving states", "share of prompts", share=True)
    stack(axes, table[:, 0], shares_TS, list(STATES), list(STATES.values()))
    return finish(figure, axes, outside=True)


def phases(records: Sequence[Record]) -> Figure | None:
    """Seconds of each step by phase, stacked; step 0 (start-up and the first evaluation) left out."""
    rows = [(record["step"], phase_seconds(record)) for record in records if record["step"] > 0]
    names = [phase for phase in PHASES if any(seconds.get(phase, 0.0) > 0 for _, seconds in rows)]
    if not names:
        return None
    table = thin(np.array([[step, *(seconds.get(name, 0.0) for name in names)] for step, seconds in rows]))
    figure, axes = new_figure("Time by phase", "seconds per step")
    stack(axes, table[:, 0], table[:, 1:], [PHASES[name] for name in names], [PHASE_COLORS[n] for n in names])
    return finish(figure, axes, outside=True)


def stack(axes: Axes, steps: np.ndarray, values_TS: np.ndarray, labels: list[str], colors: list[str]) -> None:
    """One colour on the other, each step a flat piece: a single step and a lone peak keep their width."""
    middles = (steps[1:] + steps[:-1]) / 2
    half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
    edges = np.concatenate([[steps[0] - half], middles, [steps[-1] + half]])
    tops_TS = np.cumsum(values_TS, axis=1)
    bottoms_TS = tops_TS - values_TS
    for top, bottom, label, color in zip(tops_TS.T, bottoms_TS.T, labels, colors, strict=True):
        top, bottom = np.append(top, top[-1]), np.append(bottom, bottom[-1])
        axes.fill_between(edges, bottom, top, step="post", label=label, color=color, linewidth=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0.0)


# --- the common look ----------------------------------------------------------------------------------


def new_figure(title: str, ylabel: str, share: bool = False, xlabel: str = X_LABELS["step"]) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="none")  # not pyplot's: no window, no global list of figures
        axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(0, 1)
    return figure, axes


def widen(axes: Axes, span: float = 0.1) -> None:
    """Stretches the y axis to at least `span`: noise in the third decimal should not look like a rise."""
    low, high = axes.get_ylim()
    extra = max(span - (high - low), 0.0) / 2
    axes.set_ylim(low - extra, high + extra)


def finish(figure: Figure, axes: Axes, outside: bool = False) -> Figure:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        if outside:  # beside a stack, in its order from the top
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True, handlelength=1.0)
        else:
            axes.legend(loc="best")
    return figure


def label_of(name: str) -> str:
    """A name as a legend can show it: not too long, without what no file can hold, and never hidden."""
    shown = name.encode("utf-8", errors="replace").decode().replace("\0", " ")
    shown = shown if len(shown) <= MAX_LABEL else f"...{shown[3 - MAX_LABEL :]}"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves out labels that begin so


def style_of(index: int) -> tuple[str, str]:
    return CYCLE[index % len(CYCLE)], DASHES[index // len(CYCLE) % len(DASHES)]


# --- files --------------------------------------------------------------------------------------------

RUNS_FIGURES: dict[str, Callable[[Runs], Figure | None]] = {
    "accuracy": accuracy,
    "accuracy-rollouts": lambda runs: accuracy(runs, ROLLOUTS),
    "reward": reward,
    "reward-rollouts": lambda runs: reward(runs, ROLLOUTS),
    "mixed": mixed,
}
RUN_FIGURES: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "occupancy": occupancy,
    "phases": phases,
}


def figures(runs: Runs) -> dict[str, Figure]:
    """Every figure these runs have something for, by name; the last two only for a single run."""
    drawn = runs_figures(runs)
    if len(runs) == 1:
        (records,) = runs.values()
        drawn |= {name: figure for name, draw in RUN_FIGURES.items() if (figure := draw(records)) is not None}
    return drawn


def runs_figures(runs: Runs) -> dict[str, Figure]:
    drawn = {name: draw(runs) for name, draw in RUNS_FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def lay_out(figure: Figure) -> None:
    """Once, where matplotlib would do it twice for each file, which takes as long as drawing."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    ConstrainedLayoutEngine(w_pad=0.1).execute(figure)


def to_svg(figure: Figure, name: str = "figure") -> str:
    """A whole SVG file; `name` goes into the ids in it, so that several can stand in one page."""
    import matplotlib

    lay_out(figure)
    buffer = io.StringIO()
    # The same records give the same bytes.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_element(figure: Figure, name: str) -> tuple[str, str]:
    """(title, the <svg> element without it), to stand in a page whose style sheet has a value for each colour."""
    (title,) = {axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")}
    for axes in figure.axes:
        axes.set_title("", loc="left")
    svg = to_svg(figure, name)
    svg = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", svg[svg.index("<svg") :])
    return title, re.sub(r'style="[^"]*"', lambda style: themed(style[0]), svg)


def themed(style: str) -> str:
    """Colours as variables of the page: --ink-0072b2 stands for #0072b2, and is that where the page has no other."""
    return re.sub(r"#([0-9a-f]{6})", lambda color: f"var(--ink-{color[1]}, #{color[1]})", style)


def to_png(figure: Figure) -> bytes:
    lay_out(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
