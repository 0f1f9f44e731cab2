"""The tables of a study: rows of numbers from its records, and those rows as Markdown.

Rows are what `summary.json` holds, with null where a target was not reached or a method predicts nothing. The Markdown
stands in a page between `<!-- study: NAME -->` and `<!-- /study -->`, put there by `fill`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from dpsrl.metrics import Record
from dpsrl.study.analysis import Curves, cost_ratio_interval, mean_interval
from dpsrl.study.marks import fill_marks, markdown_of
from dpsrl.study.plan import Plan

COSTS = ("rollouts", "seconds", "tokens")
SHARES = {"all": 1.0, "95%": 0.95}  # of the reference's final accuracy
FIGURES = {
    "accuracy": "held-out accuracy over steps, rollouts and seconds",
    "cost": "rollouts to dynamic sampling's accuracy",
    "mixed": "mixed share over steps",
    "calibration": "predicted and realised share of mixed groups",
}
Row = dict[str, Any]


# --- records of one method --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """The records of one method in one setting, by seed."""

    by_seed: dict[int, Record]

    def __bool__(self) -> bool:
        return bool(self.by_seed)

    @property
    def seeds(self) -> list[int]:
        return sorted(self.by_seed)

    def values(self, of: Callable[[Record], float | None], seeds: Sequence[int] | None = None) -> np.ndarray:
        """(S,), without runs that have no such value."""
        found = [of(self.by_seed[seed]) for seed in (self.seeds if seeds is None else seeds)]
        return np.array([value for value in found if value is not None], dtype=float)

    def curves(self, cost: str, seeds: Sequence[int]) -> Curves:
        rows = [self.by_seed[seed]["curve"] for seed in seeds]
        return Curves(np.array([r[cost] for r in rows], float), np.array([r["accuracy"] for r in rows], float))


def runs_of(records: Sequence[Record], setting: str, method: str) -> Runs:
    return Runs({r["seed"]: r for r in records if (r["setting"], r["method"]) == (setting, method)})


def final_accuracy(record: Record) -> float:
    return record["curve"]["accuracy"][-1]


def mixed_share(record: Record) -> float | None:
    return record["mixed_share"]


def shared_seeds(own: Runs, other: Runs) -> list[int]:
    return sorted(own.by_seed.keys() & other.by_seed.keys())


def difference(own: Runs, other: Runs, of: Callable[[Record], float | None]) -> list[float | None] | None:
    """Mean of own minus other over seeds that both have, and half its interval; None without any."""
    values = [
        a - b
        for a, b in ((of(own.by_seed[s]), of(other.by_seed[s])) for s in shared_seeds(own, other))
        if a is not None and b is not None
    ]
    return spread(np.array(values)) if values else None


def spread(values_S: np.ndarray) -> list[float | None] | None:
    """[mean, half its 95% t-interval], the half None for one value; None for no value."""
    return [known(number) for number in mean_interval(values_S)] if values_S.size else None


def known(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


# --- rows -------------------------------------------------------------------------------------------------


def accuracy_row(runs: Runs, reference: Runs, uniform: Runs) -> Row:
    """What a method ended with, and what that cost."""
    return {
        "seeds": len(runs.seeds),
        "before": float(runs.values(lambda r: r["curve"]["accuracy"][0]).mean()),
        "accuracy": spread(runs.values(final_accuracy)),
        "minus_reference": difference(runs, reference, final_accuracy),
        "minus_uniform": difference(runs, uniform, final_accuracy),
        "rollouts": float(runs.values(lambda r: r["num_rollouts"]).mean()),
        "response_tokens": float(runs.values(lambda r: r["response_tokens"]).mean()),
        "seconds": float(runs.values(lambda r: r["curve"]["seconds"][-1]).mean()),
        "num_short": float(runs.values(lambda r: r["num_short"]).mean()),
    }


def cost_row(runs: Runs, reference: Runs) -> Row:
    """For each cost and share of the target: [ratio, low, high], null where not reached; and what was spent in all.

    `spent` is the end of the mean curve over the reference's cost: what a censored ratio is known to exceed.
    `reached`: seeds whose own last accuracy is at least the reference's of the same seed.
    """
    seeds = shared_seeds(runs, reference)
    row: Row = {"seeds": len(seeds)}
    if not seeds:
        return row
    for cost in COSTS:
        own, other = runs.curves(cost, seeds), reference.curves(cost, seeds)
        for name, share in SHARES.items():
            row[f"{cost}/{name}"] = [known(number) for number in cost_ratio_interval(own, other, share)]
        row[f"{cost}/spent"] = float(own.cost_ST[:, -1].mean() / other.cost_ST[:, -1].mean())
    pairs = [(final_accuracy(runs.by_seed[s]), final_accuracy(reference.by_seed[s])) for s in seeds]
    row["reached"] = sum(own >= other for own, other in pairs)
    return row


def selection_row(runs: Runs, ours: Runs) -> Row:
    """How well a method chose, and how well it predicted on prompts drawn at random, over all its runs together."""
    row: Row = {
        "seeds": len(runs.seeds),
        "mixed_share": spread(runs.values(mixed_share)),
        "ours_minus_it": difference(ours, runs, mixed_share) if ours else None,
    }
    for name in ("coverage", "uses_max", "select_ms"):
        values = runs.values(itemgetter(name))
        row[name] = float(values.mean()) if values.size else None
    brier = runs.values(lambda r: r["selected"] and r["selected"]["brier"])
    row["brier_selected"] = float(brier.mean()) if brier.size else None
    return row | audit_row([r["audit"] for r in runs.by_seed.values() if r["audit"]])


def audit_row(audits: Sequence[Row]) -> Row:
    sums = {name: sum(audit[name] for audit in audits) for name in ("hits", "alarms", "mixed", "squared_error")}
    num_K, predicted_K, mixed_K = (
        np.sum([audit[name] for audit in audits], axis=0) for name in ("num_K", "predicted_K", "mixed_K")
    )
    num = int(np.sum(num_K))
    return {
        "audited": num,
        "brier_audit": sums["squared_error"] / num if num else None,
        "calibration_audit": float(np.abs(predicted_K - mixed_K).sum() / num) if num else None,
        "precision": sums["hits"] / sums["alarms"] if sums["alarms"] else None,
        "recall": sums["hits"] / sums["mixed"] if sums["alarms"] else None,
        "mixed_audit": sums["mixed"] / num if num else None,
    }


def rows_of(plan: Plan, records: Sequence[Record]) -> dict[str, list[Row]]:
    """Table name -> rows: `<setting>/accuracy`, `/cost` and `/selection`, and `ablations/<what varies>`."""
    tables: dict[str, list[Row]] = {}
    for setting, methods in plan.methods_of.items():
        found = {method: runs_of(records, setting, method) for method in methods}
        found = {method: runs for method, runs in found.items() if runs}
        reference, ours, uniform = (found.get(name, Runs({})) for name in (plan.reference, plan.ours, "uniform"))
        rows = {
            method: (accuracy_row(runs, reference, uniform), cost_row(runs, reference), selection_row(runs, ours))
            for method, runs in found.items()
        }
        for place, kind in enumerate(("accuracy", "cost", "selection")):
            tables[f"{setting}/{kind}"] = [{"method": method} | row[place] for method, row in rows.items()]
    for what, variants in plan.ablations.items():
        tables[f"ablations/{what}"] = [
            row for name, of in variants.items() if (row := ablation_row(records, plan.ablated, name, of))
        ]
    return tables


def ablation_row(records: Sequence[Record], setting: str, name: str, of: str) -> Row | None:
    runs, origin = runs_of(records, setting, name), runs_of(records, setting, of)
    if not runs:
        return None
    return {
        "method": name, "of": of, "seeds": len(runs.seeds), "accuracy": spread(runs.values(final_accuracy)),
        "accuracy_difference": difference(runs, origin, final_accuracy),
        "mixed_share": spread(runs.values(mixed_share)), "mixed_difference": difference(runs, origin, mixed_share),
        "rollouts": float(runs.values(lambda r: r["num_rollouts"]).mean()),
        "seconds": float(runs.values(lambda r: r["curve"]["seconds"][-1]).mean()),
    }  # fmt: skip


# --- Markdown ---------------------------------------------------------------------------------------------


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def plus_minus(value: list[float | None] | None, sign: str = "") -> str:
    """`0.512 ± 0.010`; without an interval where there is one run."""
    if value is None or value[0] is None:
        return ""
    return f"{value[0]:{sign}.3f}" + ("" if value[1] is None else f" ± {value[1]:.3f}")


def signed(value: list[float | None] | None) -> str:
    return plus_minus(value, "+")


def ratio(row: Row, cost: str, target: str) -> str:
    """`31% [25%, 40%]`; `not within 52%` where all that was spent did not reach the target."""
    value, low, high = (math.inf if number is None else number for number in row[f"{cost}/{target}"])
    spent = row[f"{cost}/spent"]
    if math.isinf(value):
        return f"not within {spent:.0%}"
    if math.isinf(low):
        return f"{value:.0%}"
    return f"{value:.0%} [{low:.0%}, {f'not within {spent:.0%}' if math.isinf(high) else f'{high:.0%}'}]"


COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "accuracy": {
        "seeds": lambda r: str(r["seeds"]),
        "accuracy before": lambda r: share(r["before"]),
        "at the end": lambda r: plus_minus(r["accuracy"]),
        "minus dynamic sampling's": lambda r: signed(r["minus_reference"]),
        "minus uniform's": lambda r: signed(r["minus_uniform"]),
        "rollouts": lambda r: f"{r['rollouts']:,.0f}",
        "tokens per rollout": lambda r: f"{r['response_tokens']:.2f}",
        "seconds": lambda r: f"{r['seconds']:,.0f}",
    },
    "cost": {
        "seeds": lambda r: str(r["seeds"]),
        **{
            f"{cost} to {'95% of ' * (target != 'all')}its accuracy": partial(ratio, cost=cost, target=target)
            for target in SHARES
            for cost in COSTS
        },
        "seeds that end at or above it": lambda r: str(r["reached"]),
    },
    "selection": {
        "seeds": lambda r: str(r["seeds"]),
        "mixed share": lambda r: plus_minus(r["mixed_share"]),
        "ours minus it": lambda r: signed(r["ours_minus_it"]),
        "coverage": lambda r: share(r["coverage"]),
        "most uses of a prompt": lambda r: "" if r["uses_max"] is None else f"{r['uses_max']:.0f}",
        "Brier, random": lambda r: share(r["brier_audit"]),
        "calibration error, random": lambda r: share(r["calibration_audit"]),
        "precision, random": lambda r: share(r["precision"]),
        "recall, random": lambda r: share(r["recall"]),
        "Brier, selected": lambda r: share(r["brier_selected"]),
        "selection, ms a step": lambda r: "" if r["select_ms"] is None else f"{r['select_ms']:.1f}",
    },
    "ablations": {
        "variant of": lambda r: f"`{r['of']}`",
        "seeds": lambda r: str(r["seeds"]),
        "accuracy": lambda r: plus_minus(r["accuracy"]),
        "minus its method's": lambda r: signed(r["accuracy_difference"]),
        "mixed share": lambda r: plus_minus(r["mixed_share"]),
        "minus its method's mixed share": lambda r: signed(r["mixed_difference"]),
        "rollouts": lambda r: f"{r['rollouts']:,.0f}",
        "seconds": lambda r: f"{r['seconds']:,.0f}",
    },
}


def cells(name: str, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The columns of the table of that name after the first, which has the methods, and each row's cells in them."""
    columns = COLUMNS[next(part for part in name.split("/") if part in COLUMNS)]
    return list(columns), [[cell(row) if row["seeds"] else "" for cell in columns.values()] for row in rows]


def markdown(name: str, rows: Sequence[Row]) -> str:
    columns, filled = cells(name, rows)
    return markdown_of([["method", *columns], *([f"`{r['method']}`", *line] for r, line in zip(rows, filled))])


def fill(page: str, tables: dict[str, list[Row]]) -> str:
    """The page with each marked table and figure as it is now; marks of tables that there are not stay as they are."""

    def text_of(name: str) -> str | None:
        kind, _, figure = name.partition("/")
        if kind == "figure":
            return f"![{FIGURES[figure]}](study/{figure}.svg)"
        return markdown(name, tables[name]) if name in tables else None

    return fill_marks(page, "study", text_of)
