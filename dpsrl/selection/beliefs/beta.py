"""A discounted Beta distribution over each prompt's pass rate: the belief of MoPPS (arXiv 2507.04632) and its kin."""

from __future__ import annotations

import numpy as np

from dpsrl.selection.options import check_flag, check_share


class DiscountedBeta:
    """p ~ Beta(a, b); a group of m solved of n adds m to a and n - m to b. The prior is Beta(1, 1).

    decay: share of the evidence above the prior that is kept: a <- 1 + decay (a - 1), likewise b.
    idle_decay: true: every step decays the evidence of every prompt; false, as in MoPPS: an observation decays that of
        its prompt, and idle prompts keep theirs.
    """

    predicts = True

    def __init__(self, max_entries: int, num_rollouts: int, *, decay: float = 0.5, idle_decay: bool = False) -> None:
        self.decay = check_share("decay", decay)
        self.idle_decay = check_flag("idle_decay", idle_decay)
        self.num_rollouts = num_rollouts
        self.clock, self.num_entries = 0, 1
        self._counts_2E = np.zeros((2, max_entries), dtype=np.float32)  # solved, missed: as of the last observation
        self._last_E = np.zeros(max_entries, dtype=np.int32)

    def grow(self, num_entries: int) -> None:
        self._counts_2E[:, self.num_entries : num_entries] = 0.0
        self._last_E[self.num_entries : num_entries] = 0
        self.num_entries = num_entries

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        made_B = np.maximum(made_B, self._last_E[entries_B])
        gap_B = made_B - self._last_E[entries_B] if self.idle_decay else 1
        self._counts_2E[:, entries_B] *= np.float_power(self.decay, gap_B)
        self._counts_2E[:, entries_B] += np.stack([num_solved_B, num_rollouts_B - num_solved_B])
        self._last_E[entries_B] = made_B

    def advance(self, clock: int) -> None:
        self.clock = clock

    def resume(self, clock: int) -> None:
        self.clock = clock

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """a and b now, (E,) each."""
        used = slice(0, self.num_entries)
        idle_E = np.maximum(self.clock - 1 - self._last_E[used], 0)  # steps since that brought no evidence
        kept_E = np.float_power(self.decay, idle_E) if self.idle_decay else 1.0
        a_E, b_E = 1.0 + self._counts_2E[:, used] * kept_E
        return a_E, b_E

    def predict(self) -> np.ndarray:
        """The Beta-binomial of a group of the usual size."""
        a_E, b_E = self.counts()
        solved_E, unsolved_E = rising(a_E, a_E + b_E, self.num_rollouts), rising(b_E, a_E + b_E, self.num_rollouts)
        return np.stack([unsolved_E, 1.0 - unsolved_E - solved_E, solved_E], axis=1)

    def rate(self) -> np.ndarray:
        a_E, b_E = self.counts()
        return a_E / (a_E + b_E)

    def variance(self) -> np.ndarray:
        """E[p (1 - p)] = a b / ((a + b) (a + b + 1))."""
        a_E, b_E = self.counts()
        return a_E * b_E / ((a_E + b_E) * (a_E + b_E + 1.0))

    def spread(self) -> np.ndarray:
        """From the second moment of 1 - p^n - (1 - p)^n, whose terms are Beta moments."""
        a_E, b_E = self.counts()
        n, total_E = self.num_rollouts, a_E + b_E
        p_n, q_n = rising(a_E, total_E, n), rising(b_E, total_E, n)
        both = rising(a_E, total_E, n) * rising(b_E, total_E + n, n)  # E[p^n (1 - p)^n]
        square = 1.0 - 2.0 * (p_n + q_n) + rising(a_E, total_E, 2 * n) + rising(b_E, total_E, 2 * n) + 2.0 * both
        return np.sqrt(np.maximum(square - (1.0 - p_n - q_n) ** 2, 0.0))

    def draw(self, entries: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        a_E, b_E = self.counts()
        return generator.beta(a_E[entries], b_E[entries])

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return {"counts": self._counts_2E, "last": self._last_E}

    def shared_arrays(self) -> dict[str, np.ndarray]:
        return {}


def rising(a: np.ndarray, total: np.ndarray, power: int) -> np.ndarray:
    """E[p^power] for p ~ Beta(a, total - a): the product of (a + i) / (total + i)."""
    product = np.ones_like(a)
    for i in range(power):
        product = product * ((a + i) / (total + i))
    return product
