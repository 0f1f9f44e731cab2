"""The Dirichlet hidden Markov model of DPS (arXiv 2603.10887), over all prompts at once; pure numpy, float64.

Owns the update equations. Knows nothing of which prompts are chosen, nor of rollouts beyond their counts.

Axes: S solving states (0 unsolved, 1 partial, 2 solved), N prompts, B observed prompts.
Prompts are the last axis, so that every operation runs over contiguous memory: at a million
prompts this is what keeps a step near a tenth of a second.

    alpha_SSN[i, j]  Dirichlet pseudo-counts of moving to state i FROM state j; columns normalise
    posterior_SN     belief about the state of the last step, after its observation
    prior_SN         belief about the state of the next step, before its observation
"""

from __future__ import annotations

import numpy as np

NUM_STATES = 3
UNSOLVED, PARTIAL, SOLVED = range(NUM_STATES)


def observed_state(num_solved_B: np.ndarray, num_rollouts_B: np.ndarray) -> np.ndarray:
    """The solving state each group shows, int64 (B,). Every `num_rollouts_B` is at least 1."""
    state_B = np.full(num_solved_B.shape, PARTIAL, dtype=np.int64)
    state_B[num_solved_B == 0] = UNSOLVED
    state_B[num_solved_B == num_rollouts_B] = SOLVED
    return state_B


def expected_transition(alpha_SSB: np.ndarray, posterior_SB: np.ndarray, state_B: np.ndarray) -> np.ndarray:
    """Where each observed prompt came from on its way to `state_B`: shares (S, B), columns sum to 1.

    With the new state known to be s, xi[i, j] = [i = s] posterior[j] P[s, j] / sum_j posterior[j] P[s, j],
    so only row s of xi is not zero, and that row is what comes back. P is the mean of the
    Dirichlet columns before this step's update.
    """
    columns = np.arange(state_B.size)
    to_state_SB = alpha_SSB[state_B, :, columns].T / alpha_SSB.sum(axis=0)
    share_SB = posterior_SB * to_state_SB
    return share_SB / share_SB.sum(axis=0)


def propagate(alpha_SSN: np.ndarray, posterior_SN: np.ndarray, prior_SN: np.ndarray) -> None:
    """Writes prior = normalise(P posterior) into `prior_SN`, with P the mean of the Dirichlet columns."""
    weight_SN = alpha_SSN.sum(axis=0)
    np.divide(posterior_SN, weight_SN, out=weight_SN)
    np.einsum("ijn,jn->in", alpha_SSN, weight_SN, out=prior_SN)
    prior_SN /= prior_SN.sum(axis=0)  # rounding only: without it the error of idle prompts adds up over steps


def dps_update(
    alpha_SSN: np.ndarray,
    posterior_SN: np.ndarray,
    prior_SN: np.ndarray,
    ids_B: np.ndarray,
    state_B: np.ndarray,
    alpha0_SS: np.ndarray,
    decay: float,
) -> None:
    """One step of the clock for every prompt, in place, in the published order.

    1. posterior: certainty on the observed state; for the other prompts the prior stands in.
    2. transition counts: alpha <- decay alpha + (1 - decay) alpha0, plus, for observed prompts,
       the expected move from the previous posterior (under the counts before the decay).
    3. prior of the next step, from the new counts.

    `ids_B` distinct; `decay` in [0, 1] (the paper's lambda): 1 forgets nothing, 0 keeps only the last move.
    """
    move_SB = expected_transition(alpha_SSN[:, :, ids_B], posterior_SN[:, ids_B], state_B)

    np.copyto(posterior_SN, prior_SN)
    posterior_SN[:, ids_B] = 0.0
    posterior_SN[state_B, ids_B] = 1.0

    alpha_SSN *= decay
    alpha_SSN += (1.0 - decay) * alpha0_SS[:, :, None]
    alpha_SSN[state_B, :, ids_B] += move_SB.T

    propagate(alpha_SSN, posterior_SN, prior_SN)
