"""The wire between real trainers and real engines: agreement after a sync, and the faults vLLM is silent about."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpsrl.cluster import Cluster
from dpsrl.config import load_config
from dpsrl.data.build import load_tokenizer
from dpsrl.pools import RolloutPool, TrainerPool, Weights, transfer_backend
from dpsrl.trainer import TrainerWorker
from dpsrl.types import RolloutRequest

TOLERANCE = 0.01


class ScriptedTrainer(TrainerWorker):
    """A trainer whose weights and wire can be tampered with."""

    def perturb(self, seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * parameter.std())

    def lose_a_tensor(self, times: int) -> None:
        """The next `times` transfers leave one tensor out, as a renamed layer would."""
        source = self.sender.engine.source
        whole = type(source).__iter__

        class Lossy(type(source)):
            left = times

            def __iter__(self):
                Lossy.left -= 1
                for name, tensor in whole(self):
                    if Lossy.left < 0 or "layers.1.self_attn.q_proj" not in name:
                        yield name, tensor

        source.__class__ = Lossy


@contextmanager
def both_ends(tmp_path, monkeypatch, *arguments):
    monkeypatch.setattr("dpsrl.pools.TrainerWorker", ScriptedTrainer)
    config = load_config(["+recipe=quickstart", "rollout.num_workers=2", *arguments])
    backend = transfer_backend(config)
    tokenizer = load_tokenizer(config.model.path)
    canary = np.array(tokenizer("3 5 7=15:3+5+7 and then some more text, 1 2 3 4 5 6")["input_ids"], dtype=np.int32)
    with Cluster(config, tmp_path / "logs") as cluster:
        rollouts, trainers = RolloutPool(cluster, config, backend), TrainerPool(cluster, config, backend)
        trainers.start()
        rollouts.policy_versions()
        yield trainers, rollouts, Weights(trainers, rollouts, canary, TOLERANCE)


def first_rank(trainers, method, *args):
    rank = trainers.ranks[0]
    return trainers.cluster.get({rank: getattr(rank, method).remote(*args)}, method)[0]


def test_new_weights_arrive_and_a_torn_update_replaces_the_engines(tmp_path, monkeypatch):
    with both_ends(tmp_path, monkeypatch) as (trainers, rollouts, weights):
        weights.verify_start()
        before = rollouts.logprobs(weights.canary, [0, 1])
        first_rank(trainers, "perturb", 0, 0.3)
        assert weights.send(1) < 1e-4  # float32 on both ends
        after = rollouts.logprobs(weights.canary, [0, 1])
        assert np.abs(after[0] - before[0]).mean() > 0.1  # the canary does see a change of weights
        assert rollouts.policy_versions() == [1, 1]

        # One bad engine: stale weights, found by the canary alone.
        first_rank(trainers, "perturb", 1, 0.3)
        weights.policy_version = 1
        _, faults = weights.check({})
        assert set(faults) == {0, 1} and "canary" in faults[0]

        # A tensor is missing: vLLM would serve uninitialized memory; here both engines are replaced.
        engines = list(rollouts.engines)
        first_rank(trainers, "lose_a_tensor", 1)
        assert weights.send(2) < 1e-4
        assert weights.num_replaced == 2 and not set(engines) & set(rollouts.engines)
        assert rollouts.policy_versions() == [2, 2]
        request = RolloutRequest(0, weights.canary[:10], 2, 1.0, 7)
        ((_, samples, version),) = rollouts.stream([request])
        assert version == 2 and len(samples) == 2


@pytest.fixture
def tied_model(tmp_path):
    """The tiny model with lm_head tied to the embedding."""
    config = load_config(["+recipe=quickstart"])
    tokenizer = load_tokenizer(config.model.path)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    folder = tmp_path / "tied"
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_follows_its_embedding(tmp_path, monkeypatch, tied_model, dtype):
    arguments = [
        f"model.path={tied_model}",
        f"model.dtype={dtype}",
        "trainer.num_workers=1",
        "rollout.num_workers=1",
    ]
    with both_ends(tmp_path, monkeypatch, *arguments) as (trainers, _, weights):
        weights.verify_start()
        first_rank(trainers, "perturb", 0, 0.3)
        assert weights.send(1) < TOLERANCE and weights.num_replaced == 0
