import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.types import UserError

NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "counts"),
    [
        ([1, 0, 1, 1], (3, 4)),
        ([0, 0, 0], (0, 3)),
        ([1, 1], (2, 2)),
        ([1, NAN, 0, NAN], (1, 2)),  # failed rewards leave both counts
        ([NAN, NAN], (0, 0)),
        ([], (0, 0)),
        ([1, NAN], (1, 1)),
        ([0.5, 0.5, 0.5, 0.6], (2, 4)),  # in proportion: 2.1 solved of 4
        ([0.1, 0, 0, 0], (1, 4)),  # a format bonus is a spread, and the advantage sees it
        ([0.9, 1.0, 1.0], (2, 3)),
        ([0.4, 0.4], (0, 2)),
        ([0.6, 0.6], (2, 2)),
        ([-3, 7], (1, 2)),
    ],
)
def test_counts_by_hand(rewards, counts):
    assert OutcomeRule().counts(np.array(rewards, dtype=float)) == counts


def test_thresholds_and_floor():
    rule = OutcomeRule(unsolved_at=-1.0, solved_at=3.0, min_spread=0.5)
    assert rule.counts(np.array([-1.0, 3.0, 1.0, 1.0])) == (2, 4)
    assert rule.counts(np.array([-1.0, -0.6])) == (0, 2)  # below the floor: not mixed
    assert rule.counts(np.array([2.6, 3.0])) == (2, 2)
    assert OutcomeRule(min_spread=0.1).counts(np.array([0.1, 0.0, 0.0])) == (0, 3)  # the format bonus again


@given(st.lists(st.one_of(st.just(NAN), st.floats(-2, 2)), max_size=12), st.floats(0, 1))
def test_mixed_counts_if_and_only_if_the_spread_exceeds_the_floor(rewards, floor):
    rewards = np.array(rewards, dtype=float)
    solved, scored = OutcomeRule(min_spread=floor).counts(rewards)
    known = rewards[np.isfinite(rewards)]
    assert scored == known.size and 0 <= solved <= scored
    assert (0 < solved < scored) == (known.size > 1 and known.max() - known.min() > floor)


@pytest.mark.parametrize("options", [{"unsolved_at": 1.0}, {"min_spread": -0.1}])
def test_refused_rules(options):
    with pytest.raises(UserError, match="must be"):
        OutcomeRule(**options)
