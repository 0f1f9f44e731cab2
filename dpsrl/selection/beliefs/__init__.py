"""What we think of every prompt's chance of a mixed group at the next step. numpy only.

A belief owns the options of its model and the arrays that evidence changes. It knows nothing of scores, picks, rows
or random seeds. Its options are its keyword-only arguments: `build_selector` reads them from the signature, so that a
new belief is one class in a file here and one line in `BELIEFS`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dpsrl.selection.beliefs.beta import DiscountedBeta
from dpsrl.selection.beliefs.dirichlet_hmm import DirichletHMM
from dpsrl.selection.beliefs.ema import EmaVariance
from dpsrl.selection.beliefs.kalman import ArcsineKalman
from dpsrl.selection.beliefs.last_group import LastGroup, ZeroVarianceStreak
from dpsrl.selection.beliefs.logit_walk import LogitWalk
from dpsrl.selection.beliefs.none import NoBelief


class Belief(Protocol):
    """What a selector needs of a belief.

    Entry 0 is every prompt never touched; the others are one prompt each (see `entries`). The clock counts steps,
    which are policy versions: a group made at clock c was sampled by the policy after c updates.

    __init__(max_entries, num_rollouts, *, options): room for that many entries; the usual size n of a group.

    A belief may also give, each (E,): `rate()`, the expected pass rate; `variance()`, E[p (1 - p)]; `spread()`, the
    standard deviation of the chance of a mixed group; and `draw(entries, generator)`, pass rates drawn from the
    belief, one for each entry named. A score or pick that needs one is refused with a belief that lacks it. And
    `fit_in(arrays)`, where arrays depend on the usual size of a group: another run's arrays as they would be here.
    """

    predicts: bool
    """Whether `predict` knows anything; else it says a third each, which is not to be shown as a prediction."""

    def grow(self, num_entries: int) -> None:
        """There are `num_entries` from now on; new ones think what entry 0 thinks."""
        ...

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        """Takes in groups made at the clocks `made_B`, now or earlier. Entries are distinct, sizes at least 1."""
        ...

    def advance(self, clock: int) -> None:
        """Moves on to `clock`, one later than before: what the belief says is about that step from here on."""
        ...

    def predict(self) -> np.ndarray:
        """P(unsolved), P(partial), P(solved) of a group at the clock, (E, 3); rows sum to 1. Not to be written to."""
        ...

    def resume(self, clock: int) -> None:
        """The arrays were loaded; the clock stands at `clock`."""
        ...

    def entry_arrays(self) -> dict[str, np.ndarray]:
        """Every array that evidence changes and that has the entries as its last axis, at full length."""
        ...

    def shared_arrays(self) -> dict[str, np.ndarray]:
        """Every other array that evidence changes, of a shape that never changes."""
        ...


BELIEFS: dict[str, type] = {
    "dirichlet_hmm": DirichletHMM,
    "logit_walk": LogitWalk,
    "beta": DiscountedBeta,
    "ema": EmaVariance,
    "kalman": ArcsineKalman,
    "last_group": LastGroup,
    "streak": ZeroVarianceStreak,
    "none": NoBelief,
}
