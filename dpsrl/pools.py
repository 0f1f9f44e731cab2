"""Typed handles to the actors: the controller, the engines, the trainer ranks, and the weights between them.

Each method is a call to every actor of its kind, with a deadline. This file and `cluster.py` are the only ones
that import Ray.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from dpsrl.algo.packing import Update
from dpsrl.cluster import Cluster, StallError
from dpsrl.config import Config
from dpsrl.controller import Controller
from dpsrl.rollout import RolloutWorker
from dpsrl.trainer import TrainerWorker
from dpsrl.types import Rollout, RolloutRequest, UserError

POLL_BUDGET_S = 1.0  # an engine without a finished request reports back after this long
MAX_SYNC_ATTEMPTS = 3


def transfer_backend(config: Config) -> str:
    """The vLLM weight-transfer backend that `weight_sync.backend=auto` stands for."""
    if config.weight_sync.backend != "auto":
        return config.weight_sync.backend
    if config.cluster.device == "cpu":
        return "shared_memory"
    return "nccl" if config.cluster.placement == "split" else "ipc"


class ControllerHandle:
    """The one controller actor; see `controller.Controller` for what each call means."""

    def __init__(self, cluster: Cluster, **arguments: Any) -> None:
        self.cluster = cluster
        self.actor = cluster.start(Controller, "controller", env={}, options={"num_cpus": 0}, **arguments)

    def _call(self, method: Any, *args: Any) -> Any:
        return self.cluster.get({self.actor: method.remote(*args)}, "answer")[0]

    def select(self) -> list[tuple[int, float]]:
        return self._call(self.actor.select)

    def refill(self) -> list[tuple[int, float]]:
        return self._call(self.actor.refill)

    def admit(self, outcomes: list) -> list[bool]:
        return self._call(self.actor.admit, outcomes)

    def observe(self, ahead: bool = False, begun: tuple[int, ...] = ()) -> dict[str, float]:
        return self._call(self.actor.observe, ahead, begun)

    def trained(self) -> list[int]:
        return self._call(self.actor.trained)

    def anchor(self, ids: list[int], num_solved: list[int], num_rollouts: list[int]) -> None:
        self._call(self.actor.anchor, ids, num_solved, num_rollouts)

    def warm_start(self, state: dict[str, Any]) -> int:
        return self._call(self.actor.warm_start, state)

    def occupancy(self) -> dict[str, int]:
        return self._call(self.actor.occupancy)

    def state_dict(self) -> dict[str, Any]:
        return self._call(self.actor.state_dict)


class RolloutPool:
    """Every engine: requests are added at any time and come back in the order they finish."""

    def __init__(self, cluster: Cluster, config: Config, backend: str) -> None:
        self.cluster, self.config, self.backend = cluster, config, backend
        self.outstanding: dict[int, RolloutRequest] = {}
        self.load: dict[Any, int] = {}  # rollouts that each engine has still to make
        self.polls: dict[Any, Any] = {}  # of each engine that has any, one
        self.engines = [self._start(index) for index in range(config.rollout.num_workers)]

    def _start(self, index: int) -> Any:
        threads = str(self.cluster.threads(self.config.rollout.num_workers))
        env = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if self.config.rollout.tensor_parallel == 1 else "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": threads,
        }
        options = self.cluster.engine_options(index)
        return self.cluster.start(RolloutWorker, f"engine-{index}", self.config, self.backend, env=env, options=options)

    def _all(self, what: str, method: str, *args: Any) -> list[Any]:
        calls = {engine: getattr(engine, method).remote(*args) for engine in self.engines}
        return self.cluster.get(calls, what)

    def hosts(self) -> list[str]:
        return self._all("start and name its host", "node_address")

    def policy_versions(self) -> list[int]:
        """Also the wait for the engines to be up."""
        return self._all("start and name its policy version", "policy_version")

    def add(self, requests: Iterable[RolloutRequest]) -> None:
        """Hands each request to the engine with the least work."""
        self.load = {engine: self.load.get(engine, 0) for engine in self.engines}
        shares: dict[Any, list[RolloutRequest]] = {engine: [] for engine in self.engines}
        for request in requests:
            engine = min(self.engines, key=lambda candidate: self.load[candidate])
            shares[engine].append(request)
            self.load[engine] += request.num_rollouts
            self.outstanding[request.request_id] = request
        submitted = {engine: engine.submit.remote(share) for engine, share in shares.items() if share}
        self.cluster.get(submitted, "take prompts")
        for engine in submitted:
            self._poll(engine)

    def _poll(self, engine: Any) -> None:
        if engine not in self.polls.values() and self.load[engine] > 0:
            self.polls[engine.poll.remote(POLL_BUDGET_S)] = engine

    def finished(self) -> list[tuple[RolloutRequest, list[Rollout]]]:
        """Waits for one engine's answer: its finished requests with their rollouts, none where it has none yet."""
        ready, _ = ray.wait(list(self.polls), num_returns=1, timeout=self.config.run.stall_s)
        if not ready:
            silent = ", ".join(self.cluster.actors[engine] for engine in self.polls.values())
            raise StallError(f"no engine answered a poll within {self.config.run.stall_s:.0f} s: {silent}")
        engine = self.polls.pop(ready[0])
        (finished,) = self.cluster.get({engine: ready[0]}, "generate")
        self.load[engine] -= sum(len(rollouts) for _, rollouts in finished)
        self._poll(engine)  # the engine works on while the caller scores
        return [(self.outstanding.pop(request_id), rollouts) for request_id, rollouts in finished]

    def logprobs(self, token_ids: np.ndarray, indices: Iterable[int]) -> dict[int, tuple[int, np.ndarray]]:
        """(policy version, the canary's logprobs) of the engines at `indices`."""
        calls = {self.engines[index]: self.engines[index].logprobs.remote(token_ids) for index in indices}
        return dict(zip(indices, self.cluster.get(calls, "score the canary"), strict=True))

    def checksums(self, indices: Iterable[int]) -> dict[int, dict[str, str]]:
        """Of every tensor that the engines at `indices` compute with, under the trainer's names."""
        calls = {self.engines[index]: self.engines[index].checksums.remote() for index in indices}
        return dict(zip(indices, self.cluster.get(calls, "hash its weights"), strict=True))

    def sleep(self) -> None:
        """Frees the memory of weights and key-value cache."""
        self._all("go to sleep", "sleep")

    def wake(self, part: str) -> None:
        """Takes back the memory of `weights`, then that of the `kv_cache`: both at once would be a peak."""
        self._all("wake up", "wake", part)

    def replace(self, index: int) -> None:
        """A new engine, with the weights of the model folder: it needs a sync before it may serve."""
        self.cluster.kill(self.engines[index])
        self.engines[index] = self._start(index)


class SyncClient:
    """vLLM's weight-sync client, spoken by trainer rank 0 to every engine at once.

    An engine that fails is left out of the rest of the update and listed in `failures`; it keeps its old
    policy version, and whoever ordered the sync replaces it.
    """

    def __init__(self, engines: list[Any], expected: list, deadline_s: float, gpus_per_engine: int) -> None:
        self.engines = dict(enumerate(engines))
        self.expected, self.deadline_s, self.gpus_per_engine = expected, deadline_s, gpus_per_engine
        self.policy_version = 0
        self.failures: dict[int, str] = {}

    def _each(self, calls: dict[int, Any]) -> None:
        for index, call in calls.items():
            try:
                ray.get(call, timeout=self.deadline_s)
            except ray.exceptions.RayError as error:
                self.failures[index] = str(error).strip().splitlines()[-1]
                del self.engines[index]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = {}
        for index, engine in self.engines.items():
            own = dict(init_info)
            if "rank_offset" in own:  # each engine's workers follow the trainer and the engines before
                own["rank_offset"] = 1 + index * self.gpus_per_engine
            calls[index] = engine.init_weight_transfer.remote(own, self.expected)
        self._each(calls)

    def start_weight_update(self) -> None:
        self._each({index: engine.start_weight_update.remote() for index, engine in self.engines.items()})

    def update_weights(self, update_info: Any) -> None:
        self._each({index: engine.update_weights.remote(update_info) for index, engine in self.engines.items()})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self.policy_version
        self._each({index: engine.finish_weight_update.remote(version) for index, engine in self.engines.items()})


class TrainerPool:
    """Every trainer rank; calls go to all of them, as their collectives need."""

    def __init__(self, cluster: Cluster, config: Config, backend: str) -> None:
        self.cluster, self.config, self.backend = cluster, config, backend
        num_ranks = config.trainer.num_workers
        threads = cluster.threads(num_ranks)
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if config.cluster.device == "cpu":
            env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if cluster.local and sys.platform == "linux":
            env["GLOO_SOCKET_IFNAME"] = "lo"
        self.ranks = [
            cluster.start(
                TrainerWorker,
                f"trainer-{rank}",
                config,
                rank,
                threads,
                env=env,
                options=cluster.rank_options(rank),
            )
            for rank in range(num_ranks)
        ]

    def _all(self, what: str, method: str, *args: Any) -> list[Any]:
        return self.cluster.get({rank: getattr(rank, method).remote(*args) for rank in self.ranks}, what)

    def start(self) -> None:
        """Loads the model on every rank, once rank 0 has named where the others meet it."""
        first = self.ranks[0]
        host = "127.0.0.1" if self.cluster.local else self.cluster.get({first: first.node_address.remote()}, "start")[0]
        (port,) = self.cluster.get({first: first.free_port.remote()}, "start")
        self._all("start", "start", host, port)

    def hosts(self) -> list[str]:
        return self._all("name its host", "node_address")

    def connect(self, rollouts: RolloutPool) -> None:
        (expected, *_) = self._all("list its weights", "weight_metas")
        self.num_weight_bytes = sum(meta.num_bytes for meta in expected)
        width = self.config.rollout.tensor_parallel
        client = SyncClient(rollouts.engines, expected, self.config.run.stall_s, width)
        self._all("connect to the engines", "connect", client, self.backend, len(rollouts.engines) * width)

    def send_weights(self, policy_version: int) -> dict[int, str]:
        """Sends to every engine; the failures by engine index."""
        return self._all("send its weights", "send_weights", policy_version)[0]

    def begin(self, updates: list[Update]) -> dict[Any, Any]:
        """Starts a step's updates; `finish` waits for them."""
        return {
            rank: rank.train_step.remote([(u.ranks[index], u.total_weight, u.trained_weight) for u in updates])
            for index, rank in enumerate(self.ranks)
        }

    def running(self, calls: dict[Any, Any]) -> bool:
        return bool(ray.wait(list(calls.values()), num_returns=len(calls), timeout=0)[1])

    def finish(self, calls: dict[Any, Any]) -> dict[str, float]:
        """Metrics of the step's updates."""
        return self.cluster.get(calls, "train")[0]

    def accumulate(self, update: Update) -> dict[Any, Any]:
        """Starts on a part of an update that `begin_update` will end."""
        return {rank: rank.accumulate.remote(update.ranks[index]) for index, rank in enumerate(self.ranks)}

    def begin_update(self, total_weight: float, trained_weight: float) -> dict[Any, Any]:
        """Starts the optimizer's step on what was accumulated; `finish` waits for it."""
        for rank in self.ranks:
            rank.update.remote(total_weight, trained_weight)
        return {rank: rank.finish_step.remote(1) for rank in self.ranks}

    def reference_log_ratios(self, update: Update) -> np.ndarray:
        """float64, for each rollout that is laid out, sum over its tokens of log p_engine - log p_reference."""
        calls = {rank: rank.reference_log_ratios.remote(update.ranks[index]) for index, rank in enumerate(self.ranks)}
        ratios = {i: ratio for part in self.cluster.get(calls, "score the reference") for i, ratio in part.items()}
        return np.array([ratios[i] for i in range(len(ratios))])

    def begin_logprobs(self, token_ids: np.ndarray) -> dict[Any, Any]:
        """Starts scoring a sequence; rank 0's answer is the policy's."""
        return {rank: rank.logprobs.remote(token_ids) for rank in self.ranks}

    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        return self.cluster.get(self.begin_logprobs(token_ids), "score the canary")[0]

    def checksums(self) -> dict[str, str]:
        """Of every tensor, as it is sent."""
        return self._all("hash its weights", "checksums")[0]

    def sleep(self) -> None:
        """Moves the optimizer's state to the host, for the engines' turn."""
        self._all("go to sleep", "sleep")

    def wake(self) -> None:
        self._all("wake up", "wake")

    def save_model(self, folder: Path) -> None:
        self._all("save the model", "save_model", str(folder))


class Weights:
    """Owns the policy version, the proof after each sync that both ends hold the same weights, and whose turn it is.

    The proof is a canary: one fixed token sequence, whose logprobs both ends compute; with weight_sync.checksum, a hash
    of every tensor too. An engine that failed its update, reports another version or disagrees is replaced, never
    served from. Where engines and trainer share GPUs, the one side's memory is free while it is the other's turn.
    """

    def __init__(
        self,
        trainers: TrainerPool,
        rollouts: RolloutPool,
        config: Config,
        canary: np.ndarray,
        say: Callable[[str], None] = print,
    ) -> None:
        self.trainers, self.rollouts, self.config, self.canary, self.say = trainers, rollouts, config, canary, say
        self.policy_version = 0
        self.num_replaced = 0
        self.take_turns = config.cluster.placement == "colocate"
        self._check_hosts()
        trainers.connect(rollouts)

    def _check_hosts(self) -> None:
        if transfer_backend(self.config) == "shared_memory":
            hosts = sorted({*self.trainers.hosts(), *self.rollouts.hosts()})
            if len(hosts) > 1:
                raise UserError(
                    f"weights travel by shared memory, and the run is spread over {', '.join(hosts)}: "
                    "use one machine, or GPUs"
                )

    def check(self, failures: dict[int, str]) -> tuple[float, dict[int, str]]:
        """Largest canary difference in nats among sound engines, and why the others are not."""
        faults, worst = dict(failures), 0.0
        expected = self.trainers.begin_logprobs(self.canary)  # both ends compute at the same time
        sound = [index for index in range(len(self.rollouts.engines)) if index not in faults]
        answers = self.rollouts.logprobs(self.canary, sound)
        reference = self.trainers.cluster.get(expected, "score the canary")[0]
        for index, (version, logprobs) in answers.items():
            difference = float(np.abs(logprobs - reference).mean())
            if version != self.policy_version:
                faults[index] = f"reports policy version {version}, not {self.policy_version}"
            elif difference <= self.config.weight_sync.canary_tolerance:
                worst = max(worst, difference)
            else:
                faults[index] = f"differs from the trainer by {difference:.4f} nats on the canary"
        if self.config.weight_sync.checksum:
            faults |= self._compare_checksums([index for index in sound if index not in faults])
        return worst, faults

    def _compare_checksums(self, indices: list[int]) -> dict[int, str]:
        faults, sent = {}, self.trainers.checksums()
        for index, held in self.rollouts.checksums(indices).items():
            if other := [name for name, checksum in sent.items() if held.get(name) != checksum]:
                faults[index] = f"holds other weights than the trainer in {len(other)} tensors, the first is {other[0]}"
        return faults

    def verify_start(self) -> None:
        """Raises unless every engine has loaded the same weights as the trainer."""
        _, faults = self.check({})
        if faults:
            raise RuntimeError(f"engines and trainer differ before the first step: {faults}")
        if self.take_turns:
            self.trainers.sleep()

    def begin_training(self) -> None:
        """The trainer's turn, until `send`."""
        if self.take_turns:
            self.rollouts.sleep()
            self.trainers.wake()

    def send(self, policy_version: int) -> dict[str, float]:
        """Metrics of the sync, after the trainer's weights have become `policy_version` on every engine."""
        self.policy_version = policy_version
        for _ in range(MAX_SYNC_ATTEMPTS):
            if self.take_turns:
                self.rollouts.wake("weights")
            started = time.monotonic()
            failures = self.trainers.send_weights(policy_version)
            elapsed_s = time.monotonic() - started
            if self.take_turns:  # the canary needs the key-value cache
                self.trainers.sleep()
                self.rollouts.wake("kv_cache")
            worst, faults = self.check(failures)
            if not faults:
                rate = self.trainers.num_weight_bytes * len(self.rollouts.engines) / elapsed_s / 1e9
                return {"sync/canary_diff": worst, "sync/gb_per_s": rate}
            for index, fault in faults.items():
                self.say(f"engine-{index} {fault}: replacing it")
                self.rollouts.replace(index)
                self.num_replaced += 1
            self.trainers.connect(self.rollouts)
        raise RuntimeError(f"weight sync to version {policy_version} failed {MAX_SYNC_ATTEMPTS} times: {faults}")
