"""DPS's hidden Markov model with another number of states: what three of them are worth. numpy only.

    selection.method=dpsrl.study.states:PassRateStates selection.decay=0.5 selection.options.num_states=5

The states are ranges of a prompt's pass rate: none right, all right, and equal ranges between. With three they are
those of `dps`, and so is all else; with two they are unmixed and mixed. `predict` folds them into the usual three.
"""

from __future__ import annotations

import numpy as np

from dpsrl.selection.hmm import NUM_STATES, PARTIAL, SOLVED, UNSOLVED


class PassRateStates:
    """P(state) of every prompt at the next step, by the recursion of `selection.hmm`, dense and without late groups.

    Axes: K states, N prompts; counts are (to, from). Prior counts are three from each state, one for each of the usual
    states, so that a prompt never seen is thought of alike, and evidence weighs alike, whatever K is.
    """

    def __init__(self, num_prompts: int, num_rollouts: int, *, num_states: int = 3, decay: float = 0.7) -> None:
        if type(num_states) is not int or num_states < 2:
            raise ValueError(f"num_states is {num_states!r}; it must be a whole number of at least 2.")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay!r}; it must be from 0 to 1.")
        self.num_states, self.decay = num_states, float(decay)
        self.fold_SK = fold_of(num_states)
        share_K = prior_shares(self.fold_SK)
        self.alpha0_KK = np.tile(NUM_STATES * share_K[:, None], num_states)
        self.alpha_KKN = np.repeat(self.alpha0_KK[:, :, None], num_prompts, axis=2)
        self.posterior_KN = np.repeat(share_K[:, None], num_prompts, axis=1)
        self.prior_KN = self.posterior_KN.copy()

    def observe(self, ids: np.ndarray, num_solved: np.ndarray, num_rollouts: np.ndarray) -> None:
        """One step: the moves that were seen under the counts before it, decay, and the belief about the next step."""
        state_B = observed_state(num_solved, num_rollouts, self.num_states)
        alpha_KKB = self.alpha_KKN[:, :, ids]
        to_state_KB = alpha_KKB[state_B, :, np.arange(ids.size)].T / alpha_KKB.sum(axis=0)
        move_KB = self.posterior_KN[:, ids] * to_state_KB
        move_KB /= move_KB.sum(axis=0)

        self.alpha_KKN = self.decay * self.alpha_KKN + (1 - self.decay) * self.alpha0_KK[:, :, None]
        self.alpha_KKN[state_B, :, ids] += move_KB.T
        self.posterior_KN = self.prior_KN.copy()
        self.posterior_KN[:, ids] = state_B == np.arange(self.num_states)[:, None]
        prior_KN = np.einsum("ijn,jn->in", self.alpha_KKN, self.posterior_KN / self.alpha_KKN.sum(axis=0))
        self.prior_KN = prior_KN / prior_KN.sum(axis=0)

    def predict(self) -> np.ndarray:
        return (self.fold_SK @ self.prior_KN).T


def observed_state(num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, num_states: int) -> np.ndarray:
    """The state that each group shows, int (B,)."""
    mixed_B = (num_solved_B > 0) & (num_solved_B < num_rollouts_B)
    if num_states == 2:
        return mixed_B.astype(int)
    between_B = 1 + (num_states - 2) * num_solved_B // num_rollouts_B
    return np.where(mixed_B, between_B, np.where(num_solved_B > 0, num_states - 1, 0))


def fold_of(num_states: int) -> np.ndarray:
    """(S, K): 1 where a state is one of the usual three; of two, *unsolved* stands for both kinds of unmixed."""
    usual_K = [UNSOLVED, *[PARTIAL] * max(num_states - 2, 1), SOLVED][:num_states]
    return (np.arange(NUM_STATES)[:, None] == usual_K).astype(float)


def prior_shares(fold_SK: np.ndarray) -> np.ndarray:
    """(K,): a third for each of the usual states, in equal parts; of two states, mixed has a third."""
    share_S = np.full(NUM_STATES, 1 / NUM_STATES)
    if fold_SK.shape[1] == 2:
        share_S[[UNSOLVED, SOLVED]] = 2 / NUM_STATES, 0.0
    return (share_S / np.maximum(fold_SK.sum(axis=1), 1)) @ fold_SK
