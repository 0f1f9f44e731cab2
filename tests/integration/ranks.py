"""Real DeepSpeed ranks for tests: processes of this file, started once and given one configuration after another."""

import math
import os
import subprocess
import sys
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np

from dpsrl.algo.packing import Update
from dpsrl.config import Config

FILE_BYTES = 1 << 20  # of a state of 20 MB
ANSWERS_WITHIN_S = 300
MOMENTS = ("exp_avg", "exp_avg_sq")


class Rank:
    """Runs in a process of its own: one trainer rank after another."""

    def __init__(self, rank: int, meeting: str) -> None:
        self.rank, self.meeting = rank, meeting

    def start(self, config: Config) -> None:
        from dpsrl.trainer import TrainerWorker

        self._start(TrainerWorker, config)

    def start_plain(self, config: Config) -> None:
        """With gradient descent in place of AdamW, so that weights tell the gradient."""
        import torch

        from dpsrl.trainer import TrainerWorker

        class PlainWorker(TrainerWorker):
            def _optimizer(self, policy):
                return torch.optim.SGD(policy.parameters(), lr=config.trainer.lr)

        self._start(PlainWorker, config)

    def _start(self, cls: type, config: Config) -> None:
        self.worker = cls(config, self.rank, num_threads=1)
        self.worker.start(self.meeting)

    def train(self, updates: list[Update]) -> dict[str, float]:
        return self._metrics(self.worker.train_step([self._own(update) for update in updates]))

    def stream(self, update: Update) -> dict[str, float]:
        micro_batches, *weights = self._own(update)
        for micro in micro_batches:
            self.worker.accumulate([micro])
        return self._metrics(self.worker.end_step(*weights))

    def loss_is_finite(self, update: Update) -> bool:
        """Of the update under way, on this rank."""
        self.worker.accumulate(self._own(update)[0])
        return bool(np.isfinite(self.worker._sums["loss"]))

    def step(self, update: Update) -> dict[str, float]:
        return self._metrics(self.worker.end_step(*self._own(update)[1:]))

    def train_on_a_loss_of_nan(self, update: Update) -> dict[str, float]:
        """A loss that is not finite on the last rank, whose gradient is."""
        from dpsrl import trainer

        def policy_loss(*args):
            loss, metrics = whole(*args)
            return loss + (math.nan if self.rank == self.worker.world_size - 1 else 0.0), metrics

        whole, trainer.policy_loss = trainer.policy_loss, policy_loss
        try:
            return self.train([update])
        finally:
            trainer.policy_loss = whole

    def _own(self, update: Update):
        return update.ranks[self.rank], update.total_weight, update.trained_weight

    def _metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        del metrics["busy_s"], metrics["skipped"]
        return metrics | {"num_updates_done": self.worker.num_updates_done}

    def save(self, folder: str) -> None:
        from dpsrl import trainer_state

        trainer_state.FILE_BYTES = FILE_BYTES
        self.worker.save_state(folder)

    def save_model(self, folder: str) -> None:
        self.worker.save_model(folder)

    def load(self, folder: str) -> None:
        self.worker.load_state(folder)

    def state(self) -> dict[str, np.ndarray]:
        """Everything whole, by DeepSpeed's own functions: masters, moments, and the weights that the model uses."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        engine, whole = self.worker.engine, {}
        if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # those functions want it before the first step too
        for name, parameter in engine.module.model.named_parameters():
            if engine.zero_optimization_stage() == 0:
                tensors = [parameter, *(engine.basic_optimizer.state[parameter][kind] for kind in MOMENTS)]
            else:
                moments = [safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS]
                tensors = [safe_get_full_fp32_param(parameter), *moments]
            for kind, tensor in zip(("weight", *MOMENTS), tensors, strict=True):
                whole[f"{kind} {name}"] = tensor.detach().float().numpy().copy()
            with deepspeed.zero.GatheredParameters([parameter]):
                whole[f"served {name}"] = parameter.detach().float().numpy().copy()
        return whole

    def weights(self) -> np.ndarray:
        """All of them, as they would be sent, end to end."""
        return np.concatenate([tensor.flatten().double().numpy() for _, tensor in self.worker._source()])

    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        return self.worker.logprobs(token_ids)

    def steps(self) -> list[float]:
        return [float(state["step"]) for state in self.worker.engine.basic_optimizer.state.values()]


def serve(address: str, rank: int, meeting: str) -> None:
    with Client(address) as pipe:
        served = Rank(rank, meeting)
        while request := pipe.recv():
            name, args = request
            try:
                pipe.send(getattr(served, name)(*args))
            except Exception as error:  # the test's to judge
                pipe.send(error)


class Ranks:
    """Calls go to all ranks; rank 0's answer is the answer."""

    def __init__(self, num: int, folder: Path) -> None:
        self.num = num
        root = Path(__file__).parents[2]
        env = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.processes, self.pipes = [], []
        for rank in range(num):
            address = str(folder / f"rank-{rank}")
            with Listener(address) as listener:
                command = [sys.executable, __file__, address, str(rank), f"file://{folder}/meeting"]
                with (folder / f"rank-{rank}.log").open("w") as log:
                    self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
                self.pipes.append(listener.accept())

    def __getattr__(self, name: str):
        return lambda *args: self.all(name, *args)[0]

    def all(self, name: str, *args) -> list:
        for pipe in self.pipes:
            pipe.send((name, args))
        assert all(pipe.poll(ANSWERS_WITHIN_S) for pipe in self.pipes), f"a rank still waits in {name}"
        answers = [pipe.recv() for pipe in self.pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
