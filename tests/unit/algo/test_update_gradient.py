"""The gradient of an update does not depend on its layout: checked against the equation, token by token."""

import numpy as np
import pytest
import torch

from dpsrl.algo.losses import policy_loss, rollout_correction, token_logprobs
from dpsrl.algo.packing import lay_out
from dpsrl.types import Sequence

VOCAB, PAD = 11, 0


class TinyModel(torch.nn.Module):
    """A causal model in float64: each position sees the mean of the embeddings up to it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, 6, dtype=torch.float64, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(6, VOCAB, dtype=torch.float64, generator=generator))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding[token_ids].cumsum(dim=-2)
        return torch.tanh(embedded / torch.arange(1, token_ids.shape[-1] + 1)[:, None]) @ self.head


def make_sequences(num_sequences: int) -> list[Sequence]:
    generator = np.random.default_rng(0)
    sequences = []
    for _ in range(num_sequences):
        prompt_len, response_len = generator.integers(1, 6), generator.integers(1, 15)
        sequences.append(
            Sequence(
                generator.integers(0, VOCAB, prompt_len + response_len).astype(np.int32),
                int(prompt_len),
                generator.normal(-2.5, 1.0, response_len).astype(np.float32),
                float(generator.normal() * 2),
            )
        )
    return sequences


def reference_gradient(model: TinyModel, old: TinyModel, sequences: list[Sequence], aggregation: str) -> torch.Tensor:
    """One sequence and one token at a time, as DAPO eq. 8 and GRPO eq. 3 are written, dual clip at 3."""
    total = torch.zeros((), dtype=torch.float64)
    num_tokens = sum(len(s.token_ids) - s.prompt_len for s in sequences)
    for s in sequences:
        ids = torch.tensor(s.token_ids, dtype=torch.long)
        response_len = len(ids) - s.prompt_len
        for t in range(s.prompt_len, len(ids)):
            new_logp = model(ids[:t])[-1].log_softmax(-1)[ids[t]]
            old_logp = old(ids[:t])[-1].log_softmax(-1)[ids[t]].detach()
            ratio = (new_logp - old_logp).exp()
            objective = torch.min(ratio * s.advantage, ratio.clamp(0.8, 1.28) * s.advantage)
            if s.advantage < 0:
                objective = torch.max(objective, torch.tensor(3.0 * s.advantage, dtype=torch.float64))
            importance = min((old_logp - float(s.rollout_logprobs[t - s.prompt_len])).exp().item(), 2.0)
            share = 1 / num_tokens if aggregation == "token_mean" else 1 / (response_len * len(sequences))
            total = total - objective * importance * share
    return flat_gradient(total, model)


def flat_gradient(loss: torch.Tensor, model: TinyModel) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


SEQUENCES = make_sequences(17)
MODEL, OLD = TinyModel(1), TinyModel(1)
with torch.no_grad():
    OLD.head += 0.3 * torch.randn(OLD.head.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
REFERENCE = {kind: reference_gradient(MODEL, OLD, SEQUENCES, kind) for kind in ("token_mean", "sequence_mean")}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_gradient_does_not_depend_on_the_layout(aggregation, max_tokens, num_ranks):
    [ranks] = lay_out(SEQUENCES, num_ranks, 1, max_tokens, PAD, aggregation)
    total = torch.zeros_like(REFERENCE[aggregation])
    clipped = 0.0
    for micro in (micro for rank in ranks for micro in rank):
        ids, mask = torch.from_numpy(micro.token_ids_BT), torch.from_numpy(micro.loss_mask_BT)
        logprobs, _ = token_logprobs(MODEL(ids), ids)
        old_logprobs = token_logprobs(OLD(ids), ids)[0].detach()
        loss, metrics = policy_loss(
            logprobs,
            old_logprobs,
            torch.from_numpy(micro.advantages_B)[:, None],
            mask,
            torch.from_numpy(micro.weights_BT),
            dual_clip=3.0,
            correction_BT=rollout_correction(old_logprobs, torch.from_numpy(micro.rollout_logprobs_BT), mask),
        )
        total += flat_gradient(loss, MODEL)
        clipped += sum(metrics[name].item() for name in ("clip_low_share", "clip_high_share", "dual_clip_share"))
    assert 0.1 < clipped < 0.9  # both branches are in play
    torch.testing.assert_close(total, REFERENCE[aggregation], rtol=1e-10, atol=1e-12)
    assert REFERENCE[aggregation].abs().max() > 1e-3
