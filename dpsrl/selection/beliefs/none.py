"""No belief at all, for methods that do not learn."""

from __future__ import annotations

import numpy as np

from dpsrl.selection.hmm import NUM_STATES


class NoBelief:
    """Learns nothing and says a third for every state, which is what no evidence amounts to."""

    predicts = False

    def __init__(self, max_entries: int, num_rollouts: int) -> None:
        self.num_entries = 1

    def grow(self, num_entries: int) -> None:
        self.num_entries = num_entries

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        pass

    def advance(self, clock: int) -> None:
        pass

    def resume(self, clock: int) -> None:
        pass

    def predict(self) -> np.ndarray:
        return np.broadcast_to(1 / NUM_STATES, (self.num_entries, NUM_STATES))

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return {}

    def shared_arrays(self) -> dict[str, np.ndarray]:
        return {}
