"""The figures of a study from its records: mean over seeds, and a band of one 95% interval around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsrl import plots
from dpsrl.files import write_text
from dpsrl.metrics import Record
from dpsrl.study.analysis import AT_THE_START, CENSORED, mean_interval
from dpsrl.study.plan import Plan
from dpsrl.study.rows import Runs, compared, runs_of, same_cores
from dpsrl.study.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVER = {"step": "steps", "rollouts": "rollouts", "seconds": "seconds of training"}
WIDTH, HEIGHT = 3.6, 2.9  # inches of a panel
LEGEND_COLUMN, LEGEND_ROW = 1.8, 0.18  # inches
LEGEND_ROWS = 3  # for which there is room


def draw(plan: Plan, records: Sequence[Record], tables: dict[str, Table], folder: Path) -> None:
    """accuracy.svg, mixed.svg, calibration.svg and cost.svg into `folder`, of the settings that have runs."""
    import matplotlib

    made = {record["setting"] for record in records}
    plan = replace(plan, methods_of={setting: of for setting, of in plan.methods_of.items() if setting in made})
    with matplotlib.rc_context(plots.STYLE):
        figures = {
            "accuracy": accuracy(plan, records),
            "mixed": mixed(plan, records),
            "calibration": calibration(plan, records),
            "cost": cost(plan, tables),
        }
        for name, figure in figures.items():
            write_text(folder / f"{name}.svg", plots.to_svg(figure, f"study-{name}"))


def panels(num_rows: int, num_columns: int) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * num_columns, HEIGHT * num_rows + 0.7), layout="none")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def drawn(plan: Plan, records: Sequence[Record], setting: str) -> Iterator[tuple[str, Runs, dict[str, Any]]]:
    """Each method that has runs, on the seeds that all have, with its line's look: one look in all figures, the three
    that matter wider.
    """
    everywhere = list(dict.fromkeys(method for methods in plan.methods_of.values() for method in methods))
    for method, runs in compared(records, setting, plan.methods_of[setting])[0].items():
        color, dash = plots.style_of(everywhere.index(method))
        wide = method in (plan.reference, plan.ours, "uniform")
        yield method, runs, {"color": color, "linestyle": dash, "linewidth": 2.4 if wide else 1.1, "label": method}


def legend(figure: Figure) -> None:
    """One for all panels, each method once, in as many columns as there is room for; rows make the figure higher."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    num_columns = min(6, int(figure.get_figwidth() / LEGEND_COLUMN))
    num_more = max(0, -(-len(found) // num_columns) - LEGEND_ROWS)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * num_more)
    look = {"ncols": num_columns, "columnspacing": num_columns / 3}  # closer where the figure is narrow
    figure.legend(found.values(), found.keys(), loc="outside lower center", **look)


def band(axes: Axes, x_T: np.ndarray, values_ST: np.ndarray, look: dict[str, Any], marker: str = "") -> None:
    mean_T, half_T = np.array([mean_interval(column) for column in values_ST.T]).T
    axes.plot(x_T, mean_T, marker=marker, markersize=3, **look)
    if np.isfinite(half_T).all() and look["linewidth"] > 2:  # bands of all methods would hide each other
        axes.fill_between(x_T, mean_T - half_T, mean_T + half_T, color=look["color"], alpha=0.15, linewidth=0)


def accuracy(plan: Plan, records: Sequence[Record]) -> Figure:
    """Held-out accuracy: a row for each setting, over steps, rollouts and time."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure, grid = panels(len(plan.methods_of), len(OVER))
    for row, setting in zip(grid, plan.methods_of):
        for axes, (key, words) in zip(row, OVER.items()):
            for _, runs, look in drawn(plan, records, setting):
                if key == "seconds" and not same_cores(runs, runs_of(records, setting, plan.reference)):
                    continue
                curves = runs.curves(key)
                band(axes, curves.cost_T, curves.accuracy_ST, look, "o")
            axes.set(
                title=f"{setting}, over {key}s" if key == "step" else f"{setting}, over {key}",
                xlabel=words,
                ylabel="held-out accuracy" if key == "step" else "",
            )
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            plots.widen(axes)
    legend(figure)
    return figure


def mixed(plan: Plan, records: Sequence[Record]) -> Figure:
    """Share of generated groups that were mixed, a panel for each setting, smoothed over steps."""
    figure, grid = panels(1, len(plan.methods_of))
    for axes, setting in zip(grid[0], plan.methods_of):
        for _, runs, look in drawn(plan, records, setting):
            rows = [plots.smooth(np.array(record["mixed_T"])) for record in runs.by_seed.values()]
            length = min(map(len, rows))
            if length:
                band(axes, np.arange(1, length + 1), np.array([row[:length] for row in rows]), look)
        axes.set(title=setting, xlabel="step", ylim=(0, 1), ylabel="mixed share of generated groups")
    legend(figure)
    return figure


def calibration(plan: Plan, records: Sequence[Record]) -> Figure:
    """Predicted against realised share of mixed groups, of prompts drawn at random, all seeds together."""
    figure, grid = panels(1, len(plan.methods_of))
    for axes, setting in zip(grid[0], plan.methods_of):
        axes.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1)
        for _, runs, look in drawn(plan, records, setting):
            audits = [record["audit"]["all"] for record in runs.by_seed.values() if record["audit"]]
            if not audits:
                continue
            num, predicted, mixed = (
                np.sum([a[key] for a in audits], axis=0) for key in ("num_K", "predicted_K", "mixed_K")
            )
            enough = num >= 10
            if enough.sum() > 1:  # else it predicts the same of every prompt
                axes.plot(
                    predicted[enough] / num[enough], mixed[enough] / num[enough], marker="o", markersize=3, **look
                )
        axes.set(title=setting, xlabel="predicted", ylabel="mixed, of random prompts", xlim=(0, 1), ylim=(0, 1))
    legend(figure)
    return figure


def cost(plan: Plan, tables: dict[str, Table]) -> Figure:
    """Rollouts to the reference's final accuracy over the reference's; an arrow where all of them were too few."""
    figure, grid = panels(1, len(plan.methods_of))
    for axes, setting in zip(grid[0], plan.methods_of):
        rows = [row for row in tables[f"{setting}/cost"].rows if row["seeds"]][::-1]
        for place, row in enumerate(rows):
            found = row["rollouts/all"]
            if found["state"] == AT_THE_START:
                continue
            low, high = (found["spent"] if end is None else end for end in found["interval"] or [None, None])
            color = plots.RED if row["method"] == plan.ours else plots.BLUE
            if found["interval"]:
                axes.plot([low, high], [place, place], color=color, linewidth=1.5)
            if found["state"] == CENSORED:
                axes.plot(found["spent"], place, ">", color=color, fillstyle="none")
            else:
                axes.plot(found["value"], place, "o", color=color)
        axes.axvline(1.0, color="#BBBBBB", linewidth=1)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set(title=setting, xlabel=f"over all rollouts of {plan.reference}", ylim=(-0.5, max(1, len(rows)) - 0.5))
        axes.set_xlim(left=0)
    return figure
