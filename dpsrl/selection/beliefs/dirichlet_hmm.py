"""The belief of DPS (arXiv 2603.10887): one Dirichlet hidden Markov model per prompt. The maths is in `hmm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpsrl.selection import hmm
from dpsrl.selection.options import as_floats, check_flag, check_number, check_share, is_number
from dpsrl.types import UserError

ALPHA_PRESETS = {  # rows: to, columns: from; unsolved, partial, solved
    "uniform": ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "progress": ((1.0, 0.5, 0.5), (1.0, 1.0, 0.5), (1.0, 1.0, 1.0)),
    "stability": ((1.0, 0.5, 0.5), (0.5, 1.0, 0.5), (0.5, 0.5, 1.0)),
    "local": ((1.0, 1.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0)),
}
PI_PRESETS = {
    "uniform": (1 / 3, 1 / 3, 1 / 3),
    "unsolved": (1.0, 0.0, 0.0),
    "partial": (0.0, 1.0, 0.0),
    "solved": (0.0, 0.0, 1.0),
}
NEVER = -1
SINGLE_FROM = 200_000  # prompts from which float32 halves the bytes; below, nobody waits and figures agree to 1e-15
NEGLIGIBLE = 1e-20  # of a count of about 1: where the table of powers ends


class DirichletHMM:
    """P(state) of every prompt at the next step, by the published update.

    decay: in [0, 1], the paper's lambda: what share of the counts above the prior is kept per step.
    prior_alpha: counts before any evidence: a preset name, one positive number, or 3 x 3 of them (to, from).
    prior_pi: belief before any evidence: a preset name or three shares that sum to 1.
    first_transition: as published, the first observation of a prompt counts as a move out of `prior_pi`, although
        nothing was seen to move. That smears a third of a count over the row of the observed state: a prompt seen
        unsolved and then partial ranks below one never seen. false leaves the move out.
    evidence_weight: how much one observed move adds to the counts; 1 as published. P(partial) of a prompt that is
        always partial ends at (1 + w / (1 - decay)) / (3 + w / (1 - decay)), 0.68 at decay 0.7 and w = 1: a rank and
        no probability. A larger weight raises that ceiling.
    """

    predicts = True

    def __init__(
        self,
        max_entries: int,
        num_rollouts: int,
        *,
        decay: float = 0.7,
        prior_alpha: str | float | Sequence[Sequence[float]] = "uniform",
        prior_pi: str | Sequence[float] = "uniform",
        first_transition: bool = True,
        evidence_weight: float = 1.0,
    ) -> None:
        self.decay = check_share("decay", decay)
        self.first_transition = check_flag("first_transition", first_transition)
        self.evidence_weight = check_number("evidence_weight", evidence_weight, lowest=0.0)
        dtype = np.float64 if max_entries <= SINGLE_FROM else np.float32
        self.alpha0_SS = transition_counts(prior_alpha).astype(dtype)
        self.pi_S = initial_shares(prior_pi).astype(dtype)
        self.clock, self.num_entries = 0, 0
        self._gain_SSE = np.zeros((hmm.NUM_STATES, hmm.NUM_STATES, max_entries), dtype=dtype)
        self._posterior_SE = np.zeros((hmm.NUM_STATES, max_entries), dtype=dtype)
        self._prior_SE = np.zeros((hmm.NUM_STATES, max_entries), dtype=dtype)
        self._last_E = np.zeros(max_entries, dtype=np.int32)  # clock of the last observation
        self._state_E = np.zeros(max_entries, dtype=np.int8)  # what it showed
        self._posterior_SE[:, 0] = self._prior_SE[:, 0] = self.pi_S
        self._last_E[0] = NEVER
        self.grow(1)

    def grow(self, num_entries: int) -> None:
        new = slice(self.num_entries or 1, num_entries)
        self._posterior_SE[:, new] = self._posterior_SE[:, :1]
        self._prior_SE[:, new] = self._prior_SE[:, :1]
        self._gain_SSE[:, :, new] = 0.0  # may hold what was there before an earlier state was loaded
        self._last_E[new] = NEVER
        self.num_entries = num_entries

    def predict(self) -> np.ndarray:
        return self._prior_SE[:, : self.num_entries].T

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        """Evidence of step `made_B`, in the published order: the move under the old counts, their decay, the new move.

        A group that comes late enters where it was made: the posterior of the step before is worked out again from
        the prompt's last observation, and afterwards carried on to the clock.
        """
        made_B = np.maximum(made_B, self._last_E[entries_B] + 1)
        state_B = hmm.observed_state(num_solved_B, num_rollouts_B)
        before_SB = self._posterior_SE[:, entries_B]
        late = np.flatnonzero(made_B < self.clock)
        if late.size:
            before_SB[:, late] = self._replay(entries_B[late], made_B[late] - 1)
        move_SB = hmm.expected_transition(self._alpha(entries_B, made_B - 1), before_SB, state_B)
        if not self.first_transition:
            move_SB[:, self._last_E[entries_B] == NEVER] = 0.0

        self._gain_SSE[:, :, entries_B] *= self._power(made_B - self._last_E[entries_B])
        self._gain_SSE[state_B, :, entries_B] += self.evidence_weight * move_SB.T
        self._last_E[entries_B] = made_B
        self._state_E[entries_B] = state_B
        # `advance` takes the prior for the posterior of the step that ends: a certainty for what was seen in it.
        self._prior_SE[:, entries_B] = state_B == np.arange(hmm.NUM_STATES)[:, None]
        if late.size:
            self._prior_SE[:, entries_B[late]] = self._replay(entries_B[late], np.full(late.size, self.clock))

    def advance(self, clock: int) -> None:
        self.clock = clock
        self._posterior_SE, self._prior_SE = self._prior_SE, self._posterior_SE
        used = slice(0, self.num_entries)
        hmm.propagate_all(
            self._gain_SSE[:, :, used],
            self._last_E[used],
            clock - 1,
            self._power(np.arange(self._num_powers(clock))).astype(self.alpha0_SS.dtype),
            self.alpha0_SS,
            self._posterior_SE[:, used],
            self._prior_SE[:, used],
        )

    def resume(self, clock: int) -> None:
        self.clock = clock

    def _num_powers(self, clock: int) -> int:
        """Length of the table of powers of the decay; its last is 0, or it covers every gap there is."""
        if self.decay == 0.0:
            return 2
        needed = np.log(NEGLIGIBLE) / np.log(self.decay) if self.decay < 1.0 else np.inf
        return int(min(needed, clock + 1)) + 2

    def _power(self, exponents: np.ndarray) -> np.ndarray:
        """decay^n, with 0 for what is negligible; an entry never observed has no gain to decay."""
        powers = np.power(self.decay, np.maximum(exponents, 0).astype(np.float64))
        return np.where(powers < NEGLIGIBLE, 0.0, powers)

    def _alpha(self, entries_B: np.ndarray, clock_B: np.ndarray) -> np.ndarray:
        """Transition counts as of the clocks given, (S, S, B)."""
        scale_B = self._power(clock_B - self._last_E[entries_B])
        return self._gain_SSE[:, :, entries_B] * scale_B + self.alpha0_SS[:, :, None]

    def _replay(self, entries_B: np.ndarray, clock_B: np.ndarray) -> np.ndarray:
        """Posteriors of idle steps `clock_B`, (S, B), worked out from each prompt's last observation."""
        last_B = self._last_E[entries_B]
        seen_B = last_B != NEVER
        posterior_SB = (self._state_E[entries_B] == np.arange(hmm.NUM_STATES)[:, None]).astype(self.alpha0_SS.dtype)
        posterior_SB[:, ~seen_B] = self.pi_S[:, None]
        at_B = np.maximum(last_B, 0)  # `pi` is the belief about step 0, not about a step before it
        while (behind := np.flatnonzero(at_B < clock_B)).size:
            alpha_SSB = self._alpha(entries_B[behind], at_B[behind])
            posterior_SB[:, behind] = hmm.propagate(alpha_SSB, posterior_SB[:, behind])
            at_B[behind] += 1
        return posterior_SB

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return {
            "gain": self._gain_SSE,
            "posterior": self._posterior_SE,
            "prior": self._prior_SE,
            "last": self._last_E,
            "state": self._state_E,
        }

    def shared_arrays(self) -> dict[str, np.ndarray]:
        return {}


def transition_counts(prior_alpha: str | float | Sequence[Sequence[float]]) -> np.ndarray:
    """The counts before any evidence, float64 (S, S), all positive."""
    if isinstance(prior_alpha, str) and prior_alpha not in ALPHA_PRESETS:
        raise UserError(
            f"selection option 'prior_alpha' is {prior_alpha!r}; "
            f"use one of {', '.join(ALPHA_PRESETS)}, a positive number, or 3 x 3 numbers."
        )
    value: Any = ALPHA_PRESETS[prior_alpha] if isinstance(prior_alpha, str) else prior_alpha
    if is_number(value):
        value = np.full((hmm.NUM_STATES, hmm.NUM_STATES), value)
    alpha_SS = as_floats("prior_alpha", value, (hmm.NUM_STATES, hmm.NUM_STATES))
    if not (alpha_SS > 0).all():
        raise UserError(
            f"selection option 'prior_alpha' is {prior_alpha!r}, which has counts that are not positive: "
            "a prompt that makes such a move has probability 0/0 ever after; use small counts such as 0.01."
        )
    return alpha_SS


def initial_shares(prior_pi: str | Sequence[float]) -> np.ndarray:
    """The belief before any evidence, float64 (S,), sums to 1."""
    if isinstance(prior_pi, str) and prior_pi not in PI_PRESETS:
        raise UserError(
            f"selection option 'prior_pi' is {prior_pi!r}; "
            f"use one of {', '.join(PI_PRESETS)}, or three shares that sum to 1."
        )
    pi_S = as_floats("prior_pi", PI_PRESETS[prior_pi] if isinstance(prior_pi, str) else prior_pi, (hmm.NUM_STATES,))
    if (pi_S < 0).any() or abs(pi_S.sum() - 1.0) > 1e-6:
        raise UserError(
            f"selection option 'prior_pi' is {prior_pi!r}; its three shares must be 0 or more and sum to 1."
        )
    return pi_S / pi_S.sum()
