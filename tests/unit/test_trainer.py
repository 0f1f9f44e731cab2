"""The learning-rate schedule, by hand."""

import pytest

from dpsrl.config import TrainerConfig
from dpsrl.trainer import lr_at

pytestmark = pytest.mark.process  # imports the stack


def test_warm_up_then_constant():
    config = TrainerConfig(lr=1.0, warmup_updates=4)
    assert [lr_at(u, config, 10) for u in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_decay_starts_at_the_peak_and_would_reach_zero_after_the_last(schedule, middle):
    config = TrainerConfig(lr=1.0, lr_schedule=schedule, warmup_updates=2)
    assert lr_at(2, config, 12) == pytest.approx(1.0)
    assert lr_at(7, config, 12) == pytest.approx(middle)
    assert lr_at(12, config, 12) == pytest.approx(0.0)
