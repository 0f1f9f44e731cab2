"""`hmm.propagate_all` compiled by numba: each prompt's counts are read once, its prior is written once."""

from __future__ import annotations

from numba import njit, prange


@njit(parallel=True, cache=True, error_model="numpy")
def propagate_all(gain_SSE, last_E, clock, powers, alpha0_SS, posterior_SE, prior_SE):
    for e in prange(prior_SE.shape[1]):
        scale = powers[min(clock - last_E[e], powers.size - 1)]
        unsolved = prior_SE[0, e] * 0
        partial = unsolved
        solved = unsolved
        for j in range(3):
            a0 = alpha0_SS[0, j] + scale * gain_SSE[0, j, e]
            a1 = alpha0_SS[1, j] + scale * gain_SSE[1, j, e]
            a2 = alpha0_SS[2, j] + scale * gain_SSE[2, j, e]
            weight = posterior_SE[j, e] / (a0 + a1 + a2)
            unsolved += weight * a0
            partial += weight * a1
            solved += weight * a2
        total = unsolved + partial + solved
        prior_SE[0, e] = unsolved / total
        prior_SE[1, e] = partial / total
        prior_SE[2, e] = solved / total
