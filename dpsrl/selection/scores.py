"""What a prompt is worth: one number per prompt, higher is picked first. numpy only.

A score reads the belief and how often each prompt was selected; it owns its options and no state.
Its options are its keyword-only arguments, as for beliefs.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dpsrl.selection import hmm
from dpsrl.selection.beliefs import Belief, is_number
from dpsrl.types import UserError


class Score(Protocol):
    """float64 (N,). Reads its arguments and changes neither."""

    def __call__(self, belief: Belief, num_selected_N: np.ndarray) -> np.ndarray: ...


class PartialScore:
    """P(partial) + entropy_weight * H(prior), the score of DPS; H in nats, so at most 1.0986.

    entropy_weight: any finite number; 0 is the published default, and it leaves H out altogether.
    """

    def __init__(self, *, entropy_weight: float = 0.0) -> None:
        if not is_number(entropy_weight) or not np.isfinite(entropy_weight):
            raise UserError(f"selection option 'entropy_weight' is {entropy_weight!r}; it must be a finite number.")
        self.entropy_weight = float(entropy_weight)

    def __call__(self, belief: Belief, num_selected_N: np.ndarray) -> np.ndarray:
        prior_NS = belief.predict()
        score_N = prior_NS[:, hmm.PARTIAL].copy()
        if self.entropy_weight:
            score_N += self.entropy_weight * entropy(prior_NS)
        return score_N


class LeastSelected:
    """Minus the times selected: with random ties, every prompt comes once before any comes twice."""

    def __call__(self, belief: Belief, num_selected_N: np.ndarray) -> np.ndarray:
        return -num_selected_N.astype(np.float64)


SCORES: dict[str, type] = {"partial": PartialScore, "least_selected": LeastSelected}


def entropy(probs_NS: np.ndarray) -> np.ndarray:
    """Shannon entropy of each row in nats, (N,); a probability of 0 adds 0."""
    return -(probs_NS * np.log(np.where(probs_NS > 0, probs_NS, 1.0))).sum(axis=1)
