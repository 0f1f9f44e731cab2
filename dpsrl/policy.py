"""The policy as the trainer runs it: logprobs of the loss tokens of a packed micro-batch, and no more.

Owns the model's loading, its attention over rows that share a prompt, and a head that never holds the logits of all
tokens at once. Knows nothing of losses, optimizers or ranks. It is an ordinary module, so that DeepSpeed, activation
checkpointing and torch.compile work on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsrl.algo.packing import MicroBatch
from dpsrl.types import UserError

ATTENTION = "dpsrl_packed"
CHUNK_ELEMENTS = 1 << 26  # logits held at a time, 256 MiB in float32
WIDTH_TOLERANCE = 0.75  # rows down to this share of the longest one's length are padded to it, for attention alone


class Policy(nn.Module):
    """A causal language model of transformers that answers with logprobs.

    head_dtype: what logits are computed in. On GPUs float32 on both ends: one side alone drifts further than none.
    """

    def __init__(self, model: nn.Module, head_dtype: torch.dtype) -> None:
        super().__init__()
        check_architecture(model.config)
        self.model = model
        head = model.get_output_embeddings()
        head.forward = lambda hidden, target, temperature, entropy: head_logprobs(
            hidden, head.weight, target, temperature, entropy, head_dtype
        )

    def forward(
        self, batch: PackedBatch, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(logprobs_L, entropy_L): of each loss token given its row up to there, at the sampling temperature."""
        hidden_ND = self.model.base_model(
            input_ids=batch.token_ids_N[None], position_ids=batch.position_ids_N[None], use_cache=False, rows=batch.rows
        ).last_hidden_state[0]
        head = self.model.get_output_embeddings()  # called as a module, so that ZeRO-3 gathers its weight
        # Not hidden_ND[...]: responses of a group share a predictor, and indexing adds their gradients in any order.
        hidden_LD = hidden_ND.index_select(0, batch.predictor_L)
        return head(hidden_LD, batch.target_L, temperature, with_entropy)


def load_policy(
    path: str, dtype: torch.dtype, head_dtype: torch.dtype, gradient_checkpointing: bool = False, compile: bool = False
) -> Policy:
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)  # rows are cut before attention, not masked in it
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compile:
        model.base_model.compile(dynamic=True)  # any number of tokens
    return Policy(model, head_dtype).train()


def check_architecture(config: Any) -> None:
    """Refuses models whose attention or head does more than is computed here."""
    for name, plain in {"final_logit_softcapping": None, "attn_logit_softcapping": None, "logit_scale": 1.0,
                        "logits_scaling": 1.0}.items():  # fmt: skip
        if getattr(config, name, None) not in (None, plain):
            raise UserError(
                f"the model's {name}={getattr(config, name)} is not supported by the trainer: choose a model without it"
            )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "use_sliding_window", False):
        raise UserError(
            f"the model's attention is {', '.join(sorted(kinds))}: the trainer runs models with full attention in "
            "every layer"
        )


# --- what goes in -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionRows:
    """Where on the line the tokens of each row lie, and where in the rows' output each token of the line is taken.

    A row holds its prompt's tokens too, which it shares on the line with the rows of its group. For `flash`, rows lie
    end to end; else they are padded on the right to a few widths, which a causal row needs no mask for.
    """

    blocks: list[Tensor]  # int64 (rows, width) of places on the line, by width; one of shape (M,) for `flash`
    source_N: Tensor  # int64, the place in the concatenated outputs of the blocks
    starts: Tensor | None = None  # int32 (S + 1,), for `flash`
    longest: int = 0


@dataclass(frozen=True)
class PackedBatch:
    """The tensors of a micro-batch that the model sees."""

    token_ids_N: Tensor
    position_ids_N: Tensor
    predictor_L: Tensor
    target_L: Tensor
    rows: AttentionRows


def packed_batch(micro: MicroBatch, device: torch.device, flash: bool = False) -> PackedBatch:
    def tensor(array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=device)  # a copy: arrays from Ray's object store are read-only

    blocks, source_N = attention_blocks(micro, flash)
    starts = np.concatenate([[0], np.cumsum(micro.row_lengths_S)]).astype(np.int32) if flash else None
    rows = AttentionRows(
        [tensor(block) for block in blocks], tensor(source_N), None if starts is None else tensor(starts),
        int(micro.row_lengths_S.max()),
    )  # fmt: skip
    return PackedBatch(
        tensor(micro.token_ids_N), tensor(micro.position_ids_N), tensor(micro.predictor_L), tensor(micro.target_L), rows
    )


def attention_blocks(micro: MicroBatch, flash: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """(blocks, source_N) of `AttentionRows`, as arrays."""
    source_N = np.empty(micro.token_ids_N.size, dtype=np.int64)
    if flash:
        source_N[micro.row_tokens_M] = np.arange(micro.row_tokens_M.size)
        return [micro.row_tokens_M], source_N
    starts_S = np.cumsum(micro.row_lengths_S) - micro.row_lengths_S
    order = np.argsort(-micro.row_lengths_S, kind="stable")
    blocks, first, offset = [], 0, 0
    while first < order.size:
        width = int(micro.row_lengths_S[order[first]])
        last = first
        while last < order.size and micro.row_lengths_S[order[last]] >= WIDTH_TOLERANCE * width:
            last += 1
        rows = order[first:last]
        columns = np.arange(width)
        real = columns < micro.row_lengths_S[rows, None]
        places = np.where(real, starts_S[rows, None] + columns, starts_S[rows, None])
        block = micro.row_tokens_M[places]
        flat = offset + np.arange(block.size).reshape(block.shape)
        source_N[block[real]] = flat[real]
        blocks.append(block)
        first, offset = last, offset + block.size
    return blocks, source_N


# --- attention --------------------------------------------------------------------------------------


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    rows: AttentionRows | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each row; query, key, value (1, heads, N, head size), output (1, N, heads, head size)."""
    assert rows is not None and attention_mask is None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, heads, head size)
    attend = _flash_attention if rows.starts is not None else _block_attention
    return attend(q, k, v, rows, scaling).index_select(0, rows.source_N)[None], None


def _block_attention(q: Tensor, k: Tensor, v: Tensor, rows: AttentionRows, scaling: float | None) -> Tensor:
    outputs = []
    for block in rows.blocks:
        q_BHTD, k_BHTD, v_BHTD = (
            tensor.index_select(0, block.flatten()).view(*block.shape, *tensor.shape[1:]).transpose(1, 2)
            for tensor in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, rows: AttentionRows, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.index_select(0, rows.blocks[0]) for tensor in (q, k, v))
    return varlen_attn(
        q, k, v, rows.starts, rows.starts, rows.longest, rows.longest, scale=scaling, window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has its variable-length flash attention for this card and type."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)


# --- the head ---------------------------------------------------------------------------------------


def head_logprobs(
    hidden_LD: Tensor, weight_VD: Tensor, target_L: Tensor, temperature: float, with_entropy: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(logprobs_L, entropy_L): log softmax(hidden @ weight.T / temperature) at the target, and the entropy, in nats.

    Logits exist a chunk of tokens at a time, forwards and backwards, so that memory does not grow with tokens x
    vocabulary. They are worked on in place: on a card a pass over them costs about as much as their making. Sums are
    float32, or float64 for float64 weights. entropy is 0 unless asked for.
    """
    assert temperature > 0, temperature
    return _HeadLogprobs.apply(hidden_LD, weight_VD, target_L, temperature, with_entropy, dtype)


class _HeadLogprobs(torch.autograd.Function):
    """With z = logits / temperature, p = softmax(z) and H = -sum p log p:
    d log p_target / dz = onehot - p,   dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_LD: Tensor, weight_VD: Tensor, target_L: Tensor, temperature: float, with_entropy: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wide = torch.promote_types(dtype, torch.float32)
        logprobs_L = torch.empty(target_L.shape, dtype=wide, device=hidden_LD.device)
        normaliser_L, entropy_L = torch.empty_like(logprobs_L), torch.zeros_like(logprobs_L)
        head_VD = weight_VD.to(dtype)
        for chunk in row_chunks(target_L.numel(), weight_VD.shape[0]):
            z = _logits(hidden_LD[chunk].to(dtype), head_VD, temperature, wide)
            normaliser = z.logsumexp(dim=-1)
            normaliser_L[chunk] = normaliser
            logprobs_L[chunk] = z.gather(-1, target_L[chunk, None]).squeeze(-1) - normaliser
            if with_entropy:
                entropy_L[chunk] = torch.special.entr(z.sub_(normaliser[:, None]).exp_()).sum(dim=-1)
        ctx.save_for_backward(hidden_LD, weight_VD, target_L, normaliser_L, entropy_L)
        ctx.temperature, ctx.with_entropy, ctx.dtype, ctx.wide = temperature, with_entropy, dtype, wide
        return logprobs_L, entropy_L

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs_L: Tensor, grad_entropy_L: Tensor) -> tuple[Tensor | None, ...]:
        hidden_LD, weight_VD, target_L, normaliser_L, entropy_L = ctx.saved_tensors
        grad_hidden_LD = torch.empty_like(hidden_LD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=ctx.wide)
        head_VD = weight_VD.to(ctx.dtype)
        for chunk in row_chunks(target_L.numel(), weight_VD.shape[0]):
            hidden = hidden_LD[chunk].to(ctx.dtype)
            z = _logits(hidden, head_VD, ctx.temperature, ctx.wide)
            p = z.sub_(normaliser_L[chunk, None]).exp_()
            grad_logprobs, grad_entropy = (g[chunk, None] / ctx.temperature for g in (grad_logprobs_L, grad_entropy_L))
            of_entropy = torch.special.entr(p) - p * entropy_L[chunk, None] if ctx.with_entropy else None
            grad = p.mul_(-grad_logprobs).scatter_add_(-1, target_L[chunk, None], grad_logprobs)
            if of_entropy is not None:
                grad.addcmul_(of_entropy, grad_entropy)
            grad = grad.to(ctx.dtype)
            grad_hidden_LD[chunk] = (grad @ head_VD).to(hidden_LD.dtype)
            if ctx.dtype == ctx.wide:
                grad_weight_VD.addmm_(grad.T, hidden)
            else:
                grad_weight_VD += grad.T @ hidden
        return grad_hidden_LD, grad_weight_VD.to(weight_VD.dtype), None, None, None, None


def _logits(hidden_LD: Tensor, head_VD: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    logits = F.linear(hidden_LD, head_VD).to(wide)
    return logits if temperature == 1 else logits.div_(temperature)


def row_chunks(num_tokens: int, vocab: int) -> list[slice]:
    """Slices that cover the tokens, each of at most CHUNK_ELEMENTS logits (and at least one token)."""
    step = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]
