"""The Countdown generator against an exhaustive solver that shares no code with it."""

import json
from fractions import Fraction
from itertools import combinations

import pytest

from dpsrl.data.countdown import Instance, generate, paper_prompt, short_prompt
from dpsrl.types import UserError

pytestmark = pytest.mark.process

TINY = {"max_number": 20, "max_target": 100, "prompt_format": "short"}


def reachable(values: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value of every expression that uses each of the given values once."""
    if len(values) == 1:
        return set(values)
    found = set()
    for i, j in combinations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
        joined = {a + b, a - b, b - a, a * b} | ({a / b} if b else set()) | ({b / a} if a else set())
        for value in joined:
            found |= reachable((*rest, value))
    return found


def keys(rows):
    return [(tuple(sorted(row["answer"]["numbers"])), row["answer"]["target"]) for row in rows]


def test_every_row_is_solvable_and_in_range():
    rows = generate(40, seed=3, **TINY) + generate(20, seed=4, split="test")
    for row, top in zip(rows, [20] * 40 + [99] * 20, strict=True):
        numbers, target = row["answer"]["numbers"], row["answer"]["target"]
        assert len(numbers) in (3, 4) and 1 <= min(numbers) and max(numbers) <= top and 1 <= target <= 100
        assert target in reachable(tuple(map(Fraction, numbers)))


def test_rows_are_distinct_and_seeded():
    rows = generate(2000, seed=0, **TINY)
    assert len(set(keys(rows))) == 2000
    assert rows == generate(2000, seed=0, **TINY)
    assert rows[:500] == generate(500, seed=0, **TINY)
    assert rows != generate(2000, seed=1, **TINY)


def test_splits_are_disjoint_whatever_the_seed():
    small = {"numbers": (2, 3), "max_number": 8, "max_target": 50}
    train = {key for seed in range(3) for key in keys(generate(700, seed=seed, **small))}
    test = {key for seed in range(3) for key in keys(generate(150, seed=seed, split="test", **small))}
    assert len(train) > 700 and len(test) > 150  # the seeds draw different rows
    assert not train & test


def test_split_ignores_the_order_of_the_numbers():
    assert Instance((3, 5, 7), 15, "").split == Instance((7, 3, 5), 15, "").split
    splits = [Instance((a, b), a + b, "").split for a in range(40) for b in range(a)]
    assert 0.15 < splits.count("test") / len(splits) < 0.25


def test_all_distinct_instances_can_be_had():
    """Pairs of 1 and 2: (1, 1) gives 2 and 1, (1, 2) gives 3, 2 and 1, (2, 2) gives 4 and 1."""
    pairs = {((1, 1), 2), ((1, 1), 1), ((1, 2), 3), ((1, 2), 2), ((1, 2), 1), ((2, 2), 4), ((2, 2), 1)}
    by_split = {"train": set(), "test": set()}
    for numbers, target in pairs:
        by_split[Instance(numbers, target, "").split].add((numbers, target))
    for split, expected in by_split.items():
        if expected:
            rows = generate(len(expected), (2,), max_number=2, split=split)
            assert set(keys(rows)) == expected
        with pytest.raises(UserError, match=f"only {len(expected)} distinct"):
            generate(len(expected) + 1, (2,), max_number=2, split=split)


def test_number_counts_follow_the_weights_given():
    counts = [len(row["answer"]["numbers"]) for row in generate(1000, (3, 3, 4), **TINY)]
    assert 0.6 < counts.count(3) / 1000 < 0.73  # a third fewer fours than threes; sums over 100 fall out


def test_prompts():
    assert short_prompt([3, 5, 7], 15) == "3 5 7=15:"
    text = paper_prompt([3, 5, 7], 15)
    assert "[3, 5, 7]" in text and "equals 15." in text and "<answer> (1 + 2) / 3 </answer>" in text
    row = generate(1, seed=9)[0]
    assert row["problem"] == paper_prompt(row["answer"]["numbers"], row["answer"]["target"])


def test_rows_survive_json():
    rows = generate(5, **TINY)
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_prompts": 0}, "num_prompts is 0"),
        ({"numbers": ()}, r"numbers is \(\)"),
        ({"numbers": (1, 3)}, r"numbers is \(1, 3\)"),
        ({"numbers": (3, 9)}, r"numbers is \(3, 9\)"),
        ({"max_number": 0}, "max_number is 0"),
        ({"max_target": 0}, "max_target is 0"),
        ({"operators": "-*"}, r"operators is .-\*."),
        ({"operators": "+^"}, r"operators is .\+\^."),
        ({"split": "dev"}, "split is 'dev'"),
        ({"prompt_format": "long"}, "prompt_format is 'long'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        generate(**{"num_prompts": 5, **change})
