"""Every rollout is accounted for, whatever became of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsrl.ledger import Ledger
from dpsrl.types import Group, Rollout, Score


def group(index, scores, finish_reasons=None):
    ids, logprobs = np.array([1], dtype=np.int32), np.zeros(1, dtype=np.float32)
    reasons = finish_reasons or ["stop"] * len(scores)
    rollouts = [Rollout(ids, logprobs, reason, [(0, 1)]) for reason in reasons]
    return Group(index, str(index), ids, rollouts, [None if s is None else Score(s, s >= 1) for s in scores])


def test_an_account_by_hand():
    ledger = Ledger()
    mixed, alike, late = group(0, [1, 0, None, 0], ["stop", "length", "stop", "stop"]), group(1, [0, 0]), group(2, [1])
    ledger.came_back(mixed, admitted=True)
    ledger.came_back(alike, admitted=False)
    ledger.came_back(late, admitted=True)
    assert ledger.balance(carried=5)["holds"]
    ledger.taken([mixed], mask_truncated=True, has_update=True)
    assert ledger.balance(carried=1) == {
        "generated": 7, "trained": 2, "dropped": {"not mixed": 2, "missing": 1, "truncated": 1}, "carried": 1,
        "holds": True,
    }  # fmt: skip
    assert not ledger.balance(carried=2)["holds"] and not ledger.balance(carried=0)["holds"]
    ledger.skipped(2)  # the update was not finite
    assert ledger.trained == 0 and ledger.dropped["in an update that was skipped"] == 2
    assert ledger.balance(carried=1)["holds"]


score = st.one_of(st.none(), st.sampled_from([0.0, 1.0]))


@given(
    st.lists(st.tuples(st.lists(score, min_size=1, max_size=4), st.booleans(), st.integers(0, 2))),
    st.booleans(),
)
def test_the_account_holds_at_any_time(groups, mask_truncated):
    """fate of an admitted group: 0 carried, 1 in an update, 2 in a batch that is too small for one."""
    ledger, carried = Ledger(), 0
    for index, (scores, admitted, fate) in enumerate(groups):
        made = group(index, scores, ["length" if index % 2 else "stop"] * len(scores))
        ledger.came_back(made, admitted)
        if admitted and fate == 0:
            carried += len(scores)
        elif admitted:
            ledger.taken([made], mask_truncated, has_update=fate == 1)
        assert ledger.balance(carried)["holds"]
    assert ledger.generated == sum(len(scores) for scores, *_ in groups)
    assert ledger.trained == pytest.approx(
        sum(
            sum(s is not None and not (mask_truncated and index % 2) for s in scores)
            for index, (scores, admitted, fate) in enumerate(groups)
            if admitted and fate == 1
        )
    )
