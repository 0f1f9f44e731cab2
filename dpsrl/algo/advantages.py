"""Advantages of the rollouts of a batch of groups. Pure, numpy only; knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STD_FLOOR = 1e-6  # beside the std, as in verl; it matters only where rewards differ by less than that
KINDS = ("grpo", "dr_grpo", "rloo", "reinforce_pp")


def advantages(rewards: Sequence[np.ndarray], kind: str = "grpo") -> list[np.ndarray]:
    """Advantage of each rollout, float64 (G,) for each group of rewards (G,).

    grpo:          (r_i - mean(r)) / (std(r) + 1e-6)          (DeepSeekMath, arXiv 2402.03300, section 4.1.2)
    dr_grpo:       r_i - mean(r)                              (Dr. GRPO, arXiv 2503.20783)
    rloo:          r_i - mean of the others' rewards          (RLOO, arXiv 2402.14740, section 3.4)
    reinforce_pp:  (r_i - mean(r)) / (std over the batch of these differences + 1e-6)
                   (REINFORCE++ with baseline, arXiv 2501.03262, section 3.2)

    A group's std is the unbiased one (divided by G - 1): the paper does not say, and TRL and verl both take that one;
    the batch's is divided by the number of rollouts. A missing reward is NaN: it is left out of every mean and std, and
    its advantage is 0. A group whose rewards are all the same, or that has fewer than two, gets exactly 0 everywhere:
    the rounding left over by the mean must not be blown up by a tiny std.
    ValueError on an infinite reward or an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"advantage kind {kind!r} is unknown; use one of: {', '.join(KINDS)}.")
    of_groups = [_of_group(np.asarray(rewards_G, dtype=np.float64), kind) for rewards_G in rewards]
    if kind == "reinforce_pp":
        scored = [advantages_G[~np.isnan(rewards_G)] for advantages_G, rewards_G in zip(of_groups, rewards)]
        scale = np.concatenate(scored).std() if any(map(np.size, scored)) else 0.0
        of_groups = [advantages_G / (scale + STD_FLOOR) for advantages_G in of_groups]
    return of_groups


def _of_group(rewards_G: np.ndarray, kind: str) -> np.ndarray:
    if np.isinf(rewards_G).any():
        raise ValueError(f"rewards {rewards_G.tolist()} hold an infinity; a reward that failed is NaN.")
    advantages_G = np.zeros_like(rewards_G)
    present_G = ~np.isnan(rewards_G)
    present = rewards_G[present_G]
    if present.size < 2 or present.max() == present.min():
        return advantages_G
    centred = present - present.mean()
    if kind == "grpo":
        centred /= present.std(ddof=1) + STD_FLOOR
    elif kind == "rloo":
        centred *= present.size / (present.size - 1)
    advantages_G[present_G] = centred
    return advantages_G


def overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """What is added to the reward of a long response, in [-1, 0] (DAPO, arXiv 2503.14476, eq. 13).

    0 up to max_tokens - buffer_tokens, from there falling evenly to -1 at max_tokens.
    """
    if not buffer_tokens:
        return 0.0
    return float(np.clip((max_tokens - buffer_tokens - num_tokens) / buffer_tokens, -1.0, 0.0))
