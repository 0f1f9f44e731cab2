"""EarlyTraining: the trainer's work on a batch that is still being generated.

Gradients of admitted groups are accumulated as these come; the update itself waits for the last of them. Nothing about
it is approximate: weights and gradient are those of the batch as a whole, summed in another order.
"""

from __future__ import annotations

from typing import Any

from dpsrl.batch import lay_out_step, train_groups
from dpsrl.config import Config
from dpsrl.pools import TrainerPool
from dpsrl.types import Group


class EarlyTraining:
    """Owns what has been handed to the trainer of the batch under way."""

    def __init__(self, config: Config, trainers: TrainerPool) -> None:
        self.config, self.trainers = config, trainers
        self.begun: list[int] = []  # prompts
        self.updates: list[Any] = []  # the parts handed over
        self._waiting: list[Group] = []
        self._calls: list[dict[Any, Any]] = []
        self._full = config.trainer.micro_batch_tokens * config.trainer.num_workers

    def take(self, group: Group) -> None:
        """Puts a group into the batch; starts on those that wait once they fill a micro-batch of every rank."""
        if len(self.begun) < self.config.train.batch:
            self.begun.append(group.index)
            self._waiting.append(group)
            if sum(r.token_ids.size for g in self._waiting for r in g.rollouts) >= self._full:
                self._start()

    def _start(self) -> None:
        if groups := train_groups(self._waiting, self.config):
            (update,) = lay_out_step(groups, self.config)
            self.updates.append(update)
            self._calls.append(self.trainers.accumulate(update))
        self._waiting = []

    def finish(self) -> dict[Any, Any] | None:
        """Starts on the rest and on the update; None when there is nothing to train on."""
        self._start()
        for calls in self._calls:
            self.trainers.cluster.get(calls, "train")
        if not self.updates:
            return None
        total, trained = (sum(getattr(u, name) for u in self.updates) for name in ("total_weight", "trained_weight"))
        return self.trainers.begin_update(total, trained)
