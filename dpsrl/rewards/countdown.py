"""The Countdown reward: does an expression use each given number once and equal the target, exactly?

Owns the parser (exact rationals, no eval). Knows nothing of models or prompts. Never raises on a
response, whatever it holds, and works on at most MAX_CHARS of it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from dpsrl.types import Score, UserError

MAX_CHARS = 512  # an honest expression over 8 numbers is far shorter
MAX_DEPTH = 32  # nested parentheses
FORMAT_REWARD = 0.1  # TinyZero's reward for a well-formed expression that is wrong

_ANSWER_OPEN, _ANSWER_CLOSE = "<answer>", "</answer>"
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")  # re.match walks on from where the last token ended


class _Malformed(Exception):
    """The text is not an expression, or has no value."""


def score(response: str, answer: Mapping[str, Any] | str) -> Score:
    """Reward 1 and correct, or 0 and not. `answer` is {"numbers": [3, 5, 7], "target": 15}, or that as JSON.

    Judged is what stands in the last <answer>...</answer>, or the whole response where there is none. A
    trailing "= 15" is allowed if it names the target. A sign in front (-3+5) is allowed: it reaches no
    target that the same numbers do not reach without it. Raises UserError if the answer is malformed.
    """
    numbers, target = read_answer(answer)
    correct = _equals(extract_expression(response), numbers, target)
    return Score(reward=float(correct), correct=correct)


def score_with_format(response: str, answer: Mapping[str, Any] | str) -> Score:
    """As `score`, but a wrong response that closes an <answer> tag earns FORMAT_REWARD (TinyZero's shaping).

    Groups without a right answer can then have unequal rewards; `correct`, which solving states
    count, is the same as in `score`.
    """
    plain = score(response, answer)
    if plain.correct or _last_answer(response) is None:
        return plain
    return Score(reward=FORMAT_REWARD, correct=False)


def read_answer(answer: Mapping[str, Any] | str) -> tuple[list[int], int]:
    """(numbers, target) of an answer record or its JSON text. Raises UserError if it is neither."""
    record: Any = answer
    if isinstance(answer, str):
        try:
            record = json.loads(answer)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nested without end
            record = None
    if isinstance(record, Mapping):
        numbers: Any = record.get("numbers")
        target: Any = record.get("target")
        if isinstance(numbers, np.ndarray):  # what pandas makes of a list
            numbers = numbers.tolist()
        if isinstance(numbers, list | tuple) and numbers and all(_is_count(n) for n in (*numbers, target)):
            return [int(n) for n in numbers], int(target)
    raise UserError(
        f"a Countdown answer is {_shown(answer)}, must hold non-negative integers: "
        'give {"numbers": [3, 5, 7], "target": 15}.'
    )


def is_answer(answer: Any) -> bool:
    """Whether `score` takes it."""
    try:
        read_answer(answer)
    except UserError:
        return False
    return True


def _shown(answer: Any) -> str:
    try:
        return repr(str(answer)[:80])
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"a {type(answer).__name__}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def extract_expression(response: str) -> str:
    """What stands in the last <answer>...</answer>, or the whole response; stripped."""
    inside = _last_answer(response)
    return (response if inside is None else inside).strip()


def _last_answer(response: str) -> str | None:
    """The text in the last closed <answer> tag, or None. Linear in the response."""
    last_close = response.rfind(_ANSWER_CLOSE)
    start = response.rfind(_ANSWER_OPEN, 0, last_close) if last_close >= 0 else -1
    # Up to the first end tag: models repeat it.
    return response[start + len(_ANSWER_OPEN) : response.find(_ANSWER_CLOSE, start)] if start >= 0 else None


def _equals(text: str, numbers: list[int], target: int) -> bool:
    """Whether the text is an expression over exactly these numbers whose value is the target."""
    if len(text) > MAX_CHARS:
        return False
    expression, equals, right_side = text.translate(_SIGNS).partition("=")
    if equals and right_side.strip() != str(target):
        return False
    try:
        tokens = _tokenize(expression)
        # Compared as text and before any arithmetic: no long literal is ever converted.
        if Counter(token for token in tokens if token.isdigit()) != Counter(map(str, numbers)):
            return False
        return _evaluate(tokens) == target
    except (_Malformed, ZeroDivisionError):
        return False


def _tokenize(expression: str) -> list[str]:
    tokens, position, end = [], 0, len(expression.rstrip())
    while position < end:
        found = _TOKEN.match(expression, position)
        if found is None:
            raise _Malformed
        tokens.append(found.group(1))
        position = found.end()
    return tokens


def _evaluate(tokens: list[str]) -> Fraction:
    """The exact value of a whole expression. Raises _Malformed or ZeroDivisionError."""
    value, position = _sum(tokens, 0, 0)
    if position != len(tokens):
        raise _Malformed
    return value


def _peek(tokens: list[str], position: int) -> str:
    return tokens[position] if position < len(tokens) else ""


def _sum(tokens: list[str], position: int, depth: int) -> tuple[Fraction, int]:
    """sum := product (('+' | '-') product)*; (value, where it ends)."""
    value, position = _product(tokens, position, depth)
    while (operator := _peek(tokens, position)) in ("+", "-"):
        right, position = _product(tokens, position + 1, depth)
        value = value + right if operator == "+" else value - right
    return value, position


def _product(tokens: list[str], position: int, depth: int) -> tuple[Fraction, int]:
    """product := factor (('*' | '/') factor)*"""
    value, position = _factor(tokens, position, depth)
    while (operator := _peek(tokens, position)) in ("*", "/"):
        right, position = _factor(tokens, position + 1, depth)
        value = value * right if operator == "*" else value / right
    return value, position


def _factor(tokens: list[str], position: int, depth: int) -> tuple[Fraction, int]:
    """factor := ('+' | '-')* (number | '(' sum ')')"""
    sign = 1
    while (token := _peek(tokens, position)) in ("+", "-"):
        sign = -sign if token == "-" else sign
        position += 1
    if token.isdigit():
        return sign * Fraction(int(token)), position + 1
    if token != "(" or depth == MAX_DEPTH:
        raise _Malformed
    value, position = _sum(tokens, position + 1, depth + 1)
    if _peek(tokens, position) != ")":
        raise _Malformed
    return sign * value, position + 1
