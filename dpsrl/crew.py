"""The processes that can outlast a run: Ray's session, the engines, the trainer ranks.

A start takes most of a minute, nearly all of it imports and loading, and the next run of a sweep needs the very same
processes with other weights. Owns whether it gets them; what they do in a run is in `pools.py`.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpsrl.cluster import Cluster
from dpsrl.config import Config
from dpsrl.pools import RolloutPool, TrainerPool, transfer_backend
from dpsrl.stops import StopRequests

OF_REQUESTS = ("num_rollouts", "temperature", "spare_share")  # in `rollout`: an engine is told of them with each


class Crew:
    """A cluster with engines and trainer ranks that are starting; `wait_until_up` before they are used.

    is_new: whether the engines hold the weights of the model folder still.
    """

    def __init__(self, config: Config, log_dir: Path, stops: StopRequests | None) -> None:
        self._made_for, self.is_new = needs(config), True
        backend = transfer_backend(config)
        with ExitStack() as started:
            self.cluster = started.enter_context(Cluster(config, log_dir, stops=stops))
            self.rollouts = RolloutPool(self.cluster, config, backend)
            self.trainers = TrainerPool(self.cluster, config, backend)
            self._stack = started.pop_all()
        self._at_rest = ExitStack()

    def close(self) -> None:
        with self._stack, self._at_rest:
            pass

    def suits(self, config: Config) -> bool:
        """Whether a run of `config` would start processes that are just like these."""
        return self._made_for == needs(config)

    def rest(self) -> None:
        """The run is over: what was its own alone is ended, and nobody is waited for."""
        mine = {*self.rollouts.engines, *self.trainers.ranks}
        for actor in self.cluster.actors.keys() - mine:
            self.cluster.kill(actor)
        self._at_rest.enter_context(self.cluster.watchdog.paused())

    def take_up(self, config: Config, log_dir: Path, stops: StopRequests | None) -> None:
        """The next run begins: all are as they would be after a start, but for the engines' weights."""
        self._at_rest.close()
        self.is_new = False
        self.cluster.take_up(config, log_dir, stops)
        self.rollouts.renew(config)
        self.trainers.renew(config)

    def wait_until_up(self) -> None:
        if self.is_new:
            self.trainers.start()
            self.rollouts.wait_until_up()


class Keeper:
    """Lends a crew to one run after another. With `keeps`, that of a run which ended well waits for the next one."""

    def __init__(self, keeps: bool = False) -> None:
        self.keeps = keeps
        self._kept: Crew | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        if self._kept is not None:
            self._kept.close()

    @contextmanager
    def crew(self, config: Config, log_dir: Path, stops: StopRequests | None) -> Iterator[Crew]:
        """One for a run of `config`, its logs in `log_dir`. A crew that has seen an error is ended."""
        crew = self._taken_up(config, log_dir, stops) or Crew(config, log_dir, stops)
        try:
            yield crew
            if self.keeps and can_be_kept(config) and not crew.rollouts.outstanding:
                with told():  # the run has ended well, and its crew is ended below
                    crew.rest()
                    self._kept = crew
        finally:
            if crew is not self._kept:
                crew.close()

    def _taken_up(self, config: Config, log_dir: Path, stops: StopRequests | None) -> Crew | None:
        """The kept crew, where it suits and the hand-over works; else it is ended. What is wrong with the run itself
        comes out again when it starts its own.
        """
        crew, self._kept = self._kept, None
        if crew is None:
            return None
        with ExitStack() as unless_taken:
            unless_taken.callback(crew.close)
            if crew.suits(config):
                with told():
                    crew.take_up(config, log_dir, stops)
                    unless_taken.pop_all()
                    return crew
        return None


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong inside is written to the log, and no more: the run goes on without a kept crew."""
    try:
        yield
    except Exception:
        traceback.print_exc()


def can_be_kept(config: Config) -> bool:
    """After a run of `config`. In ZeRO's stages and in bfloat16 DeepSpeed's hooks hold what they belong to for ever, so
    that a trainer's memory would grow with each run; and on GPUs it has not been tried.
    """
    in_float32 = config.trainer.zero_stage == 0 and config.model.dtype == "float32"
    return config.cluster.device == "cpu" and in_float32


def needs(config: Config) -> dict[str, Any]:
    """What decides which processes a run starts, and what they cannot change any more."""
    rollout = {name: value for name, value in asdict(config.rollout).items() if name not in OF_REQUESTS}
    return {
        "model": config.model, "cluster": config.cluster, "weight_sync": config.weight_sync, "rollout": rollout,
        "num_ranks": config.trainer.num_workers, "at_once": (config.train.max_lag > 0, config.train.streaming),
    }  # fmt: skip
