"""The driver's loop where a real run is not needed: what becomes of failed saves and updates, and of a lost party."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

import dpsrl.train
from dpsrl.cluster import PartyLost, StallError
from dpsrl.config import load_config
from dpsrl.resume import Driver
from dpsrl.run_folder import RunFolder
from dpsrl.stops import StopRequests
from dpsrl.train import reference_kl, save, train_until_done, watch_skipped

pytestmark = pytest.mark.process


@pytest.fixture
def run(tmp_path):
    """What `save` needs of a run, and `said`, the events that it told of."""

    def write(folder):
        np.save(folder / "weights.npy", np.zeros(3))

    said, beats = [], []
    return SimpleNamespace(
        config=load_config(["+recipe=quickstart"]), driver=Driver(step=1), saved=0, said=said, elapsed_s=lambda: 1.0,
        cluster=SimpleNamespace(watchdog=SimpleNamespace(beat=lambda: beats.append(1))), beats=beats,
        event=lambda kind, text: said.append((kind, text)), screen=SimpleNamespace(stage=lambda *_: None),
        metrics=SimpleNamespace(so_far=lambda step: {}, timer=lambda name: nullcontext()),
        trainers=SimpleNamespace(save_model=write, save_state=write),
        controller=SimpleNamespace(state_dict=lambda: {"beliefs": np.zeros(3)}),
        checked=SimpleNamespace(
            folder=RunFolder(tmp_path / "run"), about={}, checkpoint=None,
            tokenizer=SimpleNamespace(save_pretrained=lambda folder: None),
        ),
    )  # fmt: skip


def fail(error):
    def failing(*_):
        raise error

    return failing


@pytest.mark.parametrize("part", ["save_model", "save_state", "state_dict"])
def test_a_party_lost_while_saving_is_told_of_at_once(run, part):
    save(run, None)
    run.driver.step = 2
    lost = PartyLost("trainer-0 died while it should save", [])
    setattr(run.controller if part == "state_dict" else run.trainers, part, fail(lost))
    with pytest.raises(PartyLost) as caught:
        save(run, None)
    assert caught.value is lost and run.saved == 1 and run.said == []
    assert [path.name for path in run.checked.folder.list_checkpoints()] == ["step_1"]


def test_a_disk_that_refuses_costs_the_checkpoint_alone(run):
    run.trainers.save_state = fail(OSError(28, "No space left on device"))
    save(run, None)
    ((kind, text),) = run.said
    assert kind == "checkpoint" and "No space left on device" in text and run.saved == 0


def test_a_checkpoint_that_cannot_be_removed_costs_nothing(run, monkeypatch):
    monkeypatch.setattr(RunFolder, "_remove_older", fail(OSError(16, "Device or resource busy", "step_0")))
    save(run, None)
    assert run.said == [
        ("checkpoint", f"warning: a checkpoint older than {run.checked.folder.checkpoints}/step_1 cannot be removed: "
         "Device or resource busy (step_0)")
    ]  # fmt: skip
    assert run.saved == 1 and run.checked.folder.newest_checkpoint()[0].step == 1


def test_each_file_of_a_checkpoint_counts_as_progress(run):
    save(run, None)
    (saved,) = run.checked.folder.list_checkpoints()
    assert len(run.beats) >= sum(path.is_file() for path in saved.rglob("*")) - 1  # the manifest is the last


def test_updates_in_a_row_are_counted_across_steps_and_within_one(run):
    run.num_skipped, run.config.trainer.max_skipped = 0, 5
    watch_skipped(run, [True, True, False, True], 1)
    assert run.num_skipped == 1
    watch_skipped(run, [True, False, True, True], 2)
    watch_skipped(run, [True, False, False, False], 3)
    assert run.num_skipped == 0
    with pytest.raises(StallError, match="5 updates in a row were not finite, trainer.max_skipped=5"):
        watch_skipped(run, [False, *[True] * 5, False, False], 4)


def test_a_party_lost_after_a_request_to_stop_is_not_started_again(run, monkeypatch):
    said, stops = [], StopRequests()

    def lose(*_):
        stops.num = 1
        raise PartyLost("trainer-0 died while it should train", [])

    monkeypatch.setattr(dpsrl.train, "launch", lambda *_: run)
    monkeypatch.setattr(dpsrl.train, "train_from", lose)
    save(run, None)
    screen = SimpleNamespace(line=said.append)
    assert train_until_done(run.config, run.checked, screen, stops) is None
    assert said == [
        "trainer-0 died while it should train: asked to stop (SIGTERM), and this was not saved; resume=auto goes on "
        "from step 1"
    ]


def test_without_a_group_to_train_on_there_is_no_kl_to_the_reference():
    config = load_config(["+recipe=quickstart", "algo.kl_coef=0.1", "algo.kl_in=reward"])
    assert reference_kl(SimpleNamespace(config=config), []) is None
