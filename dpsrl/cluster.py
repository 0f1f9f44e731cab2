"""The Ray session: its start, the place of every actor, their output, waits with a deadline.

Every wait (`run.stall_s`, `run.start_s`) names whom it waits for. A local cluster starts here and ends with the run.
What the actors are asked to do is in `pools.py`.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from dpsrl.config import Config
from dpsrl.guard import Guard, children
from dpsrl.machine import num_cores
from dpsrl.resources import check_resources, resource_plan
from dpsrl.screen import output_to
from dpsrl.stops import StopRequests
from dpsrl.types import StateLost, UserError
from dpsrl.watchdog import Watchdog

RAY_ATTEMPTS = 3
SLICE_S = 1.0  # how long a wait goes on before Ctrl-C and deadlines are looked at
PEERS_FAIL_WITHIN_S = 5.0  # after one party's error, to learn whether another's death is behind it
STACKS_WITHIN_S = 2.0
HANDS_OVER_WITHIN_S = 60.0  # for a process that rests to open the next run's log
SIGNALS_WITHIN_S = 15.0  # for a process on another machine to start and to send them

# --- the cluster --------------------------------------------------------------------------------------


class StallError(RuntimeError):
    """The run cannot go on, because others did not do their part; the message names them."""


class PartyLost(StallError):
    """A process did not answer in time, or died; the message names it and its log.

    actors: those that were lost; why: the message without their names.
    """

    def __init__(self, sentence: str, actors: Iterable[Any], why: str = "") -> None:
        super().__init__(sentence)
        self.actors, self.why = list(actors), why or sentence


class Cluster:
    """Owns the Ray session and the actors started in it. Leaving the context ends them all."""

    def __init__(
        self, config: Config, log_dir: Path, with_trainer: bool = True, stops: StopRequests | None = None
    ) -> None:
        """stops: where the run notes SIGTERM; without it the first one is a Ctrl-C."""
        self.config, self.log_dir = config, log_dir.absolute()
        self.local = not config.cluster.address
        self.actors: dict[Any, str] = {}
        self._processes: dict[Any, Any] = {}  # by actor, a call that answers (node, process id)
        self.placement: PlacementGroup | None = None
        self.plan = resource_plan(config, with_trainer)
        self.watchdog = Watchdog(watchdog_limit_s(config), self._end_processes)
        if self.local:
            _need_token()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's default of 15 lets any other program on a laptop take the cores that two threads wait for each other on.
        os.environ.setdefault("RAY_worker_niceness", "0")
        num_cpus = max(num_cores(), self.plan.total["CPU"])
        local = {"num_cpus": num_cpus, "include_dashboard": False} if self.local else {}
        with ExitStack() as started:
            self.guard = started.enter_context(Guard())
            self.stops = stops or started.enter_context(StopRequests(patience=0))
            with _whole_start(), _deaf_to_sigterm():
                _start_ray(self.guard, address=config.cluster.address or "local", **local)
                self.stops.listen()
            self._interrupts = _remembered_interrupts(started)
            started.enter_context(self.watchdog)
            started.callback(ray.shutdown)
            if not self.local:
                machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
                machines = [{kind: int(amounts.get(kind, 0)) for kind in ("GPU", "CPU")} for amounts in machines]
                check_resources(self.plan, machines, f"the cluster {config.cluster.address}")
            self._reserve()
            self._stack = started.pop_all()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self._stack.close()

    def take_up(self, config: Config, log_dir: Path, stops: StopRequests | None) -> None:
        """Serves another run from here on, whose processes would be the same."""
        self.config, self.log_dir = config, log_dir.absolute()
        self.stops = stops or self.stops
        self._interrupts.clear()
        self.watchdog.limit_s = watchdog_limit_s(config)
        calls = {actor: actor.log_to.remote(self._log_of(name)) for actor, name in self.actors.items()}
        self.get(calls, "open its log", HANDS_OVER_WITHIN_S)

    def _log_of(self, name: str) -> str:
        return str(self.log_dir / f"{name}.log")

    def _end_processes(self) -> None:
        """For the watchdog of a driver that hangs, perhaps in Ray: those on this machine. Ray ends the others."""
        self.write_stacks(elsewhere=False)
        self._signal(signal.SIGKILL, self._places(), elsewhere=False)

    def start(
        self, cls: type, name: str, *args: Any, env: dict[str, str], options: dict[str, Any], **kwargs: Any
    ) -> Any:
        """An actor of `cls(*args, **kwargs)`, its output in logs/<name>.log. `options` are Ray's."""
        actor_cls = ray.remote(_logged(cls, self._log_of(name)))
        env_vars = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env
        if self.config.cluster.device == "gpu" and self.config.model.dtype == "bfloat16":
            # Logits are float32 products of bfloat16 values, which TF32 holds exactly: tensor cores compute them.
            env_vars["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"
        actor = actor_cls.options(runtime_env={"env_vars": env_vars}, **options).remote(*args, **kwargs)
        self.actors[actor] = name
        self._processes[actor] = actor.process.remote()
        return actor

    def kill(self, actor: Any) -> None:
        place = {known: where for known, where in self._places().items() if known == actor}
        ray.kill(actor)
        self._signal(signal.SIGKILL, place)  # a process that is stopped does not hear Ray
        del self.actors[actor], self._processes[actor]

    # --- waits --------------------------------------------------------------------------------------

    def get(self, calls: dict[Any, Any], what: str, deadline_s: float | None = None) -> list[Any]:
        """Results of `{actor: reference}`, in order. PartyLost names those that died or kept silent.

        deadline_s: run.stall_s where it is not given.
        """
        deadline_s = deadline_s or self.config.run.stall_s
        actor_of = {call: actor for actor, call in calls.items()}
        results: dict[Any, Any] = {}
        started_s = self.watchdog.awake_s
        while len(results) < len(calls):
            left = {call: actor for call, actor in actor_of.items() if call not in results}
            for call in self.ready(list(left), started_s + deadline_s):
                results[call] = self._result(call, left, what)
            silent = [actor for call, actor in left.items() if call not in results]
            if silent and self.watchdog.awake_s > started_s + deadline_s:
                self._lost(silent, f"did not {what} within {deadline_s:.0f} s")
        return [results[call] for call in calls.values()]

    def ready(self, calls: list[Any], until_s: float) -> list[Any]:
        """The calls that have ended, once there is one; none when the watchdog's `awake_s` passes `until_s`."""
        while True:
            if self._interrupts:
                raise KeyboardInterrupt
            self.watchdog.beat()
            self.guard.check()
            if ray.wait(calls, num_returns=1, timeout=SLICE_S)[0]:
                return ray.wait(calls, num_returns=len(calls), timeout=0)[0]
            if self.watchdog.awake_s > until_s:
                return []

    def _result(self, call: Any, actor_of: dict[Any, Any], what: str) -> Any:
        """What the call returned. Where it failed, and another party's death may be why, that one is named."""
        try:
            return ray.get(call)
        except ray.exceptions.RayActorError as error:  # its process ended, or cannot be reached
            self._lost([actor_of[call]], f"died while it should {what}{_own_error(error)}")
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            if isinstance(error.cause, StateLost):
                raise PartyLost(f"{self.actors[actor_of[call]]}: {error.cause}", [actor_of[call]]) from error
            calls = list(actor_of)
            ended, _ = ray.wait(calls, num_returns=len(calls), timeout=PEERS_FAIL_WITHIN_S)
            if dead := [actor_of[other] for other in ended if _died(other)]:
                self._lost(dead, f"died while it should {what}")
            raise

    def _lost(self, actors: list[Any], why: str) -> None:
        """Raises PartyLost, once the stacks of all parties are in their logs."""
        self.write_stacks()
        names = [self.actors[actor] for actor in actors]
        logs = "its log is" if len(names) == 1 else "their logs are"
        files = ", ".join(map(self._log_of, names))
        why = f"{why}; {logs} {files}"
        raise PartyLost(f"{', '.join(names)} {why}", actors, why)

    # --- processes ----------------------------------------------------------------------------------

    def processes(self) -> dict[str, int]:
        """Process ids on this machine, by party."""
        here = ray.get_runtime_context().get_node_id()
        return {self.actors[actor]: process for actor, (node, process) in self._places().items() if node == here}

    def _places(self) -> dict[Any, tuple[str, int]]:
        """Node and process id of the actors that have started."""
        if not ray.is_initialized():
            return {}
        started = {a: call for a, call in self._processes.items() if ray.wait([call], timeout=0)[0]}
        return {actor: ray.get(call, timeout=SLICE_S) for actor, call in started.items() if not _died(call)}

    def _signal(self, number: int, places: dict[Any, tuple[str, int]], elsewhere: bool = True) -> None:
        """Signals processes, on other machines by a task of Ray's there."""
        here, calls = ray.get_runtime_context().get_node_id() if places else "", []
        for node, process in places.values():
            if node == here:
                _signal_here(process, number)
            elif elsewhere:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                task = ray.remote(_signal_here).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
                calls.append(task.remote(process, number))
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=SIGNALS_WITHIN_S)

    def write_stacks(self, elsewhere: bool = True) -> None:
        """Has every process write what each of its threads does into its log."""
        self._signal(signal.SIGUSR1, self._places(), elsewhere)
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(STACKS_WITHIN_S)

    def threads(self, num_workers: int) -> int:
        """CPU threads of each of `num_workers` that compute at the same time."""
        cores = num_cores()
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


def watchdog_limit_s(config: Config) -> float:
    """Seconds that the driver may take between two looks at its waits: longer than any of them has."""
    return 2 * max(config.run.stall_s, config.run.start_s) + 60


def _start_ray(guard: Guard, **options: Any) -> None:
    """Tries again where Ray gives up on a busy machine, after half a minute. The guard follows what it starts."""
    before = children(os.getpid())
    for attempt in range(1, RAY_ATTEMPTS + 1):
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
            return
        except Exception as error:  # its own kinds differ by what was late, down to a bare Exception
            ray.shutdown()
            if attempt == RAY_ATTEMPTS:
                raise StallError(f"Ray did not start: {str(error).strip().splitlines()[0]}") from error
        finally:
            guard.follow(children(os.getpid()) - before)


def _need_token() -> None:
    """Sees to it that a token guards a cluster of our own; one that Ray 2.60 makes could be read by all users."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise UserError(
            f"RAY_AUTH_MODE={mode} would let anyone who reaches this machine run code in the run's processes: unset it"
        )
    file = Path.home() / ".ray/auth_token"
    with suppress(OSError):  # its folder is not ours to change
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
                new.write(secrets.token_hex(32))
        file.chmod(0o600)


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


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Processes started here, and those that they start, do not hear SIGTERM.

    A scheduler sends it to all processes of a job at once: the driver needs the others to save, and ends them then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


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
        log: int | None = None  # descriptor

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.log_to(path)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            super().__init__(*args, **kwargs)

        def log_to(self, path: str) -> None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            log = output_to(path)
            faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
            if self.log is not None:
                os.close(self.log)
            self.log = log

        def node_address(self) -> str:
            return ray.util.get_node_ip_address()

        def process(self) -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), os.getpid()

    Logged.__name__ = Logged.__qualname__ = cls.__name__  # Ray tells actor classes apart by these
    return Logged


def _died(call: Any) -> bool:
    try:
        ray.get(call, timeout=0)
    except ray.exceptions.RayActorError:
        return True
    except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError):
        return False
    return False


def _own_error(error: ray.exceptions.RayActorError) -> str:
    """What an actor raised while it was made, which Ray has only as text: ` (ModuleNotFoundError: ...)`."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f" ({lines[-1].strip()})" if "creation task" in str(error) and len(lines) > 1 else ""


def _signal_here(process: int, number: int) -> None:
    """Signals one of Ray's workers; not whatever else may have its number by now."""
    try:
        if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(process, number)
    except (FileNotFoundError, ProcessLookupError):
        pass
