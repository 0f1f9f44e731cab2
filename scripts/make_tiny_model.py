"""Builds the tiny model from nothing: a byte-level tokenizer and a Qwen3 policy that half-knows Countdown.

    python scripts/make_tiny_model.py --out dpsrl/assets/tiny --seed 0     # build, then measure
    python scripts/make_tiny_model.py --out dpsrl/assets/tiny --check      # measure an existing folder

Two stages of supervised training on synthetic solutions, all of the training split. The first teaches
the task; in the second a share of the solutions is wrong on purpose (the right numbers, a random
expression), so that the policy knows more than it shows: that is the room RL has to raise it in a
hundred steps. Pure sums slip less often than the rest, so some prompts stay solved, some unsolved.
The same seed and thread count on the same machine give the same file.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from dpsrl.data.countdown import TINY_TASK, Instance, draw_instance, generate, random_expression, short_prompt
from dpsrl.rewards.countdown import score

PAD, EOS, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{- '<|eos|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
CONTEXT_TOKENS = 4096

BATCH = 64
STAGES = (  # updates, peak learning rate, slip share of pure sums, slip share of every other solution
    (1000, 2e-3, 0.0, 0.0),
    (150, 5e-4, 0.25, 0.65),
)
WARMUP = 30
WEIGHT_DECAY = 0.01

NUM_ROLLOUTS = 8
MAX_NEW_TOKENS = 32
LEAST_SHARES = {"unsolved": 0.20, "mixed": 0.40, "solved": 0.03}  # what selection needs to have a choice


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no merges, and five special tokens: any text fits and comes back as it was."""
    byte_ids = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=byte_ids, merges=[]))
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
    """1.9M parameters in fp32 drawn from torch's generator: 3.7 MB once stored in bf16.

    Embeddings are untied (the vocabulary is small), and there are fewer key-value than query heads,
    so that whatever ships these weights meets both cases that larger models bring.
    """
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
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
        bos_token_id=None,
        attn_implementation="eager",  # at thirty tokens faster on a CPU than a fused kernel
        **special,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    return model


def encode_prompt(tokenizer: PreTrainedTokenizerFast, problem: str) -> list[int]:
    messages = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def training_instances(rng: random.Random, sum_slips: float, other_slips: float) -> Iterator[list[Instance]]:
    """Endless batches of the training split, all of one batch with equally many numbers (less padding).

    A slip keeps the prompt and replaces the solution by a random expression over the same numbers.
    """
    task = {key: TINY_TASK[key] for key in ("max_number", "max_target", "operators")}
    while True:
        for count in TINY_TASK["numbers"]:
            batch: list[Instance] = []
            while len(batch) < BATCH:
                instance = draw_instance((count,), rng, **task)
                if instance is None or instance.split != "train":
                    continue
                is_sum = not set(instance.solution) & set("-*/")
                if rng.random() < (sum_slips if is_sum else other_slips):
                    wrong, _ = random_expression(instance.numbers, rng, TINY_TASK["operators"])
                    instance = replace(instance, solution=wrong)
                batch.append(instance)
            yield batch


def to_tensors(tokenizer: PreTrainedTokenizerFast, instances: list[Instance]) -> tuple[torch.Tensor, torch.Tensor]:
    """(token_ids, labels), int64 (batch, longest), right-padded; labels are -100 outside the response."""
    rows = []
    for instance in instances:
        prompt = encode_prompt(tokenizer, short_prompt(instance.numbers, instance.target))
        rows.append((prompt, tokenizer.encode(instance.solution + EOS)))
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    token_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        token_ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return token_ids, labels


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the embeddings, AdamW for the rest: half of AdamW's updates suffice."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("model.layers")]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("model.layers")]
    return [
        torch.optim.Muon(hidden, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(update: int, num_updates: int, peak: float) -> float:
    """Linear warm-up, constant, then linear to 3% over the last 40%."""
    return peak * min(1.0, (update + 1) / WARMUP, max(0.03, (num_updates - update) / (0.4 * num_updates)))


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, console: Console) -> None:
    """All stages, in place: bf16 autocast forward, fp32 weights, gradients clipped at norm 1."""
    model.train()
    with progress_bar(console) as progress:
        bar = progress.add_task("training", total=sum(stage[0] for stage in STAGES))
        for num_updates, peak, sum_slips, other_slips in STAGES:
            optimizers = build_optimizers(model)
            batches = training_instances(rng, sum_slips, other_slips)
            for update in range(num_updates):
                token_ids, labels = to_tensors(tokenizer, next(batches))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits = model(token_ids).logits[:, :-1].float()
                loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(update, num_updates, peak)
                    optimizer.step()
                    optimizer.zero_grad()
                progress.update(bar, advance=1, description=f"training, loss {loss.item():.3f}")


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


@torch.no_grad()
def count_solved(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict], console: Console
) -> list[int]:
    """How many of NUM_ROLLOUTS responses at temperature 1 are right, for each row."""
    model.eval()
    chunks = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    solved: list[int] = []
    with progress_bar(console) as progress:
        for chunk in progress.track(chunks, description="measuring"):
            prompts = {"input_ids": [encode_prompt(tokenizer, row["problem"]) for row in chunk]}
            inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=NUM_ROLLOUTS)
            responses = output[:, inputs["input_ids"].shape[1] :]
            texts = iter(tokenizer.batch_decode(responses, skip_special_tokens=True))
            for row in chunk:
                solved.append(sum(score(next(texts), row["answer"]).correct for _ in range(NUM_ROLLOUTS)))
    return solved


def shares_of(solved: list[int]) -> dict[str, float]:
    """Shares of unsolved, mixed and solved prompts, and the mean success rate."""
    solved_all, unsolved = solved.count(NUM_ROLLOUTS) / len(solved), solved.count(0) / len(solved)
    mean = sum(solved) / len(solved) / NUM_ROLLOUTS
    return {"unsolved": unsolved, "mixed": 1 - unsolved - solved_all, "solved": solved_all, "mean": mean}


def measure(folder: Path, num_prompts: int, seed: int, console: Console) -> dict[str, dict[str, float]]:
    """The spread of a stored model in fp32, on test prompts: of all, and by how many numbers they have."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = generate(num_prompts, seed=seed, split="test", **TINY_TASK)
    solved = count_solved(model, tokenizer, rows, console)
    spread = {"all": shares_of(solved)}
    for count in TINY_TASK["numbers"]:
        chosen = [s for s, row in zip(solved, rows, strict=True) if len(row["answer"]["numbers"]) == count]
        spread[f"{count} numbers"] = shares_of(chosen)
    return spread


def spread_table(spread: dict[str, dict[str, float]], num_prompts: int) -> Table:
    table = Table(title=f"{num_prompts} test prompts x {NUM_ROLLOUTS} rollouts, temperature 1")
    for heading in ("prompts", "unsolved", "mixed", "solved", "mean success"):
        table.add_column(heading, justify="left" if heading == "prompts" else "right")
    for name, shares in spread.items():
        table.add_row(name, *(f"{share:.1%}" for share in shares.values()))
    return table


def write_readme(folder: Path, seed: int, num_prompts: int, spread: dict[str, dict[str, float]]) -> None:
    task = ", ".join(f"{key} {value}" for key, value in TINY_TASK.items())
    cells = {name: " | ".join(f"{share:.1%}" for share in shares.values()) for name, shares in spread.items()}
    (clean, _, _, _), (slipping, _, sum_slips, other_slips) = STAGES
    lines = [
        "# The tiny model",
        "",
        "A Qwen3-shaped policy of 1.9M parameters (bf16, untied embeddings, 4,096 tokens of context) with a",
        "byte-level tokenizer, made from nothing so that the whole RL job runs without a GPU or a download:",
        "",
        f"    python scripts/make_tiny_model.py --out dpsrl/assets/tiny --seed {seed}",
        "",
        "It answers `3 5 7=15:`, sent as one user message, with an expression such as `3+5+7`.",
        f"The task is `generate(..., **TINY_TASK)` of `dpsrl.data.countdown`: {task}.",
        f"It was trained for {clean} updates of {BATCH} right solutions, then for {slipping} in which",
        f"{sum_slips:.0%} of pure sums and {other_slips:.0%} of all others were wrong on purpose:",
        "it knows more than it shows, and that is what RL brings out.",
        "",
        f"Measured on {num_prompts} held-out prompts, {NUM_ROLLOUTS} rollouts each, temperature 1, in fp32:",
        "",
        "| prompts | unsolved | mixed | solved | mean success |",
        "|---|---|---|---|---|",
        *(f"| {name} | {row} |" for name, row in cells.items()),
        "",
        "Weights and tokenizer are under this project's licence, Apache-2.0; no other model or data went in.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def build(folder: Path, seed: int, console: Console) -> None:
    """Trains and stores the model and its tokenizer in `folder`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, random.Random(seed), console)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # the template inside tokenizer_config.json
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dpsrl/assets/tiny"), help="folder of the model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the data and the measurement")
    parser.add_argument("--num-prompts", type=int, default=1000, help="test prompts to measure on")
    parser.add_argument("--check", action="store_true", help="only measure the model in --out")
    arguments = parser.parse_args()
    console = Console()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums in one order: the same file whatever the number of cores
    if not arguments.check:
        build(arguments.out, arguments.seed, console)
    spread = measure(arguments.out, arguments.num_prompts, arguments.seed, console)
    if not arguments.check:
        write_readme(arguments.out, arguments.seed, arguments.num_prompts, spread)
    console.print(spread_table(spread, arguments.num_prompts))
    short = [name for name, least in LEAST_SHARES.items() if spread["all"][name] < least]
    if short:
        raise SystemExit(f"too few prompts are {' or '.join(short)}: the shares must reach {LEAST_SHARES}.")


if __name__ == "__main__":
    main()
