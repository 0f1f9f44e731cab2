"""Token logprobs, the clipped policy-gradient loss, its off-policy corrections and KL estimators. Pure torch.

Knows nothing of models, ranks or micro-batches beyond the weights it is given.

Axes: B rows, T token positions, V vocabulary. Every (B, T) tensor is about the token AT t; the
first token of a row has no logprob and holds 0.

Losses and metrics are sums over loss tokens of weight x value, with weights from `packing` that
sum to 1 over a token_mean update: add the results of all micro-batches and ranks, and they are
the update's means. Values outside `mask_BT` may be anything, NaN too: they never reach a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: far beyond any clip, and still finite in float32
CHUNK_ELEMENTS = 1 << 26  # logits upcast at a time, 256 MiB in float32


def token_logprobs(
    logits_BTV: Tensor, token_ids_BT: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(logprobs_BT, entropy_BT or None): log p(token t | tokens before), and that law's entropy in nats.

    logits_BTV: as a causal model gives them: those at t are about token t + 1 (the shift is done
    here). temperature: the one the tokens were sampled at; logits are divided by it.
    Computed in float32, or float64 for float64 logits, a chunk at a time: beyond the logits
    themselves only their gradient is ever held whole. Not differentiable twice.
    """
    assert temperature > 0, temperature
    target_BT = token_ids_BT.long().roll(-1, dims=1)  # the last column is dropped below
    vocab = logits_BTV.shape[-1]
    logprobs, entropy = _LogprobAndEntropy.apply(
        logits_BTV.reshape(-1, vocab), target_BT.reshape(-1), temperature, with_entropy
    )
    logprobs_BT = shift_right(logprobs.view(token_ids_BT.shape))
    return logprobs_BT, shift_right(entropy.view(token_ids_BT.shape)) if with_entropy else None


def shift_right(values_BT: Tensor) -> Tensor:
    """Each row moved by one position: what was said at t - 1 about token t stands at t; 0 comes first."""
    return torch.nn.functional.pad(values_BT[:, :-1], (1, 0))


class _LogprobAndEntropy(torch.autograd.Function):
    """Per row of logits: log softmax at the target, and the entropy; the backward pass recomputes softmax.

    With z = logits / temperature, p = softmax(z) and H = -sum p log p:
    d log p_target / dz = onehot - p,   dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(ctx, logits_RV: Tensor, target_R: Tensor, temperature: float, with_entropy: bool):
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        logprobs_R = torch.empty(target_R.shape, dtype=dtype, device=logits_RV.device)
        normaliser_R = torch.empty_like(logprobs_R)
        entropy_R = torch.zeros_like(logprobs_R)
        for rows in row_chunks(logits_RV):
            z = logits_RV[rows].to(dtype) / temperature
            normaliser = z.logsumexp(dim=-1)
            normaliser_R[rows] = normaliser
            logprobs_R[rows] = z.gather(-1, target_R[rows, None]).squeeze(-1) - normaliser
            if with_entropy:
                entropy_R[rows] = torch.special.entr(z.sub_(normaliser[:, None]).exp_()).sum(dim=-1)
        ctx.save_for_backward(logits_RV, target_R, normaliser_R, entropy_R)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return logprobs_R, entropy_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs_R: Tensor, grad_entropy_R: Tensor):
        logits_RV, target_R, normaliser_R, entropy_R = ctx.saved_tensors
        grad_RV = torch.empty_like(logits_RV)
        for rows in row_chunks(logits_RV):
            z = logits_RV[rows].to(normaliser_R.dtype) / ctx.temperature
            p = z.sub_(normaliser_R[rows, None]).exp_()
            grad = p * -grad_logprobs_R[rows, None]
            grad.scatter_add_(-1, target_R[rows, None], grad_logprobs_R[rows, None])
            if ctx.with_entropy:
                grad += grad_entropy_R[rows, None] * (torch.special.entr(p) - p * entropy_R[rows, None])
            grad_RV[rows] = grad / ctx.temperature
        return grad_RV, None, None, None


def row_chunks(logits_RV: Tensor) -> list[slice]:
    """Slices that cover the rows, each of at most CHUNK_ELEMENTS logits (and at least one row)."""
    num_rows, vocab = logits_RV.shape
    step = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    weights_BT: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 10.0,
    correction_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics): the clipped surrogate of PPO with clip-higher and dual clip, summed with the weights.

    With ratio r = exp(logprob - old_logprob) and advantage A, per token
        L = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)    (PPO 1707.06347 eq. 7; DAPO 2503.14476 eq. 8)
        L = min(L, -dual_clip A) where A < 0                     (dual-clip PPO, 1912.09729)
    and L is multiplied by `correction_BT` (`rollout_correction`), where given.

    old_logprobs_BT: of the policy that the update started from; no gradient flows into them.
    advantages_BT: (B, T), or (B, 1). dual_clip: above 1, or None for none.
    Metrics: shares of loss tokens `clip_low_share`, `clip_high_share`, `dual_clip_share`, and
    `policy_kl`, the k3 estimate of KL(old || new).
    """
    log_ratio_BT = masked_log_ratio(logprobs_BT, old_logprobs_BT.detach(), mask_BT)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    dual_BT = torch.zeros_like(mask_BT)
    if dual_clip is not None:
        assert dual_clip > 1.0, dual_clip
        ceiling_BT = -dual_clip * advantages_BT
        dual_BT = (advantages_BT < 0) & (loss_BT > ceiling_BT)
        loss_BT = torch.where(dual_BT, ceiling_BT, loss_BT)
    if correction_BT is not None:
        loss_BT = loss_BT * correction_BT.detach()
    metrics = {
        "clip_low_share": (advantages_BT < 0) & (ratio_BT < 1.0 - clip_low),
        "clip_high_share": (advantages_BT > 0) & (ratio_BT > 1.0 + clip_high),
        "dual_clip_share": dual_BT,
        "policy_kl": k3(log_ratio_BT),
    }
    return (loss_BT * weights_BT).sum(), weighted_sums(metrics, weights_BT)


def rollout_correction(
    old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, cap: float = 2.0
) -> Tensor:
    """Truncated importance weights min(p_trainer / p_rollout, cap) per token, detached; 1 outside the mask.

    They correct for the engine having sampled from a slightly different policy than the trainer
    holds (Yao et al. 2025, truncated importance sampling).
    """
    return masked_log_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT).detach().exp().clamp(max=cap)


def mismatch_metrics(
    old_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    mask_BT: Tensor,
    weights_BT: Tensor,
    cap: float = 2.0,
) -> dict[str, Tensor]:
    """How far engine and trainer are apart on the sampled tokens.

    `mismatch_kl`: k3 estimate of KL(rollout || trainer); `mismatch_abs`: mean |difference of logprobs|;
    `correction_capped_share`: share of tokens whose importance weight reaches `cap`.
    """
    log_ratio_BT = masked_log_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT).detach()
    metrics = {
        "mismatch_kl": k3(log_ratio_BT),
        "mismatch_abs": log_ratio_BT.abs(),
        "correction_capped_share": log_ratio_BT.exp() > cap,
    }
    return weighted_sums(metrics, weights_BT)


def masked_log_ratio(logprobs_BT: Tensor, base_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """logprobs - base, clamped to +-20; 0 outside the mask, with no gradient there."""
    difference_BT = torch.where(mask_BT, logprobs_BT - base_logprobs_BT, torch.zeros_like(logprobs_BT))
    return difference_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def k1(log_ratio: Tensor) -> Tensor:
    """Estimate -log r of KL(sampler || other), with r = other / sampler: unbiased, may be negative.

    k1 and k3: Schulman 2020, "Approximating KL divergence". For KL(policy || reference) the
    log ratio is reference - policy.
    """
    return -log_ratio


def k3(log_ratio: Tensor) -> Tensor:
    """Estimate r - 1 - log r of the same KL: unbiased, never negative, smaller variance."""
    return torch.expm1(log_ratio) - log_ratio


def weighted_sums(metrics_BT: dict[str, Tensor], weights_BT: Tensor) -> dict[str, Tensor]:
    """The weighted sum of each metric, a detached scalar; additive over micro-batches and ranks."""
    return {name: (values.detach().to(weights_BT.dtype) * weights_BT).sum() for name, values in metrics_BT.items()}
