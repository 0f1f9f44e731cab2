"""Typed handles to the actors: the controller, the engines, the trainer ranks, and the weights between them.

Each method is a call to every actor of its kind, with a deadline. This file and `cluster.py` are the only ones
that import Ray.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import ray

from dpsrl.algo.packing import Update
from dpsrl.cluster import Cluster, PartyLost, StallError
from dpsrl.config import Config
from dpsrl.controller import Controller
from dpsrl.rollout import RolloutWorker
from dpsrl.types import Rollout, RolloutRequest, Sent

POLL_BUDGET_S = 1.0  # an engine without a finished request reports back after this long
MAX_LOST = 4  # times that each engine may be lost without a finished group in between


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

    def came_back(self, outcomes: list) -> tuple[list[bool], list[bool], list[tuple[int, float]]]:
        return self._call(self.actor.came_back, outcomes)

    def observe(self, ahead: bool = False, begun: tuple[int, ...] = ()) -> dict[str, float]:
        return self._call(self.actor.observe, ahead, begun)

    def trained(self) -> list[int]:
        return self._call(self.actor.trained)

    def anchor(self, ids: Any, num_solved: Any, num_rollouts: Any) -> None:
        self._call(self.actor.anchor, ids, num_solved, num_rollouts)

    def warm_start(self, state: dict[str, Any]) -> int:
        return self._call(self.actor.warm_start, state)

    def occupancy(self) -> dict[str, int]:
        return self._call(self.actor.occupancy)

    def state_dict(self) -> dict[str, Any]:
        return self._call(self.actor.state_dict)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._call(self.actor.load_state_dict, state)


class RolloutPool:
    """Every engine: requests are added at any time and come back in the order they finish.

    An engine that dies, fails or keeps silent is handed to `on_lost`, which must put another in its place; what it was
    working on is then sampled again. So no request is lost, and none counts twice.
    """

    def __init__(self, cluster: Cluster, config: Config, backend: str) -> None:
        self.cluster, self.config, self.backend = cluster, config, backend
        self.outstanding: dict[int, RolloutRequest] = {}
        self.load: dict[Any, int] = {}  # rollouts that each engine has still to make
        self.polls: dict[Any, Any] = {}  # of each engine that has any, one
        self.on_lost: Callable[[dict[int, str]], None] = self.replace_all
        self._holders: dict[int, Any] = {}  # of each outstanding request, the engine
        self._submitted: dict[Any, list[Any]] = {}  # calls that have handed over requests, by engine
        self._heard_s: dict[Any, float] = {}  # when each engine last answered or was given work
        self._num_lost = 0  # since the last finished group
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
        if self.cluster.local:  # vLLM leaves a file behind at each start; what torch compiles there is to stay
            compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{gettempdir()}/torchinductor_{os.getuid()}")
            env |= {"TMPDIR": self.cluster.guard.folder, "TORCHINDUCTOR_CACHE_DIR": compiled}
        options = self.cluster.engine_options(index)
        return self.cluster.start(RolloutWorker, f"engine-{index}", self.config, self.backend, env=env, options=options)

    def _all(self, what: str, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        calls = {engine: getattr(engine, method).remote(*args) for engine in self.engines}
        return self.cluster.get(calls, what, deadline_s)

    def wait_until_up(self) -> None:
        self._all("start", "policy_version", deadline_s=self.config.run.start_s)

    def renew(self, config: Config) -> None:
        """For another run: its engines would start like these, and nothing is left to be done."""
        assert not self.outstanding
        self.config, self.on_lost, self._num_lost = config, self.replace_all, 0

    def hosts(self) -> list[str]:
        return self._all("name its host", "node_address")

    def policy_versions(self) -> list[int]:
        return self._all("name its policy version", "policy_version")

    def add(self, requests: Iterable[RolloutRequest]) -> None:
        """Hands each request to the engine with the least work."""
        self.load = {engine: self.load.get(engine, 0) for engine in self.engines}
        shares: dict[Any, list[RolloutRequest]] = {engine: [] for engine in self.engines}
        for request in requests:
            engine = min(self.engines, key=lambda candidate: self.load[candidate])
            shares[engine].append(request)
            self.load[engine] += request.num_rollouts
            self.outstanding[request.request_id], self._holders[request.request_id] = request, engine
        for engine, share in shares.items():
            if share:
                self._submitted.setdefault(engine, []).append(engine.submit.remote(share))
                self._poll(engine)

    def _poll(self, engine: Any) -> None:
        if engine not in self.polls.values() and self.load[engine] > 0:
            self._heard_s[engine] = self.cluster.watchdog.awake_s
            self.polls[engine.poll.remote(POLL_BUDGET_S)] = engine

    def finished(self) -> list[tuple[RolloutRequest, list[Rollout]]]:
        """Waits for one engine's answer: its finished requests with their rollouts, none where it has none yet."""
        stall_s = self.config.run.stall_s
        until_s = min(self._heard_s[engine] for engine in self.polls.values()) + stall_s
        ended = self.cluster.ready(list(self.polls), until_s)
        overdue_s = self.cluster.watchdog.awake_s - stall_s
        silent = [e for call, e in self.polls.items() if call not in ended and self._heard_s[e] <= overdue_s]
        if silent:
            self._lose({engine: f"kept silent for {stall_s:.0f} s" for engine in silent})
            return []
        if not ended:
            return []
        engine = self.polls.pop(ended[0])
        try:
            for call in [*self._submitted.pop(engine, []), ended[0]]:
                (finished,) = self.cluster.get({engine: call}, "generate")
        except PartyLost as lost:
            self._lose({engine: lost.why})
            return []
        except ray.exceptions.RayTaskError as error:
            self._lose({engine: f"failed: {str(error).strip().splitlines()[-1]}"})
            return []
        if finished:
            self._num_lost = 0
        self.load[engine] -= sum(len(rollouts) for _, rollouts in finished)
        self._poll(engine)  # the engine works on while the caller scores
        for request_id, _ in finished:
            del self._holders[request_id]
        return [(self.outstanding.pop(request_id), rollouts) for request_id, rollouts in finished]

    def _lose(self, why: dict[Any, str]) -> None:
        """Has the engines replaced, and what they were working on sampled again."""
        self._num_lost += len(why)
        if self._num_lost > MAX_LOST * len(self.engines):
            raise StallError(f"engines were lost {self._num_lost} times without a finished group: {why}")
        self.on_lost({self.engines.index(engine): reason for engine, reason in why.items()})
        self.resubmit()

    def resubmit(self) -> None:
        """Has what replaced engines were working on sampled again; they need the current weights before."""
        self.add([self.outstanding[i] for i, engine in self._holders.items() if engine not in self.engines])

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

    def replace_all(self, lost: dict[int, str]) -> None:
        """New engines, with the weights of the model folder: they need a sync before they may serve a later policy."""
        for index in lost:
            old = self.engines[index]
            self.polls = {call: engine for call, engine in self.polls.items() if engine != old}
            for kept in (self.load, self._submitted, self._heard_s):
                kept.pop(old, None)
            self.cluster.kill(old)
            self.engines[index] = self._start(index)
        self.wait_until_up()


class SyncClient:
    """vLLM's weight-sync client, spoken by trainer rank 0 to every engine at once.

    An engine works its calls off in order, so that only the last needs to be waited for, and whatever must outlive a
    call. One that fails is left out of the rest of the update and listed in `failures`; it keeps its old policy
    version, and whoever ordered the sync replaces it.
    """

    def __init__(self, engines: list[Any], expected: list, deadline_s: float, gpus_per_engine: int) -> None:
        self.engines = dict(enumerate(engines))
        self.expected, self.deadline_s, self.gpus_per_engine = expected, deadline_s, gpus_per_engine
        self.policy_version = 0
        self.canary: np.ndarray | None = None
        self.failures: dict[int, str] = {}
        self.answers: dict[int, tuple[int, np.ndarray]] = {}  # of the last update: policy version, canary's logprobs
        self._pending: list[dict[int, Any]] = []
        self._open: list[Any] = []  # files that pending calls read

    def _submit(self, method: str, *args: Any) -> None:
        self._pending.append({index: getattr(engine, method).remote(*args) for index, engine in self.engines.items()})

    def _wait(self) -> dict[int, Any]:
        """Results of the last call submitted, by engine. One deadline for them all."""
        results: dict[int, Any] = {}
        end = time.monotonic() + self.deadline_s
        for calls in self._pending:
            results = {}
            for index, call in calls.items():
                if index not in self.engines:
                    continue
                try:
                    results[index] = ray.get(call, timeout=max(0.01, end - time.monotonic()))
                except ray.exceptions.GetTimeoutError:
                    self.failures[index] = f"did not take weights within {self.deadline_s:.0f} s"
                    del self.engines[index]
                except ray.exceptions.RayActorError:
                    self.failures[index] = "died while it should take weights"
                    del self.engines[index]
                except ray.exceptions.RayError as error:
                    self.failures[index] = str(error).strip().splitlines()[-1]
                    del self.engines[index]
        self._pending = []
        while self._open:
            self._open.pop().close()
        return results

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = {}
        for index, engine in self.engines.items():
            own = dict(init_info)
            if "rank_offset" in own:  # each engine's workers follow the trainer and the engines before
                own["rank_offset"] = 1 + index * self.gpus_per_engine
            calls[index] = engine.init_weight_transfer.remote(own, self.expected)
        self._pending.append(calls)
        self._wait()

    def start_weight_update(self) -> None:
        self._submit("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._submit("update_weights", update_info)
        self._wait()

    def update_from(self, file: Any, update_info: Any) -> None:
        """Like `update_weights`, and goes on: the file is closed once the engines have read it.

        That is before the next bucket, so that there are never more than two in memory.
        """
        self._wait()
        self._submit("update_weights", update_info)
        self._open.append(file)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._submit("finish_weight_update", self.policy_version, self.canary)

    def wait(self) -> None:
        """Until every engine has finished, or is listed in `failures`."""
        self.answers = self._wait()


class TrainerPool:
    """Every trainer rank; calls go to all of them, as their collectives need."""

    def __init__(self, cluster: Cluster, config: Config, backend: str) -> None:
        from dpsrl.trainer import TrainerWorker  # torch takes seconds; a mistake in the configuration is told before

        self.cluster, self.config, self.backend = cluster, config, backend
        self.under_way: dict[Any, Any] = {}  # calls of the updates that were begun and that nobody has waited for
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

    def _all(self, what: str, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        return self.cluster.get({rank: getattr(rank, method).remote(*args) for rank in self.ranks}, what, deadline_s)

    def start(self) -> None:
        """Loads the model on every rank, once it is known where they meet."""
        self._all("start", "start", self._meeting(), deadline_s=self.config.run.start_s)

    def renew(self, config: Config) -> None:
        """For another run, whose ranks would be as many: each has the model anew, as after `start`."""
        self.config = config
        self._all("load the model anew", "renew", config, deadline_s=config.run.start_s)

    def _meeting(self) -> str:
        """For torch: a file that only this user can open, since its TCP store listens to everyone; or rank 0's port."""
        if self.cluster.local:
            return f"file://{self.cluster.guard.folder}/trainers"
        first, start_s = self.ranks[0], self.config.run.start_s
        (host,) = self.cluster.get({first: first.node_address.remote()}, "start", start_s)
        (port,) = self.cluster.get({first: first.free_port.remote()}, "start", start_s)
        return f"tcp://{host}:{port}"

    def hosts(self) -> list[str]:
        return self._all("name its host", "node_address")

    def connect(self, rollouts: RolloutPool) -> None:
        # Its first use of vLLM, which takes seconds to load.
        (expected, *_) = self._all("list its weights", "weight_metas", deadline_s=self.config.run.start_s)
        self.num_weight_bytes = sum(meta.num_bytes for meta in expected)
        width = self.config.rollout.tensor_parallel
        client = SyncClient(rollouts.engines, expected, self.config.run.stall_s, width)
        num_gpus = len(rollouts.engines) * width
        deadline_s = 3 * self.config.run.stall_s
        self._all("connect to the engines", "connect", client, self.backend, num_gpus, deadline_s=deadline_s)

    def send_weights(self, policy_version: int, canary: np.ndarray | None) -> Sent:
        """Sends to every engine, which score the canary then, where one is given, as the trainer does."""
        # An engine that keeps silent is left out after run.stall_s, by the rank that sends.
        deadline_s = 3 * self.config.run.stall_s
        return self._all("send its weights", "send_weights", policy_version, canary, deadline_s=deadline_s)[0]

    def begin(self, updates: list[Update]) -> dict[Any, Any]:
        """Starts a step's updates; `finish` waits for them."""
        self.under_way = {
            rank: rank.train_step.remote([(u.ranks[index], u.total_weight, u.trained_weight) for u in updates])
            for index, rank in enumerate(self.ranks)
        }
        return self.under_way

    def running(self, calls: dict[Any, Any]) -> bool:
        return bool(ray.wait(list(calls.values()), num_returns=len(calls), timeout=0)[1])

    def finish(self, calls: dict[Any, Any]) -> dict[str, Any]:
        """Metrics of the step's updates."""
        metrics = self.cluster.get(calls, "train")[0]
        self.under_way = {}
        return metrics

    def settle(self) -> bool:
        """Waits for updates under way, without taking their metrics; whether there were any not waited for before."""
        calls, self.under_way = self.under_way, {}
        if calls:
            self.cluster.get(calls, "train")
        return bool(calls)

    def accumulate(self, update: Update) -> dict[Any, Any]:
        """Starts on a part of an update that `begin_update` will end."""
        return {rank: rank.accumulate.remote(update.ranks[index]) for index, rank in enumerate(self.ranks)}

    def begin_update(self, total_weight: float, trained_weight: float) -> dict[Any, Any]:
        """Starts the optimizer's step on what was accumulated; `finish` waits for it."""
        self.under_way = {rank: rank.end_step.remote(total_weight, trained_weight) for rank in self.ranks}
        return self.under_way

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

    def save_state(self, folder: Path) -> None:
        """Weights, moments and counts, for `load_state` of any number of ranks at any ZeRO stage."""
        self._all("save its state", "save_state", str(folder))

    def load_state(self, folder: Path) -> None:
        """UserError where the folder is not whole or belongs to another model."""
        self._all("load its state", "load_state", str(folder))
