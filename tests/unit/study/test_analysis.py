"""Statistics against closed forms, and enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsrl.study.analysis import (
    AT_THE_START,
    CENSORED,
    REACHED,
    Curves,
    bootstrap,
    cost_ratio,
    cost_ratio_interval,
    mean_interval,
    reach,
)


@pytest.mark.parametrize("num", [2, 3, 8, 20])
def test_intervals_of_means_hold_95_percent_of_students_density(num):
    mean, half = mean_interval(np.array([0.0] * (num - 1) + [1.0]))
    scale = np.std([0.0] * (num - 1) + [1.0], ddof=1) / np.sqrt(num)
    nu, x = num - 1, np.linspace(0, half / scale, 200_001)
    density = (
        math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2)) * (1 + x**2 / nu) ** (-(nu + 1) / 2)
    )
    assert 2 * np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-4) and mean == pytest.approx(1 / num)


def test_one_value_has_no_interval():
    mean, half = mean_interval(np.array([0.25]))
    assert mean == 0.25 and np.isnan(half)


shares = st.integers(0, 64).map(lambda k: k / 64)


@given(st.lists(st.tuples(st.integers(1, 50), shares), min_size=1, max_size=8), shares)
def test_reach_is_the_first_point_of_the_drawn_curve_at_the_target(steps, target):
    cost, accuracy = np.cumsum([s for s, _ in steps]).astype(float), np.array([a for _, a in steps])
    found = reach(cost, accuracy, target)
    grid = np.union1d(np.linspace(cost[0], cost[-1], 20_001), cost)
    above = np.interp(grid, cost, accuracy) >= target - 1e-9
    if np.isinf(found):
        assert accuracy.max() < target
    else:
        assert found == pytest.approx(grid[above.argmax()], abs=2 * (cost[-1] - cost[0]) / 20_000 + 1e-9)


def test_reach_by_hand():
    cost, accuracy = np.array([0.0, 100.0, 300.0, 400.0]), np.array([0.2, 0.4, 0.6, 0.5])
    assert reach(cost, accuracy, 0.5) == pytest.approx(200.0)  # half way from 100 to 300, not the 400 at the end
    assert reach(cost, accuracy, 0.6) == 300.0
    assert reach(cost, accuracy, 0.1) == 0.0
    assert reach(cost, accuracy, 0.61) == np.inf


def straight(slopes, cost_per_step=100.0, num=5):
    """Runs whose accuracy grows by `slope` an evaluation from 0.2."""
    steps = np.arange(num)
    cost = np.tile(cost_per_step * steps, (len(slopes), 1))
    return Curves(cost, 0.2 + np.outer(slopes, steps))


def test_the_cost_ratio_of_straight_lines_is_that_of_their_slopes():
    own, reference = straight([0.09, 0.11]), straight([0.04, 0.06], cost_per_step=200.0)
    # the target is 0.2 + 4 x 0.05 = 0.4; own has it after 2 steps of 100, the reference after 4 of 200
    assert cost_ratio(own, reference, 1.0) == pytest.approx(200 / 800)
    # 95% of it is 0.38: 0.18 / 0.1 = 1.8 steps, and 3.6
    assert cost_ratio(own, reference, 0.95) == pytest.approx(180 / 720)
    assert cost_ratio(reference, reference, 1.0) == pytest.approx(1.0)


def test_a_reference_reaches_its_own_end_whatever_the_rounding():
    generator = np.random.default_rng(0)
    cost = np.tile(np.arange(7.0), (8, 1))
    for _ in range(200):
        rising = Curves(cost, np.sort(generator.random((8, 7)), axis=1))
        assert cost_ratio(rising, rising, 1.0) == 1.0


def test_what_never_gets_there_is_censored_not_extrapolated():
    assert cost_ratio(straight([0.01, 0.02]), straight([0.05, 0.05]), 1.0) == np.inf
    ratio = cost_ratio_interval(straight([0.01, 0.02] * 3), straight([0.05] * 6, cost_per_step=200.0), 1.0)
    assert ratio == (CENSORED, (np.inf, (np.inf, np.inf), 0), 0.5)


def test_what_is_reached_before_the_first_step_has_no_ratio():
    """Not to be taken for a method that does not get there: the reference ends where it began."""
    assert np.isnan(cost_ratio(straight([0.05]), straight([0.0]), 1.0))
    assert cost_ratio_interval(straight([0.05]), straight([0.0]), 1.0).state == AT_THE_START
    lucky = Curves(straight([0.05]).cost_ST, np.full((1, 5), 0.9))
    assert cost_ratio_interval(lucky, straight([0.05]), 1.0).state == AT_THE_START


def test_the_full_accuracy_is_compared_with_all_that_the_reference_spent():
    """A reference that is at its end's accuracy half way has spent twice as much as it needed."""
    early = Curves(np.array([[0.0, 100.0, 200.0]]), np.array([[0.2, 0.4, 0.4]]))
    own = Curves(np.array([[0.0, 50.0, 100.0]]), np.array([[0.2, 0.4, 0.4]]))
    assert cost_ratio(own, early, 1.0) == pytest.approx(50 / 200) and cost_ratio(early, early, 1.0) == 0.5
    # 0.38 is nine tenths of the way to 0.4, for both
    assert cost_ratio(own, early, 0.95) == pytest.approx(45 / 90) and cost_ratio(early, early, 0.95) == 1.0


def test_a_bootstrap_of_few_seeds_has_the_expanded_quantiles_of_all_resamples():
    """Phi(-sqrt(6/5) x 2.571) = 0.00243, and one minus it."""
    values = np.array([0.0, 1.0, 5.0, 20.0, 21.0, 40.0])
    everything = np.sort([values[list(seeds)].mean() for seeds in itertools.product(range(6), repeat=6)])
    estimate = bootstrap(lambda seeds: values[seeds].mean(axis=-1), 6, num_resamples=200_000)
    assert estimate.value == values.mean() and estimate.dropped == 0
    for found, share in zip(estimate.interval, (0.00243, 1 - 0.00243), strict=True):
        assert np.mean(everything < found - 1e-9) <= share + 4e-4 and np.mean(everything <= found) >= share - 4e-4


def test_intervals_of_eight_seeds_hold_a_known_difference_as_often_as_they_say():
    generator, num_held, num_studies = np.random.default_rng(0), 0, 1500
    for _ in range(num_studies):
        difference_S = 0.1 + generator.normal(0, 0.02, 8) - generator.normal(0, 0.03, 8)
        low, high = bootstrap(lambda seeds, d=difference_S: d[seeds].mean(axis=-1), 8, num_resamples=1500).interval
        num_held += low <= 0.1 <= high
    assert 0.92 <= num_held / num_studies <= 0.98


def test_resamples_without_a_value_are_counted():
    values = np.array([1.0, 1.0, 1.0, 1.0, 1.0, np.nan])
    estimate = bootstrap(lambda seeds: values[seeds].mean(axis=-1), 6, 20_000)
    assert estimate.dropped / 20_000 == pytest.approx(1 - (5 / 6) ** 6, abs=0.02)
    assert np.isnan(estimate.value) and estimate.interval == (1.0, 1.0)


def test_pairing_keeps_what_seeds_share_out_of_the_interval():
    """Seeds differ sixfold in what they cost, but own always costs a quarter of the reference."""
    costs = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None] * np.arange(5)
    accuracy = np.tile(0.2 + 0.1 * np.arange(5), (6, 1))
    state, estimate, spent = cost_ratio_interval(Curves(0.25 * costs, accuracy), Curves(costs, accuracy), 1.0)
    assert (state, estimate.value, spent) == (REACHED, pytest.approx(0.25), pytest.approx(0.25))
    assert estimate.interval == pytest.approx((0.25, 0.25))


def test_an_interval_that_some_resamples_never_reach_is_open_above():
    slopes = [0.02, 0.02, 0.02, 0.08, 0.08, 0.08]
    for target, state in ((0.045, REACHED), (0.055, CENSORED)):
        ratio = cost_ratio_interval(straight(slopes), straight([target] * 6), 1.0)
        low, high = ratio.estimate.interval
        assert ratio.state == state and np.isfinite(low) and high == np.inf


def test_five_seeds_have_no_interval():
    assert bootstrap(lambda seeds: seeds.mean(axis=-1), 5) == (2.0, None, 0)
