"""Real DeepSpeed ranks: one update is the same update however many ranks and whichever ZeRO stage share it."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpsrl.algo.packing import lay_out
from dpsrl.cluster import Cluster
from dpsrl.config import load_config
from dpsrl.pools import TrainerPool
from dpsrl.types import Sequence


def sequences(num: int, config) -> list[Sequence]:
    """Random tokens of uneven lengths, with logprobs that the policy itself gives them."""
    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    made = []
    for _ in range(num):
        prompt_len, length = rng.integers(3, 12), rng.integers(14, 40)
        token_ids = rng.integers(0, 256, length).astype(np.int32)
        with torch.no_grad():
            logits = model(torch.tensor(token_ids[None], dtype=torch.long)).logits[0]
        logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(token_ids[1:, None], dtype=torch.long))[:, 0]
        made.append(Sequence(token_ids, int(prompt_len), logprobs[prompt_len - 1 :].numpy(), float(rng.normal())))
    return made


def one_step(tmp_path, *arguments):
    """(metrics, logprobs of a fixed sequence afterwards) of one step of two updates."""
    config = load_config(
        ["+recipe=quickstart", "train.num_updates=2", "trainer.lr=1e-3", "algo.entropy_coef=0.01", *arguments]
    )
    layout = lay_out(sequences(24, config), config.trainer.num_workers, 2, config.trainer.micro_batch_tokens, 0)
    with Cluster(config, tmp_path / "logs") as cluster:
        trainers = TrainerPool(cluster, config, "shared_memory")
        trainers.start()
        return trainers.train_step(layout), trainers.logprobs(np.arange(20, 60, dtype=np.int32))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One rank, no ZeRO, everything in one micro-batch."""
    return one_step(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_stages_and_micro_batches_do_not_change_an_update(tmp_path, reference, stage):
    metrics, logprobs = one_step(
        tmp_path, "trainer.num_workers=2", f"trainer.zero_stage={stage}", "trainer.micro_batch_tokens=100"
    )
    expected, expected_logprobs = reference
    assert metrics.keys() == expected.keys()
    for name in ("loss", "entropy", "grad_norm", "policy_kl", "clip_low_share", "clip_high_share", "lr"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-3)
    assert expected["policy_kl"] > 1e-6  # the second update did leave the policy that the step began with
    assert expected["mismatch_kl"] < 1e-8


def test_bfloat16_trains_to_nearly_the_same(tmp_path, reference):
    metrics, _ = one_step(tmp_path, "model.dtype=bfloat16", "trainer.num_workers=2", "trainer.zero_stage=2")
    assert metrics["loss"] == pytest.approx(reference[0]["loss"], abs=0.05)
    # Rounding moves the importance weights of unlikely tokens; a wrong scale by the ranks would be a factor of two.
    assert metrics["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=0.4)
