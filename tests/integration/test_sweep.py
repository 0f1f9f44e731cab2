"""Two methods, two seeds, real runs, one after another, with engines and trainer that stay."""

import json

ARGUMENTS = (
    "+recipe=quickstart", "train.steps=2", "train.batch=16", "data.countdown.num_train=64",
    "data.countdown.num_test=16", "eval.num_rollouts=4",
)  # fmt: skip


def test_a_sweep_of_real_runs(start, tmp_path):
    arguments = ["-m", *ARGUMENTS, "selection=dps,uniform", "seed=0,1", f"run.dir={tmp_path}/grid"]
    done = start.run_module("dpsrl.train", *arguments, runs=2)
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
    assert len({(path / "logs/engine-0.log").read_text() for path in folders}) == 4
    assert not any("Traceback" in (path / "logs/driver.log").read_text() for path in folders)  # of a hand-over

    again = start.run_module("dpsrl.train", *arguments)
    assert again.returncode == 0 and again.stdout.count("finished before") == 4

    # the last of them, by processes of its own: nothing is left in the kept ones of what was before
    alone = tmp_path / "alone"
    assert (
        start.run_module("dpsrl.train", *ARGUMENTS, "seed=1", "selection=uniform", f"run.dir={alone}").returncode == 0
    )
    for name in ("groups.jsonl", "checkpoints/step_2/model/model.safetensors"):
        assert (alone / name).read_bytes() == (folders[3] / name).read_bytes(), name
