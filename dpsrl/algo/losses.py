"""The policy-gradient losses, their off-policy corrections and KL estimators. Pure torch, on loss tokens alone.

Knows nothing of models, ranks or micro-batches beyond the weights it is given.

Axes: L loss tokens, end to end; `row_L` says which of the S rollouts each is of. Losses and metrics are sums over loss
tokens of weight x value (`packing`): add the results of all micro-batches and ranks, divide by the update's total
weight, and they are the update's means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsrl.own import check_call, load_own, told
from dpsrl.types import UserError

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: far beyond any clip, and still finite in float32
KINDS = ("ppo", "gspo", "cispo", "reinforce")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
KL_KINDS = ("k1", "k2", "k3")


OwnLoss = Callable[[Tensor, Tensor, Tensor, "Rows"], Tensor]


@dataclass(frozen=True)
class Rows:
    """Which rollout each loss token is of, and sums and means over rollouts."""

    row_L: Tensor  # int64
    num_rows: int

    def total(self, values_L: Tensor) -> Tensor:
        """(S,): the sum of each rollout."""
        return values_L.new_zeros(self.num_rows).index_add(0, self.row_L, values_L)

    def mean(self, values_L: Tensor) -> Tensor:
        """(S,): the mean of each rollout; 0 for one without a loss token."""
        return self.total(values_L) / self.total(torch.ones_like(values_L)).clamp(min=1)


def policy_loss(
    logprobs_L: Tensor,
    old_logprobs_L: Tensor,
    advantages_L: Tensor,
    weights_L: Tensor,
    rows: Rows,
    kind: str | OwnLoss = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 10.0,
    correction_L: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics), summed with the weights. With ratio r = exp(logprob - old logprob) and advantage A, per token

    ppo:        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)    (PPO 1707.06347 eq. 7; GRPO 2402.03300 eq. 3;
                                                                      with clip-higher DAPO 2503.14476 eq. 8)
    gspo:       the same with r of the whole response, exp(mean of its tokens' log ratios)  (GSPO 2507.18071 eq. 5-7)
    cispo:      -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A logprob  (CISPO, MiniMax-M1 2506.13585 eq. 4)
    reinforce:  -A logprob                                                      (RLOO 2402.14740 eq. 3)

    own:        what a function of the user's own gives for each token (`load_loss`)

    and for ppo and gspo, where A < 0, at most -dual_clip A (dual-clip PPO, 1912.09729). Every loss is multiplied by
    `correction_L` (`rollout_correction`), where given.

    old_logprobs_L: of the policy that the update started from; no gradient flows into them. dual_clip: above 1, or
    None for none. Metrics: shares of loss tokens `clip_low_share`, `clip_high_share`, `dual_clip_share`, and
    `policy_kl`, the k3 estimate of KL(old || new).
    """
    assert callable(kind) or kind in KINDS, kind
    token_log_ratio_L = log_ratio(logprobs_L, old_logprobs_L.detach())
    log_ratio_L = rows.mean(token_log_ratio_L)[rows.row_L] if kind == "gspo" else token_log_ratio_L
    ratio_L = log_ratio_L.exp()
    clipped_L = ratio_L.clamp(1.0 - clip_low, 1.0 + clip_high)
    dual_L = torch.zeros_like(ratio_L, dtype=torch.bool)
    if callable(kind):
        loss_L = kind(logprobs_L, old_logprobs_L.detach(), advantages_L, rows)
    elif kind == "reinforce":
        loss_L = -advantages_L * logprobs_L
    elif kind == "cispo":
        loss_L = -clipped_L.detach() * advantages_L * logprobs_L
    else:
        loss_L = -torch.minimum(ratio_L * advantages_L, clipped_L * advantages_L)
        if dual_clip is not None:
            assert dual_clip > 1.0, dual_clip
            ceiling_L = -dual_clip * advantages_L
            dual_L = (advantages_L < 0) & (loss_L > ceiling_L)
            loss_L = torch.where(dual_L, ceiling_L, loss_L)
    if correction_L is not None:
        loss_L = loss_L * correction_L.detach()
    clips = kind in ("ppo", "gspo", "cispo")
    metrics = {
        "clip_low_share": clips & (advantages_L < 0) & (ratio_L < 1.0 - clip_low),
        "clip_high_share": clips & (advantages_L > 0) & (ratio_L > 1.0 + clip_high),
        "dual_clip_share": dual_L,
        "policy_kl": kl(token_log_ratio_L, "k3"),
    }
    return (loss_L * weights_L).sum(), weighted_sums(metrics, weights_L)


def load_loss(name: str) -> OwnLoss:
    """The loss at `my_module:function`, tried on a tiny batch: UserError unless it gives a finite number for each
    token, which depends on the logprobs.

    It is called with (logprobs_L, old_logprobs_L, advantages_L, rows), as `policy_loss` has them. What it gives is
    multiplied by the correction and the weights, and summed, as all losses are.
    """
    label = f"algo.loss={name}"
    function = load_own(name, label)
    check_call(function, label, 4, f"def {name.partition(':')[2]}(logprobs, old_logprobs, advantages, rows)")

    def loss(logprobs_L: Tensor, old_logprobs_L: Tensor, advantages_L: Tensor, rows: Rows) -> Tensor:
        try:
            loss_L = function(logprobs_L, old_logprobs_L, advantages_L, rows)
        except Exception as error:  # whatever a person's function does
            raise UserError(f"{label} failed with {told(error)}; mend it.") from error
        if not isinstance(loss_L, Tensor) or loss_L.shape != logprobs_L.shape:
            given = f"a tensor {tuple(loss_L.shape)}" if isinstance(loss_L, Tensor) else type(loss_L).__name__
            raise UserError(
                f"{label} returned {given} for {len(logprobs_L)} tokens; return a tensor with a loss for each."
            )
        return loss_L

    rows = Rows(torch.tensor([0, 0, 0, 1, 1]), 2)
    old_L, advantages_L = torch.tensor([-0.5, -1.5, -0.1, -2.0, -0.7]), torch.tensor([1.0, -1.0])[rows.row_L]
    logprobs_L = (old_L + torch.tensor([0.1, -0.1, 0.0, 0.05, -0.02])).requires_grad_()
    loss_L = loss(logprobs_L, old_L, advantages_L, rows)
    (gradient_L,) = torch.autograd.grad(loss_L.sum() + 0.0 * logprobs_L.sum(), logprobs_L)
    if not gradient_L.any():
        raise UserError(f"{label} has no gradient in the logprobs; compute it from them, in torch, without detach.")
    if not (loss_L.isfinite().all() and gradient_L.isfinite().all()):
        raise UserError(f"{label} or its gradient is not finite on a tiny batch; clamp what may grow or divide by 0.")
    return loss


def rollout_correction(
    old_logprobs_L: Tensor,
    rollout_logprobs_L: Tensor,
    rows: Rows,
    kind: str = "token_truncate",
    low: float = 0.5,
    high: float = 2.0,
) -> Tensor:
    """What each token's loss is multiplied by, since the engine sampled from another policy than the trainer holds.

    With w = p_trainer / p_engine, of the token or (sequence_*) of the whole response, a product over its tokens:
    *_truncate: min(w, high)                       (truncated importance sampling, Yao et al. 2025)
    *_mask:     w where low <= w <= high, else 0   (masked importance sampling; IcePop, Ring-1T 2510.18855)
    none:       1
    """
    assert kind in CORRECTIONS, kind
    if kind == "none":
        return torch.ones_like(old_logprobs_L)
    log_weight_L = (old_logprobs_L - rollout_logprobs_L).detach()
    if kind.startswith("sequence"):
        log_weight_L = rows.total(log_weight_L)[rows.row_L]
    weight_L = log_weight_L.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if kind.endswith("truncate"):
        return weight_L.clamp(max=high)
    return torch.where((weight_L >= low) & (weight_L <= high), weight_L, torch.zeros_like(weight_L))


def mismatch_metrics(
    old_logprobs_L: Tensor,
    rollout_logprobs_L: Tensor,
    correction_L: Tensor,
    weights_L: Tensor,
    rows: Rows,
    high: float = 2.0,
) -> dict[str, Tensor]:
    """How far engine and trainer are apart on the sampled tokens.

    `mismatch_kl`: k3 estimate of KL(engine || trainer); `mismatch_abs`: mean |difference of logprobs|;
    `mismatch_ppl_ratio`: the trainer's perplexity of a response over the engine's, mean over responses;
    `correction_capped_share`, `correction_masked_share`: tokens whose weight was cut at `high`, or set to 0.
    """  # fmt: skip
    log_ratio_L = log_ratio(old_logprobs_L, rollout_logprobs_L).detach()
    metrics = {
        "mismatch_kl": kl(log_ratio_L, "k3"),
        "mismatch_abs": log_ratio_L.abs(),
        "mismatch_ppl_ratio": rows.mean(-log_ratio_L).exp()[rows.row_L],
        "correction_capped_share": correction_L >= high,
        "correction_masked_share": correction_L == 0,
    }
    return weighted_sums(metrics, weights_L)


def log_ratio(logprobs_L: Tensor, base_logprobs_L: Tensor) -> Tensor:
    """logprobs - base, clamped to +-20."""
    return (logprobs_L - base_logprobs_L).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl(log_ratio_L: Tensor, kind: str) -> Tensor:
    """Estimate of KL(sampler || other) from log r = other - sampler at the sampler's tokens.

    k1: -log r, unbiased, may be negative; k2: (log r)^2 / 2, biased, and its gradient is that of the KL;
    k3: r - 1 - log r, unbiased, never negative, smaller variance (Schulman 2020, "Approximating KL divergence").
    For KL(policy || reference) the log ratio is reference - policy. As a loss, k1's gradient has mean 0: it belongs in
    the reward.
    """
    assert kind in KL_KINDS, kind
    if kind == "k1":
        return -log_ratio_L
    return 0.5 * log_ratio_L.square() if kind == "k2" else torch.expm1(log_ratio_L) - log_ratio_L


def weighted_sums(metrics_L: dict[str, Tensor], weights_L: Tensor) -> dict[str, Tensor]:
    """The weighted sum of each metric, a detached scalar; additive over micro-batches and ranks."""
    return {name: (values.detach().to(weights_L.dtype) * weights_L).sum() for name, values in metrics_L.items()}
