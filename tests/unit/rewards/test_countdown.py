"""The Countdown reward against hand-worked cases, Python's own arithmetic, and hostile text."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsrl.data.countdown import random_expression
from dpsrl.rewards.countdown import FORMAT_REWARD, MAX_CHARS, MAX_DEPTH, is_answer, score, score_with_format
from dpsrl.types import Score, UserError

ANSWER = {"numbers": [3, 5, 7], "target": 15}
RIGHT, WRONG = Score(1.0, True), Score(0.0, False)


@pytest.mark.parametrize(
    ("response", "numbers", "target"),
    [
        ("3+5+7", [3, 5, 7], 15),
        (" 7 + (5 + 3)\n", [3, 5, 7], 15),
        ("3+5+7=15", [3, 5, 7], 15),
        ("3+5+7 = 15 ", [3, 5, 7], 15),
        ("8/(3-8/3)", [3, 3, 8, 8], 24),  # passes through a fraction
        ("2*7-(9-9)", [9, 2, 9, 7], 14),
        ("-3+5", [5, 3], 2),
        ("3--5", [5, 3], 8),
        ("4−2×3÷6", [2, 3, 4, 6], 3),
        ("((((3))))+5", [3, 5], 8),
        ("0*5", [5, 0], 0),
        ("<think>3+5*7=38</think><answer>(3+5)+7</answer>", [3, 5, 7], 15),
        ("<answer>3*5*7</answer> no: <answer> 3+5+7 = 15 </answer> done", [3, 5, 7], 15),
        ("<answer>3+5+7</answer></answer> <answer>", [3, 5, 7], 15),
    ],
)
def test_right_responses(response, numbers, target):
    assert score(response, {"numbers": numbers, "target": target}) == RIGHT


@pytest.mark.parametrize(
    "response",
    [
        "",
        "15",
        "3+5",  # 7 unused
        "3+5+7+0",  # 0 not given
        "3+3+5+7-3",  # 3 used three times
        "3*5-7",  # 8
        "3+5+7=16",
        "3+5+7=15=15",
        "3+5+7=10+5",  # the right side must be the target itself
        "3+5+7=",
        "03+5+7",  # not a given number as written
        "3.0+5+7",
        "3+5+7)",
        "(3+5+7",
        "3+5 7",
        "3 5 7",
        "3+5+7+",
        "*3+5+7",
        "3**5+7",
        "3//5+7",
        "(3)(5)(7)",
        "3+5+7 is it",
        "٣+5+7",  # an Arabic digit
        "3+5+7<answer>",
        "<answer>3+5+7",  # never closed
        "3+5+7 <answer></answer>",  # the last answer counts, and it is empty
        "<answer>3+5+7</answer><answer>3*5*7</answer>",
        "__import__('os')",
    ],
)
def test_wrong_responses(response):
    assert score(response, ANSWER) == WRONG


@pytest.mark.parametrize("numbers", [[np.int64(3), np.int64(5), np.int64(7)], np.array([3, 5, 7], dtype=np.int32)])
def test_numbers_as_pandas_gives_them(numbers):
    answer = {"numbers": numbers, "target": np.int64(15)}
    assert is_answer(answer) and score("3+5+7=15", answer) == RIGHT and score("3+5", answer) == WRONG
    assert not is_answer({"numbers": np.array([3.0, 5.0]), "target": 8}) and not is_answer(
        answer | {"numbers": np.array(3)}
    )


@pytest.mark.parametrize("response", ["3/(5-5)", "5/(3*(5-5))", "3/5/0"])
def test_division_by_zero_is_wrong(response):
    assert score(response, {"numbers": [3, 5, 5], "target": 3}) == WRONG


def test_answer_may_be_json_text():
    assert score("3+5+7", json.dumps(ANSWER)) == RIGHT
    assert score("3+5*7", json.dumps(ANSWER)) == WRONG


@pytest.mark.parametrize(
    "answer",
    [
        "15",
        "not json",
        {"numbers": [3, 5]},
        {"numbers": [], "target": 3},
        {"numbers": [3, 5.0], "target": 8},
        {"numbers": [3, -5], "target": 2},
        {"numbers": [3, 5], "target": True},
        {"numbers": "35", "target": 8},
        pytest.param("9" * 5000, id="long"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param(10**5000, id="huge"),
    ],
)
def test_malformed_answer_is_refused(answer):
    with pytest.raises(UserError, match="Countdown answer"):
        score("3+5", answer)
    assert not is_answer(answer) and is_answer(ANSWER)


def test_format_reward_only_for_a_closed_wrong_answer():
    assert score_with_format("<answer>3+5+7</answer>", ANSWER) == RIGHT
    assert score_with_format("<answer>3*5</answer>", ANSWER) == Score(FORMAT_REWARD, False)
    assert score_with_format("3*5", ANSWER) == WRONG


@pytest.mark.process
@given(st.lists(st.integers(1, 99), min_size=2, max_size=6), st.integers(0, 2**32))
def test_agrees_with_pythons_arithmetic_on_generated_expressions(numbers, seed):
    """The generator writes plain Python; eval, used in tests only, is the independent truth."""
    expression, value = random_expression(numbers, random.Random(seed))
    assert eval(expression.replace("/", "//")) == value
    assert score(expression, {"numbers": numbers, "target": value}) == RIGHT
    assert score(expression, {"numbers": numbers, "target": value + 1}) == WRONG
    assert score(expression, {"numbers": [*numbers, 1], "target": value}) == WRONG


@given(st.text(alphabet="3579+-*/() =×÷.e_", max_size=40))
def test_agrees_with_python_on_expression_like_text(text):
    """Right exactly when Python, too, reads 3, 5 and 7 in the text once each and gets 15."""
    if score(text, ANSWER) == RIGHT:
        plain = text.partition("=")[0].replace("×", "*").replace("÷", "/").strip()
        assert sorted(c for c in plain if c.isdigit()) == ["3", "5", "7"]
        assert eval(plain) == pytest.approx(15)


@pytest.mark.process
@given(st.text())
def test_any_text_is_wrong_not_an_error(text):
    assert score(text, ANSWER) in (RIGHT, WRONG)


@pytest.mark.parametrize(
    "response",
    [
        "(" * 1_000_000,
        "(" * 300 + "3" + ")" * 200,
        "(" * (MAX_DEPTH + 1) + "3" + ")" * (MAX_DEPTH + 1) + "+5+7",
        "-" * 1_000_000 + "3+5+7",
        "9" * 1_000_000,
        "3+5+" + "9" * 400,
        "3+5+7" + "\n" * 10 + "x" * 1_000_000,
        "<answer>" * 200_000,
        "</answer>" * 200_000,
        "<answer>" * 100_000 + "3*5*7" + "</answer>" * 100_000,
        "<answer>" + "9**" * 300_000 + "9</answer>",
        " " * 400 + "x",
        "\x00\ud800\U0010ffff",
        "3+5+7" + " " * MAX_CHARS + "+",
    ],
)
def test_hostile_responses_are_wrong(response):
    assert score(response, ANSWER) == WRONG


def test_depth_and_blank_space_within_bounds_are_right():
    assert score("(" * MAX_DEPTH + "3" + ")" * MAX_DEPTH + "+5+7", ANSWER) == RIGHT
    assert score("-" * 400 + "3+5+7", ANSWER) == RIGHT
    assert score("\n" * 1_000_000 + "3+5+7", ANSWER) == RIGHT


def test_many_given_numbers_stay_exact():
    expression = "*".join(["97"] * 60)
    assert score(expression, {"numbers": [97] * 60, "target": 97**60}) == RIGHT
    assert score(expression, {"numbers": [97] * 60, "target": 97**60 + 1}) == WRONG
