"""What we think of every prompt's solving state at the next step. numpy only.

A belief owns the options of its model and the arrays that evidence changes. It knows nothing of
scores, picks or random numbers. Its options are its keyword-only arguments: `build_selector`
reads them from the signature, so a new belief is one class here and one line in `BELIEFS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dpsrl.selection import hmm
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


class Belief(Protocol):
    """What a selector needs of a belief. `ids_B` are distinct and every `num_rollouts_B` is at least 1."""

    def predict(self) -> np.ndarray:
        """P(unsolved), P(partial), P(solved) at the next step; float64 (N, 3), rows sum to 1, a copy."""
        ...

    def observe(self, ids_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray) -> None:
        """Moves the belief one step on. Called once per step, also when nothing was observed."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array that evidence changes, by name: the live arrays, not copies."""
        ...


class DirichletHMM:
    """The belief of DPS (arXiv 2603.10887), one Dirichlet HMM per prompt; the maths is in `hmm`.

    decay: in [0, 1], the paper's lambda: what share of the counts above the prior is kept per step.
    prior_alpha: counts before any evidence: a preset name, one positive number, or 3 x 3 of them (to, from).
    prior_pi: belief before any evidence: a preset name or three shares that sum to 1.
    """

    def __init__(
        self,
        num_prompts: int,
        *,
        decay: float = 0.7,
        prior_alpha: str | float | Sequence[Sequence[float]] = "uniform",
        prior_pi: str | Sequence[float] = "uniform",
    ) -> None:
        self.decay = check_share("decay", decay)
        self.alpha0_SS = transition_counts(prior_alpha)
        pi_S = initial_shares(prior_pi)
        self.alpha_SSN = np.repeat(self.alpha0_SS[:, :, None], num_prompts, axis=2)
        self.posterior_SN = np.repeat(pi_S[:, None], num_prompts, axis=1)
        self.prior_SN = self.posterior_SN.copy()

    def predict(self) -> np.ndarray:
        return self.prior_SN.T.copy()

    def observe(self, ids_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray) -> None:
        state_B = hmm.observed_state(num_solved_B, num_rollouts_B)
        hmm.dps_update(self.alpha_SSN, self.posterior_SN, self.prior_SN, ids_B, state_B, self.alpha0_SS, self.decay)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"alpha": self.alpha_SSN, "posterior": self.posterior_SN, "prior": self.prior_SN}


class NoBelief:
    """Learns nothing and says a third for every state, which is what no evidence amounts to."""

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts

    def predict(self) -> np.ndarray:
        return np.full((self.num_prompts, hmm.NUM_STATES), 1 / hmm.NUM_STATES)

    def observe(self, ids_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray) -> None:
        pass

    def arrays(self) -> dict[str, np.ndarray]:
        return {}


BELIEFS: dict[str, type] = {"dirichlet_hmm": DirichletHMM, "none": NoBelief}


def is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_share(name: str, value: float) -> float:
    if not is_number(value) or not 0.0 <= value <= 1.0:
        raise UserError(f"selection option '{name}' is {value!r}; it must be a number from 0 to 1.")
    return float(value)


def transition_counts(prior_alpha: str | float | Sequence[Sequence[float]]) -> np.ndarray:
    """The counts before any evidence, float64 (S, S), all positive."""
    if isinstance(prior_alpha, str) and prior_alpha not in ALPHA_PRESETS:
        raise UserError(
            f"selection option 'prior_alpha' is {prior_alpha!r}; "
            f"use one of {', '.join(ALPHA_PRESETS)}, a positive number, or 3 x 3 numbers."
        )
    value = ALPHA_PRESETS[prior_alpha] if isinstance(prior_alpha, str) else prior_alpha
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


def as_floats(name: str, value: object, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as finite float64 of `shape`, or a UserError that names the option."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = None
    if array is None or array.shape != shape or not np.isfinite(array).all():
        raise UserError(
            f"selection option '{name}' is {value!r}; it must be {' x '.join(map(str, shape))} finite numbers."
        )
    return array
