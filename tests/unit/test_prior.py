import json

import numpy as np
import pytest

from dpsrl.checkpoint import write_state
from dpsrl.config import load_config
from dpsrl.controller import Controller
from dpsrl.prior import read_controller_state, read_pass_rates, read_prior
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

IDS = np.array([0xA, 0xB, 0xC], dtype=np.uint64)


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def line(prompt_id, num_solved, num_rollouts, **more):
    return {"prompt_id": prompt_id, "num_solved": num_solved, "num_rollouts": num_rollouts} | more


def test_pass_rates_are_summed_and_matched_by_id(tmp_path):
    path = write(tmp_path / "r.jsonl", line("c", 3, 8), line("zz", 1, 8), "", line("a", 0, 8, step=3), line("c", 5, 8))
    rates = read_pass_rates(path, IDS)
    rows, solved, scored = rates.of_rows()
    assert (rows.tolist(), solved.tolist(), scored.tolist()) == ([0, 2], [0, 8], [8, 16])
    assert rates.sentence() == (
        f"pass rates of 2 of 3 prompts are known from {path} (33.3% solved, 50.0% mixed groups); "
        "1 lines are about other prompts"
    )


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[1]",
        "7",
        line("a", 9, 8),
        line("a", -1, 8),
        line("a", 0.5, 8),
        line(3, 1, 8),
        {"prompt_id": "a"},
        line("a", True, 8),
        line("a", 1, 10**30),
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(tmp_path, bad):
    path = write(tmp_path / "r.jsonl", line("a", 1, 8), bad)
    with pytest.raises(UserError, match="line 2: .* is not an object with prompt_id"):
        read_pass_rates(path, IDS)


def test_nothing_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="knows none of the 3 prompts .1 lines are about others"):
        read_pass_rates(write(tmp_path / "r.jsonl", line("x", 1, 8)), IDS)
    with pytest.raises(UserError, match="is not a file: give pass_rates.jsonl"):
        read_pass_rates(tmp_path / "none.jsonl", IDS)


def test_a_controllers_state_comes_from_a_checkpoint_or_the_latest_of_a_run(tmp_path):
    controller = Controller(IDS, 2, {"method": "dps"}, 8, seed=0)
    for step in (2, 10):
        controller.selector.observe(np.array([0]), np.array([step // 3]), np.array([8]))
        parts = {"controller": lambda folder: write_state(folder, controller.state_dict())}
        RunFolder(tmp_path).save_checkpoint(step, parts, {}, keep=2)
    (tmp_path / "checkpoints/step_12.tmp").mkdir()  # a run was killed while it saved
    (tmp_path / "checkpoints/step_12.tmp/manifest.json").touch()
    state = read_controller_state(tmp_path)
    assert int(state["selector.clock"]) == 2
    assert int(read_controller_state(tmp_path / "checkpoints/step_2")["selector.clock"]) == 1
    assert Controller(np.array([0xB, 0xA], dtype=np.uint64), 1, {"method": "dps"}, 8, seed=0).warm_start(state) == 1
    with pytest.raises(UserError, match="holds no controller's state"):
        read_controller_state(tmp_path / "nowhere")


def test_beliefs_that_cannot_be_taken_over_are_refused_when_they_are_read(tmp_path):
    state = Controller(IDS, 2, {"method": "dps"}, 8, seed=0).state_dict()
    parts = {"controller": lambda folder: write_state(folder, state)}
    RunFolder(tmp_path).save_checkpoint(1, parts, {}, keep=1)
    with pytest.raises(UserError, match=f"selection.warm_start={tmp_path}: .*another selection method"):
        read_prior(load_config(["+recipe=quickstart", f"selection.warm_start={tmp_path}"]), IDS)
    prior = read_prior(load_config(["+recipe=quickstart", "selection=dps", f"selection.warm_start={tmp_path}"]), IDS)
    assert prior.state is not None and prior.state.keys() == state.keys()
