"""What a prompt is worth: one number per entry, higher is picked first. numpy only.

A score reads the belief and how often each prompt was selected; it owns its options and no state. `needs` names what
the belief must give beyond `predict`; `of_rate`, where there is one, is the score of a prompt whose pass rate and size
of group are known, which is what a pick that draws pass rates from the belief ranks on.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from dpsrl.selection import hmm
from dpsrl.selection.beliefs import Belief
from dpsrl.selection.options import check_number, check_share


class Score(Protocol):
    """float (E,). Reads its arguments and changes neither."""

    needs: tuple[str, ...]

    def __call__(self, belief: Belief, num_selected_E: np.ndarray) -> np.ndarray: ...


class PartialScore:
    """P(partial) + entropy_weight * H(prior), the score of DPS; H in nats, so at most 1.0986.

    For a belief about pass rates P(partial) is E[1 - p^n - (1 - p)^n], the chance of a mixed group of n.

    entropy_weight: any finite number; 0 is the published default, and it leaves H out altogether.
    diminish: see `diminished`; 0 is the published default.
    """

    needs = ()

    def __init__(self, *, entropy_weight: float = 0.0, diminish: float = 0.0) -> None:
        self.entropy_weight = check_number("entropy_weight", entropy_weight)
        self.diminish = check_number("diminish", diminish, lowest=0.0)

    def __call__(self, belief: Belief, num_selected_E: np.ndarray) -> np.ndarray:
        prior_ES = belief.predict()
        value_E = prior_ES[:, hmm.PARTIAL]
        if self.entropy_weight:
            value_E = value_E + self.entropy_weight * entropy(prior_ES)
        return diminished(value_E, num_selected_E, self.diminish)

    def of_rate(self, rate: np.ndarray, num_rollouts: int) -> np.ndarray:
        unsolved, solved = (1.0 - rate) ** num_rollouts, rate**num_rollouts
        states = np.stack([unsolved, 1.0 - unsolved - solved, solved], axis=1)
        return states[:, hmm.PARTIAL] + (self.entropy_weight * entropy(states) if self.entropy_weight else 0.0)


class VarianceScore:
    """4 E[p (1 - p)], in [0, 1]: the expected variance of a reward, as a share of the greatest there can be."""

    needs = ("variance",)

    def __call__(self, belief: Any, num_selected_E: np.ndarray) -> np.ndarray:
        return 4.0 * belief.variance()

    def of_rate(self, rate: np.ndarray, num_rollouts: int) -> np.ndarray:
        return 4.0 * rate * (1.0 - rate)


class TargetScore:
    """-(p - target_rate)^2 of the expected pass rate p: nearest to the target first.

    target_rate: in [0, 1].
    """

    needs = ("rate",)

    def __init__(self, *, target_rate: float = 0.5) -> None:
        self.target_rate = check_share("target_rate", target_rate)

    def __call__(self, belief: Any, num_selected_E: np.ndarray) -> np.ndarray:
        return -((belief.rate() - self.target_rate) ** 2)

    def of_rate(self, rate: np.ndarray, num_rollouts: int) -> np.ndarray:
        return -((rate - self.target_rate) ** 2)


class LeastSelected:
    """Minus the times selected: with random ties, every prompt comes once before any comes twice."""

    needs = ()

    def __call__(self, belief: Belief, num_selected_E: np.ndarray) -> np.ndarray:
        return -num_selected_E.astype(np.float64)


class Optimistic:
    """P(partial) + bonus * its standard deviation under the belief: what is uncertain is tried, and then known.

    bonus: 0 or more; 0 is greedy. diminish: see `diminished`.
    """

    needs = ("spread",)

    def __init__(self, *, bonus: float = 1.2, diminish: float = 0.0) -> None:
        self.bonus = check_number("bonus", bonus, lowest=0.0)
        self.diminish = check_number("diminish", diminish, lowest=0.0)

    def __call__(self, belief: Any, num_selected_E: np.ndarray) -> np.ndarray:
        value_E = belief.predict()[:, hmm.PARTIAL] + self.bonus * belief.spread()
        return diminished(value_E, num_selected_E, self.diminish)


class Resampled:
    """Least selected first, but prompts whose last group was all correct only when nothing else is left.

    History resampling of SRPO (arXiv 2504.14286), without its epoch boundary: a prompt comes once per epoch anyway.
    """

    needs = ("left_out",)

    def __call__(self, belief: Any, num_selected_E: np.ndarray) -> np.ndarray:
        return -num_selected_E.astype(np.float64) - 1e9 * belief.left_out()


class LeastVisited:
    """Minus the turns a prompt had, kept or skipped."""

    needs = ("visits",)

    def __call__(self, belief: Any, num_selected_E: np.ndarray) -> np.ndarray:
        return -belief.visits().astype(np.float64)


SCORES: dict[str, type] = {
    "partial": PartialScore,
    "variance": VarianceScore,
    "target": TargetScore,
    "optimistic": Optimistic,
    "least_selected": LeastSelected,
    "resampled": Resampled,
    "least_visited": LeastVisited,
}


def diminished(value_E: np.ndarray, num_selected_E: np.ndarray, diminish: float) -> np.ndarray:
    """value / (1 + times selected)^diminish: what a prompt still teaches falls with each time that it was met.

    Were values to stay as they are, the best choices by it would make the sum over prompts of
    value * (1 + 2^-diminish + ... + uses^-diminish) as large as it can be. 0 leaves the value as it is.
    """
    return value_E / (1.0 + num_selected_E) ** diminish if diminish else value_E


def entropy(probs_ES: np.ndarray) -> np.ndarray:
    """Shannon entropy of each row in nats, (E,); a probability of 0 adds 0."""
    return -(probs_ES * np.log(np.where(probs_ES > 0, probs_ES, 1.0))).sum(axis=1)
