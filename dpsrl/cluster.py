"""The Ray session: its start, the place of every actor, their output, waits with a deadline.

Every wait (`run.stall_s`) names whom it waits for. A local cluster starts here and ends with the run. What the
actors are asked to do is in `pools.py`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dpsrl.config import Config
from dpsrl.resources import check_resources, resource_plan

# --- the cluster --------------------------------------------------------------------------------------


class StallError(RuntimeError):
    """A party did not answer in time, or died; the message names it and its log."""


class Cluster:
    """Owns the Ray session and the actors started in it. Leaving the context ends them all."""

    def __init__(self, config: Config, log_dir: Path, with_trainer: bool = True) -> None:
        self.config, self.log_dir = config, log_dir.absolute()
        self.local = not config.cluster.address
        self.actors: dict[Any, str] = {}
        self.placement: PlacementGroup | None = None
        self._stack = ExitStack()
        self.plan = resource_plan(config, with_trainer)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's default of 15 lets any other program on a laptop take the cores that two threads wait for each other on.
        os.environ.setdefault("RAY_worker_niceness", "0")
        num_cpus = max(os.cpu_count() or 1, self.plan.total["CPU"])
        local = {"num_cpus": num_cpus, "include_dashboard": False} if self.local else {}
        with _whole_start():
            ray.init(address=config.cluster.address or "local", log_to_driver=False, logging_level="ERROR", **local)
        self._interrupts = _remembered_interrupts(self._stack)
        if not self.local:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            machines = [{kind: int(amounts.get(kind, 0)) for kind in ("GPU", "CPU")} for amounts in machines]
            check_resources(self.plan, machines, f"the cluster {config.cluster.address}")
        self._reserve()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for actor in self.actors:
            ray.kill(actor)
        ray.shutdown()

    def start(
        self, cls: type, name: str, *args: Any, env: dict[str, str], options: dict[str, Any], **kwargs: Any
    ) -> Any:
        """An actor of `cls(*args, **kwargs)`, its output in logs/<name>.log. `options` are Ray's."""
        actor_cls = ray.remote(_logged(cls, str(self.log_dir / f"{name}.log")))
        env_vars = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env
        actor = actor_cls.options(runtime_env={"env_vars": env_vars}, **options).remote(*args, **kwargs)
        self.actors[actor] = name
        return actor

    def kill(self, actor: Any) -> None:
        ray.kill(actor)
        del self.actors[actor]

    def get(self, calls: dict[Any, Any], what: str) -> list[Any]:
        """Results of `{actor: reference}`, in order; StallError names the one that failed or kept silent."""
        results = []
        for actor, call in calls.items():
            if self._interrupts:
                raise KeyboardInterrupt
            name = self.actors[actor]
            try:
                results.append(ray.get(call, timeout=self.config.run.stall_s))
            except ray.exceptions.GetTimeoutError:
                raise StallError(
                    f"{name} did not {what} within {self.config.run.stall_s:.0f} s; {self._log(name)}"
                ) from None
            except ray.exceptions.ActorDiedError as error:
                raise StallError(f"{name} died while it should {what}; {self._log(name)}") from error
        return results

    def _log(self, name: str) -> str:
        return f"its log is {self.log_dir / name}.log"

    def threads(self, num_workers: int) -> int:
        """CPU threads of each of `num_workers` that compute at the same time."""
        cores = os.cpu_count() or 1
        if self.config.train.max_lag or self.config.train.streaming:  # engines and trainer compute at the same time
            num_workers = self.plan.num_engines + self.plan.num_ranks
        wanted = self.config.cluster.cpus_per_worker
        return max(1, min(wanted, cores // num_workers)) if self.config.cluster.device == "cpu" else wanted

    def _reserve(self) -> None:
        """One placement group for the whole run: it starts complete or not at all."""
        self.placement = placement_group(self.plan.bundles, strategy="PACK")
        if not self.placement.wait(timeout_seconds=self.config.run.stall_s):
            raise StallError(
                f"Ray did not place {self.plan.words} within {self.config.run.stall_s:.0f} s: "
                "others may hold its machines"
            )

    def engine_options(self, index: int) -> dict[str, Any]:
        """Ray's options of engine `index`."""
        return self._options(self.plan.engine_bundle(index))

    def rank_options(self, index: int) -> dict[str, Any]:
        return self._options(self.plan.rank_bundle(index))

    def _options(self, place: int) -> dict[str, Any]:
        """A bundle's place, and all of it, or half where two share it."""
        amounts = self.plan.bundles[place]
        parts = 2 if self.plan.shared else 1
        strategy = PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=place)
        options = {"num_cpus": amounts["CPU"] // parts, "scheduling_strategy": strategy}
        return options | ({"num_gpus": amounts["GPU"] / parts} if amounts["GPU"] else {})


@contextmanager
def _whole_start() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: half a Ray session would be left with no one to end it."""
    interrupts: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number)) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
        if interrupts:
            ray.shutdown()
            raise KeyboardInterrupt


def _remembered_interrupts(stack: ExitStack) -> list[int]:
    """Fills when Ctrl-C comes, besides raising KeyboardInterrupt, until `stack` is closed.

    Python drops an exception that is raised while a destructor or a callback runs, so that a Ctrl-C can get lost.
    """
    interrupts: list[int] = []

    def remember(number: int, _: Any) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, remember))
    return interrupts


def _logged(cls: type, path: str) -> type:
    """`cls` with its process's output in a file, whatever library writes it."""

    class Logged(cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            super().__init__(*args, **kwargs)

        def node_address(self) -> str:
            return ray.util.get_node_ip_address()

    Logged.__name__ = Logged.__qualname__ = cls.__name__  # Ray tells actor classes apart by these
    return Logged
