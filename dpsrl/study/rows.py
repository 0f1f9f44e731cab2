"""What a study says of its methods, as rows of numbers from its records.

Methods are compared on the seeds that all of them have. An estimate in a row is its value, null where it has none, its
interval, null for too few seeds, and how many resamples were dropped; an end of an interval is null where it lies
beyond what a method spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from dpsrl.metrics import Record
from dpsrl.study.analysis import (
    AT_THE_START,
    Curves,
    Estimate,
    Ratio,
    bootstrap,
    cost_ratio_interval,
    mean_interval,
)
from dpsrl.study.plan import Plan, Variant

COSTS = ("rollouts", "seconds", "tokens")
SHARES = {"all": 1.0, "95%": 0.95}  # of the reference's final accuracy
PARTS = ("all", "seen")  # audited prompts, and those of them that had been scored before
CLAIMED_SHARE = 0.25  # of the reference's rollouts, in which its accuracy is to be reached
Row = dict[str, Any]
Value = Callable[[Record], float | None]


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

    def on(self, seeds: Iterable[int]) -> Runs:
        return Runs({seed: self.by_seed[seed] for seed in sorted(seeds)})

    def values(self, of: Value) -> np.ndarray:
        """(S,), without runs that have no such value."""
        found = [of(self.by_seed[seed]) for seed in self.seeds]
        return np.array([value for value in found if value is not None], dtype=float)

    def mean(self, of: Value) -> float | None:
        values = self.values(of)
        return float(values.mean()) if values.size else None

    def median(self, of: Value) -> float | None:
        values = self.values(of)
        return float(np.median(values)) if values.size else None

    def curves(self, cost: str) -> Curves:
        rows = [self.by_seed[seed]["curve"] for seed in self.seeds]
        average = np.median if cost == "seconds" else np.mean  # a run may have been held up
        return Curves(np.array([r[cost] for r in rows], float), np.array([r["accuracy"] for r in rows], float), average)

    @property
    def group_size(self) -> int:
        return self.by_seed[self.seeds[0]]["group_size"]


def runs_of(records: Sequence[Record], setting: str, method: str) -> Runs:
    return Runs({r["seed"]: r for r in records if (r["setting"], r["method"]) == (setting, method)})


def compared(records: Sequence[Record], setting: str, methods: Iterable[str]) -> tuple[dict[str, Runs], list[str]]:
    """The runs of each method that has any, on the seeds that all these have; and sentences on what that leaves out."""
    found = {method: runs for method in methods if (runs := runs_of(records, setting, method))}
    every = set().union(*(runs.by_seed for runs in found.values()))
    shared = every.intersection(*(runs.by_seed for runs in found.values()))
    if shared == every:
        return found, []
    if not shared:
        return found, ["No seed has runs of all methods: means are over different seeds, and say little side by side."]
    fewer = [f"`{method}`" for method, runs in found.items() if runs.by_seed.keys() != every]
    have = "has" if len(fewer) == 1 else "have"
    note = f"Over the {len(shared)} of {len(every)} seeds that all methods have; {', '.join(fewer)} {have} fewer."
    return {method: runs.on(shared) for method, runs in found.items()}, [note]


def final_accuracy(record: Record) -> float:
    return record["curve"]["accuracy"][-1]


def seconds(record: Record) -> float:
    return record["curve"]["seconds"][-1]


mixed_share: Value = itemgetter("mixed_share")


def paired(own: Runs, other: Runs) -> tuple[Runs, Runs]:
    """Both, on the seeds that both have."""
    seeds = own.by_seed.keys() & other.by_seed.keys()
    return own.on(seeds), other.on(seeds)


def difference(own: Runs, other: Runs, of: Value) -> list[float | None] | None:
    """Mean of own minus other over seeds that both have, and half its interval; None without any, or of one method."""
    if own is other:
        return None
    pairs = [(of(a), of(b)) for a, b in zip(*(runs.by_seed.values() for runs in paired(own, other)), strict=True)]
    return spread(np.array([a - b for a, b in pairs if a is not None and b is not None]))


def at_equal_rollouts(own: Runs, reference: Runs) -> list[float | None] | None:
    """As `difference` of final accuracies, but the reference's is that after as many rollouts as `own` spent in all.

    Linear between evaluations; where `own` spent more than the reference did, it is the reference's last.
    """
    if own is reference:
        return None
    pairs = zip(*(runs.by_seed.values() for runs in paired(own, reference)), strict=True)
    curves = [(final_accuracy(a), a["num_rollouts"], b["curve"]) for a, b in pairs]
    return spread(np.array([end - np.interp(num, c["rollouts"], c["accuracy"]) for end, num, c in curves]))


def spread(values_S: np.ndarray) -> list[float | None] | None:
    """[mean, half its 95% t-interval], the half None for one value; None for no value."""
    return [known(number) for number in mean_interval(values_S)] if values_S.size else None


def excludes_zero(value: list[float | None]) -> bool:
    mean, half = value
    return mean is not None and half is not None and abs(mean) > half


def known(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def told(estimate: Estimate) -> Row:
    interval = estimate.interval and [known(end) for end in estimate.interval]
    return {"value": known(estimate.value), "interval": interval, "dropped": estimate.dropped}


def told_ratio(ratio: Ratio) -> Row:
    return {"state": ratio.state, "spent": known(ratio.spent)} | told(ratio.estimate)


def same_cores(own: Runs, other: Runs) -> bool:
    """Whether seconds can be compared: on as many cores, seed by seed."""
    pairs = zip(*(runs.by_seed.values() for runs in paired(own, other)), strict=True)
    return all(a["num_cores"] == b["num_cores"] for a, b in pairs)


# --- rows -------------------------------------------------------------------------------------------------


def accuracy_row(runs: Runs, reference: Runs, uniform: Runs) -> Row:
    """What a method ended with, and what that cost."""
    return {
        "seeds": len(runs.seeds),
        "before": runs.mean(lambda r: r["curve"]["accuracy"][0]),
        "accuracy": spread(runs.values(final_accuracy)),
        "minus_reference": difference(runs, reference, final_accuracy),
        "at_equal_rollouts": at_equal_rollouts(runs, reference),
        "minus_uniform": difference(runs, uniform, final_accuracy),
        "rollouts": runs.mean(itemgetter("num_rollouts")),
        "response_tokens": runs.mean(itemgetter("response_tokens")),
        "seconds": runs.median(seconds) if same_cores(runs, reference) else None,
    }


def cost_row(runs: Runs, reference: Runs, uniform: Runs) -> Row:
    """For each cost and share of the target a ratio with its state, None where it cannot be paired.

    `reached`: seeds whose own last accuracy is at least the reference's of the same seed. `rollouts/uniform`: until
    the final accuracy of uniform sampling, over all that this spent.
    """
    mine, uniform = paired(runs, uniform)
    runs, reference = paired(runs, reference)
    row: Row = {"seeds": len(runs.seeds)}
    if not runs:
        return row
    if mine:
        ratio = cost_ratio_interval(mine.curves("rollouts"), uniform.curves("rollouts"), 1.0)
        row["rollouts/uniform"] = told_ratio(ratio)
    for cost in COSTS:
        comparable = cost != "seconds" or same_cores(runs, reference)
        own, other = runs.curves(cost), reference.curves(cost)
        for name, share in SHARES.items():
            row[f"{cost}/{name}"] = told_ratio(cost_ratio_interval(own, other, share)) if comparable else None
    pairs = zip(runs.values(final_accuracy), reference.values(final_accuracy), strict=True)
    row["reached"] = int(sum(own >= other for own, other in pairs))
    row["short_steps"] = runs.mean(itemgetter("short_steps"))
    return row


def selection_row(runs: Runs, ours: Runs) -> Row:
    """How well a method chose, and what that cost."""
    names = ("coverage", "coverage_chosen", "uses_max", "select_ms")
    return {
        "seeds": len(runs.seeds),
        "mixed_share": spread(runs.values(mixed_share)),
        "ours_minus_it": difference(ours, runs, mixed_share) if ours else None,
        "brier_chosen": runs.mean(lambda r: r["selected"] and r["selected"]["brier"]),
        "mixed_prompts": runs.mean(lambda r: r.get("mixed_prompts")),
    } | {name: runs.mean(itemgetter(name)) for name in names}


def prediction_row(runs: Runs) -> Row:
    """How well a method predicted on prompts drawn at random, over all its runs together; intervals over runs.

    A method that predicts nothing has the share of mixed groups alone.
    """
    audits = [record["audit"] for record in runs.by_seed.values() if record["audit"]]
    row: Row = {"seeds": len(runs.seeds), "predicts": any(r["selected"] for r in runs.by_seed.values())}
    for part in PARTS if audits else ():
        sums = {name: np.array([audit[part][name] for audit in audits]) for name in audits[0][part]}
        num_S, gap_SK = sums["num_K"].sum(axis=1), sums["predicted_K"] - sums["mixed_K"]
        row[f"num/{part}"] = int(num_S.sum())
        row[f"mixed/{part}"] = told(pooled(sums["mixed"], num_S))
        if row["predicts"]:
            share = row[f"mixed/{part}"]["value"]
            row[f"brier_of_mean/{part}"] = None if share is None else share * (1 - share)
            row[f"brier/{part}"] = told(pooled(sums["squared_error"], num_S))
            row[f"calibration/{part}"] = told(pooled(gap_SK, num_S))
            row[f"alarms/{part}"] = int(sums["alarms"].sum())
            row[f"precision/{part}"] = told(pooled(sums["hits"], sums["alarms"]))
            row[f"recall/{part}"] = told(pooled(sums["hits"], sums["mixed"]))
    return row


def pooled(sum_S: np.ndarray, num_S: np.ndarray) -> Estimate:
    """A sum over runs for each that was counted; of sums in several ranges (S, K), their absolute values together."""

    def of(seeds: np.ndarray) -> np.ndarray:
        num = num_S[seeds].sum(axis=-1)
        total = sum_S[seeds].sum(axis=-1) if sum_S.ndim == 1 else np.abs(sum_S[seeds].sum(axis=-2)).sum(axis=-1)
        return total / np.where(num > 0, num, math.nan)

    return bootstrap(of, num_S.size)


def ablation_row(runs: Runs, beside: Runs, variant: Variant) -> Row:
    """beside: runs of what it is compared with. Shares of mixed groups are alike for groups of one size alone."""
    same_size = bool(beside) and runs.group_size == beside.group_size
    return {
        "of": variant.of, "beside": variant.beside, "seeds": len(runs.seeds),
        "accuracy": spread(runs.values(final_accuracy)),
        "accuracy_difference": difference(runs, beside, final_accuracy),
        "mixed_share": spread(runs.values(mixed_share)),
        "mixed_difference": difference(runs, beside, mixed_share) if same_size else None,
        "rollouts": runs.mean(itemgetter("num_rollouts")),
        "seconds": runs.median(seconds) if same_cores(runs, beside) else None,
    }  # fmt: skip


# --- the verdict ------------------------------------------------------------------------------------------


def verdict_row(plan: Plan, method: str, found: dict[str, Runs]) -> Row:
    """Whether a method reached the reference's final accuracy with at most CLAIMED_SHARE of its rollouts, counted as
    they were and as whole batches, and whether its mixed share is above that of all others that choose beforehand.
    Without runs of the reference there is the latter alone.
    """
    runs, reference = paired(found[method], found.get(plan.reference, Runs({})))
    row: Row = {"seeds": len(runs.seeds or found[method].seeds)}
    for name in ("rollouts", "whole_batches") if runs else ():
        ratio = cost_ratio_interval(runs.curves("rollouts"), reference.curves(name), 1.0)
        row |= {name: told_ratio(ratio), f"{name}/within": within(ratio)}
    others = {name: other for name, other in found.items() if name != method and name not in plan.refilling}
    margins = {name: difference(found[method], other, mixed_share) for name, other in others.items()}
    row["margins"] = [[name, *margin] for name, margin in margins.items() if margin]
    return row


def within(ratio: Ratio) -> str:
    """A whole interval on one side of CLAIMED_SHARE decides; an end beyond what was spent is at least that."""
    if ratio.state == AT_THE_START or ratio.estimate.interval is None:
        return "not decided by these seeds"
    low, high = ratio.estimate.interval
    if high <= CLAIMED_SHARE:
        return "yes"
    return "no" if min(low, ratio.spent) > CLAIMED_SHARE else "not decided by these seeds"
