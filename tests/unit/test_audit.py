import numpy as np
import pytest

from dpsrl.audit import MIN_GROUPS, WINDOW, Audit, calibration_error


def test_calibration_error_by_hand():
    predicted, mixed = np.array([0.1, 0.1, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 1.0])
    # two bins: |0.2 - 1| / 4 and |1.8 - 2| / 4
    assert calibration_error(predicted, mixed) == pytest.approx(0.25)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0.0


def test_figures_begin_with_enough_groups_and_look_back_a_window():
    audit = Audit(4, seed=0)
    audit.record(np.full(MIN_GROUPS - 1, 0.5), *np.zeros((3, MIN_GROUPS - 1)))
    assert audit.metrics() == {}
    audit.record(np.array([0.5]), np.array([0.0]), np.array([1.0]), np.array([1.0]))
    assert audit.metrics()["selection/audit_brier"] == pytest.approx(0.25)
    audit.record(*np.ones((4, WINDOW)))
    assert audit.metrics() == pytest.approx(
        {"selection/audit_brier": 0, "selection/audit_calibration": 0, "selection/audit_mixed_share": 1}
    )


def test_draws_avoid_what_is_busy_and_go_on_after_loading():
    first, second = Audit(3, seed=1), Audit(3, seed=1)
    assert all(set(first.draw(6, [0, 1, 2], 9)) == {3, 4, 5} for _ in range(5))
    assert first.draw(6, [0, 1, 2, 3, 4], 9) == [5]
    assert len(first.draw(100, [], 2)) == 2
    second.load_state_dict(first.state_dict())
    assert second.draw(1000, [], 9) == first.draw(1000, [], 9)
