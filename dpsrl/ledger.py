"""Where every rollout of a run went: generated = trained + carried + dropped, with a reason for each that was dropped.

Pure book-keeping; whoever moves rollouts says so here. Only rollouts that came back whole count as generated: what an
engine was working on when it was lost is sampled again, and counts then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from dpsrl.types import Group

MISSING, UNMIXED, TRUNCATED = "missing", "not mixed", "truncated"
TOO_FEW, SKIPPED = "too few for an update", "in an update that was skipped"


@dataclass
class Ledger:
    """Counts of rollouts since the run began."""

    generated: int = 0
    trained: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, num_rollouts: int) -> None:
        if num_rollouts:
            self.dropped[reason] = self.dropped.get(reason, 0) + num_rollouts

    def came_back(self, group: Group, admitted: bool) -> None:
        """A group is here; unless it is admitted, its way ends."""
        self.generated += len(group.rollouts)
        if not admitted:
            self.drop(MISSING, len(group.rollouts) - group.num_scored)
            self.drop(UNMIXED, group.num_scored)

    def taken(self, groups: Iterable[Group], mask_truncated: bool, has_update: bool) -> None:
        """The way of the batch's groups ends: in an update, or because there are too few for one."""
        for group in groups:
            for rollout, score in zip(group.rollouts, group.scores, strict=True):
                if score is None:
                    self.drop(MISSING, 1)
                elif mask_truncated and rollout.finish_reason == "length":
                    self.drop(TRUNCATED, 1)
                elif has_update:
                    self.trained += 1
                else:
                    self.drop(TOO_FEW, 1)

    def skipped(self, num_rollouts: int) -> None:
        """Of rollouts that were taken into an update: it turned out not to be finite."""
        self.trained -= num_rollouts
        self.drop(SKIPPED, num_rollouts)

    def balance(self, carried: int) -> dict[str, Any]:
        """The account with what is carried over now; `holds` says whether it adds up."""
        holds = self.generated == self.trained + carried + sum(self.dropped.values())
        return asdict(self) | {"carried": carried, "holds": holds}
