"""Figures from the groups of a run, and from where its rollouts went. Each returns None where there is nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsrl.metrics import Record
from dpsrl.plots import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    ROLLOUTS,
    SKY,
    STATES,
    STYLE,
    Runs,
    finish,
    label_of,
    new_figure,
    number,
    series,
    stack,
    style_of,
    thin,
)
from dpsrl.report.history import Calibration, History, flows_over_time
from dpsrl.report.spending import Spending
from dpsrl.selection.hmm import PARTIAL, SOLVED, UNSOLVED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY = "#333333", "#777777"
UNSEEN_COLOR = "#BBBBBB"
STATE_NAMES = {UNSOLVED: "unsolved", PARTIAL: "partial", SOLVED: "solved"}
STATE_COLORS = {state: STATES[name] for state, name in STATE_NAMES.items()}
GAP = 0.035  # between the nodes of a flow figure, share of its height
LABEL_HEIGHT = 0.115  # of a node's two lines
FAINT_BELOW = 10  # groups: what a range of fewer says is mostly chance
MAX_VISITS = 12  # more than that are one bar
OUTCOMES = ((SOLVED, "all right"), (PARTIAL, "mixed"), (UNSOLVED, "all wrong"))


def outcomes(history: History) -> Figure | None:
    """Groups of each step by how they went, stacked."""
    if not len(history):
        return None
    steps_T, place_G = np.unique(history.step_G, return_inverse=True)
    counts_TS = np.stack([np.bincount(place_G, history.state_G == state) for state, _ in OUTCOMES], axis=1)
    table = thin(np.column_stack([steps_T, counts_TS]))
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure("What selection got", "groups per step")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    stack(axes, table[:, 0], table[:, 1:], [name for _, name in OUTCOMES], [STATE_COLORS[s] for s, _ in OUTCOMES])
    return finish(figure, axes, outside=True)


def flow(table: np.ndarray) -> Figure | None:
    """Bands from a prompt's state to that of its next group; `table` as `history.flows` gives it."""
    total = table.sum()
    if not total:
        return None
    from matplotlib.patches import Rectangle

    figure, axes = new_figure("From one group of a prompt to its next", "")
    axes.set_axis_off()
    axes.set_xlim(-0.42, 1.42)
    axes.set_ylim(-0.02, 1.1)
    order = (SOLVED, PARTIAL, UNSOLVED)
    left = [(state + 1, STATE_NAMES[state], STATE_COLORS[state]) for state in order] + [(0, "unseen", UNSEEN_COLOR)]
    scale = (1 - GAP * 3) / total
    left_top = dict(zip([row for row, *_ in left], tops(table.sum(axis=1)[[row for row, *_ in left]] * scale)))
    right_top = dict(zip(order, tops(table.sum(axis=0)[list(order)] * scale)))
    from_T = [(name, color, left_top[row], table[row].sum()) for row, name, color in left]
    to_T = [(STATE_NAMES[s], STATE_COLORS[s], right_top[s], table[:, s].sum()) for s in order]
    for x, edge, align, nodes in ((-0.02, -0.03, "right", from_T), (0.98, 1.03, "left", to_T)):
        for _, color, top, num in nodes:
            axes.add_patch(Rectangle((x, top - num * scale), 0.04, num * scale, color=color, linewidth=0))
        label_nodes(axes, edge, align, [(name, num, top - num * scale / 2) for name, _, top, num in nodes], total)
    for row, _, color in left:
        for state in order:
            height = table[row, state] * scale
            band(axes, left_top[row], right_top[state], height, color)
            left_top[row] -= height
            right_top[state] -= height
    for x, align, words in ((-0.03, "right", "before"), (1.03, "left", "after")):
        axes.text(x, 1.06, words, ha=align, va="center", fontweight="bold", color=INK)
    return figure


def tops(heights: np.ndarray) -> list[float]:
    """Upper edges of nodes that hang from 1 downwards with gaps between."""
    return [1.0 - heights[:i].sum() - GAP * i for i in range(heights.size)]


def label_nodes(axes: Axes, x: float, align: str, nodes: Sequence[tuple[str, int, float]], total: int) -> None:
    """Names and counts at the middles of the nodes, from the top down, none over another."""
    nodes = [node for node in nodes if node[1]]
    middles = apart([middle for *_, middle in nodes], LABEL_HEIGHT, floor=0.02)
    for (name, num, _), y in zip(nodes, middles, strict=True):
        words = f"{name}\n{num:,} ({num / total:.0%})"
        axes.text(x, y, words, ha=align, va="center", color=INK, fontsize=8.5, linespacing=1.2)


def apart(middles: Sequence[float], distance: float, floor: float) -> list[float]:
    """Falling heights moved as little as it takes to be `distance` apart, none below `floor`."""
    placed: list[float] = []
    for middle in middles:
        placed.append(min(middle, placed[-1] - distance) if placed else middle)
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], placed[i + 1] + distance if i + 1 < len(placed) else floor)
    return placed


def band(axes: Axes, left: float, right: float, height: float, color: str) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if height <= 0:
        return
    points = [
        (0.02, left), (0.5, left), (0.5, right), (0.98, right),
        (0.98, right - height), (0.5, right - height), (0.5, left - height), (0.02, left - height), (0.02, left),
    ]  # fmt: skip
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    axes.add_patch(PathPatch(Path(points, codes), facecolor=color, alpha=0.45, linewidth=0))


# Moves: those towards solved are drawn upwards, the others downwards.
UP = (("unsolved to partial", UNSOLVED, PARTIAL, SKY), ("partial to solved", PARTIAL, SOLVED, GREEN),
      ("unsolved to solved", UNSOLVED, SOLVED, BLUE))  # fmt: skip
DOWN = (("partial to unsolved", PARTIAL, UNSOLVED, ORANGE), ("solved to partial", SOLVED, PARTIAL, PINK),
        ("solved to unsolved", SOLVED, UNSOLVED, RED))  # fmt: skip


def moves(history: History) -> Figure | None:
    """Share of prompts met again that had changed state, over time."""
    if not (history.before_G != -1).any():
        return None
    edges, table_WSS = flows_over_time(history)
    again_W = table_WSS[:, 1:].sum(axis=(1, 2))
    used = again_W > 0
    middles, width = (edges[:-1] + edges[1:] - 1) / 2, (edges[1] - edges[0]) * 0.86
    figure, axes = new_figure("Prompts that changed state", "share of prompts met again")
    for sign, kinds in ((1, UP), (-1, DOWN)):
        base_W = np.zeros(again_W.size)
        for label, before, after, color in kinds:
            share_W = sign * table_WSS[:, 1 + before, after] / np.maximum(again_W, 1)
            if share_W.any():
                axes.bar(middles[used], share_W[used], width, base_W[used], label=label, color=color, linewidth=0)
            base_W += share_W
    from matplotlib.ticker import FuncFormatter

    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{abs(y):.0%}"))
    axes.set_xlim(edges[0] - 0.5, edges[-1] - 0.5)
    return finish(figure, axes, outside=True) if axes.patches else None


def reliability(known: Calibration | None) -> Figure | None:
    """What was predicted against what came, and how many groups each range had."""
    if known is None:
        return None
    import matplotlib
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = new_figure("Prediction and outcome", "share that was mixed", True, "predicted chance of mixed")
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        counts = axes.twinx()
    counts.spines["right"].set_visible(True)
    num_bins = known.num_groups_K.size
    places = (np.arange(num_bins) + 0.5) / num_bins
    counts.bar(places, known.num_groups_K, 0.9 / num_bins, color="#E3E3E3", linewidth=0)
    counts.set_ylabel("groups in the range (bars)", color=INK, fontsize=STYLE["font.size"])
    counts.set_ylim(0, known.num_groups_K.max() * 1.25)
    counts.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot([0, 1], [0, 1], ":", color=GREY, label="as predicted", linewidth=1.2)
    for some, alpha, label in ((True, 1.0, "realised, 95%"), (False, 0.3, None)):
        used = (known.num_groups_K > 0) & ((known.num_groups_K >= FAINT_BELOW) == some)
        share, low, high = known.mixed_K[used], known.low_K[used], known.high_K[used]
        spread = np.clip([share - low, high - share], 0, None)
        style = {"fmt": "o", "color": BLUE, "markersize": 5, "alpha": alpha, "label": label}
        axes.errorbar(known.predicted_K[used], share, spread, **style)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    finish(figure, axes)
    axes.get_legend().set_loc("upper left")  # where few groups are, as a rule
    return figure


def coverage(records: Sequence[Record], num_prompts: int | None, batch: int) -> Figure | None:
    """Share of prompts rolled out at least once, beside one pass over all prompts in order."""
    steps, values = series(records, "selection/coverage")
    if not steps.size:
        return None
    figure, axes = new_figure("Coverage", "share of prompts", share=True)
    if num_prompts:
        axes.plot(steps, np.minimum(1.0, steps * batch / num_prompts), ":", color=GREY, label="each once, in order")
    marker = "o" if steps.size == 1 else ""
    axes.plot(thin(steps), thin(values), color=BLUE, label="rolled out at least once", marker=marker)
    return finish(figure, axes)


def coverages(runs: Runs) -> Figure | None:
    """The coverage of several runs."""
    figure, axes = new_figure("Coverage", "share of prompts", share=True)
    for index, (name, records) in enumerate(runs.items()):
        steps, values = series(records, "selection/coverage")
        color, dash = style_of(index)
        if steps.size:
            axes.plot(thin(steps), thin(values), dash, color=color, label=label_of(name))
    return finish(figure, axes) if axes.lines else None


def visits(history: History, num_prompts: int | None) -> Figure | None:
    """Prompts by how often they were rolled out."""
    if not len(history):
        return None
    visits_P = history.visits_P
    counts = np.bincount(np.minimum(visits_P, MAX_VISITS), minlength=2)
    counts[0] = max(0, (num_prompts or 0) - visits_P.size)
    figure, axes = new_figure("How often each prompt was rolled out", "prompts", xlabel="times rolled out")
    colors = [UNSEEN_COLOR if times == 0 else BLUE for times in range(counts.size)]
    bars = axes.bar(np.arange(counts.size), counts, 0.8, color=colors, linewidth=0)
    axes.bar_label(bars, [f"{n:,}" if n else "" for n in counts], fontsize=8, color=INK, padding=2)
    axes.set_xticks(range(counts.size), [f"{n}+" if n == MAX_VISITS else str(n) for n in range(counts.size)])
    axes.set_ylim(0, counts.max() * 1.12)
    axes.grid(False, axis="x")
    return figure


def spent(known: Spending | None) -> Figure | None:
    """Rollouts generated against mixed groups, as it was and as other ways are estimated."""
    if known is None:
        return None
    from matplotlib.ticker import StrMethodFormatter

    figure, axes = new_figure("What the mixed groups cost", "rollouts generated", xlabel="mixed groups so far")
    for label, values, color, dash in (
        ("uniform sampling, estimated", known.uniform_T, RED, "--"),
        ("dynamic sampling, estimated", known.dynamic_T, ORANGE, "-."),
        ("this run", known.run_T, BLUE, "-"),
    ):
        x, y = np.concatenate([[0], thin(known.mixed_T)]), np.concatenate([[0.0], thin(values)])
        axes.plot(x, y, dash, color=color, label=label)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return finish(figure, axes)


def ledger(parts: Sequence[tuple[str, int]]) -> Figure | None:
    """Where every rollout went: (where to, how many)."""
    total = sum(num for _, num in parts)
    if not total:
        return None
    figure, axes = new_figure("Where the rollouts went", "", xlabel="rollouts")
    colors = [{"trained": BLUE, "carried": SKY}.get(name, color) for (name, _), color in zip(parts, DROPPED_COLORS)]
    names = [name for name, _ in parts]
    bars = axes.barh(names, [num for _, num in parts], color=colors, linewidth=0, height=0.62)
    axes.bar_label(bars, [f"{num:,} ({num / total:.1%})" for _, num in parts], padding=4, fontsize=8.5, color=INK)
    figure.set_figheight(1.2 + 0.42 * len(parts))
    axes.invert_yaxis()
    axes.set_xlim(0, max(num for _, num in parts) * 1.42)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


TRAINED = "rollout/num_trained"
DROPPED_COLORS = (BLUE, SKY, ORANGE, RED, PINK, GREY, GREEN)


def ledger_parts(account: Any) -> list[tuple[str, int]]:
    """(where to, how many) from the account in summary.json; empty where it is none."""
    if not isinstance(account, Mapping) or not isinstance(account.get("dropped"), Mapping):
        return []
    dropped = [(f"dropped: {reason}", num) for reason, num in account["dropped"].items()]
    parts = [("trained", account.get("trained")), ("carried", account.get("carried")), *dropped][:7]
    return [(name, int(number(num, 0.0))) for name, num in parts]


def ledger_so_far(records: Sequence[Record]) -> list[tuple[str, int]]:
    """The same for a run that has no account yet, as far as its steps say."""
    (generated, trained) = (
        max((number(record.get(key), 0.0) for record in records), default=0.0) for key in (ROLLOUTS, TRAINED)
    )
    return [("trained", int(trained)), ("waiting or dropped", int(max(0.0, generated - trained)))]
