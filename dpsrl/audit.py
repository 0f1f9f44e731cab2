"""How good the predictions are on prompts that were not chosen for them. numpy only.

Figures over selected prompts flatter a method: it selects where it is confident. So a few prompts of every step are
drawn at random from all, and what was predicted of them is compared with how they went.
"""

from __future__ import annotations

import numpy as np

WINDOW = 512  # the latest audited groups
NUM_BINS = 5
MIN_GROUPS = 20  # below this a figure would be noise


class Audit:
    """Owns the draws and the latest WINDOW judgements: the predicted chance of a mixed group, whether it was mixed,
    whether *partial* had been the likeliest state, and whether the prompt had been scored before.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.num_prompts = num_prompts
        self._num_drawn = 0
        self._judged = np.zeros((0, 4))
        self._seed = seed

    def draw(self, num_rows: int, busy: list[int], limit: int) -> list[int]:
        """Distinct rows outside `busy`, each as likely as the other, at most `limit`. A new generator for each draw."""
        generator = np.random.default_rng([self._seed, 0xA0D17, self._num_drawn])
        self._num_drawn += 1
        taken = set(busy)
        wanted = min(self.num_prompts, limit, num_rows - len(taken))
        rows: list[int] = []
        while len(rows) < wanted:
            row = int(generator.integers(num_rows))
            if row not in taken:
                taken.add(row)
                rows.append(row)
        return rows

    def record(self, predicted_A: np.ndarray, mixed_A: np.ndarray, likeliest_A: np.ndarray, seen_A: np.ndarray) -> None:
        latest = np.stack([predicted_A, mixed_A, likeliest_A, seen_A], axis=1)
        self._judged = np.concatenate([self._judged, latest])[-WINDOW:]

    def metrics(self, predicts: bool = True) -> dict[str, float]:
        """Nothing until there are MIN_GROUPS; predicts: whether there are predictions to be judged."""
        if len(self._judged) < MIN_GROUPS:
            return {}
        predicted, mixed, *_ = self._judged.T
        judged = {
            "selection/audit_brier": float(((predicted - mixed) ** 2).mean()),
            "selection/audit_calibration": calibration_error(predicted, mixed),
        }
        return (judged if predicts else {}) | {"selection/audit_mixed_share": float(mixed.mean())}

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"judged": self._judged.copy(), "num_drawn": np.array(self._num_drawn)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._judged, self._num_drawn = np.array(state["judged"]), int(state["num_drawn"])


def calibration_error(predicted_A: np.ndarray, mixed_A: np.ndarray) -> float:
    """Mean |predicted - realised| over NUM_BINS equal ranges of the prediction, weighted by their groups (ECE)."""
    bin_A = np.minimum((predicted_A * NUM_BINS).astype(int), NUM_BINS - 1)
    gap = np.bincount(bin_A, predicted_A - mixed_A, minlength=NUM_BINS)
    return float(np.abs(gap).sum() / predicted_A.size)
