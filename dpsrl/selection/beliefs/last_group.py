"""What history resampling and GRESO remember: how a prompt's last group went, and for how long it went alike."""

from __future__ import annotations

import numpy as np

from dpsrl.selection.hmm import NUM_STATES, PARTIAL, SOLVED, UNSOLVED, observed_state
from dpsrl.selection.options import check_share

NEVER = NUM_STATES  # last state of a prompt not seen yet


class LastGroup:
    """The solving state that each prompt's last group showed; the belief of history resampling (arXiv 2504.14286).

    The method itself predicts nothing. So that it can be judged beside the others, `predict` gives how often each state
    followed each last state so far, over all prompts, with one of each to begin with.
    """

    predicts = True

    def __init__(self, max_entries: int, num_rollouts: int) -> None:
        self.num_entries = 1
        self._last_state_E = np.full(max_entries, NEVER, dtype=np.int8)
        self._followed_S1S = np.ones((NUM_STATES + 1, NUM_STATES))

    def grow(self, num_entries: int) -> None:
        self._last_state_E[self.num_entries : num_entries] = NEVER
        self.num_entries = num_entries

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        state_B = observed_state(num_solved_B, num_rollouts_B)
        np.add.at(self._followed_S1S, (self._last_state_E[entries_B], state_B), 1.0)
        self._last_state_E[entries_B] = state_B

    def advance(self, clock: int) -> None:
        pass

    def resume(self, clock: int) -> None:
        pass

    def predict(self) -> np.ndarray:
        shares = self._followed_S1S / self._followed_S1S.sum(axis=1, keepdims=True)
        return shares[self._last_state_E[: self.num_entries]]

    def left_out(self) -> np.ndarray:
        """bool (E,): prompts whose last group was all correct."""
        return self._last_state_E[: self.num_entries] == SOLVED

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return {"last_state": self._last_state_E}

    def shared_arrays(self) -> dict[str, np.ndarray]:
        return {"followed": self._followed_S1S}


class ZeroVarianceStreak(LastGroup):
    """How many groups without spread each prompt showed in a row: the belief of GRESO (arXiv 2506.02177).

    A prompt with a streak of z is kept with chance max(p^z, MIN_KEEP), p being one number for easy (all correct) and
    one for hard (none correct) prompts. After every step p goes down by 0.01 where the share of such groups reached its
    target, else up, within [0.05, 0.95]. Prompts come in epochs: one skipped has had its turn.

    target_waste: share of groups without spread that is aimed at; a third of it easy, two thirds hard, as published.
    """

    MIN_KEEP, STEP, START, LOWEST, HIGHEST = 0.01, 0.01, 0.5, 0.05, 0.95

    def __init__(self, max_entries: int, num_rollouts: int, *, target_waste: float = 0.25) -> None:
        super().__init__(max_entries, num_rollouts)
        waste = check_share("target_waste", target_waste)
        self._targets = {SOLVED: waste / 3.0, UNSOLVED: waste * 2.0 / 3.0}
        self._streak_E = np.zeros(max_entries, dtype=np.int16)
        self._visits_E = np.zeros(max_entries, dtype=np.int32)
        self._base_S = np.full(NUM_STATES, self.START)

    def grow(self, num_entries: int) -> None:
        self._streak_E[self.num_entries : num_entries] = 0
        self._visits_E[self.num_entries : num_entries] = 0
        super().grow(num_entries)

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        state_B = observed_state(num_solved_B, num_rollouts_B)
        before_B = self._last_state_E[entries_B]
        again_B = (state_B == before_B) & (state_B != PARTIAL)
        self._streak_E[entries_B] = np.where(again_B, self._streak_E[entries_B] + 1, state_B != PARTIAL)
        if (before_B != NEVER).any():  # not in the first epoch, where nothing could have been skipped
            for state, target in self._targets.items():
                step = -self.STEP if (state_B == state).mean() >= target else self.STEP
                self._base_S[state] = np.clip(self._base_S[state] + step, self.LOWEST, self.HIGHEST)
        super().observe(entries_B, num_solved_B, num_rollouts_B, made_B)

    def keep(self) -> np.ndarray:
        """Chance, (E,), that a prompt is not skipped when its turn comes."""
        streak_E, state_E = self._streak_E[: self.num_entries], self._last_state_E[: self.num_entries]
        base_E = np.append(self._base_S, 1.0)[state_E]
        return np.where(streak_E > 0, np.maximum(base_E**streak_E, self.MIN_KEEP), 1.0)

    def visits(self) -> np.ndarray:
        """Turns that each prompt had, kept or skipped, (E,)."""
        return self._visits_E[: self.num_entries]

    def visit(self, entries: np.ndarray) -> None:
        """These had their turn; distinct, none of them 0."""
        self._visits_E[entries] += 1

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return super().entry_arrays() | {"streak": self._streak_E, "visits": self._visits_E}

    def shared_arrays(self) -> dict[str, np.ndarray]:
        return super().shared_arrays() | {"base": self._base_S}
