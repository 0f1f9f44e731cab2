"""Real DeepSpeed ranks: one update is the same update however many ranks share it, whatever ZeRO stage they are at."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpsrl.algo.packing import lay_out
from dpsrl.cluster import Cluster
from dpsrl.config import Config, load_config
from dpsrl.pools import TrainerPool
from dpsrl.types import TrainGroup, UserError

LR = 100.0  # of plain gradient descent, so large that the rounding of weights hides nothing of the gradient


def configuration(*arguments) -> Config:
    return load_config(["+recipe=quickstart", "algo.entropy_coef=0.01", *arguments])


def groups(num: int, config: Config) -> list[TrainGroup]:
    """Random tokens of uneven lengths, sampled by something near the policy."""
    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    made = []
    for _ in range(num):
        prompt = rng.integers(0, 256, rng.integers(3, 12)).astype(np.int32)
        responses = [rng.integers(0, 256, rng.integers(3, 30)).astype(np.int32) for _ in range(3)]
        logprobs = [
            law(model, prompt, response)[0].detach().numpy() + rng.normal(0, 0.3, response.size).astype(np.float32)
            for response in responses
        ]
        made.append(TrainGroup(prompt, responses, logprobs, rng.normal(0, 1, 3)))
    return made


def law(model, prompt: np.ndarray, response: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob, entropy) of each token of the response, by transformers alone."""
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)
    log_p = model(ids[None]).logits[0, prompt.size - 1 : -1].log_softmax(-1)
    return log_p.gather(1, ids[prompt.size :, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture(scope="module")
def truth() -> tuple[list[TrainGroup], np.ndarray]:
    """The groups, and the update's gradient from one rollout at a time, written out."""
    config = configuration()
    made = groups(8, config)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    num_tokens = sum(response.size for group in made for response in group.responses)
    for group in made:
        for response, sampled, advantage in zip(group.responses, group.rollout_logprobs, group.advantages, strict=True):
            logp, entropy = law(model, group.prompt_token_ids, response)
            importance = (logp.detach() - torch.tensor(sampled)).exp().clamp(max=2.0)
            loss = -importance * float(advantage) * (logp - logp.detach()).exp() - 0.01 * entropy
            (loss.sum() / num_tokens).backward()
    return made, np.concatenate([p.grad.double().numpy().ravel() for p in model.parameters()])


@pytest.mark.parametrize(
    "arguments",
    [
        ["trainer.micro_batch_tokens=1"],  # every rollout alone, nothing shared
        ["trainer.num_workers=2"],
        ["trainer.num_workers=2", "trainer.zero_stage=1", "trainer.micro_batch_tokens=150"],
        ["trainer.num_workers=2", "trainer.zero_stage=2", "trainer.micro_batch_tokens=150"],
        ["trainer.num_workers=2", "trainer.zero_stage=3", "trainer.micro_batch_tokens=150"],
        ["trainer.zero_stage=2", "trainer.offload=optimizer", "trainer.gradient_checkpointing=true"],
    ],
    ids=lambda arguments: " ".join(argument.removeprefix("trainer.") for argument in arguments),
)
def test_the_gradient_is_the_equations(ranks, truth, arguments):
    made, expected = truth
    config = configuration(f"trainer.lr={LR}", "trainer.max_grad_norm=1e9", *arguments)
    pool = ranks(config.trainer.num_workers)
    [update] = lay_out(made, pool.num, 1, config.trainer.micro_batch_tokens)
    pool.start_plain(config)
    before = pool.weights()
    metrics = pool.stream(update)
    gradient = (before - pool.weights()) / LR
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    assert metrics["correction_capped_share"] > 0 and metrics["mismatch_kl"] > 1e-3


def one_step(ranks, *arguments):
    """(metrics, logprobs of a fixed sequence afterwards) of one step of two updates, with AdamW."""
    config = configuration("train.num_updates=2", "trainer.lr=1e-3", *arguments)
    pool = ranks(config.trainer.num_workers)
    pool.start(config)
    metrics = pool.train(lay_out(groups(8, config), pool.num, 2, config.trainer.micro_batch_tokens))
    return metrics, pool.logprobs(np.arange(20, 60, dtype=np.int32))


def test_the_pool_saves_and_loads_and_hears_what_goes_wrong(tmp_path):
    config = configuration("trainer.num_workers=2", "trainer.zero_stage=2", "trainer.lr=1e-3")
    (update,) = lay_out(groups(4, config), 2, 1, config.trainer.micro_batch_tokens)
    with Cluster(config, tmp_path / "logs") as cluster:
        trainers = TrainerPool(cluster, config, "shared_memory")
        trainers.start()
        trainers.finish(trainers.begin([update]))
        trainers.save_state(tmp_path / "state")
        saved = trainers.checksums()
        trainers.finish(trainers.begin([update]))
        at_once = trainers.checksums()
        trainers.load_state(tmp_path / "state")
        assert trainers.checksums() == saved != at_once
        trainers.accumulate(update)
        assert trainers.finish(trainers.begin_update(update.total_weight, update.trained_weight))["num_skipped"] == 0
        assert trainers.checksums() == at_once
        with pytest.raises(UserError, match="state.json is missing"):
            trainers.load_state(tmp_path)
        trainers.accumulate(update)  # and divide by what leaves no weight finite
        with pytest.raises(RuntimeError, match="no longer finite after update 3"):
            trainers.finish(trainers.begin_update(math.nan, 1.0))


@pytest.fixture(scope="module")
def reference(ranks):
    """One rank, no ZeRO, everything in one micro-batch."""
    return one_step(ranks)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_updates_with_clipping_and_a_reference_are_the_same_on_two_ranks(ranks, reference, stage):
    metrics, logprobs = one_step(
        ranks, "trainer.num_workers=2", f"trainer.zero_stage={stage}", "trainer.micro_batch_tokens=100",
        "algo.kl_coef=1e-9",
    )  # fmt: skip
    expected, expected_logprobs = reference
    assert metrics.keys() == expected.keys() | {"reference_kl"}
    for name in ("loss", "entropy", "grad_norm", "policy_kl", "clip_low_share", "clip_high_share", "lr"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=3e-3)
    assert expected["policy_kl"] > 1e-6  # the second update did leave the policy that the step began with
    assert metrics["reference_kl"] > 1e-6  # and the reference too


@pytest.mark.parametrize("arguments", [["trainer.num_workers=2", "trainer.zero_stage=2"], ["trainer.zero_stage=0"]])
def test_bfloat16_trains_to_nearly_the_same(ranks, reference, arguments):
    metrics, _ = one_step(ranks, "model.dtype=bfloat16", *arguments)
    assert metrics["loss"] == pytest.approx(reference[0]["loss"], abs=0.05)
    # Rounding moves the importance weights of unlikely tokens; a wrong scale would be a factor of hundreds.
    assert metrics["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=0.4)


@pytest.mark.parametrize("stage", [0, 3])
def test_in_bfloat16_the_last_of_many_micro_batches_counts_as_the_first(ranks, stage):
    """A sum kept in bfloat16 loses more and more of what is added, and stands still in the end."""
    config = configuration("model.dtype=bfloat16", "trainer.max_grad_norm=1e9", f"trainer.zero_stage={stage}")
    (update,) = lay_out(groups(1, config), 1, 1, config.trainer.micro_batch_tokens)
    times = 150
    many = replace(
        update, ranks=[update.ranks[0] * times], total_weight=update.total_weight * times,
        trained_weight=update.trained_weight * times,
    )  # fmt: skip
    norms = []
    for one in (update, many):
        ranks(1).start(config)
        norms.append(ranks(1).train([one])["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
