"""The statistics of a study. numpy only.

Axes: S seeds, T evaluations of a run. Seeds are paired: the seed of a run fixes its training prompts, its held-out
prompts and how they are sampled, so that differences between methods are taken seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 4000
# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the normal one.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip


class Curves(NamedTuple):
    """Runs of one method, a row for each seed: accuracy at each evaluation, and what had been spent by then.

    Resamples of the seeds, where there are such, are axes before S.
    """

    cost_ST: np.ndarray
    accuracy_ST: np.ndarray


class Estimate(NamedTuple):
    """A value and its 95% interval. inf: not reached, with what was spent; nan: not to be told from so few runs."""

    value: float
    low: float
    high: float


def mean_interval(values_S: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95% t-interval; the width is NaN for one value."""
    if values_S.size < 2:
        return float(values_S.mean()), math.nan
    quantile = T_95[values_S.size - 2] if values_S.size - 2 < len(T_95) else 1.96
    return float(values_S.mean()), float(quantile * values_S.std(ddof=1) / math.sqrt(values_S.size))


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
    """What `own` costs over what `reference` costs until its mean accuracy is `share` of the reference's final one.

    Both are read off curves averaged over seeds, whose noise is a fraction of a single run's; a curve's noise makes it
    reach a target early, the reference's as well. NaN where the reference has it before its first step.
    """
    own_T, reference_T = (curves.accuracy_ST.mean(axis=-2) for curves in (own, reference))
    target = share * reference_T[..., -1]  # of the curve that is read off, to the last bit, so that it does reach it
    own_cost, reference_cost = (
        reach(curves.cost_ST.mean(axis=-2), accuracy_T, target)
        for curves, accuracy_T in ((own, own_T), (reference, reference_T))
    )
    return own_cost / np.where(reference_cost > 0, reference_cost, math.nan)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], num_seeds: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """`statistic` of all seeds, and the 2.5% and 97.5% quantiles of what it is on seeds drawn with replacement.

    statistic: of places of seeds (..., S), so that whatever belongs to one seed is drawn together, to a value for each
    draw. A resample that is inf counts as larger than any other. The interval is NaN for fewer than three seeds.
    """
    value = float(statistic(np.arange(num_seeds)))
    if num_seeds < 3:
        return Estimate(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = np.sort(statistic(generator.integers(num_seeds, size=(num_resamples, num_seeds))))
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return Estimate(value, math.nan, math.nan)
    low, high = (drawn[math.floor(q * (drawn.size - 1) + 0.5)] for q in (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def cost_ratio_interval(own: Curves, reference: Curves, share: float) -> Estimate:
    """`cost_ratio` with its interval over seeds, paired: rows of `own` and `reference` are of the same seeds."""
    assert len(own.cost_ST) == len(reference.cost_ST)

    def of(seeds: np.ndarray) -> np.ndarray:
        drawn = [Curves(curves.cost_ST[seeds], curves.accuracy_ST[seeds]) for curves in (own, reference)]
        return cost_ratio(drawn[0], drawn[1], share)

    return bootstrap(of, len(own.cost_ST))
