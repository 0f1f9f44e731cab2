"""What other ways of sampling would have spent for the mixed groups of a run, estimated from what the run saw.

Pure numbers. The estimate takes the policy as it was at each step, and asks how often a prompt drawn at random gave a
mixed group then: from prompts scored for the first time, which no belief told apart, or from the audit's draws once
there are as many. What a policy trained on other prompts would have been like, nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpsrl.audit import MIN_GROUPS, WINDOW
from dpsrl.metrics import Record
from dpsrl.report.history import History

ENOUGH = 200  # groups, by which a share is known to about 7 points
AUDIT_KEY = "selection/audit_mixed_share"


@dataclass(frozen=True)
class Spending:
    """Rollouts and mixed groups so far, at the end of each step that generated any (T,).

    random_share_T: the estimated chance of a mixed group of a random prompt; num_audit: steps whose share is the
    audit's, the others' is that of first groups. Uniform sampling trains on all it generates, dynamic sampling on the
    mixed groups alone: `mixed_T[-1] * group_size`.
    """

    steps_T: np.ndarray
    mixed_T: np.ndarray
    run_T: np.ndarray
    uniform_T: np.ndarray
    dynamic_T: np.ndarray
    random_share_T: np.ndarray
    num_audit: int
    group_size: int
    batch: int


def spending(
    history: History, records: Sequence[Record], batch: int, first_is_random: bool, num_audited: int = 1
) -> Spending | None:
    """None where the chance of a mixed group of a random prompt cannot be told, or there was no mixed group.

    batch: groups of an update, which dynamic sampling fills. first_is_random: False where pass rates or beliefs were
    known beforehand, so that first groups were chosen too. num_audited: prompts drawn for the audit in each step.
    """
    if not history.mixed_G.any():
        return None
    steps_T, place_G = np.unique(history.step_G, return_inverse=True)
    share_T, num_audit = random_shares(history, records, steps_T, first_is_random, num_audited)
    if share_T is None:
        return None
    group_size = int(history.num_rollouts_G.max())
    mixed_T = np.bincount(place_G, history.mixed_G)
    rounds_T = np.array([expected_rounds(share, batch) for share in share_T])
    return Spending(
        steps_T,
        np.cumsum(mixed_T).astype(int),
        group_size * np.cumsum(np.bincount(place_G)),
        group_size * np.cumsum(mixed_T / share_T),
        group_size * np.cumsum(mixed_T * rounds_T),
        share_T, num_audit, group_size, batch,
    )  # fmt: skip


def random_shares(
    history: History, records: Sequence[Record], steps_T: np.ndarray, first_is_random: bool, num_audited: int
) -> tuple[np.ndarray | None, int]:
    """(T,) and how many of them are the audit's; a step before the first estimate takes that one.

    The audit counts once it has as many groups as the others, or ENOUGH. Never below half a group in a window, so that
    what follows stays finite.
    """
    audit: Mapping[int, float] = {
        record["step"]: record[AUDIT_KEY] for record in records if is_share(record.get(AUDIT_KEY))
    }
    first_G = history.first_G
    first_step, first_mixed = history.step_G[first_G], history.mixed_G[first_G]
    num_T = np.searchsorted(first_step, steps_T, side="right")  # history is in order of steps
    sums = np.concatenate([[0], np.cumsum(first_mixed)])
    share_T, from_audit_T = np.full(steps_T.size, math.nan), np.zeros(steps_T.size, dtype=bool)
    for t, (step, num) in enumerate(zip(steps_T.tolist(), num_T.tolist(), strict=True)):
        others = min(num, WINDOW) if first_is_random and num >= MIN_GROUPS else 0
        if step in audit and num_audited * (t + 1) >= min(others, ENOUGH):
            share_T[t], from_audit_T[t] = audit[step], True
        elif from_audit_T[:t].any():
            share_T[t], from_audit_T[t] = share_T[t - 1], True
        elif others:
            start = max(0, num - WINDOW)
            share_T[t] = (sums[num] - sums[start]) / (num - start)
    known = np.flatnonzero(np.isfinite(share_T))
    if not known.size:
        return None, 0
    share_T[: known[0]] = share_T[known[0]]
    from_audit_T[: known[0]] = from_audit_T[known[0]]
    return np.clip(share_T, 0.5 / WINDOW, 1.0), int(from_audit_T.sum())


def is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def expected_rounds(share: float, batch: int) -> float:
    """Mean number of rounds of `batch` random prompts until `batch` groups of them are mixed.

    sum over n of P(Binomial(n batch, share) < batch), by the normal approximation with continuity correction.
    """
    total, n = 1.0, 1
    while True:
        mean = n * batch * share
        spread = math.sqrt(max(mean * (1 - share), 1e-12))
        missing = 0.5 * math.erfc((mean - batch + 0.5) / (spread * math.sqrt(2)))
        total += missing
        if mean > batch and missing < 1e-6:
            return total
        n += 1
