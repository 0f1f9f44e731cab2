"""The driver's loop where a real run is not needed: what becomes of a save that fails."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from dpsrl.cluster import PartyLost
from dpsrl.config import load_config
from dpsrl.resume import Driver
from dpsrl.run_folder import RunFolder
from dpsrl.train import save

pytestmark = pytest.mark.process


class Prompts:
    content_hash = "0"

    def __len__(self):
        return 1


@pytest.fixture
def run(tmp_path):
    """What `save` needs of a run, and `said`, the events that it told of."""

    def write(folder):
        np.save(folder / "weights.npy", np.zeros(3))

    said = []
    return SimpleNamespace(
        config=load_config(["+recipe=quickstart"]), driver=Driver(step=1), saved=0, said=said, elapsed_s=lambda: 1.0,
        event=lambda kind, text: said.append((kind, text)), screen=SimpleNamespace(stage=lambda *_: None),
        metrics=SimpleNamespace(so_far=lambda step: {}, timer=lambda name: nullcontext()),
        trainers=SimpleNamespace(save_model=write, save_state=write),
        controller=SimpleNamespace(state_dict=lambda: {"beliefs": np.zeros(3)}),
        checked=SimpleNamespace(
            folder=RunFolder(tmp_path / "run"), prompts=Prompts(),
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
