"""The statistics of a study. numpy only.

Axes: S seeds, T evaluations of a run. Seeds are paired: the seed of a run fixes its training prompts, its held-out
prompts and how they are sampled, so that differences between methods are taken seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 10_000
MIN_SEEDS = 6  # below, the interval of a bootstrap means nothing
# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the normal one.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip


class Curves(NamedTuple):
    """Runs of one method, a row for each seed: accuracy at each evaluation, and what had been spent by then.

    Resamples of the seeds, where there are such, are axes before S. average: of the costs, over seeds; the median where
    single runs may have been held up.
    """

    cost_ST: np.ndarray
    accuracy_ST: np.ndarray
    average: Callable[..., np.ndarray] = np.mean

    @property
    def cost_T(self) -> np.ndarray:
        return self.average(self.cost_ST, axis=-2)

    @property
    def accuracy_T(self) -> np.ndarray:
        return self.accuracy_ST.mean(axis=-2)

    def on(self, seeds: np.ndarray) -> Curves:
        return Curves(self.cost_ST[seeds], self.accuracy_ST[seeds], self.average)


class Estimate(NamedTuple):
    """A value and its 95% interval, None for fewer than MIN_SEEDS seeds.

    dropped: resamples of which the value is not defined (NaN), without which the interval is.
    """

    value: float
    interval: tuple[float, float] | None = None
    dropped: int = 0


# How far a curve got: to the target at some cost; not to it with all that was spent; or there before the first step.
REACHED, CENSORED, AT_THE_START = "reached", "censored", "at the start"


class Ratio(NamedTuple):
    """What a method costs over the reference's cost: inf where it is censored, NaN where the reference had it at once.

    spent: all that the method cost over the same, which a censored ratio is known to exceed.
    """

    state: str
    estimate: Estimate
    spent: float


def mean_interval(values_S: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95% t-interval; the width is NaN for one value."""
    if values_S.size < 2:
        return float(values_S.mean()), math.nan
    return float(values_S.mean()), float(student(values_S.size) * values_S.std(ddof=1) / math.sqrt(values_S.size))


def student(num: int) -> float:
    """The 0.975 quantile of Student's t for that many values."""
    return T_95[num - 2] if num - 2 < len(T_95) else 1.96


def reach(cost_T: np.ndarray, accuracy_T: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    """The least cost at which the curve, linear between evaluations, has the accuracy `target`; inf where it never has.

    Nothing is said beyond the last evaluation: such a run is censored. Of many curves, in axes before T, each its own.
    """
    above_T = accuracy_T >= np.asarray(target)[..., None]
    after = above_T.argmax(axis=-1)[..., None]
    before = np.maximum(after - 1, 0)
    costs, accuracies = (
        [np.take_along_axis(values_T, place, axis=-1)[..., 0] for place in (before, after)]
        for values_T in (cost_T, accuracy_T)
    )
    rise = np.where(after[..., 0] > 0, accuracies[1] - accuracies[0], 1.0)
    crossed = costs[0] + (target - accuracies[0]) / rise * (costs[1] - costs[0])
    return np.where(above_T.any(axis=-1), crossed, math.inf)


def cost_ratio(own: Curves, reference: Curves, share: float) -> np.ndarray:
    """What `own` costs until its mean accuracy is `share` of the reference's final one, over the reference's cost.

    Curves are means over seeds, whose noise is a fraction of a single run's; noise makes a curve reach a target early.
    inf where own is censored, NaN where the reference is there at the start.
    """
    target = share * reference.accuracy_T[..., -1]
    return reach(own.cost_T, own.accuracy_T, target) / reference_cost(reference, share)


def reference_cost(reference: Curves, share: float) -> np.ndarray:
    """For its final accuracy, share 1, all that the reference spent, as the paper has it; for a part of that, what it
    costs the reference until it is there. NaN where it is there at the start.
    """
    cost_T, accuracy_T = reference.cost_T, reference.accuracy_T
    first = reach(cost_T, accuracy_T, share * accuracy_T[..., -1])
    return np.where(first > 0, cost_T[..., -1] if share == 1.0 else first, math.nan)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], num_seeds: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """`statistic` of all seeds, and its expanded percentile interval over seeds drawn with replacement.

    statistic: of places of seeds (..., S), so that whatever belongs to one seed is drawn together, to a value for each
    draw. A resample that is inf counts as larger than any other; one that is NaN is dropped and counted.

    Few seeds make plain percentiles too narrow: a resample's variance lacks a factor of n / (n - 1), and the normal
    quantile is not Student's. Hesterberg (2015, The American Statistician 69(4), expanded percentile intervals) reads
    off the quantiles that would make up for both were the statistic a mean of normal values.
    """
    value = float(statistic(np.arange(num_seeds)))
    if num_seeds < MIN_SEEDS:
        return Estimate(value)
    generator = np.random.default_rng(seed)
    drawn = statistic(generator.integers(num_seeds, size=(num_resamples, num_seeds)))
    known = np.sort(drawn[~np.isnan(drawn)])
    if not known.size:
        return Estimate(value, None, drawn.size)
    tail = normal_cdf(-math.sqrt(num_seeds / (num_seeds - 1)) * student(num_seeds))
    low, high = (float(known[math.floor(q * (known.size - 1) + 0.5)]) for q in (tail, 1 - tail))
    return Estimate(value, (low, high), drawn.size - known.size)


def normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def cost_ratio_interval(own: Curves, reference: Curves, share: float) -> Ratio:
    """`cost_ratio` with its interval over seeds, paired: rows of `own` and `reference` are of the same seeds."""
    assert len(own.cost_ST) == len(reference.cost_ST)

    def of(seeds: np.ndarray) -> np.ndarray:
        return cost_ratio(own.on(seeds), reference.on(seeds), share)

    estimate = bootstrap(of, len(own.cost_ST))
    spent = float(own.cost_T[-1] / reference_cost(reference, share))
    if not estimate.value > 0:
        return Ratio(AT_THE_START, estimate, spent)
    return Ratio(CENSORED if math.isinf(estimate.value) else REACHED, estimate, spent)
