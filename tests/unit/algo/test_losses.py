"""Every loss against a reference that loops over tokens as its paper writes it, values and gradients, in float64."""

import math

import pytest
import torch

from dpsrl.algo.losses import (
    CORRECTIONS,
    KINDS,
    Rows,
    kl,
    log_ratio,
    mismatch_metrics,
    policy_loss,
    rollout_correction,
)

F64 = torch.float64
LENGTHS = [3, 1, 7, 5]
CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def rows_of(lengths):
    return Rows(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), len(lengths))


ROWS = rows_of(LENGTHS)


def batch(seed):
    """(logprobs that need a gradient, old, rollout, advantages (S,), weights (L,))."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=generator)

    old = -normal(sum(LENGTHS)).abs() - 0.1
    new = (old + 0.4 * normal(sum(LENGTHS))).requires_grad_()
    return new, old, old + 0.5 * normal(sum(LENGTHS)), 2 * normal(len(LENGTHS)), normal(sum(LENGTHS)).abs()


def reference_loss(kind, new, old, advantages, weights, correction):
    total, start = torch.zeros((), dtype=F64), 0
    for length, advantage in zip(LENGTHS, advantages.tolist(), strict=True):
        tokens = range(start, start + length)
        start += length
        of_response = torch.stack([new[t] - old[t] for t in tokens]).sum() / length
        for t in tokens:
            ratio = torch.exp(new[t] - old[t])
            if kind == "gspo":
                ratio = torch.exp(of_response)
            low, high = 1 - CLIP["clip_low"], 1 + CLIP["clip_high"]
            clipped = torch.clip(ratio, low, high)
            if kind == "reinforce":
                loss = -advantage * new[t]
            elif kind == "cispo":
                loss = -clipped.item() * advantage * new[t]
            else:
                loss = -torch.min(ratio * advantage, clipped * advantage)
                if advantage < 0:
                    loss = torch.min(loss, torch.tensor(-CLIP["dual_clip"] * advantage, dtype=F64))
            total = total + weights[t] * correction[t].item() * loss
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_the_papers(kind, seed):
    new, old, rollout, advantages, weights = batch(seed)
    correction = rollout_correction(old, rollout, ROWS)
    loss, _ = policy_loss(new, old, advantages[ROWS.row_L], weights, ROWS, kind, **CLIP, correction_L=correction)
    expected = reference_loss(kind, new, old, advantages, weights, correction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, new)
    (expected_gradient,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    assert gradient.abs().max() > 1e-3


def reference_correction(kind, old, rollout, low, high):
    weights, start = [], 0
    for length in LENGTHS:
        tokens = range(start, start + length)
        start += length
        of_response = math.prod(math.exp(old[t] - rollout[t]) for t in tokens)
        for t in tokens:
            weight = of_response if kind.startswith("sequence") else math.exp(old[t] - rollout[t])
            if kind.endswith("truncate"):
                weight = min(weight, high)
            elif not low <= weight <= high:
                weight = 0.0
            weights.append(1.0 if kind == "none" else weight)
    return weights


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_corrections_are_the_papers(kind, seed):
    _, old, rollout, _, _ = batch(seed)
    got = rollout_correction(old.requires_grad_(), rollout, ROWS, kind, 0.7, 1.4)
    assert not got.requires_grad
    assert got.tolist() == pytest.approx(reference_correction(kind, old.tolist(), rollout.tolist(), 0.7, 1.4))


def test_a_correction_stays_finite():
    far = rollout_correction(tensor(-1.0), tensor(-1000.0), rows_of([1]), "token_truncate", high=1e12)
    assert far.item() == pytest.approx(math.exp(20.0))


def one_token_loss(ratio, advantage, **options):
    """(loss, d loss / d logprob, metrics) of a single token."""
    logprob = tensor(-1.0).requires_grad_()
    loss, metrics = policy_loss(
        logprob, tensor(-1.0 - math.log(ratio)), tensor(advantage), tensor(1.0), rows_of([1]), **options
    )
    loss.backward()
    return loss.item(), logprob.grad.item(), {name: value.item() for name, value in metrics.items() if value > 0}


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


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_every_loss_has_the_plain_policy_gradient_summed_over_a_response(kind):
    new = tensor(-1.0, -2.0, -0.5).requires_grad_()
    rows, weights = rows_of([3]), torch.full((3,), 1 / 3, dtype=F64)
    loss, _ = policy_loss(new, new.detach(), tensor(2.0, 2.0, 2.0), weights, rows, kind)
    assert torch.autograd.grad(loss, new)[0].tolist() == pytest.approx([-2 / 3] * 3)


def test_metrics_are_weighted_sums_without_a_gradient():
    new, old = tensor(0.0, math.log(1.5), math.log(0.5)).requires_grad_(), tensor(0.0, 0.0, 0.0)
    _, metrics = policy_loss(new, old, tensor(1.0, 1.0, 1.0), tensor(0.5, 0.25, 0.25), rows_of([3]))
    assert metrics["clip_high_share"].item() == pytest.approx(0.25)
    assert metrics["clip_low_share"].item() == 0.0
    assert not any(value.requires_grad for value in metrics.values())


def test_mismatch_by_hand():
    rows, weights = rows_of([2, 1]), tensor(0.25, 0.25, 0.5)
    old, rollout = tensor(-1.0, -1.0 + math.log(4.0), -1.0), tensor(-1.0, -1.0, -1.0 + math.log(2.0))
    correction = rollout_correction(old, rollout, rows)
    metrics = mismatch_metrics(old, rollout, correction, weights, rows)
    k3 = [0.0, 4.0 - 1.0 - math.log(4.0), 0.5 - 1.0 + math.log(2.0)]
    assert metrics["mismatch_kl"].item() == pytest.approx(k3[1] / 4 + k3[2] / 2)
    assert metrics["mismatch_abs"].item() == pytest.approx(math.log(4.0) / 4 + math.log(2.0) / 2)
    # the trainer finds the first response exp(log 4 / 2) times as likely a token, the second half as likely
    assert metrics["mismatch_ppl_ratio"].item() == pytest.approx(0.5 * (1 / 2) + 0.5 * 2.0)
    assert metrics["correction_capped_share"].item() == pytest.approx(0.25)
    masked = mismatch_metrics(old, rollout, rollout_correction(old, rollout, rows, "token_mask"), weights, rows)
    assert masked["correction_masked_share"].item() == pytest.approx(0.25)


def test_kl_estimators():
    sampler, other = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    ratio = log_ratio(other.log(), sampler.log())
    exact = (sampler * (sampler / other).log()).sum().item()
    assert (sampler * kl(ratio, "k1")).sum().item() == pytest.approx(exact)
    assert (sampler * kl(ratio, "k3")).sum().item() == pytest.approx(exact)
    assert (kl(ratio, "k3") >= 0).all() and torch.equal(kl(ratio, "k2"), ratio**2 / 2)


def test_the_gradient_of_k2_in_the_loss_is_that_of_the_kl():
    """And that of k1 has mean 0, which is why it belongs in the reward."""
    logits, other = tensor(0.3, -0.2, 0.5).requires_grad_(), tensor(0.2, 0.2, 0.6)
    law = logits.log_softmax(-1)
    exact = torch.autograd.grad((law.exp() * (law - other.log())).sum(), logits, retain_graph=True)[0]
    weights = law.exp().detach()
    for kind, expected in (("k2", exact), ("k1", torch.zeros(3, dtype=F64))):
        estimate = (weights * kl(other.log() - law, kind)).sum()
        torch.testing.assert_close(torch.autograd.grad(estimate, logits, retain_graph=True)[0], expected)
