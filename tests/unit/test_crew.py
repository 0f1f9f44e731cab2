"""Which processes go from one run to the next, with stand-ins that start nothing."""

import pytest

from dpsrl import crew
from dpsrl.cluster import PartyLost
from dpsrl.config import load_config


class StandIn(crew.Crew):
    def __init__(self, config, log_dir, stops):
        self._made_for, self.rollouts, self.state = crew.needs(config), self, "new"
        self.outstanding = {}

    def take_up(self, config, log_dir, stops):
        if isinstance(self.state, Exception):
            raise self.state
        self.state = "kept"

    def rest(self):
        if self.state == "cannot rest":
            raise OSError("no process to end")
        self.state = "resting"

    def close(self):
        self.state = "ended"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(crew, "Crew", StandIn)


def lend(keeper, *changes, error=None, outstanding=None):
    """The crew of a run, and whether it was new."""
    config = load_config(["+recipe=quickstart", *changes])
    with keeper.crew(config, None, None) as lent:
        state, lent.outstanding = lent.state, outstanding or {}
        if error:
            raise error
    return lent, state


def test_a_run_that_starts_the_same_processes_gets_them():
    with crew.Keeper(keeps=True) as keeper:
        first, state = lend(keeper)
        assert (state, first.state) == ("new", "resting")
        changes = [
            "seed=3", "selection=uniform", "train.steps=3", "trainer.lr=1e-3", "rollout.num_rollouts=4",
            "rollout.temperature=0.7", "algo.loss=gspo", "selection.admission=mixed", "run.stall_s=99",
        ]  # fmt: skip
        assert lend(keeper, *changes) == (first, "kept")
        assert lend(keeper) == (first, "kept") and first.state == "resting"
    assert first.state == "ended"


@pytest.mark.parametrize(
    "change",
    [
        "train.max_lag=1", "train.streaming=true", "rollout.num_workers=2", "trainer.num_workers=2",
        "rollout.max_num_seqs=8", "model.max_response_tokens=64", "model.dtype=bfloat16", "cluster.cpus_per_worker=1",
    ],
)  # fmt: skip
def test_one_that_does_not_gets_new_ones(change):
    with crew.Keeper(keeps=True) as keeper:
        first, _ = lend(keeper)
        other, state = lend(keeper, change)
        assert state == "new" and other is not first and first.state == "ended"


def test_after_an_error_or_with_rollouts_under_way_nothing_is_kept():
    with crew.Keeper(keeps=True) as keeper:
        first, _ = lend(keeper)
        for error in (KeyboardInterrupt(), RuntimeError()):
            with pytest.raises(type(error)):
                lend(keeper, error=error)
        assert first.state == "ended"
        second, state = lend(keeper, outstanding={1: "a request"})
        assert state == "new" and second.state == "ended"


def test_a_trainer_that_could_not_be_freed_is_not_kept():
    with crew.Keeper(keeps=True) as keeper:
        first, _ = lend(keeper)
        assert lend(keeper, "trainer.zero_stage=1") == (first, "kept") and first.state == "ended"
        for change in ("trainer.zero_stage=2", "model.dtype=bfloat16"):
            lent, state = lend(keeper, change)
            assert (state, lent.state) == ("new", "ended")


@pytest.mark.parametrize("fault", [PartyLost("engine-0 died", []), RuntimeError("it cannot load the model anew")])
def test_where_the_hand_over_fails_the_run_starts_its_own_and_says_so(fault, capsys):
    with crew.Keeper(keeps=True) as keeper:
        first, _ = lend(keeper)
        first.state = fault
        second, state = lend(keeper)
        assert str(fault) in capsys.readouterr().err
        assert state == "new" and first.state == "ended"
        assert lend(keeper) == (second, "kept")


def test_a_run_that_ended_well_does_so_though_its_processes_cannot_be_kept():
    config = load_config(["+recipe=quickstart"])
    with crew.Keeper(keeps=True) as keeper:
        with keeper.crew(config, None, None) as first:
            first.state = "cannot rest"
        assert first.state == "ended"
        assert lend(keeper)[1] == "new"


def test_a_run_of_its_own_keeps_nothing():
    lent, _ = lend(crew.Keeper())
    assert lent.state == "ended"
