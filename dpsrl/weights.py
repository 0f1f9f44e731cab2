"""From the trainer to the engines: the client that rank 0 speaks to all of them with, and the proof that it worked.

The wire itself is `weight_sync.py`. Engines that were lost are replaced here, since a new one is nothing without the
current weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dpsrl.cluster import PartyLost, StallError
from dpsrl.config import Config
from dpsrl.pools import RolloutPool, TrainerPool, transfer_backend
from dpsrl.types import Sent, UserError

MAX_SYNC_ATTEMPTS = 3


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
        rollouts.on_lost = self.recover

    def _check_hosts(self) -> None:
        if transfer_backend(self.config) == "shared_memory":
            hosts = sorted({*self.trainers.hosts(), *self.rollouts.hosts()})
            if len(hosts) > 1:
                raise UserError(
                    f"weights travel by shared memory, and the run is spread over {', '.join(hosts)}: "
                    "use one machine, or GPUs"
                )

    def check(self, failures: dict[int, str]) -> tuple[float, dict[int, str]]:
        """Has both ends score the canary, and judges them."""
        expected = self.trainers.begin_logprobs(self.canary)  # both ends compute at the same time
        answers = self.rollouts.logprobs(
            self.canary, [i for i in range(len(self.rollouts.engines)) if i not in failures]
        )
        return self._judge(Sent(failures, answers, self.trainers.cluster.get(expected, "score the canary")[0]))

    def _judge(self, sent: Sent) -> tuple[float, dict[int, str]]:
        """Largest canary difference in nats among sound engines, and why the others are not."""
        faults, worst = dict(sent.failures), 0.0
        for index, (version, logprobs) in sent.answers.items():
            difference = float(np.abs(logprobs - sent.logprobs).mean())
            if version != self.policy_version:
                faults[index] = f"reports policy version {version}, not {self.policy_version}"
            elif difference <= self.config.weight_sync.canary_tolerance:
                worst = max(worst, difference)
            else:
                faults[index] = f"differs from the trainer by {difference:.4f} nats on the canary"
        if self.config.weight_sync.checksum:
            faults |= self._compare_checksums([index for index in sent.answers if index not in faults])
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
            raise StallError(f"engines and trainer differ before the first step: {faults}")
        if self.take_turns:
            self.trainers.sleep()

    def restore(self, policy_version: int) -> None:
        """Gives the engines the weights that the trainer has taken up from a checkpoint."""
        self.begin_training()
        self.send(policy_version)

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
            sent = self.trainers.send_weights(policy_version, None if self.take_turns else self.canary)
            elapsed_s = time.monotonic() - started
            if self.take_turns:  # the canary needs the key-value cache
                self.trainers.sleep()
                self.rollouts.wake("kv_cache")
                worst, faults = self.check(sent.failures)
            else:
                worst, faults = self._judge(sent)
            if not faults:
                self.rollouts.resubmit()
                rate = self.trainers.num_weight_bytes * len(self.rollouts.engines) / elapsed_s / 1e9
                return {"sync/canary_diff": worst, "sync/gb_per_s": rate}
            self._replace(faults)
        sentence = f"weight sync to version {policy_version} failed {MAX_SYNC_ATTEMPTS} times: {faults}"
        raise PartyLost(sentence, [self.rollouts.engines[index] for index in faults])

    def recover(self, lost: dict[int, str]) -> None:
        """Puts new engines in the place of those that were lost, with the current weights.

        Where the trainer is at work, these are the ones that it is about to have: its old weights are gone.
        """
        self._replace(lost)
        self.send(self.policy_version + self.trainers.settle())

    def _replace(self, faults: dict[int, str]) -> None:
        for index, fault in faults.items():
            self.say(f"engine-{index} {fault}: replacing it")
        self.num_replaced += len(faults)
        self.rollouts.replace_all(faults)
        self.trainers.connect(self.rollouts)
