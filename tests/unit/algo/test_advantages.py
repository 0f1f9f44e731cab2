import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsrl.algo.advantages import KINDS, advantages, overlong_penalty

NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "kind", "expected"),
    [
        # mean 1/2, squares add up to 1, unbiased variance 1/3: std 0.57735
        ([1, 0, 1, 0], "grpo", [0.8660254, -0.8660254, 0.8660254, -0.8660254]),
        ([1, 0, 1, 0], "dr_grpo", [0.5, -0.5, 0.5, -0.5]),
        # mean 1/4, squares (9 + 3 x 1) / 16 = 3/4, unbiased variance 1/4: std 1/2
        ([1, 0, 0, 0], "grpo", [1.5, -0.5, -0.5, -0.5]),
        ([1, 0, 0, 0], "dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        # a missing reward: the others as a group of their own, itself 0; mean 1/2, std 0.70711
        ([1, NAN, 0], "grpo", [0.70710678, 0, -0.70710678]),
        ([1, NAN, 0], "dr_grpo", [0.5, 0, -0.5]),
        # the others' means: 1/3 for a right one, 2/3 for a wrong one
        ([1, 0, 1, 0], "rloo", [2 / 3, -2 / 3, 2 / 3, -2 / 3]),
        ([1, NAN, 0], "rloo", [1.0, 0, -1.0]),
        # differences of 1/2 throughout: std 1/2
        ([1, NAN, 0], "reinforce_pp", [1.0, 0, -1.0]),
    ],
)
def test_by_hand(rewards, kind, expected):
    np.testing.assert_allclose(advantages([np.array(rewards)], kind)[0], expected, atol=3e-6)


def test_reinforce_pp_divides_by_the_std_of_the_whole_batch():
    batch = [np.array([1.0, 0.0]), np.array([4.0, 0.0]), np.array([3.0, 3.0]), np.array([NAN, 7.0])]
    made = advantages(batch, "reinforce_pp")
    std = np.std([0.5, -0.5, 2.0, -2.0, 0.0, 0.0, 0.0])  # a group without a difference counts with its zeros
    np.testing.assert_allclose(np.concatenate(made), [0.5 / std, -0.5 / std, 2 / std, -2 / std, 0, 0, 0, 0], rtol=1e-5)


def test_overlong_penalty_by_hand():
    assert [overlong_penalty(n, 20, 8) for n in (1, 12, 14, 16, 20, 25)] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong_penalty(20, 20, 0) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rewards",
    [
        [0.1] * 7,
        [1 / 3] * 3,
        [0, 0, 0, 0],
        [1e9 + 0.1] * 5,
        [NAN, 0.1, 0.1, 0.1],
        [NAN, 1.0, NAN],
        [NAN, NAN],
        [1.0],
        [],
    ],
)
def test_exactly_zero_without_a_difference(rewards, kind):
    (made,) = advantages([np.array(rewards)], kind)
    assert made.shape == (len(rewards),) and made.dtype == np.float64
    assert (made == 0).all()
    _, made = advantages([np.array([1.0, 0.0]), np.array(rewards)], kind)
    assert (made == 0).all()


@given(
    st.lists(st.one_of(st.just(NAN), st.floats(-100, 100)), min_size=1, max_size=16),
    st.sampled_from(KINDS),
)
def test_finite_and_centred(rewards, kind):
    (made,) = advantages([np.array(rewards)], kind)
    assert np.isfinite(made).all()
    assert abs(made.sum()) < 1e-6
    assert (made[np.isnan(rewards)] == 0).all()


def test_refusals():
    with pytest.raises(ValueError, match="'grop' is unknown; use one of: grpo, dr_grpo, rloo, reinforce_pp"):
        advantages([np.array([0.0, 1.0])], "grop")
    with pytest.raises(ValueError, match="hold an infinity"):
        advantages([np.array([0.0, np.inf])])
