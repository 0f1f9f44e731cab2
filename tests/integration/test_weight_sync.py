"""The wire between real trainers and real engines: agreement after a sync, and the faults vLLM is silent about."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpsrl.algo.packing import lay_out
from dpsrl.cluster import Cluster
from dpsrl.config import load_config
from dpsrl.data.build import load_tokenizer
from dpsrl.policy import packed_batch
from dpsrl.pools import RolloutPool, TrainerPool, transfer_backend
from dpsrl.trainer import TrainerWorker
from dpsrl.types import RolloutRequest, TrainGroup
from dpsrl.weights import Weights

TOLERANCE = 0.01


class ScriptedTrainer(TrainerWorker):
    """A trainer whose weights and wire can be tampered with."""

    def perturb(self, seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * parameter.std())

    def perturb_shards(self, seed: int, scale: float = 0.01) -> None:
        """Changes what this rank holds of each parameter under ZeRO-3."""
        torch.manual_seed(1000 * seed + self.rank)
        for parameter in self.engine.module.parameters():
            held = parameter.ds_tensor
            held.data.add_(torch.randn_like(held) * scale)

    def logprobs_of(self, responses, prompt) -> list[np.ndarray]:
        """At the temperature of the requests in the test."""
        group = TrainGroup(
            prompt, list(responses), [np.zeros(r.size, np.float32) for r in responses], np.zeros(len(responses))
        )
        ((micro,),) = lay_out([group], 1, 1, 10**9)[0].ranks
        with torch.no_grad():
            logprobs = self.engine(packed_batch(micro, self.device), 1.5)[0].numpy()
        return np.split(logprobs, np.cumsum([r.size for r in responses])[:-1])

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
def both_ends(folder, *arguments):
    config = load_config(
        ["+recipe=quickstart", "rollout.num_workers=2", f"weight_sync.canary_tolerance={TOLERANCE}", *arguments]
    )
    backend = transfer_backend(config)
    tokenizer = load_tokenizer(config.model.path)
    canary = np.array(tokenizer("3 5 7=15:3+5+7 and then some more text, 1 2 3 4 5 6")["input_ids"], dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch, Cluster(config, folder / "logs") as cluster:
        patch.setattr("dpsrl.trainer.TrainerWorker", ScriptedTrainer)
        rollouts, trainers = RolloutPool(cluster, config, backend), TrainerPool(cluster, config, backend)
        trainers.start()
        rollouts.policy_versions()
        weights = Weights(trainers, rollouts, config, canary)
        weights.verify_start()
        yield trainers, rollouts, weights


def first_rank(trainers, method, *args):
    rank = trainers.ranks[0]
    return trainers.cluster.get({rank: getattr(rank, method).remote(*args)}, method)[0]


def all_of(rollouts, requests):
    rollouts.add(requests)
    done = []
    while rollouts.outstanding:
        done += rollouts.finished()
    return done


@pytest.mark.slow
def test_two_ranks_and_two_engines_hold_equal_bits_after_twenty_syncs(tmp_path):
    """And a change of one weight, too small for the canary, is found."""
    arguments = [
        "trainer.num_workers=2", "trainer.zero_stage=3", "weight_sync.checksum=true", "weight_sync.bucket_mib=1"
    ]  # fmt: skip
    with both_ends(tmp_path, *arguments) as (trainers, rollouts, weights):
        seen = {str(sorted(trainers.checksums().items()))}
        for version in range(1, 21):
            trainers._all("change", "perturb_shards", version)
            metrics = weights.send(version)
            assert weights.num_replaced == 0 and metrics["sync/gb_per_s"] > 0
            seen.add(str(sorted(trainers.checksums().items())))
        assert len(seen) == 21
        trainers._all("change", "perturb_shards", 99, 1e-6)
        worst, faults = weights.check({})
        assert worst < TOLERANCE and set(faults) == {0, 1}
        assert "holds other weights than the trainer" in faults[0]


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


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_tied_head_follows_its_embedding(tmp_path, tied_model, dtype):
    arguments = [
        f"model.path={tied_model}",
        f"model.dtype={dtype}",
        "trainer.num_workers=1",
        "rollout.num_workers=1",
    ]
    with both_ends(tmp_path, *arguments) as (trainers, _, weights):
        first_rank(trainers, "perturb", 0, 0.3)
        assert weights.send(1)["sync/canary_diff"] < TOLERANCE and weights.num_replaced == 0


# --- one pair of ends for all that follows: no other can be open beside it ---------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """A trainer and two engines, each too small for two requests of 64 at once."""
    with both_ends(tmp_path_factory.mktemp("ends"), "rollout.max_num_seqs=64") as made:
        yield made


def test_requests_under_way_go_on_with_the_new_weights(ends):
    """Each token knows the weights that sampled it, and its logprob is theirs."""
    trainers, rollouts, weights = ends
    old = weights.policy_version
    prompt = weights.canary[:12]
    rollouts.add([RolloutRequest(i, prompt, 64, 1.5, i) for i in range(4)])
    done = []
    while not done:  # the first group is back, others are on their way
        done += rollouts.finished()
    before = first_rank(trainers, "logprobs_of", [s.token_ids for _, samples in done for s in samples], prompt)
    first_rank(trainers, "perturb", 0, 0.05)
    weights.send(old + 1)
    while rollouts.outstanding:
        done += rollouts.finished()
    samples = [sample for _, of_request in done for sample in of_request]
    for sample in samples:
        assert sum(count for _, count in sample.versions) == sample.token_ids.size == sample.logprobs.size
    for sample, logprobs in zip(samples, before):
        assert sample.versions[0][0] == old
        np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-3)
    both = [sample for sample in samples if len(sample.versions) == 2]
    assert both, "no response was under way during the sync"
    after = first_rank(trainers, "logprobs_of", [sample.token_ids for sample in both], prompt)
    for sample, logprobs in zip(both, after, strict=True):
        (_, num_old), (version, _) = sample.versions
        assert version == old + 1
        np.testing.assert_allclose(sample.logprobs[num_old:], logprobs[num_old:], atol=1e-3)


def test_new_weights_arrive_and_a_torn_update_replaces_the_engines(ends):
    trainers, rollouts, weights = ends
    version = weights.policy_version
    before = rollouts.logprobs(weights.canary, [0, 1])
    first_rank(trainers, "perturb", 0, 0.3)
    assert weights.send(version + 1)["sync/canary_diff"] < 1e-4  # float32 on both ends
    after = rollouts.logprobs(weights.canary, [0, 1])
    assert np.abs(after[0][1] - before[0][1]).mean() > 0.1  # the canary does see a change of weights
    assert rollouts.policy_versions() == [version + 1] * 2

    # One bad engine: stale weights, found by the canary alone.
    first_rank(trainers, "perturb", 1, 0.3)
    weights.policy_version = version + 1
    _, faults = weights.check({})
    assert set(faults) == {0, 1} and "canary" in faults[0]

    # A tensor is missing: vLLM would serve uninitialized memory; here both engines are replaced. What they were at work
    # on is sampled again, by the new weights.
    rollouts.add([RolloutRequest(i, weights.canary[:10], 64, 1.0, i) for i in range(4)])
    engines = list(rollouts.engines)
    first_rank(trainers, "lose_a_tensor", 1)
    assert weights.send(version + 2)["sync/canary_diff"] < 1e-4
    assert weights.num_replaced == 2 and not set(engines) & set(rollouts.engines)
    assert rollouts.policy_versions() == [version + 2] * 2
    samples = [sample for _, of_request in all_of(rollouts, []) for sample in of_request]
    assert len(samples) == 4 * 64
    assert all(sample.versions == [(version + 2, sample.token_ids.size)] for sample in samples)


def test_engines_lost_twice_during_one_update_get_the_version_that_it_makes(ends):
    trainers, rollouts, weights = ends
    version = weights.policy_version
    group = TrainGroup(weights.canary[:5], [weights.canary[5:9]], [np.full(4, -1.0, dtype=np.float32)], np.ones(1))
    calls = trainers.begin(lay_out([group], 1, 1, 100))
    for _ in range(2):
        weights.recover({})
        assert rollouts.policy_versions() == [version + 1] * 2
    trainers.finish(calls)
    weights.recover({})
    assert rollouts.policy_versions() == [version + 1] * 2
