"""An exponential moving average of each prompt's reward variance: the simplest method that learns."""

from __future__ import annotations

import numpy as np

from dpsrl.selection.hmm import NUM_STATES, PARTIAL, SOLVED, UNSOLVED, observed_state
from dpsrl.selection.options import check_share


class EmaVariance:
    """v <- (1 - smoothing) v + smoothing 4 r (1 - r), with r the solved share of the group; the first group sets v.

    A prompt never seen has v = 1, the greatest there is, so that all prompts are seen first. `predict` reads v as the
    variance of a known pass rate, p = (1 - sqrt(1 - v)) / 2, and gives the chance of a mixed group at that rate; what
    is left goes to solved or unsolved by an average of r. Prompts never seen are predicted as first groups went.

    smoothing: weight of the latest group, in [0, 1].
    """

    predicts = True

    def __init__(self, max_entries: int, num_rollouts: int, *, smoothing: float = 0.5) -> None:
        self.smoothing = check_share("smoothing", smoothing)
        self.num_rollouts, self.num_entries = num_rollouts, 1
        self._value_E = np.ones(max_entries, dtype=np.float32)
        self._rate_E = np.full(max_entries, np.nan, dtype=np.float32)  # NaN: never seen
        self._first_S = np.ones(NUM_STATES)  # how first groups went, and one of each

    def grow(self, num_entries: int) -> None:
        self._value_E[self.num_entries : num_entries] = 1.0
        self._rate_E[self.num_entries : num_entries] = np.nan
        self.num_entries = num_entries

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        rate_B = num_solved_B / num_rollouts_B
        first_B = np.isnan(self._rate_E[entries_B])
        state_B = observed_state(num_solved_B, num_rollouts_B)
        self._first_S += np.bincount(state_B[first_B], minlength=NUM_STATES)
        weight_B = np.where(first_B, 1.0, self.smoothing)
        old_rate_B = np.where(first_B, 0.0, self._rate_E[entries_B])
        self._value_E[entries_B] += weight_B * (4.0 * rate_B * (1.0 - rate_B) - self._value_E[entries_B])
        self._rate_E[entries_B] = old_rate_B + weight_B * (rate_B - old_rate_B)

    def advance(self, clock: int) -> None:
        pass

    def resume(self, clock: int) -> None:
        pass

    def variance(self) -> np.ndarray:
        """E[p (1 - p)], (E,); a quarter for a prompt never seen."""
        return self._value_E[: self.num_entries] / 4.0

    def predict(self) -> np.ndarray:
        value_E = np.clip(self._value_E[: self.num_entries].astype(np.float64), 0.0, 1.0)
        rate_E = self._rate_E[: self.num_entries].astype(np.float64)
        low_E = (1.0 - np.sqrt(1.0 - value_E)) / 2.0
        one_sided_E = low_E**self.num_rollouts + (1.0 - low_E) ** self.num_rollouts
        solved_share_E = rate_E**2 / (rate_E**2 + (1.0 - rate_E) ** 2)
        states_ES = np.empty((self.num_entries, NUM_STATES))
        states_ES[:, PARTIAL] = 1.0 - one_sided_E
        states_ES[:, SOLVED] = one_sided_E * solved_share_E
        states_ES[:, UNSOLVED] = one_sided_E * (1.0 - solved_share_E)
        states_ES[np.isnan(rate_E)] = self._first_S / self._first_S.sum()
        return states_ES

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return {"value": self._value_E, "rate": self._rate_E}

    def shared_arrays(self) -> dict[str, np.ndarray]:
        return {"first": self._first_S}
