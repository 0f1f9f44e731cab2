"""The model of K states: equal to `dps` with three, and to enumeration by hand with any."""

import itertools

import numpy as np
import pytest

from dpsrl.config import load_config, selector_config
from dpsrl.selection import build_selector
from dpsrl.study.states import PassRateStates, fold_of, observed_state, prior_shares

METHOD = "dpsrl.study.states:PassRateStates"


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_three_states_are_those_of_dps(decay):
    """Predictions and picks, over steps in which few prompts are seen and some not at all."""
    common = {"num_prompts": 12, "num_rollouts": 8, "seed": 0, "decay": decay}
    ours, published = build_selector(METHOD, num_states=3, **common), build_selector("dps", **common)
    generator = np.random.default_rng(0)
    for _ in range(30):
        ids = np.sort(generator.choice(12, generator.integers(0, 5), replace=False))
        solved = generator.choice([0, 3, 8], ids.size)
        for selector in (ours, published):
            selector.observe(ids, solved, np.full(ids.size, 8))
        np.testing.assert_allclose(ours.predict(), published.predict(), atol=1e-12)
    score = published.score()
    assert score[ours.select(4)] == pytest.approx(np.sort(score)[::-1][:4])


def by_enumeration(groups, num_steps, num_states, decay):
    """(K,): the belief about the step after the last, of one prompt whose groups are {step: state}.

    Idle steps by summing over all paths; the move to a seen state by listing all pairs (from, to) and keeping the
    possible ones. Counts as the published recursion has them, one number at a time.
    """
    share = prior_shares(fold_of(num_states))
    alpha = [[3 * share[i] for _ in range(num_states)] for i in range(num_states)]
    matrices, start = [], list(share)  # since the state was last known
    for step in range(num_steps):
        if step in groups:
            before = over_paths(start, matrices[:-1] if matrices else [])
            chance = columns(alpha)
            pairs = {(i, j): before[j] * chance[i][j] for i, j in itertools.product(range(num_states), repeat=2)}
            possible = {pair: p for pair, p in pairs.items() if pair[0] == groups[step]}
            total = sum(possible.values())
        alpha = [[decay * a + (1 - decay) * 3 * share[i] for a in row] for i, row in enumerate(alpha)]
        if step in groups:
            for (i, j), p in possible.items():
                alpha[i][j] += p / total
            start, matrices = [float(i == groups[step]) for i in range(num_states)], []
        matrices.append(columns(alpha))
    return over_paths(start, matrices)


def columns(alpha):
    sums = [sum(row[j] for row in alpha) for j in range(len(alpha))]
    return [[a / sums[j] for j, a in enumerate(row)] for row in alpha]


def over_paths(start, matrices):
    size = len(start)
    end = [0.0] * size
    for path in itertools.product(range(size), repeat=len(matrices) + 1):
        p = start[path[0]]
        for matrix, came_from, went_to in zip(matrices, path, path[1:], strict=False):
            p *= matrix[went_to][came_from]
        end[path[-1]] += p
    return end


@pytest.mark.parametrize("num_states", [2, 3, 4, 5])
def test_against_enumeration_of_all_paths(num_states):
    generator = np.random.default_rng(num_states)
    for decay in (0.0, 0.5, 1.0):
        model = PassRateStates(3, 8, num_states=num_states, decay=decay)
        groups = [{}, {}, {}]
        for step in range(5):
            ids = np.flatnonzero(generator.random(3) < 0.5)
            solved, sizes = generator.integers(0, 9, ids.size), np.full(ids.size, 8)
            for n, state in zip(ids, observed_state(solved, sizes, num_states), strict=True):
                groups[n][step] = state
            model.observe(ids, solved, sizes)
            expected = [by_enumeration(known, step + 1, num_states, decay) for known in groups]
            np.testing.assert_allclose(model.prior_KN.T, expected, atol=1e-12)


def test_states_are_ranges_of_the_pass_rate():
    solved, sizes = np.arange(9), np.full(9, 8)
    assert observed_state(solved, sizes, 3).tolist() == [0, *[1] * 7, 2]
    assert observed_state(solved, sizes, 2).tolist() == [0, *[1] * 7, 0]
    assert observed_state(solved, sizes, 5).tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("num_states", [2, 3, 5])
def test_what_is_never_seen_is_mixed_by_a_third_whatever_the_states(num_states):
    model = PassRateStates(2, 8, num_states=num_states)
    for _ in range(3):
        assert model.predict()[:, 1] == pytest.approx([1 / 3] * 2) and model.predict().sum(axis=1) == pytest.approx(1)
        model.observe(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))


def test_the_options_reach_the_model():
    arguments = [
        "+recipe=quickstart", "selection=dps", "selection.decay=0.5", f"selection.method={METHOD}",
        "selection.options.num_states=5",
    ]  # fmt: skip
    selector = build_selector(**selector_config(load_config(arguments)), num_prompts=4, num_rollouts=8, seed=0)
    assert selector.belief._object.num_states == 5 and selector.belief._object.decay == 0.5
