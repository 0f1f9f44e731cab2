"""The beliefs about pass rates against integration, recursion and enumeration written independently of them."""

import numpy as np
import pytest

from dpsrl.selection.beliefs import BELIEFS
from dpsrl.selection.beliefs.beta import DiscountedBeta
from dpsrl.selection.beliefs.dirichlet_hmm import DirichletHMM
from dpsrl.selection.beliefs.ema import EmaVariance
from dpsrl.selection.beliefs.kalman import ArcsineKalman
from dpsrl.selection.beliefs.last_group import LastGroup, ZeroVarianceStreak
from dpsrl.selection.beliefs.logit_walk import LogitWalk, binomial_likelihood, posterior_moments

N = 8
CURVED = 1.5e-3  # of tables and single precision


def step(belief, groups, made=None):
    """One step of the clock; `groups`: {entry: (solved, rollouts)}."""
    entries = np.array(list(groups), dtype=np.int64)
    counts = np.array(list(groups.values()), dtype=np.int64).reshape(-1, 2)
    clock = getattr(belief, "clock", 0)
    belief.observe(entries, *counts.T, np.full(entries.size, clock if made is None else made))
    belief.advance(clock + 1)


def build(cls, num_prompts=4, **options):
    belief = cls(num_prompts + 1, N, **options)
    belief.grow(num_prompts + 1)
    return belief


def mixed(rate):
    return 1 - rate**N - (1 - rate) ** N


# --- all of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BELIEFS)
def test_predictions_are_probabilities_whatever_happens(name):
    belief, rng = build(BELIEFS[name], 30), np.random.default_rng(0)
    for _ in range(60):
        entries = rng.choice(np.arange(1, 31), 8, replace=False)
        sizes = rng.integers(1, 20, 8)
        step(belief, {int(e): (int(rng.integers(0, n + 1)), int(n)) for e, n in zip(entries, sizes)})
        states = belief.predict()
        assert states.shape == (31, 3) and np.isfinite(states).all() and (states > -1e-6).all()
        np.testing.assert_allclose(states.sum(axis=1), 1.0, atol=1e-5)
        for reading in ("rate", "variance", "spread"):
            if hasattr(belief, reading):
                values = getattr(belief, reading)()
                assert values.shape == (31,) and (values >= -1e-6).all() and (values <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["dirichlet_hmm", "beta", "kalman", "logit_walk"])
@pytest.mark.parametrize("idle", [0, 1, 4])
def test_a_late_group_counts_from_the_step_that_made_it(name, idle):
    """Group made at step 3 and observed 2 steps later: the same belief as if it had come in time."""
    options = {"kalman": {"drift": 0.02, "walk_noise": 0.01}, "beta": {"idle_decay": True}}.get(name, {})
    late, in_time = build(BELIEFS[name], 2, **options), build(BELIEFS[name], 2, **options)
    for belief in (late, in_time):
        belief._learn_shared = lambda *evidence: None  # what is shared depends on when it is learned
        step(belief, {1: (4, N)})
        step(belief, {1: (0, N)})
        step(belief, {})
    step(in_time, {1: (6, N), 2: (2, N)})
    for _ in range(2):
        step(in_time, {})
    step(late, {})
    step(late, {})
    step(late, {1: (6, N), 2: (2, N)}, made=3)
    for _ in range(idle):
        step(in_time, {})
        step(late, {})
    # The population of `logit_walk` counts how old its groups are from when it hears of them.
    tolerance = 3e-2 if name == "logit_walk" else 1e-6
    np.testing.assert_allclose(late.predict()[1:], in_time.predict()[1:], atol=tolerance)


# --- DPS ------------------------------------------------------------------------------------------------------


def test_without_the_first_transition_partial_ranks_above_never_seen():
    """Unsolved and then partial: 0.3093 as published, below the third of a prompt never seen."""
    published, mended = build(DirichletHMM), build(DirichletHMM, first_transition=False)
    for belief in (published, mended):
        step(belief, {1: (0, N)})
        step(belief, {1: (4, N)})
    assert published.predict()[1, 1] == pytest.approx(0.3093, abs=5e-5)
    assert mended.predict()[1, 1] >= 1 / 3


def test_the_evidence_weight_raises_the_ceiling():
    for weight in (1.0, 4.0):
        belief = build(DirichletHMM, evidence_weight=weight)
        for _ in range(300):
            step(belief, {1: (4, N)})
        n = 1 + weight / 0.3
        assert belief.predict()[1, 1] == pytest.approx(n / (n + 2), abs=1e-9)


@pytest.mark.process
def test_the_compiled_kernel_equals_numpy():
    numba = pytest.importorskip("numba")
    from dpsrl.selection import hmm
    from dpsrl.selection.kernel import propagate_all

    assert numba
    rng = np.random.default_rng(0)
    arguments = [
        rng.random((3, 3, 50)),
        rng.integers(-1, 9, 50).astype(np.int32),
        9,
        0.7 ** np.arange(6),
        np.ones((3, 3)),
    ]
    posterior = rng.dirichlet(np.ones(3), 50).T.copy()
    by_numpy, by_kernel = np.zeros((3, 50)), np.zeros((3, 50))
    hmm.propagate_all(*arguments, posterior, by_numpy)
    propagate_all(*arguments, posterior, by_kernel)
    np.testing.assert_allclose(by_kernel, by_numpy, atol=1e-15)


# --- Beta -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle_decay", [True, False])
def test_beta_counts_by_recursion(idle_decay):
    belief, decay = build(DiscountedBeta, 3, decay=0.6, idle_decay=idle_decay), 0.6
    a, b = np.ones(4), np.ones(4)
    rng = np.random.default_rng(1)
    for _ in range(20):
        groups = {e: (int(rng.integers(0, 9)), N) for e in (1, 2, 3) if rng.random() < 0.5}
        for e in (1, 2, 3):
            if idle_decay or e in groups:
                a[e], b[e] = 1 + decay * (a[e] - 1), 1 + decay * (b[e] - 1)
            if e in groups:
                a[e], b[e] = a[e] + groups[e][0], b[e] + N - groups[e][0]
        step(belief, groups)
        np.testing.assert_allclose(belief.counts(), [a, b], rtol=1e-5)


def test_beta_expectations_by_integration():
    belief = build(DiscountedBeta, 3, decay=1.0)
    step(belief, {1: (3, N), 2: (8, N), 3: (0, 2)})
    p = (np.arange(200_000) + 0.5) / 200_000
    for e, (a, b) in enumerate(np.transpose(belief.counts())):
        weight = p ** (a - 1) * (1 - p) ** (b - 1)
        weight /= weight.sum()
        f = mixed(p)
        np.testing.assert_allclose(belief.predict()[e], [weight @ (1 - p) ** N, weight @ f, weight @ p**N], atol=1e-6)
        assert belief.rate()[e] == pytest.approx(weight @ p, abs=1e-6)
        assert belief.variance()[e] == pytest.approx(weight @ (p * (1 - p)), abs=1e-6)
        assert belief.spread()[e] == pytest.approx(np.sqrt(weight @ f**2 - (weight @ f) ** 2), abs=1e-5)


def test_beta_draws_have_its_mean():
    belief = build(DiscountedBeta, 1, decay=1.0)
    step(belief, {1: (6, N)})
    draws = belief.draw(np.ones(20_000, dtype=int), np.random.default_rng(0))
    assert draws.mean() == pytest.approx(0.7, abs=0.005)


# --- EMA ------------------------------------------------------------------------------------------------------


def test_ema_by_hand():
    belief = build(EmaVariance, 3, smoothing=0.25)
    step(belief, {1: (4, N), 2: (8, N)})
    np.testing.assert_allclose(4 * belief.variance(), [1, 1, 0, 1])
    step(belief, {1: (0, N), 2: (2, 4)})
    np.testing.assert_allclose(4 * belief.variance(), [1, 0.75, 0.25, 1])
    assert belief.predict()[1, 1] == pytest.approx(mixed(0.25), abs=1e-6)  # 4 p (1 - p) = 0.75
    assert belief.predict()[0].tolist() == pytest.approx([1 / 5, 2 / 5, 2 / 5])  # one each, one partial, one solved


# --- Kalman ---------------------------------------------------------------------------------------------------


def test_kalman_by_recursion():
    """Step by step as the filter is written down, against the closed form over idle steps."""
    drift, noise = 0.03, 0.004
    belief = build(ArcsineKalman, 1, drift=drift, walk_noise=noise)
    mean, var = np.pi / 4, np.pi**2 / 48
    history = [4, None, None, 0, 8, None, 7, 1]
    seen = False
    for solved in history:
        if solved is not None:
            inner = 0 < solved < N
            read = np.arcsin(np.sqrt((solved + 0.375) / (N + 0.75))) if inner else np.pi / 2 * (solved > 0)
            read_var = 1 / (4 * N + 2) if inner else 1 / (2 * N)
            kept = var / (var + read_var)
            mean, var, seen = mean + kept * (read - mean), var * (1 - kept), True
        step(belief, {} if solved is None else {1: (solved, N)})
        if seen:
            mean, var = np.arctan2(np.sin(mean) * np.exp(2 * drift), np.cos(mean)), min(var + noise, np.pi**2 / 48)
        np.testing.assert_allclose(belief._at(np.array([1]), belief.clock), [[mean], [var]], rtol=2e-5)


def test_kalman_expectations_by_sampling():
    belief = build(ArcsineKalman, 1, drift=0.0, walk_noise=0.0)
    step(belief, {1: (3, N)})
    mean, var = belief._at(np.array([1]), belief.clock)
    psi = np.random.default_rng(0).normal(mean, np.sqrt(var), 400_000)
    rate = np.sin(psi) ** 2
    assert belief.rate()[1] == pytest.approx(rate.mean(), abs=2e-3)
    assert belief.variance()[1] == pytest.approx((rate * (1 - rate)).mean(), abs=1e-3)
    assert belief.predict()[1, 1] == pytest.approx(mixed(rate).mean(), abs=0.03)  # cos^2n is nearly a Gaussian


def test_kalman_learns_drift_and_noise():
    rng, logit = np.random.default_rng(0), np.random.default_rng(1).normal(-1, 1, 400)
    belief = build(ArcsineKalman, 400)
    for _ in range(60):
        solved = rng.binomial(N, 1 / (1 + np.exp(-logit)))
        step(belief, {e + 1: (int(m), N) for e, m in enumerate(solved)})
        logit += 0.04
    assert belief._shared[0] == pytest.approx(0.04 / 4, abs=0.006)  # d logit = 4 drift


# --- last group -----------------------------------------------------------------------------------------------


def test_last_group_counts_what_followed():
    belief = build(LastGroup, 3)
    step(belief, {1: (0, N), 2: (0, N), 3: (8, N)})
    step(belief, {1: (4, N), 2: (0, N)})
    assert belief.left_out().tolist() == [False, False, False, True]
    np.testing.assert_allclose(belief.predict()[2], [2 / 5, 2 / 5, 1 / 5])  # of unsolved: one again, one partial
    np.testing.assert_allclose(belief.predict()[0], [3 / 6, 1 / 6, 2 / 6])


def test_streaks_and_their_keep_chance():
    belief = build(ZeroVarianceStreak, 3)
    step(belief, {1: (0, N), 2: (8, N), 3: (4, N)})
    np.testing.assert_allclose(belief.keep(), [1, 0.5, 0.5, 1])
    step(belief, {1: (0, N), 2: (0, N)})  # hard again; easy became hard; both shares count against their targets
    hard = 0.5 - 0.01
    np.testing.assert_allclose(belief.keep(), [1, hard**2, hard, 1])
    for _ in range(20):
        step(belief, {1: (0, N)})
    assert belief.keep()[1] == 0.01
    step(belief, {1: (3, N)})
    assert belief.keep()[1] == 1.0


# --- the random walk of `forecast` -----------------------------------------------------------------------------


def test_posterior_moments_by_a_fine_grid():
    """The last three are surprises that leave what is believed far behind."""
    mean, var = np.array([-1.0, 0.5, 3.0, 10.0, 6.0, -9.0]), np.array([2.0, 0.3, 4.0, 2.0, 1.0, 1.0])
    solved, rollouts = np.array([0, 5, 8, 0, 0, 64]), np.array([8, 8, 16, 8, 64, 64])
    got = posterior_moments(mean, var, solved, rollouts)
    logit = np.linspace(-25, 25, 50_001)
    for i in range(mean.size):
        p = 1 / (1 + np.exp(-logit))
        weight = (
            np.exp(-((logit - mean[i]) ** 2) / (2 * var[i])) * p ** solved[i] * (1 - p) ** (rollouts[i] - solved[i])
        )
        weight /= weight.sum()
        assert got[0][i] == pytest.approx(weight @ logit, abs=2e-4)
        assert got[1][i] == pytest.approx(weight @ logit**2 - (weight @ logit) ** 2, rel=2e-3)


@pytest.mark.parametrize("history", [[3, 4, 5], [0, None, 1, 0], [8, 8, None, None, 6], [1, 0, 0, 4], [7, 2, 8]])
def test_the_belief_equals_enumeration_over_paths(history):
    """All paths of (logit, gain) on a fine grid, with every shared parameter held; moments only, so within a bound."""
    belief = build(LogitWalk, 1, noise=0.05, gain=0.3)
    belief._learn_shared = lambda *evidence: None
    first = next(m for m in history if m is not None)
    x = np.linspace(-9, 9, 241)
    gains = np.linspace(0.3 - 4 * 0.3, 0.3 + 4 * 0.3, 41)
    gain_weight = np.exp(-((gains - 0.3) ** 2) / (2 * (0.3**2 + 1e-4)))
    walk = np.exp(-((x[:, None] - x) ** 2) / (2 * 0.05))
    walk /= walk.sum(axis=1, keepdims=True)
    # The prior is the population that the belief itself fitted to the first group: that fit is tested below.
    weight, trained = None, False
    for t, solved in enumerate(history):
        if weight is not None:
            weight = weight @ walk
            if trained:
                weight = np.stack([np.interp(x - g, x, row) for g, row in zip(gains, weight)])
        trained = solved is not None and 0 < solved < N
        step(belief, {} if solved is None else {1: (solved, N)})
        if solved is not None:
            if weight is None:
                prior = np.interp(x, np.linspace(-8, 8, 81), belief._fit_G, left=0, right=0)
                weight = gain_weight[:, None] * prior
            weight = weight * binomial_likelihood(x, np.array([solved]), np.array([N]))
        weight = weight / weight.sum()
        shifted = weight @ walk
        if trained:
            shifted = np.stack([np.interp(x - g, x, row) for g, row in zip(gains, shifted)])
        marginal = shifted.sum(axis=0) / shifted.sum()
        rate = 1 / (1 + np.exp(-x))
        assert belief.predict()[1, 1] == pytest.approx(marginal @ mixed(rate), abs=0.05), (t, first)
        assert belief.rate()[1] == pytest.approx(marginal @ rate, abs=0.03), t


def test_the_population_is_recovered_from_first_groups():
    rng = np.random.default_rng(0)
    logit = np.where(rng.random(4000) < 0.6, rng.normal(-3, 0.7, 4000), rng.normal(1, 0.7, 4000))
    belief = build(LogitWalk, 4000)
    rate = 1 / (1 + np.exp(-logit))
    for part in np.array_split(np.arange(3000), 12):
        step(belief, {int(i) + 1: (int(rng.binomial(N, rate[i])), N) for i in part})
    unsolved, partial, solved = belief.predict()[4000]  # never seen
    assert partial == pytest.approx(mixed(rate).mean(), abs=0.03)
    assert unsolved == pytest.approx(((1 - rate) ** N).mean(), abs=0.03)
    # Prompts seen once: calibrated within each outcome of the first group.
    once = belief.predict()[1:3001, 1]
    assert once.mean() == pytest.approx(mixed(rate[:3000]).mean(), abs=0.03)


def test_drift_and_gain_are_learned():
    rng = np.random.default_rng(0)
    logit = rng.normal(-1.0, 1.2, 600)
    belief = build(LogitWalk, 600)
    for _ in range(80):
        chosen = rng.choice(600, 100, replace=False)
        solved = rng.binomial(N, 1 / (1 + np.exp(-logit[chosen])))
        step(belief, {int(i) + 1: (int(m), N) for i, m in zip(chosen, solved)})
        logit[chosen[(solved > 0) & (solved < N)]] += 0.12
        logit += 0.01
    drift, gain, noise = belief._shared
    assert drift == pytest.approx(0.01, abs=0.01)
    assert gain == pytest.approx(0.12, abs=0.12)  # from second groups alone, so with some 300 of them
    assert noise < 0.03
    error = belief._at(np.arange(1, 601), belief.clock)[0] - logit
    assert abs(error.mean()) < 0.25


def test_a_prompt_that_does_not_learn_is_told_from_one_that_does():
    belief = build(LogitWalk, 2, gain=0.3)
    belief._learn_shared = lambda *evidence: None
    rng = np.random.default_rng(3)
    logit = np.array([-1.5, -1.5])
    for _ in range(12):
        solved = rng.binomial(N, 1 / (1 + np.exp(-logit)))
        step(belief, {1: (int(solved[0]), N), 2: (int(solved[1]), N)})
        logit[0] += 0.4 * (0 < solved[0] < N)
    gains = belief._moments_5E[2, 1:3]
    assert gains[0] > gains[1] + 0.1


def test_large_groups_of_a_separate_pass_count():
    belief = build(LogitWalk, 2)
    step(belief, {1: (16, 64), 2: (0, 64)})
    assert belief.rate()[1] == pytest.approx(0.25, abs=0.04)
    assert belief.predict()[2, 1] < 0.15


def test_the_table_agrees_with_quadrature():
    belief = build(LogitWalk, 1)
    step(belief, {1: (2, N)})
    step(belief, {1: (3, N)})
    mean, var, _ = belief._at(np.array([1]), belief.clock)
    rate = 1 / (1 + np.exp(-np.random.default_rng(0).normal(mean, np.sqrt(var), 1_000_000)))
    assert belief.predict()[1, 1] == pytest.approx(mixed(rate).mean(), abs=CURVED)
    assert belief.spread()[1] == pytest.approx(mixed(rate).std(), abs=2 * CURVED)
    draws = belief.draw(np.ones(50_000, dtype=int), np.random.default_rng(0))
    assert draws.mean() == pytest.approx(belief.rate()[1], abs=0.005)
