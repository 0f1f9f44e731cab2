"""avg@K's interval and pass@k against enumeration and simulation."""

import json
from itertools import combinations

import numpy as np
import pytest

from dpsrl.evaluate import EvalResult, mean_with_interval, pass_at, write_results

pytestmark = pytest.mark.process  # imports the stack


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    solved_N, num_samples = np.array([0, 1, 3, 8]), 8
    measured = pass_at(solved_N, np.full(4, num_samples))
    assert set(measured) == {1, 2, 4, 8}
    for k, value in measured.items():
        subsets = list(combinations(range(num_samples), k))
        expected = [np.mean([any(i < solved for i in subset) for subset in subsets]) for solved in solved_N]
        assert value == pytest.approx(np.mean(expected), abs=1e-12)


def test_prompts_without_scores_are_left_out():
    assert pass_at(np.array([0, 2]), np.array([0, 2])) == {1: 1.0, 2: 1.0}
    assert pass_at(np.array([0]), np.array([0])) == {}


def test_the_interval_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = rng.binomial(8, 0.3, 60) / 8
        mean, low, high = mean_with_interval(values)
        assert low <= mean <= high
        hits += low <= 0.3 <= high
    assert 178 <= hits <= 200  # 190 expected, standard deviation 3


def test_prompts_that_agree_leave_doubt_by_their_number():
    mean, low, high = mean_with_interval(np.zeros(30))
    assert mean == low == 0.0 and high == pytest.approx(1.96**2 / (30 + 1.96**2), abs=1e-4)
    assert mean_with_interval(np.ones(30))[1] == pytest.approx(1.0 - high)
    # One sample per prompt is the textbook case: 6 of 20, Wilson's interval 0.1455 to 0.5190.
    values = np.array([1.0] * 6 + [0.0] * 14)
    trials = 6 * 14 / 20**2 / (values.var(ddof=1) / 20)  # 19: the unbiased variance costs one
    assert trials == pytest.approx(19.0)
    assert mean_with_interval(values)[1:] == pytest.approx((0.1455, 0.5190), abs=0.01)


def test_no_values_give_no_number():
    assert np.isnan(mean_with_interval(np.array([]))).all()


def test_results_without_a_reward_are_null_in_the_summary(tmp_path):
    none = mean_with_interval(np.array([]))
    write_results(
        tmp_path / "summary.json", [EvalResult("mine", 3, 2, *none, pass_at={}, truncated_share=0.0, num_missing=6)]
    )
    text = (tmp_path / "summary.json").read_text()
    (result,) = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["avg"] is None and result["num_missing"] == 6
