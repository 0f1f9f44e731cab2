"""Advantages of the rollouts of one group. Pure, numpy only; knows nothing of tokens."""

from __future__ import annotations

import numpy as np

STD_FLOOR = 1e-6  # beside the std, as in verl; it matters only where rewards differ by less than that
KINDS = ("grpo", "dr_grpo")


def group_advantages(rewards_G: np.ndarray, kind: str = "grpo") -> np.ndarray:
    """Advantage of each rollout relative to its group, float64 (G,).

    grpo:     A_i = (r_i - mean(r)) / (std(r) + 1e-6)      (DeepSeekMath, arXiv 2402.03300, section 4.1.2)
    dr_grpo:  A_i = r_i - mean(r)                          (Dr. GRPO, arXiv 2503.20783)

    std is the unbiased one (divided by G - 1): the paper does not say, and TRL and verl both take
    that one. A missing reward is NaN: it is left out of mean and std, and its advantage is 0.
    A group whose rewards are all the same, or that has fewer than two, gets exactly 0
    everywhere: the rounding left over by the mean must not be blown up by a tiny std.
    ValueError on an infinite reward or an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"advantage kind {kind!r} is unknown; use one of: {', '.join(KINDS)}.")
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    if np.isinf(rewards_G).any():
        raise ValueError(f"rewards {rewards_G.tolist()} hold an infinity; a reward that failed is NaN.")
    advantages_G = np.zeros_like(rewards_G)
    present_G = ~np.isnan(rewards_G)
    present = rewards_G[present_G]
    if present.size < 2 or present.max() == present.min():
        return advantages_G
    centred = present - present.mean()
    advantages_G[present_G] = centred if kind == "dr_grpo" else centred / (present.std(ddof=1) + STD_FLOOR)
    return advantages_G
