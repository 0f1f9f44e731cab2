"""Builds the tiny model from nothing: a byte-level tokenizer and a Qwen3-shaped policy that half-knows Countdown.

    python scripts/make_tiny_model.py --out dpsrl/assets/tiny --seed 0     # build, then measure
    python scripts/make_tiny_model.py --out dpsrl/assets/tiny --check      # measure an existing folder

Supervised training on synthetic solutions stops while the format is right and the arithmetic is not, so
that RL has something to raise. The same seed on the same machine gives the same file.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dpsrl.data.countdown import draw_instance, generate, short_prompt
from dpsrl.rewards.countdown import score

PAD, EOS, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{- '<|eos|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
CONTEXT_TOKENS = 4096

NUMBERS, MAX_NUMBER, MAX_TARGET, OPERATORS = (3, 4), 20, 100, '+++---*/'  # the default task, which quickstart trains on

UPDATES, BATCH, PEAK_LR = 600, 128, 2e-3
NUM_ROLLOUTS = 8
NEW_TOKENS = 24
CHECK_PROMPTS = 500


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no merges, and five special tokens: any text fits and comes back as it was."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """1.9M parameters in fp32, untied, freshly drawn from torch's generator."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model


def prompt_text(problem: str) -> str:
    """The chat template's rendering of one user message, spelled out: thousands of these are made."""
    return f"{USER}{problem}{ASSISTANT}"


def draw_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """(token_ids, labels), int64 (BATCH, longest): right-padded; labels are -100 outside the response."""
    rows: list[tuple[list[int], int]] = []
    while len(rows) < BATCH:
        instance = draw_instance(NUMBERS, rng, max_number=MAX_NUMBER, max_target=MAX_TARGET, operators=OPERATORS)
        if instance is None or instance.split != "train":
            continue
        prompt = tokenizer.encode(prompt_text(short_prompt(instance.numbers, instance.target)))
        rows.append((prompt + tokenizer.encode(instance.solution + EOS), len(prompt)))
    longest = max(len(ids) for ids, _ in rows)
    token_ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
    labels = torch.full((BATCH, longest), -100)
    for row, (ids, prompt_len) in enumerate(rows):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_len : len(ids)] = torch.tensor(ids[prompt_len:])
    return token_ids, labels


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, updates: int, hook=None) -> None:
    """Supervised training in place: AdamW, warm-up then cosine to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 50
    model.train()
    with Progress() as progress:
        task = progress.add_task("training", total=updates)
        for update in range(updates):
            decay = 0.55 + 0.45 * math.cos(math.pi * update / updates)
            optimizer.param_groups[0]["lr"] = PEAK_LR * min(1.0, (update + 1) / warmup) * decay
            token_ids, labels = draw_batch(tokenizer, rng)
            logits = model(token_ids).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, description=f"training, loss {loss.item():.3f}")
            if hook: hook(update, loss.item())


@torch.no_grad()
def count_solved(model, tokenizer, rows: list[dict], batch: int = 100, temperature: float = 1.0) -> list[int]:
    """How many of NUM_ROLLOUTS samples are right, for each row."""
    model.eval()
    tokenizer.padding_side = "left"
    solved = []
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        inputs = tokenizer([prompt_text(row["problem"]) for row in chunk], return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_return_sequences=NUM_ROLLOUTS, do_sample=True,
                             temperature=temperature, top_k=0, top_p=1.0)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, row in enumerate(chunk):
            solved.append(sum(score(t, row["answer"]).correct for t in texts[i * NUM_ROLLOUTS : (i + 1) * NUM_ROLLOUTS]))
    return solved


def spread(solved):
    n = len(solved)
    return {"unsolved": sum(s == 0 for s in solved) / n, "mixed": sum(0 < s < NUM_ROLLOUTS for s in solved) / n,
            "solved": sum(s == NUM_ROLLOUTS for s in solved) / n, "mean": sum(solved) / n / NUM_ROLLOUTS}
