"""The Dirichlet hidden Markov model of DPS (arXiv 2603.10887), over all entries at once; pure numpy.

Owns the update equations. Knows nothing of which prompts are chosen, nor of rollouts beyond their counts.

Axes: S solving states (0 unsolved, 1 partial, 2 solved), E entries (see `entries`), B observed prompts.
Entries are the last axis, so that every operation runs over contiguous memory.

    gain_SSE[i, j]   what evidence added to the Dirichlet pseudo-count of moving to state i FROM state j, at the
                     prompt's last observation. n steps later the count is alpha0 + decay^n gain: the published
                     recursion alpha <- decay alpha + (1 - decay) alpha0 in closed form, so that the counts of
                     idle prompts are never rewritten. Columns normalise
    posterior_SE     belief about the state of the last step, after its observation
    prior_SE         belief about the state of the next step, before its observation
"""

from __future__ import annotations

import numpy as np

NUM_STATES = 3
UNSOLVED, PARTIAL, SOLVED = range(NUM_STATES)

BLOCK = 8192  # entries at a time: what one pass writes is still in the cache for the next
KERNEL_FROM = 200_000  # entries from which compiling the kernel (seconds, once) pays


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


def propagate(alpha_SSE: np.ndarray, posterior_SE: np.ndarray) -> np.ndarray:
    """normalise(P posterior), (S, E), with P the mean of the Dirichlet columns."""
    prior_SE = np.einsum("ijn,jn->in", alpha_SSE, posterior_SE / alpha_SSE.sum(axis=0))
    return prior_SE / prior_SE.sum(axis=0)  # rounding only: without it the error of idle prompts adds up over steps


def propagate_all(
    gain_SSE: np.ndarray,
    last_E: np.ndarray,
    clock: int,
    powers: np.ndarray,
    alpha0_SS: np.ndarray,
    posterior_SE: np.ndarray,
    prior_SE: np.ndarray,
) -> None:
    """Writes the prior of the next step into `prior_SE` for every entry.

    last_E: clock of each prompt's last observation; powers[n] = decay^n, its last stands for all beyond.
    """
    if prior_SE.shape[1] >= KERNEL_FROM:
        kernel = compiled_kernel()
        if kernel is not None:
            kernel(gain_SSE, last_E, clock, powers, alpha0_SS, posterior_SE, prior_SE)
            return
    for start in range(0, prior_SE.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        scale_E = powers[np.minimum(clock - last_E[part], powers.size - 1)]
        alpha_SSE = gain_SSE[:, :, part] * scale_E + alpha0_SS[:, :, None]
        prior_SE[:, part] = propagate(alpha_SSE, posterior_SE[:, part])


def compiled_kernel():
    """`propagate_all` in one pass over memory, on all cores; None without numba."""
    if "kernel" not in _COMPILED:
        try:
            from dpsrl.selection.kernel import propagate_all as kernel
        except ImportError:
            kernel = None
        _COMPILED["kernel"] = kernel
    return _COMPILED["kernel"]


_COMPILED: dict = {}
