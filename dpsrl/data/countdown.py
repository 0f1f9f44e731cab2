"""Countdown problems: reach a target from given numbers, each used exactly once, with + - * /.

Owns the generator, its two prompt formats and the fixed train/test split. Pure and seeded; knows
nothing of tokens, files or scoring.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpsrl.types import UserError

OPERATORS = "+-*/"
SPLITS = ("train", "test")
TEST_SHARE = 5  # one instance in this many belongs to the test split
GIVE_UP_DRAWS = 20_000  # this many draws in a row without a new row: there are (almost) none left

PAPER_PROMPT = (
    "Using the numbers [{numbers}], create an equation that equals {target}. "
    "You can use the basic arithmetic operations (+, -, *, /), and each number must be used exactly once. "
    "Show your work in <think> </think> tags. "
    "Then return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)


@dataclass(frozen=True, slots=True)
class Instance:
    """One problem with the expression that made it: `Instance((3, 5, 7), 15, "3+5+7")`."""

    numbers: tuple[int, ...]  # in the order they are shown
    target: int
    solution: str  # one of possibly many

    @property
    def key(self) -> tuple[int, ...]:
        """Sorted numbers, then the target: equal for instances that differ only in the order shown."""
        return (*sorted(self.numbers), self.target)

    @property
    def split(self) -> str:
        """ "train" or "test", from a hash of the key alone: disjoint whatever the seed, size or order."""
        digest = hashlib.sha256(" ".join(map(str, self.key)).encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def short_prompt(numbers: Sequence[int], target: int) -> str:
    """The tiny model's prompt: `3 5 7=15:`."""
    return f"{' '.join(map(str, numbers))}={target}:"


def paper_prompt(numbers: Sequence[int], target: int) -> str:
    """The prompt for pretrained models: think first, then an expression in <answer> tags."""
    return PAPER_PROMPT.format(numbers=", ".join(map(str, numbers)), target=target)


PROMPT_FORMATS = {"short": short_prompt, "paper": paper_prompt}

# What the tiny model was made for, as arguments of `generate`: mostly sums and differences, some products.
TINY_TASK: dict[str, Any] = {
    "numbers": (3, 4),
    "max_number": 20,
    "max_target": 100,
    "operators": "++++----*",
    "prompt_format": "short",
}


@dataclass(frozen=True, slots=True)
class _Term:
    """A subexpression while it is being built."""

    value: int
    text: str
    level: int  # of its outermost operator: 0 for + and -, 1 for * and /, 2 for a bare number


def _inside(term: _Term, level: int) -> str:
    """The term's text, in parentheses if its outermost operator binds more loosely than `level`."""
    return f"({term.text})" if term.level < level else term.text


def _combine(left: _Term, right: _Term, operator: str) -> _Term | None:
    """`left operator right`, or None where the value is not a positive integer.

    On the right of - and / an operator of the same level needs parentheses too: 9-(3+1), 8/(4/2).
    """
    if operator == "+":
        return _Term(left.value + right.value, f"{left.text}+{right.text}", 0)
    if operator == "*":
        return _Term(left.value * right.value, f"{_inside(left, 1)}*{_inside(right, 1)}", 1)
    if operator == "-":
        value = left.value - right.value
        return _Term(value, f"{left.text}-{_inside(right, 1)}", 0) if value > 0 else None
    value, remainder = divmod(left.value, right.value)
    return _Term(value, f"{_inside(left, 1)}/{_inside(right, 2)}", 1) if remainder == 0 else None


def random_expression(numbers: Sequence[int], rng: random.Random, operators: str = OPERATORS) -> tuple[str, int]:
    """(expression, value): each number once, every intermediate value a positive integer.

    Two subexpressions at a time are joined by a random operator until one is left, so all shapes of
    tree occur. A draw that gives zero, a negative number or a fraction is drawn again; + never fails and
    must be among `operators`, which are drawn evenly: "+++-" gives three in four sums.
    Operands of + and * stay in the order of `numbers`: 3+5, never 5+3.
    """
    terms = [_Term(number, str(number), 2) for number in numbers]
    while len(terms) > 1:
        i, j = rng.sample(range(len(terms)), 2)
        operator = rng.choice(operators)
        if operator in "+*":
            i, j = min(i, j), max(i, j)
        joined = _combine(terms[i], terms[j], operator)
        if joined is not None:
            terms[min(i, j)] = joined
            del terms[max(i, j)]
    return terms[0].text, terms[0].value


def draw_instance(
    numbers: Sequence[int],
    rng: random.Random,
    *,
    max_number: int,
    max_target: int,
    operators: str = OPERATORS,
) -> Instance | None:
    """One instance of either split, or None where the expression drawn exceeds `max_target`.

    `numbers` holds how many numbers an instance may have, drawn evenly: (3, 3, 4) gives two thirds threes.
    The numbers lie in 1..max_number.
    """
    chosen = tuple(rng.randint(1, max_number) for _ in range(rng.choice(numbers)))
    solution, target = random_expression(chosen, rng, operators)
    return Instance(chosen, target, solution) if target <= max_target else None


def generate(
    num_prompts: int,
    numbers: Sequence[int] = (3, 4),
    seed: int = 0,
    *,
    max_number: int = 99,
    max_target: int = 100,
    operators: str = OPERATORS,
    split: str = "train",
    prompt_format: str = "paper",
) -> list[dict[str, Any]]:
    """Distinct, solvable rows `{"problem": text, "answer": {"numbers": [...], "target": t}}`.

    Every target comes from an expression over its numbers, so every row has a solution. Rows are distinct
    up to the order of the numbers, and no row of one split occurs in the other, whatever the seeds.
    The paper's range is numbers to 99 and targets to 100; the tiny model's is numbers to 20.
    Raises UserError for values out of range and for more rows than the ranges hold.
    """
    _check(num_prompts, numbers, max_number, max_target, operators, split, prompt_format)
    rng = random.Random(seed)
    ranges: dict[str, Any] = {"max_number": max_number, "max_target": max_target, "operators": operators}
    rows: list[dict[str, Any]] = []
    seen: set[tuple[int, ...]] = set()
    idle_draws = 0
    while len(rows) < num_prompts:
        instance = draw_instance(numbers, rng, **ranges)
        if instance is None or instance.split != split or instance.key in seen:
            idle_draws += 1
            if idle_draws == GIVE_UP_DRAWS:
                raise UserError(
                    f"num_prompts is {num_prompts}, but only {len(rows)} distinct Countdown instances were "
                    f"found for numbers={tuple(numbers)}, max_number={max_number}, max_target={max_target} "
                    f"in the {split} split: ask for fewer or widen the ranges."
                )
            continue
        idle_draws = 0
        seen.add(instance.key)
        problem = PROMPT_FORMATS[prompt_format](instance.numbers, instance.target)
        answer = {"numbers": list(instance.numbers), "target": instance.target}
        rows.append({"problem": problem, "answer": answer})
    return rows


def _check(
    num_prompts: int,
    numbers: Sequence[int],
    max_number: int,
    max_target: int,
    operators: str,
    split: str,
    prompt_format: str,
) -> None:
    """Raises UserError for the first argument out of range."""
    if num_prompts < 1:
        raise UserError(f"num_prompts is {num_prompts}, must be at least 1: ask for one prompt or more.")
    if not numbers or min(numbers) < 2 or max(numbers) > 8:
        raise UserError(f"numbers is {tuple(numbers)}, must be counts from 2 to 8: give for example (3, 4).")
    if max_number < 1:
        raise UserError(f"max_number is {max_number}, must be at least 1: give for example 99.")
    if max_target < 1:
        raise UserError(f"max_target is {max_target}, must be at least 1: give for example 100.")
    if "+" not in operators or set(operators) - set(OPERATORS):
        raise UserError(
            f"operators is {operators!r}, must hold + and only {OPERATORS}: repeat one to draw it more often."
        )
    if split not in SPLITS:
        raise UserError(f"split is {split!r}, must be one of {', '.join(SPLITS)}: choose one of them.")
    if prompt_format not in PROMPT_FORMATS:
        known = ", ".join(PROMPT_FORMATS)
        raise UserError(f"prompt_format is {prompt_format!r}, must be one of {known}: choose one of them.")
