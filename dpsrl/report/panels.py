"""What a page shows of runs: each figure with one sentence on how to read it, and its numbers in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpsrl import plots
from dpsrl.report import figures
from dpsrl.report.history import flows
from dpsrl.report.load import Run
from dpsrl.report.spending import Spending

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST = "What it cost"
CAPTIONS = {
    "accuracy": "Mean accuracy on prompts that are never trained on, at each evaluation.",
    "accuracy-rollouts": "The same against the rollouts generated, which are what a run pays for: further left is "
    "cheaper.",
    "reward": "Rollouts made for training, single steps faint and their moving mean bold; selection decides which "
    "prompts they come from, so that a flat line can go with a policy that learns.",
    "reward-rollouts": "The same against the rollouts generated.",
    "outcomes": "Groups rolled out at each step by how they went: only mixed ones, with right and wrong answers, carry "
    "a learning signal.",
    "mixed": "Share of generated groups that were mixed, beside what was predicted when they were selected: the closer "
    "the lines, the better the predictions.",
    "occupancy": "Every training prompt by how its last group went; light grey are prompts not rolled out yet.",
    "flow": "Each pair of consecutive groups of a prompt is one strand, from its state before (left) to its state "
    "after (right); a band is as thick as it has strands.",
    "moves": "Of the prompts met again in a stretch of steps, the share found in another state than before: upwards "
    "moved towards solved, downwards away from it.",
    "coverage": "Share of all training prompts rolled out at least once; the dotted line takes each prompt once before "
    "any twice.",
    "visits": "Training prompts by how many groups they had, from 0: a long tail means that selection keeps coming "
    "back.",
    "ledger": "Every rollout that was generated, by what became of it; carried ones wait for the next step.",
    "phases": "Seconds of each step by what they were spent on; phases that run at once stand on each other too.",
}
MIXED_ALONE = "Share of generated groups that were mixed: with right and wrong answers."


@dataclass(frozen=True)
class Panel:
    """A figure with its caption; head and rows: its numbers, for who cannot see it or wants them."""

    name: str
    figure: Figure
    caption: str
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    open: bool = False  # whether the table stands there from the start


def several(runs: Mapping[str, Run]) -> list[Panel]:
    """Figures that compare runs."""
    records = {name: run.records for name, run in runs.items()}
    drawn = plots.runs_figures(records) | {"coverage": figures.coverages(records)}
    captions = CAPTIONS | {"mixed": MIXED_ALONE, "coverage": "Share of all training prompts rolled out at least once."}
    return [Panel(name, figure, captions[name]) for name, figure in drawn.items() if figure is not None]


def sections(run: Run) -> dict[str, list[Panel]]:
    """Heading -> panels of one run; a heading without panels is left out, except the last, which has a table too."""
    own = plots.figures({run.name: run.records})
    history = run.history
    own |= {
        "outcomes": figures.outcomes(history),
        "moves": figures.moves(history),
        "coverage": figures.coverage(run.records, run.num_prompts, run.batch),
        "visits": figures.visits(history, run.num_prompts),
    }
    predicts = any("selection/predicted_share" in record for record in run.records)
    captions = CAPTIONS if predicts else CAPTIONS | {"mixed": MIXED_ALONE}
    made = {name: Panel(name, figure, captions[name]) for name, figure in own.items() if figure is not None}
    made |= {panel.name: panel for panel in (flow(run), reliability(run), spent(run), ledger(run)) if panel}
    order = {
        "Learning": ("accuracy", "accuracy-rollouts", "reward", "reward-rollouts"),
        "What selection did": ("outcomes", "mixed", "occupancy", "flow", "moves", "reliability", "coverage", "visits"),
        COST: ("spent", "ledger", "phases"),
    }
    found = {heading: [made[name] for name in names if name in made] for heading, names in order.items()}
    return {heading: panels for heading, panels in found.items() if panels or heading == COST}


def flow(run: Run) -> Panel | None:
    table = flows(run.history)
    figure = figures.flow(table)
    if figure is None:
        return None
    names = ("never scored", *figures.STATE_NAMES.values())
    rows = tuple(
        (name, *(f"{num:,} ({num / max(row.sum(), 1):.0%})" for num in row)) for name, row in zip(names, table)
    )
    return Panel("flow", figure, CAPTIONS["flow"], ("before \\ after", *figures.STATE_NAMES.values()), rows)


def reliability(run: Run) -> Panel | None:
    known = run.calibration
    figure = figures.reliability(known)
    if known is None or figure is None:
        return None
    num_bins, total = known.num_groups_K.size, int(known.num_groups_K.sum())
    caption = (
        "Groups in ten ranges of the predicted chance of being mixed; points on the dotted line came out as predicted, "
        f"above it more often. Brier score {known.brier:.3f} ({known.base_brier:.3f} for predicting the mean "
        f"each time), mean gap {known.error:.3f}, over the {total:,} groups that selection chose."
    )
    rows = tuple(
        (
            f"{k / num_bins:.0%} to {(k + 1) / num_bins:.0%}", f"{num:,}", f"{known.predicted_K[k]:.3f}",
            f"{known.mixed_K[k]:.3f}", f"{known.low_K[k]:.3f} to {known.high_K[k]:.3f}",
        )
        for k, num in enumerate(known.num_groups_K.tolist()) if num
    )  # fmt: skip
    return Panel("reliability", figure, caption, ("range", "groups", "predicted", "mixed", "95% interval"), rows)


def spent(run: Run) -> Panel | None:
    known = run.spending
    figure = figures.spent(known)
    if known is None or figure is None:
        return None
    mixed, generated = int(known.mixed_T[-1]), int(known.run_T[-1])
    trained = dict(figures.ledger_so_far(run.records))["trained"]
    uniform, dynamic = float(known.uniform_T[-1]), float(known.dynamic_T[-1])
    rows = (
        ("this run", f"{generated:,}", f"{trained:,}" if trained else "-", f"{generated / mixed:.1f}"),
        ("uniform sampling (estimated)", f"{uniform:,.0f}", f"{uniform:,.0f}", f"{uniform / mixed:.1f}"),
        (
            "dynamic sampling (estimated)",
            f"{dynamic:,.0f}",
            f"{mixed * known.group_size:,}",
            f"{dynamic / mixed:.1f}",
        ),
    )
    head = ("way of sampling", "rollouts generated", "trained on", "per mixed group")
    return Panel("spent", figure, spent_caption(known), head, rows, open=True)


def spent_caption(known: Spending) -> str:
    """How the two estimates are made, with their numbers."""
    num = known.steps_T.size
    if known.num_audit == num:
        source = "prompts drawn at random for the audit (the latest 512)"
    elif known.num_audit == 0:
        source = "prompts scored for the first time, which no belief told apart (the latest 512)"
    else:
        source = (
            f"prompts scored for the first time, then ({known.num_audit:,} of {num:,} steps) of prompts drawn at "
            "random for the audit, the latest 512 each"
        )
    low, high = known.random_share_T.min(), known.random_share_T.max()
    return (
        "Rollouts generated until so many groups were mixed; lower is cheaper. Both other ways are estimated, taking "
        f"the policy as it was at each step, from the mixed share of {source}: {low:.0%} to {high:.0%}. Uniform "
        "sampling takes one group over that share per mixed group and trains on all; dynamic sampling rolls out "
        f"{known.batch:,} random prompts at a time until {known.batch:,} groups are mixed, and drops the rest."
    )


def why_not_estimated(run: Run) -> str:
    """For a run with groups whose counterfactual cost is not known."""
    if not len(run.history) or run.spending is not None:
        return ""
    reason = (
        "none of its groups was mixed"
        if not run.history.mixed_G.any()
        else "it has no figure of prompts drawn at random (selection.audit_share), and too few first groups, or first "
        "groups that were chosen by what was known beforehand"
    )
    return f"What uniform and dynamic sampling would have spent cannot be estimated for this run: {reason}."


def ledger(run: Run) -> Panel | None:
    parts = figures.ledger_parts(run.summary.get("rollouts")) or figures.ledger_so_far(run.records)
    figure = figures.ledger(parts)
    if figure is None:
        return None
    total = sum(num for _, num in parts)
    rows = tuple((name, f"{num:,}", f"{num / total:.1%}") for name, num in parts)
    return Panel("ledger", figure, CAPTIONS["ledger"], ("rollouts", "number", "share"), rows)


def every_figure(runs: Mapping[str, Run]) -> dict[str, Figure]:
    """By file name: of all runs together, and where there are several, of each run alone."""
    drawn = {panel.name: panel.figure for panel in several(runs)} if len(runs) > 1 else {}
    for index, run in enumerate(runs.values(), 1):
        prefix = f"run{index}-" if len(runs) > 1 else ""
        drawn |= {f"{prefix}{panel.name}": panel.figure for panels in sections(run).values() for panel in panels}
    return drawn


def shown(panels: Sequence[Panel], salt: str) -> list[tuple[Panel, str, str]]:
    """Each panel with its title and its <svg> element; salt: another one for each run on a page."""
    return [(panel, *plots.to_element(panel.figure, f"{salt}-{panel.name}")) for panel in panels]
