import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsrl.algo.advantages import group_advantages

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
    ],
)
def test_by_hand(rewards, kind, expected):
    np.testing.assert_allclose(group_advantages(np.array(rewards), kind), expected, atol=3e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
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
    advantages = group_advantages(np.array(rewards), kind)
    assert advantages.shape == (len(rewards),) and advantages.dtype == np.float64
    assert (advantages == 0).all()


@given(
    st.lists(st.one_of(st.just(NAN), st.floats(-100, 100)), min_size=1, max_size=16),
    st.sampled_from(["grpo", "dr_grpo"]),
)
def test_finite_and_centred(rewards, kind):
    advantages = group_advantages(np.array(rewards), kind)
    assert np.isfinite(advantages).all()
    assert abs(advantages.sum()) < 1e-6
    assert (advantages[np.isnan(rewards)] == 0).all()


def test_refusals():
    with pytest.raises(ValueError, match="'grop' is unknown; use one of: grpo, dr_grpo"):
        group_advantages(np.array([0.0, 1.0]), "grop")
    with pytest.raises(ValueError, match="hold an infinity"):
        group_advantages(np.array([0.0, np.inf]))
