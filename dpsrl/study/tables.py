"""The tables of a study: its rows, sentences that belong to them, and both as Markdown.

Tables are what `summary.json` holds. The Markdown stands in a page between `<!-- study: NAME -->` and
`<!-- /study -->`, put there by `fill`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

from dpsrl.metrics import Record
from dpsrl.study.analysis import AT_THE_START, CENSORED, NUM_RESAMPLES
from dpsrl.study.marks import fill_marks, markdown_of
from dpsrl.study.plan import Plan
from dpsrl.study.rows import (
    CLAIMED_SHARE,
    COSTS,
    PARTS,
    SHARES,
    Row,
    Runs,
    ablation_row,
    accuracy_row,
    compared,
    cost_row,
    excludes_zero,
    prediction_row,
    runs_of,
    selection_row,
    verdict_row,
)

FIGURES = {
    "accuracy": "held-out accuracy over steps, rollouts and seconds",
    "cost": "rollouts to dynamic sampling's accuracy",
    "mixed": "mixed share over steps",
    "calibration": "predicted and realised share of mixed groups",
}
DIFFERENCES = (
    "minus_reference", "at_equal_rollouts", "minus_uniform", "ours_minus_it", "accuracy_difference", "mixed_difference",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """notes: sentences below the rows."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.rows or self.notes)


def tables_of(plan: Plan, records: Sequence[Record]) -> dict[str, Table]:
    """By name: `verdict`, `multiplicity`, `<setting>/accuracy`, `/cost`, `/selection` and `/prediction`, and
    `ablations/<what varies>`.
    """
    tables: dict[str, Table] = {}
    verdicts = []
    for setting, methods in plan.methods_of.items():
        found, notes = compared(records, setting, methods)
        notes += version_notes(found)
        reference, ours, uniform = (found.get(name, Runs({})) for name in (plan.reference, plan.ours, "uniform"))
        kinds: dict[str, Callable[[Runs], Row]] = {
            "accuracy": partial(accuracy_row, reference=reference, uniform=uniform),
            "cost": partial(cost_row, reference=reference, uniform=uniform),
            "selection": partial(selection_row, ours=ours),
            "prediction": prediction_row,
        }
        for kind, row_of in kinds.items():
            rows = [{"method": method} | row_of(runs) for method, runs in found.items()]
            tables[f"{setting}/{kind}"] = Table(rows, notes + notes_of(rows))
        verdicts += [
            {"method": method, "setting": setting} | verdict_row(plan, method, found)
            for method in plan.judged
            if method in found
        ]
    for what, variants in plan.ablations.items():
        found, notes = compared(records, plan.ablated, variants)
        beside = {name: runs_of(records, plan.ablated, variants[name].beside) for name in found}
        rows = [{"method": name} | ablation_row(found[name], beside[name], variants[name]) for name in found]
        notes += version_notes({**found, **{variants[name].beside: beside[name] for name in found}})
        tables[f"ablations/{what}"] = Table(rows, notes + notes_of(rows))
    return {
        "verdict": Table(verdicts, notes_of(verdicts)), "multiplicity": multiplicity(plan, verdicts, tables.values())
    } | tables  # fmt: skip


# --- notes ------------------------------------------------------------------------------------------------


def version_notes(found: dict[str, Runs]) -> list[str]:
    commits = {commit for runs in found.values() for record in runs.by_seed.values() for commit in record["commits"]}
    versions = ", ".join(sorted(commits))
    return [f"These runs were made by {len(commits)} versions of the code: {versions}."] if len(commits) > 1 else []


def notes_of(rows: Sequence[Row]) -> list[str]:
    """What is left out of the cells of these rows."""
    notes = []
    seconds = ("seconds", "seconds/all")
    if unpaired := [f"`{row['method']}`" for row in rows if None in [row.get(name, 0) for name in seconds]]:
        notes.append(f"Seconds of {', '.join(unpaired)} are left out: not all runs had the same number of cores.")
    estimates = [cell for row in rows for cell in row.values() if isinstance(cell, dict)]
    if dropped := max((cell["dropped"] for cell in estimates if cell["interval"]), default=0):
        notes.append(f"Of the {NUM_RESAMPLES:,} resamples behind an interval, up to {dropped:,} have no value.")
    return notes


def multiplicity(plan: Plan, verdicts: Sequence[Row], tables: Iterable[Table]) -> Table:
    """How many intervals of differences there are, each once, and how many of them chance alone would take off zero."""
    values = [
        row[name] for table in tables for row in table.rows for name in DIFFERENCES
        if row.get(name) and (row["method"], name) != (plan.reference, "minus_uniform")  # uniform's row has it already
    ]  # fmt: skip
    before = [plan.ours]  # whose margins are those of "ours minus it"
    for method in plan.judged:
        of_it = [row for row in verdicts if row["method"] == method and method not in before]
        values += [margin for row in of_it for name, *margin in row.get("margins", []) if name not in before]
        before.append(method)
    intervals = [value for value in values if value[1] is not None]
    sentence = (
        f"These tables have {len(intervals)} intervals of differences. Were there no difference anywhere, about "
        f"{0.05 * len(intervals):.0f} of them would exclude zero by chance; {sum(map(excludes_zero, intervals))} do."
    )
    return Table([], [sentence] if intervals else [])


# --- Markdown ---------------------------------------------------------------------------------------------


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def plus_minus(value: list[float | None] | None, sign: str = "") -> str:
    """`0.512 ± 0.010`; without an interval where there is one run."""
    if value is None or value[0] is None:
        return ""
    return f"{value[0]:{sign}.3f}" + ("" if value[1] is None else f" ± {value[1]:.3f}")


def signed(value: list[float | None] | None) -> str:
    return plus_minus(value, "+")


def between(estimate: Row, form: str) -> str:
    """` [25%, 40%]`, with `...` for an end beyond what was spent; nothing without a known end."""
    ends = estimate["interval"] or [None, None]
    if ends == [None, None]:
        return ""
    return f" [{', '.join('...' if end is None else format(end, form) for end in ends)}]"


def estimated(estimate: Row | None) -> str:
    """`0.213 [0.190, 0.236]`."""
    if estimate is None or estimate["value"] is None:
        return ""
    return share(estimate["value"]) + between(estimate, ".3f")


def ratio(estimate: Row | None) -> str:
    """`31% [25%, 40%]`; `not within 52% [40%, ...]` where all that was spent did not reach the target."""
    if estimate is None:
        return ""
    if estimate["state"] == AT_THE_START:
        return AT_THE_START
    value = f"not within {estimate['spent']:.0%}" if estimate["state"] == CENSORED else f"{estimate['value']:.0%}"
    return value + between(estimate, ".0%")


def cell(row: Row, form: Callable[[Any], str], key: str) -> str:
    return form(row.get(key))


def verdict(row: Row, count: str) -> str:
    """`no: 31% [27%, 40%]`; nothing without runs of the reference."""
    return f"{row[f'{count}/within']}: {ratio(row[count])}" if count in row else ""


def above_all(row: Row, of: Sequence[str] | None = None) -> str:
    """`no: +0.003 ± 0.010 above beta`, with all that it is not shown to be above; else yes, with the least margin.

    of: the others that count, where not all do; one that was not run is named.
    """
    margins = sorted((m for m in row["margins"] if of is None or m[0] in of), key=itemgetter(1))
    not_run = [f"`{name}`" for name in of or () if name not in {m[0] for m in margins}]
    doubtful = [margin for margin in margins if margin[1] <= 0 or not excludes_zero(margin[1:])]
    told = ", ".join(f"{signed(margin)} above `{name}`" for name, *margin in doubtful or margins[:1])
    without = f", without {' and '.join(not_run)}" if not_run else ""
    return f"{'no' if doubtful else 'yes'}{without}: {told}" if margins else ""


PAPERS = ("uniform", "history_resampling")  # what the paper compares mixed shares with
TO_THERE = {"all": "to dynamic sampling's accuracy, of all its {}", "95%": "to 95% of that, of its own {} until there"}
OF_PROMPTS = {"all": "", "seen": ", seen before"}
COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "verdict": {
        "setting": lambda r: r["setting"],
        "seeds": lambda r: str(r["seeds"]),
        f"dynamic sampling's accuracy in {CLAIMED_SHARE:.0%} of its rollouts": partial(verdict, count="rollouts"),
        "the same, its rollouts as whole batches": partial(verdict, count="whole_batches"),
        "mixed share above the paper's two baselines": partial(above_all, of=PAPERS),
        "mixed share above all others": above_all,
    },
    "accuracy": {
        "seeds": lambda r: str(r["seeds"]),
        "accuracy before": lambda r: share(r["before"]),
        "at the end": lambda r: plus_minus(r["accuracy"]),
        "minus dynamic sampling's": lambda r: signed(r["minus_reference"]),
        "minus that after as many rollouts": lambda r: signed(r["at_equal_rollouts"]),
        "minus uniform's": lambda r: signed(r["minus_uniform"]),
        "rollouts": lambda r: whole(r["rollouts"]),
        "tokens per rollout": lambda r: f"{r['response_tokens']:.2f}",
        "seconds": lambda r: whole(r["seconds"]),
    },
    "cost": {
        "seeds": lambda r: str(r["seeds"]),
        **{
            f"{cost} {TO_THERE[target].format(cost)}": partial(cell, form=ratio, key=f"{cost}/{target}")
            for target in SHARES
            for cost in COSTS
        },
        "rollouts to uniform's accuracy, of all its rollouts": partial(cell, form=ratio, key="rollouts/uniform"),
        "seeds that end at or above it": lambda r: str(r["reached"]),
        "steps with a short batch": lambda r: f"{r['short_steps']:.1f}",
    },
    "selection": {
        "seeds": lambda r: str(r["seeds"]),
        "mixed share": lambda r: plus_minus(r["mixed_share"]),
        "ours minus it": lambda r: signed(r["ours_minus_it"]),
        "coverage": lambda r: share(r["coverage"]),
        "coverage, chosen": lambda r: share(r["coverage_chosen"]),
        "most uses of a prompt": lambda r: whole(r["uses_max"]),
        "prompts with mixed groups": lambda r: whole(r["mixed_prompts"]),
        "Brier, chosen": lambda r: share(r["brier_chosen"]),
        "selection, ms a step": lambda r: "" if r["select_ms"] is None else f"{r['select_ms']:.1f}",
    },
    "prediction": {
        "seeds": lambda r: str(r["seeds"]),
        **{
            f"{words}{OF_PROMPTS[part]}": partial(cell, form=form, key=f"{name}/{part}")
            for name, words, form in (
                ("mixed", "mixed", estimated),
                ("brier", "Brier", estimated),
                ("brier_of_mean", "Brier of their mean", share),
                ("calibration", "calibration error", estimated),
                ("alarms", "called partial", whole),
                ("precision", "precision", estimated),
                ("recall", "recall", estimated),
            )
            for part in PARTS
        },
    },
    "ablations": {
        "variant of": lambda r: f"`{r['of']}`",
        "compared with": lambda r: f"`{r['beside']}`",
        "seeds": lambda r: str(r["seeds"]),
        "accuracy": lambda r: plus_minus(r["accuracy"]),
        "minus the other's accuracy": lambda r: signed(r["accuracy_difference"]),
        "mixed share": lambda r: plus_minus(r["mixed_share"]),
        "minus the other's mixed share": lambda r: signed(r["mixed_difference"]),
        "rollouts": lambda r: whole(r["rollouts"]),
        "seconds": lambda r: whole(r["seconds"]),
    },
}  # fmt: skip


def kind_of(name: str) -> str:
    """That of a table's columns: `accuracy` of `countdown/accuracy`, `ablations` of `ablations/decay`."""
    return next(part for part in name.split("/") if part in COLUMNS)


def lines_of(name: str, rows: Sequence[Row]) -> list[list[str]]:
    """The table of that name, its columns' names first."""
    columns = COLUMNS[kind_of(name)]
    cells = [[text(row) if row["seeds"] else "" for text in columns.values()] for row in rows]
    return [["method", *columns], *([f"`{row['method']}`", *line] for row, line in zip(rows, cells, strict=True))]


def markdown(name: str, table: Table) -> str:
    head = [markdown_of(lines_of(name, table.rows))] if table.rows else []
    return "\n\n".join(head + table.notes)


def fill(page: str, tables: dict[str, Table]) -> str:
    """The page with each marked table and figure as it is now; marks of tables that there are not stay as they are."""

    def text_of(name: str) -> str | None:
        kind, _, figure = name.partition("/")
        if kind == "figure":
            return f"![{FIGURES[figure]}](study/{figure}.svg)"
        return markdown(name, tables[name]) if name in tables else None

    return fill_marks(page, "study", text_of)
