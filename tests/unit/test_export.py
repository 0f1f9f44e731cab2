"""A run's groups and beliefs as Parquet, against the run folder they are from."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from dpsrl.checkpoint import write_state
from dpsrl.config import load_config
from dpsrl.controller import Controller, Outcome
from dpsrl.export import main
from dpsrl.run_folder import RunFolder

EXAMPLE = Path(__file__).parents[2] / "recipes/analysis/calibration.py"


@pytest.fixture
def run(tmp_path):
    """A run folder of three steps of forecast over 40 prompts, and its controller."""
    ids = np.arange(1000, 1040, dtype=np.uint64)
    controller = Controller(ids, 8, {"method": "forecast"}, num_rollouts=4, seed=0, num_audit=2)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    config = load_config(["+recipe=quickstart", "selection=forecast", "rollout.num_rollouts=4"])
    OmegaConf.save(OmegaConf.structured(config), folder.config)
    with folder.groups.open("w") as file:
        for step in (1, 2, 3):
            selected = controller.select()
            outcomes = [Outcome(row, row % 5 if row else 0, 4 if row else 0) for row, _ in selected]
            admits, audits = controller.admit(outcomes), controller.audited([row for row, _ in selected])
            for (row, predicted), outcome, admitted, audited in zip(selected, outcomes, admits, audits):
                line = {
                    "step": step, "prompt_id": f"{1000 + row:016x}", "policy_version": step - 1, "admitted": admitted,
                    "audited": audited,
                    "num_solved": outcome.num_solved, "num_rollouts": outcome.num_scored, "predicted": predicted,
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
            controller.observe()
    parts = {"controller": lambda path: write_state(path, controller.state_dict())}
    folder.save_checkpoint(3, parts, {}, keep=1)
    return folder.path, controller


def test_groups_are_those_of_the_run(run, capsys):
    folder, _ = run
    lines = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
    with (folder / "groups.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt')  # killed in the middle of a line
    assert main([str(folder)]) == 0
    rows = pyarrow.parquet.read_table(folder / "groups.parquet").to_pylist()
    states = [row.pop("state") for row in rows]
    assert rows == lines and len(rows) == 24 and sum(row["audited"] for row in rows) == 6
    for row, state in zip(rows, states):
        word = {0: "unsolved", 4: "solved"}.get(row["num_solved"], "partial")
        assert state == (word if row["num_rollouts"] else None)
    assert "24 groups; lines that could not be read and are left out: 1" in capsys.readouterr().out


def test_the_posterior_is_the_controllers(run, tmp_path, capsys):
    folder, controller = run
    assert main([str(folder), "--posterior", "--out", str(tmp_path / "mine.parquet")]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "posterior.parquet")
    assert table["prompt_id"].to_pylist() == [f"{number:016x}" for number in range(1000, 1040)]
    states = np.stack([table[state].to_numpy() for state in ("unsolved", "partial", "solved")], axis=1)
    np.testing.assert_array_equal(states, controller.selector.predict())
    np.testing.assert_array_equal(table["num_selected"].to_numpy(), controller.selector.num_selected_N)
    assert "40 prompts, after step_3" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.new"))


def test_many_groups_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("dpsrl.export.BATCH_ROWS", 7)
    line = {"step": 1, "prompt_id": "a", "predicted": None, "num_solved": 1, "num_rollouts": 2, "admitted": True,
            "policy_version": 0}  # fmt: skip
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(line | {"step": i}) + "\n" for i in range(30)))
    assert main([str(tmp_path)]) == 0
    file = pyarrow.parquet.ParquetFile(tmp_path / "groups.parquet")
    rows = file.read()
    assert file.metadata.num_row_groups == 5 and rows["step"].to_pylist() == list(range(30))
    assert rows["audited"].null_count == 30  # of runs that did not write it down


@pytest.mark.parametrize(
    "change",
    [
        {"step": "one"}, {"step": 1 << 40}, {"num_solved": 1.5}, {"num_rollouts": None}, {"admitted": "yes"},
        {"audited": 1},
        {"predicted": "0.5"}, {"predicted": 10**400}, {"prompt_id": 7}, {"prompt_id": "\ud800"},
    ],
)  # fmt: skip
def test_a_line_with_a_value_of_another_type_is_counted_and_left_out(change, tmp_path, capsys):
    line = {"step": 1, "prompt_id": "a", "predicted": 0.5, "num_solved": 1, "num_rollouts": 2, "admitted": True,
            "policy_version": 0}  # fmt: skip
    (tmp_path / "groups.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | change) + "\n")
    assert main([str(tmp_path)]) == 0
    assert "1 groups; lines that could not be read and are left out: 1" in capsys.readouterr().out


def test_beliefs_do_not_overwrite_groups(run, tmp_path, capsys):
    assert main([str(run[0]), "--posterior", "--out", str(tmp_path / "posterior.parquet")]) == 2
    assert "posterior.parquet is where --posterior writes the beliefs: give another --out" in capsys.readouterr().err
    assert not (tmp_path / "posterior.parquet").exists()


def test_a_method_that_predicts_nothing_has_no_posterior(run, capsys):
    folder, _ = run
    config = load_config(["+recipe=quickstart", "selection=uniform", "rollout.num_rollouts=4"])
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    assert main([str(folder), "--posterior"]) == 2
    assert "selection.method=uniform predicts nothing: leave out --posterior" in capsys.readouterr().err
    assert (folder / "groups.parquet").exists() and not (folder / "posterior.parquet").exists()


def test_the_example_reads_it(run):
    pytest.importorskip("pandas")
    folder, _ = run
    main([str(folder)])
    done = subprocess.run([sys.executable, EXAMPLE, folder / "groups.parquet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "predicted against observed" in done.stdout and "partial" in done.stdout


def test_refusals(run, tmp_path, capsys):
    folder, _ = run
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "nowhere/groups.jsonl does not exist: give the folder of a run"),
        ([str(folder), "--out", str(tmp_path / "no/where.parquet")], "No such file or directory): give another --out"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    (folder / "config.yaml").write_text("model: {path: here}\nnonsense: 3")
    assert main([str(folder), "--posterior"]) == 2
    assert "config.yaml cannot be read (unknown key 'nonsense'" in capsys.readouterr().err
    (tmp_path / "groups.jsonl").touch()
    assert main([str(tmp_path), "--posterior"]) == 2
    assert "has no checkpoint, which --posterior reads" in capsys.readouterr().err
