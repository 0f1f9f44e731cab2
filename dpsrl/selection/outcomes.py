"""What a group's rewards say: how many rollouts count as solved, of how many, and whether it is mixed. numpy only.

The rewards are those that the advantage is computed from, so that a mixed group is one that carries a gradient,
whatever else was measured. A reward that failed is NaN: it leaves both counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpsrl.types import UserError


@dataclass(frozen=True)
class OutcomeRule:
    """How rewards become counts. The defaults read 0/1 rewards as they are.

    unsolved_at, solved_at: rewards up to the first count as unsolved, from the second on as solved, and in between
    in proportion: with 0 and 1, four rewards of 0.5 are two solved of four.
    min_spread: the group is mixed if its greatest and least reward differ by more than this. A format bonus of 0.1
    makes no mixed group with min_spread=0.1.
    """

    unsolved_at: float = 0.0
    solved_at: float = 1.0
    min_spread: float = 0.0

    def __post_init__(self) -> None:
        if not self.unsolved_at < self.solved_at:
            raise UserError(
                f"selection.unsolved_at={self.unsolved_at} must be below selection.solved_at={self.solved_at}: "
                "they are the rewards from which a rollout counts as unsolved and as solved"
            )
        if not self.min_spread >= 0:
            raise UserError(f"selection.min_spread={self.min_spread} must be at least 0")

    def counts(self, rewards_G: np.ndarray) -> tuple[int, int]:
        """(num_solved, num_scored) with 0 < num_solved < num_scored exactly if the group is mixed."""
        rewards = rewards_G[np.isfinite(rewards_G)]
        if rewards.size == 0:
            return 0, 0
        progress = np.clip((rewards - self.unsolved_at) / (self.solved_at - self.unsolved_at), 0.0, 1.0)
        if rewards.max() - rewards.min() > self.min_spread:
            return int(np.clip(round(float(progress.sum())), 1, rewards.size - 1)), rewards.size
        return rewards.size * int(progress.mean() >= 0.5), rewards.size
