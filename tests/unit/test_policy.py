"""The packed policy against transformers run on one rollout at a time: logprobs, entropies and gradients."""

import functools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen3Config

from dpsrl import policy as policy_module
from dpsrl.algo.losses import Rows, policy_loss, rollout_correction
from dpsrl.algo.packing import dummy, lay_out
from dpsrl.policy import attention_blocks, check_architecture, head_logprobs, load_policy, packed_batch
from dpsrl.types import TrainGroup, UserError

pytestmark = pytest.mark.process

VOCAB, TEMPERATURE = 37, 0.8
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[(Qwen3Config, True), (Qwen2Config, False)], ids=["qwen3 tied", "qwen2"])
def folder(request, tmp_path_factory):
    config_class, tied = request.param
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = config_class(**SHAPE, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(path)
    return str(path)


def groups(num: int = 5) -> list[TrainGroup]:
    rng, made = np.random.default_rng(0), []
    for _ in range(num):
        responses = [rng.integers(0, VOCAB, n).astype(np.int32) for n in rng.integers(1, 14, rng.integers(1, 5))]
        logprobs = [rng.normal(-3.0, 0.5, r.size).astype(np.float32) for r in responses]
        prompt = rng.integers(0, VOCAB, rng.integers(1, 9)).astype(np.int32)
        made.append(TrainGroup(prompt, responses, logprobs, rng.normal(0, 2, len(responses))))
    return made


GROUPS = groups()
TOTAL = sum(r.size for g in GROUPS for r in g.responses)


@functools.cache
def reference_gradient(folder: str) -> dict[str, torch.Tensor]:
    """One rollout and one token at a time, as DAPO eq. 8 is written, with truncated importance weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for group in GROUPS:
        for response, sampled, advantage in zip(
            group.responses, group.rollout_logprobs, group.advantages.tolist(), strict=True
        ):
            ids = torch.tensor(np.concatenate([group.prompt_token_ids, response]), dtype=torch.long)
            law = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
            for t in range(response.size):
                logp = law[group.prompt_token_ids.size + t - 1, int(response[t])]
                importance = min(float(logp.detach().sub(float(sampled[t])).exp()), 2.0)
                total = total - importance * advantage * (logp - logp.detach()).exp() / TOTAL
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("max_tokens", "num_ranks"), [(1, 1), (40, 1), (10_000, 1), (60, 3)])
def test_the_gradient_is_that_of_single_rollouts_however_they_are_packed(folder, max_tokens, num_ranks):
    policy = load_policy(folder, torch.float64, torch.float64)
    [update] = lay_out(GROUPS, num_ranks, 1, max_tokens)
    for micro in (micro for rank in update.ranks for micro in rank):
        logprobs_L, _ = policy(packed_batch(micro, CPU), TEMPERATURE)
        rows, old_L = Rows(torch.tensor(micro.row_L), micro.row_lengths_S.size), logprobs_L.detach()
        loss, _ = policy_loss(
            logprobs_L, old_L, torch.tensor(micro.advantages_S).double()[rows.row_L],
            torch.tensor(micro.weights_L).double(), rows,
            correction_L=rollout_correction(old_L, torch.tensor(micro.rollout_L).double(), rows),
        )  # fmt: skip
        (loss / update.total_weight).backward()
    expected = reference_gradient(folder)
    got = {name: p.grad for name, p in policy.model.named_parameters()}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-7)  # advantages travel as float32
        assert gradient.abs().max() > 1e-4


def test_a_gradient_is_the_same_to_the_bit_each_time(folder):
    """Many responses begin after one prompt token, whose gradients two threads would add up in any order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rng, policy = np.random.default_rng(0), load_policy(folder, torch.float32, torch.float32)
        responses = [rng.integers(0, VOCAB, 1 + i % 2).astype(np.int32) for i in range(2048)]
        silent = [np.zeros(r.size, dtype=np.float32) for r in responses]
        group = TrainGroup(np.arange(4, dtype=np.int32), responses, silent, rng.normal(0, 2, len(responses)))
        [[micro]] = lay_out([group], 1, 1, 1 << 20)[0].ranks
        weights_L = torch.tensor(rng.normal(0, 1, micro.target_L.size), dtype=torch.float32)
        seen = set()
        for _ in range(20):
            policy.zero_grad()
            logprobs_L, entropy_L = policy(packed_batch(micro, CPU), TEMPERATURE, with_entropy=True)
            ((logprobs_L + entropy_L) * weights_L).sum().backward()
            seen.add(b"".join(p.grad.numpy().tobytes() for p in policy.parameters()))
        assert len(seen) == 1
    finally:
        torch.set_num_threads(threads)


def test_a_dummy_runs_and_has_no_gradient(folder):
    policy = load_policy(folder, torch.float64, torch.float64)
    logprobs, entropy = policy(packed_batch(dummy(), CPU), with_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.numel() == 0
    assert not any(p.grad.any() for p in policy.parameters() if p.grad is not None)


def test_checkpointing_does_not_change_the_gradient(folder):
    [update] = lay_out(GROUPS, 1, 1, 10_000)
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(folder, torch.float64, torch.float64, gradient_checkpointing=checkpointing)
        policy(packed_batch(update.ranks[0][0], CPU))[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flash", [False, True])
def test_attention_rows_lead_back_to_every_token(flash):
    [update] = lay_out(GROUPS, 1, 1, 10_000)
    micro = update.ranks[0][0]
    blocks, source_N = attention_blocks(micro, flash)
    gathered = np.concatenate([micro.token_ids_N[block].flatten() for block in blocks])
    assert gathered[source_N].tolist() == micro.token_ids_N.tolist()
    if not flash:  # rows of a block are of nearly equal length
        cells = sum(block.size for block in blocks)
        assert micro.row_tokens_M.size <= cells <= micro.row_tokens_M.size / policy_module.WIDTH_TOLERANCE


@pytest.mark.parametrize("chunk_elements", [1, 100, 1 << 26])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_head_logprobs_equal_log_softmax(monkeypatch, chunk_elements, temperature):
    monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, up, up_entropy = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((9, 4), (VOCAB, 4), (9,), (9,))
    )
    target = torch.randint(0, VOCAB, (9,), generator=generator)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = head_logprobs(hidden, weight, target, temperature, True, torch.float64)
    law = torch.distributions.Categorical(logits=hidden @ weight.T / temperature)
    torch.testing.assert_close(logprobs, law.log_prob(target))
    torch.testing.assert_close(entropy, law.entropy())
    got = torch.autograd.grad((logprobs * up + entropy * up_entropy).sum(), (hidden, weight))
    expected = torch.autograd.grad((law.log_prob(target) * up + law.entropy() * up_entropy).sum(), (hidden, weight))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_half_precision_head_sums_in_float32():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 8, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(0, 50, (6,), generator=generator)
    logprobs, entropy = head_logprobs(hidden, weight, target, 1.0, False, torch.float32)
    assert logprobs.dtype == torch.float32 and not entropy.any()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_architectures_that_do_more_are_refused():
    check_architecture(Qwen3Config(**SHAPE))
    gemma = AutoConfig.for_model("gemma2")
    with pytest.raises(UserError, match="logit_softcapping=.* is not supported by the trainer"):
        check_architecture(gemma)
    with pytest.raises(UserError, match="the model's attention is full_attention, sliding_attention"):
        check_architecture(Qwen3Config(**SHAPE, layer_types=["full_attention", "sliding_attention"]))
