import math

import pytest
import torch

from dpsrl.algo import losses
from dpsrl.algo.losses import k1, k3, mismatch_metrics, policy_loss, rollout_correction, token_logprobs

F64 = torch.float64


def row(*values, dtype=F64):
    return torch.tensor([values], dtype=dtype)


def one_token_loss(ratio, advantage, **options):
    """(loss, d loss / d logprob, metrics) of a single token."""
    logprob = row(-1.0).requires_grad_()
    loss, metrics = policy_loss(
        logprob, row(-1.0 - math.log(ratio)), row(advantage), row(True, dtype=torch.bool), row(1.0), **options
    )
    loss.backward()
    return (
        loss.item(),
        logprob.grad.item(),
        {name: value.item() for name, value in metrics.items() if value > 0},
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "share"),
    [
        (1.0, 2.0, -2.0, -2.0, None),  # on policy: plain policy gradient, d loss / d logprob = -A
        (1.2, 1.0, -1.2, -1.2, None),
        (1.5, 1.0, -1.28, 0.0, "clip_high_share"),
        (0.5, 1.0, -0.5, -0.5, None),  # a good token that became rare is pulled back
        (1.5, -1.0, 1.5, 1.5, None),
        (0.9, -1.0, 0.9, 0.9, None),
        (0.5, -1.0, 0.8, 0.0, "clip_low_share"),
        (20.0, -1.0, 10.0, 0.0, "dual_clip_share"),
        (20.0, -3.0, 30.0, 0.0, "dual_clip_share"),
        (20.0, 1.0, -1.28, 0.0, "clip_high_share"),
        (3.0, 0.0, 0.0, 0.0, None),
    ],
)
def test_clip_cases_by_hand(ratio, advantage, loss, gradient, share):
    got_loss, got_gradient, metrics = one_token_loss(ratio, advantage)
    assert got_loss == pytest.approx(loss)
    assert got_gradient == pytest.approx(gradient)
    assert {name for name in metrics if name != "policy_kl"} == ({share} if share else set())
    # k3 with r = new / old
    assert metrics.get("policy_kl", 0.0) == pytest.approx(ratio - 1 - math.log(ratio))


def test_clip_bounds_are_options():
    assert one_token_loss(1.5, 1.0, clip_high=0.6)[0] == pytest.approx(-1.5)
    assert one_token_loss(0.5, -1.0, clip_low=0.6)[0] == pytest.approx(0.5)
    assert one_token_loss(20.0, -1.0, dual_clip=None)[0] == pytest.approx(20.0)
    assert one_token_loss(20.0, -1.0, dual_clip=3.0)[0] == pytest.approx(3.0)


def test_weights_and_correction_multiply_and_metrics_add_up():
    mask = torch.tensor([[False, True, True, True]])
    weights = row(0.0, 0.5, 0.25, 0.25)
    old = row(0.0, 0.0, 0.0, 0.0)
    new = row(9.0, 0.0, math.log(1.5), math.log(0.5)).requires_grad_()
    loss, metrics = policy_loss(new, old, row(1.0), mask, weights, correction_BT=row(7.0, 1.0, 2.0, 0.5))
    assert loss.item() == pytest.approx(-(0.5 * 1.0 + 0.25 * 1.28 * 2.0 + 0.25 * 0.5 * 0.5))
    assert metrics["clip_high_share"].item() == pytest.approx(0.25)
    assert metrics["clip_low_share"].item() == 0.0
    assert not any(value.requires_grad for value in metrics.values())


def test_whatever_is_outside_the_mask_stays_outside():
    mask = torch.tensor([[False, True, False]])
    new = row(math.nan, -1.0, math.inf).requires_grad_()
    old = row(math.inf, -1.0, math.nan)
    correction = rollout_correction(old, row(-math.inf, -1.0, 0.0), mask)
    loss, metrics = policy_loss(new, old, row(1.0), mask, row(0.0, 1.0, 0.0), correction_BT=correction)
    loss.backward()
    assert loss.item() == -1.0
    assert new.grad.tolist() == [[0.0, -1.0, 0.0]]
    assert all(math.isfinite(value) for value in metrics.values())


def test_an_empty_mask_gives_zero_and_still_has_a_gradient():
    new = row(-1.0, -2.0).requires_grad_()
    loss, _ = policy_loss(new, new, row(0.0), torch.zeros(1, 2, dtype=torch.bool), row(0.0, 0.0))
    loss.backward()
    assert loss.item() == 0.0
    assert new.grad.tolist() == [[0.0, 0.0]]


def test_rollout_correction_by_hand():
    old = row(-1.0, -1.0, -1.0, -1.0, -1.0).requires_grad_()
    rollout = row(-1.0, -1.0 - math.log(1.5), -1.0 - math.log(3.0), -1.0 + math.log(4.0), -100.0)
    mask = torch.ones(1, 5, dtype=torch.bool)
    weights = rollout_correction(old, rollout, mask)
    assert not weights.requires_grad
    assert weights.tolist() == [pytest.approx([1.0, 1.5, 2.0, 0.25, 2.0])]
    assert rollout_correction(old, rollout, mask, cap=1e12)[0, 4].item() == pytest.approx(math.exp(20.0))


def test_mismatch_by_hand():
    mask = torch.tensor([[False, True, True]])
    old, rollout = row(5.0, -1.0, -1.0 + math.log(4.0)), row(-5.0, -1.0, -1.0)
    metrics = mismatch_metrics(old, rollout, mask, row(0.0, 0.5, 0.5))
    assert metrics["mismatch_kl"].item() == pytest.approx((4.0 - 1.0 - math.log(4.0)) / 2)
    assert metrics["mismatch_abs"].item() == pytest.approx(math.log(4.0) / 2)
    assert metrics["correction_capped_share"].item() == pytest.approx(0.5)


def test_kl_estimators_have_the_exact_mean():
    sampler, other = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.2, 0.2, 0.6], dtype=F64)
    log_ratio = (other / sampler).log()
    exact = (sampler * (sampler / other).log()).sum().item()
    assert (sampler * k1(log_ratio)).sum().item() == pytest.approx(exact)
    assert (sampler * k3(log_ratio)).sum().item() == pytest.approx(exact)
    assert (k3(log_ratio) >= 0).all()


@pytest.mark.parametrize("chunk_elements", [1, 13, 1 << 26])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_log_softmax(monkeypatch, chunk_elements, temperature):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=F64, generator=generator).mul(3).requires_grad_()
    ids = torch.randint(0, 7, (2, 5), generator=generator, dtype=torch.int32)
    upstream, upstream_entropy = (torch.randn(2, 5, dtype=F64, generator=generator) for _ in range(2))

    logprobs, entropy = token_logprobs(logits, ids, temperature, with_entropy=True)
    (gradient,) = torch.autograd.grad((logprobs * upstream + entropy * upstream_entropy).sum(), logits)

    expected_gradient_of = 0.0
    for b in range(2):
        assert logprobs[b, 0].item() == 0.0 and entropy[b, 0].item() == 0.0
        for t in range(1, 5):
            law = torch.distributions.Categorical(logits=logits[b, t - 1] / temperature)
            expected = law.log_prob(ids[b, t])
            torch.testing.assert_close(logprobs[b, t], expected)
            torch.testing.assert_close(entropy[b, t], law.entropy())
            expected_gradient_of = (
                expected_gradient_of + upstream[b, t] * expected + upstream_entropy[b, t] * law.entropy()
            )
    (expected_gradient,) = torch.autograd.grad(expected_gradient_of, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_token_logprobs_without_entropy_and_in_half_precision():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 50, generator=generator).bfloat16().requires_grad_()
    ids = torch.randint(0, 50, (2, 4), generator=generator)
    logprobs, entropy = token_logprobs(logits, ids)
    assert entropy is None
    assert logprobs.dtype == torch.float32
    exact, _ = token_logprobs(logits.detach().double(), ids)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
