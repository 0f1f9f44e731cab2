"""The groups of a run as columns, and what can be counted from them: visits, flows, calibration. numpy only.

Axes: G groups in the order in which they were scored, P distinct prompts, T steps. States are those of
`selection.hmm`, and -1 for a prompt that was never scored, or a group without any reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.metrics import each_line
from dpsrl.selection.hmm import NUM_STATES, PARTIAL, observed_state

NONE = -1
COUNTS = ("step", "policy_version", "num_solved", "num_rollouts")
MAX_COUNT = 2**31 - 1
MAX_ID_CHARS = 200
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class History:
    """prompt_G: place in `prompt_ids`, which are in the order of their first group; predicted_G: NaN where unknown."""

    prompt_ids: list[str]
    prompt_G: np.ndarray
    step_G: np.ndarray
    version_G: np.ndarray
    num_solved_G: np.ndarray
    num_rollouts_G: np.ndarray
    admitted_G: np.ndarray
    audited_G: np.ndarray
    predicted_G: np.ndarray
    num_unreadable: int = 0

    def __len__(self) -> int:
        return self.step_G.size

    @cached_property
    def state_G(self) -> np.ndarray:
        """The solving state that each group shows; -1 without a reward."""
        state_G = observed_state(self.num_solved_G, self.num_rollouts_G)
        state_G[self.num_rollouts_G == 0] = NONE
        return state_G

    @cached_property
    def mixed_G(self) -> np.ndarray:
        return self.state_G == PARTIAL

    @cached_property
    def before_G(self) -> np.ndarray:
        """The state of the same prompt's last scored group before this one; -1 where there was none."""
        before_G = np.full(len(self), NONE)
        scored = np.flatnonzero(self.state_G != NONE)
        order = scored[np.argsort(self.prompt_G[scored], kind="stable")]
        same = self.prompt_G[order[1:]] == self.prompt_G[order[:-1]]
        before_G[order[1:][same]] = self.state_G[order[:-1][same]]
        return before_G

    @cached_property
    def first_G(self) -> np.ndarray:
        """Whether it is its prompt's first scored group."""
        return (self.before_G == NONE) & (self.state_G != NONE)

    @property
    def visits_P(self) -> np.ndarray:
        return np.bincount(self.prompt_G, minlength=len(self.prompt_ids))


def read_history(path: Path) -> History:
    """groups.jsonl; lines that are none of a group are left out and counted. Empty where there is no file."""
    places: dict[str, int] = {}
    rows: list[tuple[int, ...]] = []
    predicted: list[float] = []
    num_unreadable = 0
    for line in each_line(path) if path.exists() else ():
        if line is None or not is_group(line):
            num_unreadable += 1
            continue
        place = places.setdefault(line["prompt_id"], len(places))
        rows.append((place, *(line[name] for name in COUNTS), line["admitted"], line.get("audited") is True))
        chance = line.get("predicted")
        predicted.append(float(chance) if isinstance(chance, (int, float)) and 0 <= chance <= 1 else math.nan)
    table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    order = np.argsort(table[:, 1], kind="stable")  # as they were written, unless somebody mixed them up
    prompt_G, step_G, version_G, num_solved_G, num_rollouts_G, admitted_G, audited_G = table[order].T
    predicted_G = np.array(predicted, dtype=float)[order]
    return History(
        list(places), prompt_G, step_G, version_G, num_solved_G, num_rollouts_G, admitted_G.astype(bool),
        audited_G.astype(bool), predicted_G, num_unreadable,
    )  # fmt: skip


def is_group(line: dict[str, Any]) -> bool:
    counts = [line.get(name) for name in COUNTS]
    whole = all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts)
    prompt_id = line.get("prompt_id")
    named = isinstance(prompt_id, str) and len(prompt_id) <= MAX_ID_CHARS and isinstance(line.get("admitted"), bool)
    return whole and named and line["num_solved"] <= line["num_rollouts"]


# --- flows between states -----------------------------------------------------------------------------


def flows(history: History) -> np.ndarray:
    """How often a prompt's scored group followed one in each state, int (1 + S, S): row 0 is never scored before."""
    scored = history.state_G != NONE
    return count_flows(history.before_G[scored], history.state_G[scored])


def count_flows(before_G: np.ndarray, state_G: np.ndarray) -> np.ndarray:
    cell_G = (before_G + 1) * NUM_STATES + state_G
    return np.bincount(cell_G, minlength=(1 + NUM_STATES) * NUM_STATES).reshape(1 + NUM_STATES, NUM_STATES)


def flows_over_time(history: History, num_windows: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """(edges (W + 1,) in steps, flows (W, 1 + S, S)) in stretches of equally many steps, at most `num_windows`."""
    scored = history.state_G != NONE
    step_G = history.step_G[scored]
    first, last = int(step_G.min()), int(step_G.max())
    width = math.ceil((last - first + 1) / num_windows)
    edges = np.arange(first, last + width + 1, width)
    window_G = (step_G - first) // width
    before_G, state_G = history.before_G[scored], history.state_G[scored]
    tables = [count_flows(before_G[window_G == w], state_G[window_G == w]) for w in range(edges.size - 1)]
    return edges, np.stack(tables)


# --- calibration --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Predicted chances of a mixed group beside what came of them, in K equal ranges of the prediction.

    Of a range without groups the shares are NaN. brier: mean squared error; base_brier: that of always predicting the
    share that came out; error: mean |predicted - mixed| over ranges, weighted by groups (ECE).
    """

    num_groups_K: np.ndarray
    predicted_K: np.ndarray
    mixed_K: np.ndarray
    low_K: np.ndarray  # 95% interval of mixed_K (Wilson)
    high_K: np.ndarray
    brier: float
    base_brier: float
    error: float


def calibration(history: History, num_bins: int = 10) -> Calibration | None:
    """None where no scored group has a prediction."""
    known = (history.state_G != NONE) & np.isfinite(history.predicted_G)
    if not known.any():
        return None
    predicted, mixed = history.predicted_G[known], history.mixed_G[known].astype(float)
    bin_G = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    num_K = np.bincount(bin_G, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        predicted_K = np.bincount(bin_G, predicted, minlength=num_bins) / num_K
        mixed_K = np.bincount(bin_G, mixed, minlength=num_bins) / num_K
        low_K, high_K = wilson(mixed_K, num_K)
    base = mixed.mean()
    gap_K = np.abs(np.bincount(bin_G, predicted - mixed, minlength=num_bins))
    return Calibration(
        num_K, predicted_K, mixed_K, low_K, high_K, float(((predicted - mixed) ** 2).mean()),
        float(base * (1 - base)), float(gap_K.sum() / predicted.size),
    )  # fmt: skip


def wilson(share: np.ndarray, num: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of a share of `num` trials (Wilson 1927)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (share + Z_95**2 / (2 * num)) / (1 + Z_95**2 / num)
        half = Z_95 / (1 + Z_95**2 / num) * np.sqrt(share * (1 - share) / num + (Z_95 / (2 * num)) ** 2)
    return centre - half, centre + half
