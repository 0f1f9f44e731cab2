"""From configuration to prompt sets: which source, which format, which benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpsrl.config import Config, is_countdown
from dpsrl.data import countdown
from dpsrl.data.datasets import LoadReport, Row, find_benchmark, load_rows
from dpsrl.data.prompts import PromptSet
from dpsrl.rewards import answers
from dpsrl.rewards.countdown import is_answer
from dpsrl.types import UserError

# By reward, what tells a reference answer that a response could match.
IS_SCORABLE: dict[str, Callable[[Any], bool]] = {"math": answers.is_scorable, "countdown": is_answer}


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or Hugging Face name, with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:  # not there; or there, and not what transformers can read
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the tokenizer of model.path={path} could not be loaded ({first}): give a local folder or go online; a "
            "model that needs code of its own is not run"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def training_prompts(config: Config, tokenizer: Any) -> PromptSet:
    data = config.data
    if data.train == "countdown":
        return _countdown(config, tokenizer, data.countdown.numbers, data.countdown.num_train, "train")
    return _prompts_of(data.train, data.split, config.reward.fn, config, tokenizer)


def _prompts_of(source: str, split: str, reward_fn: str, config: Config, tokenizer: Any) -> PromptSet:
    data = config.data
    rows, report = load_rows(
        source, prompt_key=data.prompt_key, answer_key=data.answer_key, split=split, max_bad_share=data.max_bad_share
    )
    return PromptSet(
        rows, report, tokenizer, data.instruction, config.model.max_prompt_tokens,
        IS_SCORABLE.get(reward_fn),
        max_bad_share=data.max_bad_share,
    )  # fmt: skip


def reward_of(benchmark: str, config: Config) -> str:
    """Countdown checks itself; the others take the run's reward, or math where that is Countdown's."""
    own = config.reward.fn
    of_benchmark = "math" if own == "countdown" and benchmark != "train" else own
    return "countdown" if is_countdown(benchmark) else of_benchmark


def benchmark_prompts(name: str, config: Config, tokenizer: Any) -> PromptSet:
    """Held-out prompts: 'countdown', 'countdown3', ..., a file in data.eval_dir, a Hugging Face name, or a function.

    'train' is the training prompts, for an anchor pass over them.
    """
    data = config.data
    if name == "train":
        return training_prompts(config, tokenizer)
    if is_countdown(name):
        numbers = data.countdown.numbers if name == "countdown" else [_count_of(name)]
        return _countdown(config, tokenizer, numbers, data.countdown.num_test, "test")
    return _prompts_of(find_benchmark(name, data.eval_dir), "test", reward_of(name, config), config, tokenizer)


def _count_of(name: str) -> int:
    digits = name.removeprefix("countdown")
    if not digits.isdigit():
        raise UserError(f"benchmark {name!r} is unknown: Countdown's are countdown, countdown3, countdown4 and so on")
    return int(digits)


def _countdown(config: Config, tokenizer: Any, numbers: list[int], num_prompts: int, split: str) -> PromptSet:
    settings = config.data.countdown
    generated = countdown.generate(
        num_prompts, numbers, config.seed,
        max_number=settings.max_number, max_target=settings.max_target, operators=settings.operators,
        split=split, prompt_format=settings.format,
    )  # fmt: skip
    rows = [Row(row["problem"], row["answer"], number) for number, row in enumerate(generated, 1)]
    report = LoadReport(f"countdown {split}", len(rows))
    return PromptSet(rows, report, tokenizer, "{problem}", config.model.max_prompt_tokens)
