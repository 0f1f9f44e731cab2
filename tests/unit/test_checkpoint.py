"""The run folder and its checkpoints."""

import json

import numpy as np
import pytest

from dpsrl.checkpoint import RunFolder, check_model_folder, read_state, sha256, write_state
from dpsrl.types import UserError


def write_model(folder):
    folder.mkdir()
    (folder / "weights").write_text("w")


def test_a_checkpoint_is_whole_and_older_ones_are_removed(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    for step in (2, 10, 100):  # order by number, not by name
        run.save_checkpoint(step, write_model, {"a": np.arange(3), "b": "text"}, keep=2)
    assert [path.name for path in run.list_checkpoints()] == ["step_10", "step_100"]
    folder = run.list_checkpoints()[-1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model/weights", "controller/a.npy", "controller/plain.json"}
    for name, (size, digest) in manifest["files"].items():
        assert (folder / name).stat().st_size == size and sha256(folder / name) == digest


def test_a_checkpoint_that_fails_halfway_does_not_count(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()

    def fail(folder):
        write_model(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.save_checkpoint(1, fail, {}, keep=1)
    assert run.list_checkpoints() == []
    run.save_checkpoint(1, write_model, {}, keep=1)
    assert len(run.list_checkpoints()) == 1


def test_state_comes_back_as_it_was(tmp_path):
    state = {"x": np.array([1.5, 2.5]), "n": np.array([3], dtype=np.int8), "name": "dps", "count": 4}
    write_state(tmp_path / "s", state)
    loaded = read_state(tmp_path / "s")
    assert loaded.keys() == state.keys() and loaded["name"] == "dps" and loaded["count"] == 4
    for name in ("x", "n"):
        np.testing.assert_array_equal(loaded[name], state[name])
        assert loaded[name].dtype == state[name].dtype


def test_an_occupied_run_folder_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="occupied"):
        RunFolder(tmp_path).check_free()
    RunFolder(tmp_path / "new").check_free()


def test_a_model_folder_is_checked_before_anything_loads_it(tmp_path):
    check_model_folder("owner/name")
    with pytest.raises(UserError, match="does not exist"):
        check_model_folder(str(tmp_path / "none"))
    for name, missing in (
        ("config.json", "tokenizer"),
        ("tokenizer.json", "weights"),
        ("model.safetensors", None),
    ):
        (tmp_path / name).write_text("{}")
        if missing:
            with pytest.raises(UserError, match=missing):
                check_model_folder(str(tmp_path))
    check_model_folder(str(tmp_path))
