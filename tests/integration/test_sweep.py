"""Two methods, two seeds, real runs, one after another."""

import json

import pytest


@pytest.mark.slow
def test_a_sweep_of_real_runs(start, tmp_path):
    arguments = [
        "-m", "+recipe=quickstart", "selection=dps,uniform", "seed=0,1", "train.steps=2", "train.batch=16",
        "data.countdown.num_train=64", "data.countdown.num_test=16", "eval.num_rollouts=4", f"run.dir={tmp_path}/grid",
    ]  # fmt: skip
    done = start.run_module("dpsrl.train", *arguments, runs=4)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted(path for path in (tmp_path / "grid").iterdir() if path.is_dir())
    assert [path.name for path in folders] == [
        f"selection={method},seed={seed}" for method in ("dps", "uniform") for seed in (0, 1)
    ]
    groups = [[json.loads(line) for line in (path / "groups.jsonl").read_text().splitlines()] for path in folders]
    assert (
        len({tuple(group["prompt_id"] for group in of_run) for of_run in groups}) == 4
    )  # each seed and method its own
    page = (tmp_path / "grid/report.html").read_text()
    assert all(path.name in page for path in folders)
    again = start.run_module("dpsrl.train", *arguments)
    assert again.returncode == 0 and again.stdout.count("finished before") == 4
