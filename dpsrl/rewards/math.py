r"""The math reward: is the final answer of a response equal in value to a reference answer?

Equal spellings are right without sympy; the rest goes through math-verify, items of lists and tuples one by
one. Owns no deadline: sympy can take hours and gigabytes over one expression, so call `score` in a process
that can be killed (`dpsrl.rewards.Scorer`). Where memory, the stack or the range of numbers runs out inside
math-verify, the error comes out of `score`: such a response is missing, not wrong.

Bounds, beyond which a response is wrong: its box or "answer is" stands in the last MAX_RESPONSE_CHARS (2**20)
or MAX_TAIL_CHARS (4096) characters, its answer has at most MAX_ANSWER_CHARS (1000), boxes joined as one answer
included; and unless it is the reference answer's very spelling, its brackets nest at most MAX_DEPTH (32) deep
and it has at most MAX_COMMAS (64) commas, where the reference has no more.

Nothing is evaluated as Python: only what math-verify's LaTeX grammar accepts becomes a sympy object, through
constructors. Its plain-text extraction, which calls parse_expr, is off. Importing this imports sympy;
`dpsrl.rewards.answers` does not.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from sympy import Expr

from dpsrl.rewards.answers import (
    MAX_ANSWER_CHARS,
    MAX_COMMAS,
    MAX_DEPTH,
    accepted_answers,
    brackets,
    canonical,
    depth,
    final_answers,
    is_scorable,
    is_text,
    split_list,
    text_key,
    tidy,
    without_percent,
    without_unit,
)
from dpsrl.rewards.strict import LatexExtractionConfig, parse, verify
from dpsrl.types import Score

__all__ = ["is_scorable", "score"]

# It warns once that its timeouts are off, and reports what it could not parse; both are meant here.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)
_RATIONAL = re.compile(r"([+-]?)(?:(\d{1,99})(\.\d{0,99})?|(\.\d{1,99})|\\frac\{(\d{1,99})\}\{(\d{1,99})\})")
# "x=", "f(x)=", "m_{\max }=", "AB=", "\angle A B C_{1}="; not the "MR=" of an equation between two names.
_NAMED = re.compile(r"(?:\\angle\s*)?[A-Za-z](?:\s*[A-Z]){0,3}(?:_\{?[\w\\\s]+\}?)?(?:\([A-Za-z]\))?\s*=(?![\sA-Z]+$)")
_BASED = re.compile(r"(-?(?=[A-Z]*\d)[\dA-Z]+)_\{?(\d+)\}?")
_LETTER = re.compile(r"(?<!\\)\b[A-Za-z]")


def score(response: str, answer: str | list[str]) -> Score:
    r"""Reward 1 and correct, or 0 and not. A list holds accepted spellings: any one of them is right.

    Commas inside one answer separate values that must all be given, in any order; those of a tuple or
    interval keep their order and their brackets. "x=5" and "5", "5\text{ cm}" and "5", "10\%" and "10" (or
    0.1) count as equal. Which part of the response is judged: `answers.final_answers`.
    """
    golds = [tidy(text) for text in accepted_answers(answer)]
    candidates = [tidy(text) for text in final_answers(response)]
    correct = any(_matches(gold, candidate) for gold in golds for candidate in candidates)
    return Score(reward=float(correct), correct=correct)


def _matches(gold: str, candidate: str) -> bool:
    """Whether a tidy candidate is the tidy reference answer: by spelling, as text, by items, or in value."""
    if not gold or not candidate or max(len(gold), len(candidate)) > MAX_ANSWER_CHARS:
        return False
    if canonical(gold) == canonical(candidate):
        return True
    if depth(candidate) > MAX_DEPTH or candidate.count(",") > MAX_COMMAS >= gold.count(","):
        return False
    if is_text(gold):
        return _same_text(text_key(gold), text_key(candidate))
    readings = [gold]
    if not _LETTER.search(gold):  # "0.56 = 56\%", "\frac{2}{3} \approx 0.67": either side will do
        readings += [side.strip() for side in re.split(r"\\approx|=", gold) if side.strip()][:2]
    # A candidate with two sides gives one: the rounded one only where the reference is rounded.
    sides = candidate.split(r"\approx")
    candidate = (sides[-1] if "." in gold else sides[0]).strip()
    return any(_same_structure(reading, candidate) for reading in dict.fromkeys(readings))


def _same_text(gold: str, candidate: str) -> bool:
    """Equal letters; those of a list of single letters in any order."""
    items = gold.split(",")
    if len(items) > 1 and all(len(item) == 1 for item in items):
        return sorted(items) == sorted(candidate.split(","))
    return gold == candidate


def _same_structure(gold: str, candidate: str) -> bool:
    """Tuples and intervals item by item in order, lists and sets in any order, the rest in value."""
    gold_pair, candidate_pair = brackets(gold), brackets(candidate)
    if gold_pair and candidate_pair and "\\{" not in (gold_pair[0], candidate_pair[0]):
        gold_items, items = split_list(gold_pair[1]), split_list(candidate_pair[1])
        if len(gold_items) > 1 and len(items) > 1:
            same_brackets = (gold_pair[0], gold_pair[2]) == (candidate_pair[0], candidate_pair[2])
            return same_brackets and len(gold_items) == len(items) and all(map(_matches, gold_items, items))
    gold_items = split_list(gold_pair[1] if gold_pair and gold_pair[0] == "\\{" else gold)
    items = split_list(candidate_pair[1] if candidate_pair and candidate_pair[0] == "\\{" else candidate)
    if 1 < len(gold_items) == len(items):
        return _same_items(gold_items, items)
    return _same_value(gold, candidate)


def _same_items(gold_items: list[str], items: list[str]) -> bool:
    """Whether the items can be paired off. Greedy will do: what equals the same item is equal."""
    left = list(items)
    for gold in gold_items:
        match = next((item for item in left if _matches(gold, item)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_value(gold: str, candidate: str) -> bool:
    r"""Whether two single answers have one value. 50\% is 50, and 0.5 where only one side has the sign."""
    if _NAMED.match(gold) is None or _NAMED.match(candidate) is None:
        gold, candidate = _NAMED.sub("", gold, count=1), _NAMED.sub("", candidate, count=1)
    gold, candidate = without_unit(gold), without_unit(candidate)
    based, given_base = _BASED.fullmatch(canonical(gold)), _BASED.fullmatch(canonical(candidate))
    if based:  # a number in a base: the base may be left out, and no other may be given
        return canonical(candidate) in (canonical(gold), based.group(1))
    if given_base and given_base.group(2) != "10":
        return False
    plain_gold, plain = without_percent(gold), without_percent(candidate)
    if _equal(plain_gold, plain):
        return True
    if ("%" in gold) != ("%" in candidate):
        return _equal(rf"\frac{{{plain_gold}}}{{100}}" if "%" in gold else gold,
                      rf"\frac{{{plain}}}{{100}}" if "%" in candidate else candidate)  # fmt: skip
    return False


def _equal(gold: str, candidate: str) -> bool:
    """Equal spelling, equal rational numbers, or equal by math-verify."""
    if canonical(gold) == canonical(candidate):
        return True
    left, right = _rational(gold), _rational(candidate)
    if left is not None and right is not None and (left == right or ("." in gold) == ("." in candidate)):
        return left == right
    gold_parsed, parsed = _parse_gold(gold), _parse(candidate)
    # Without its timeouts: those are signals, which work in a main thread only, and make a hang a wrong answer.
    equal = verify(gold_parsed, parsed, timeout_seconds=None, allow_set_relation_comp=True)
    return equal and not _unequal_small_numbers(gold_parsed[0], parsed[0])


def _unequal_small_numbers(gold: Any, candidate: Any) -> bool:
    """Whether two numbers that math-verify calls equal differ: it takes 1e-18 - 1e-19 for zero."""
    if not (isinstance(gold, Expr) and isinstance(candidate, Expr)):
        return False
    if not (gold.is_number and candidate.is_number):
        return False
    size = abs(gold.evalf(8))
    return bool(0 < size < 1e-3) and bool(abs((gold - candidate).evalf(8)) > 1e-4 * size)


def _rational(text: str) -> Fraction | None:
    r"""The value of 12, -1.50, .5 or \frac{1}{2}; None for anything else. Raises nothing."""
    number = _RATIONAL.fullmatch(text)
    if number is None:
        return None
    sign, whole, decimals, bare_decimals, numerator, denominator = number.groups()
    if denominator is not None:
        value = Fraction(int(numerator), int(denominator)) if int(denominator) else None
    else:
        value = Fraction(f"{whole or 0}{(decimals or bare_decimals or '.0').ljust(2, '0')}")
    return -value if value is not None and sign == "-" else value


def _parse(text: str) -> list[Any]:
    """What math-verify reads in one answer: sympy objects and text, [] for nothing."""
    return parse(rf"\boxed{{{text}}}", extraction_config=_LATEX, parsing_timeout=None)


@lru_cache(maxsize=256)  # references alone: what a response holds may be huge, and does not come again
def _parse_gold(text: str) -> list[Any]:
    return _parse(text)
