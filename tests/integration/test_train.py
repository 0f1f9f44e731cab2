"""A run from the command line to its report, on one worker of each kind and on two."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dpsrl.metrics import key_of

PUBLIC_KEYS = {
    "step", "rollout/num_rollouts", "rollout/solve_rate", "selection/mixed_share", "selection/coverage",
    "selection/brier", "train/loss", "train/mismatch_kl", "time/step_s", "time/generate_s", "time/train_s",
    "time/sync_s", "time/select_ms",
}  # fmt: skip


@pytest.fixture(params=["single_run", "many_run"])
def finished(request):
    return request.getfixturevalue(request.param)


def test_the_run_ends_well_and_leaves_the_whole_folder(finished):
    assert finished.returncode == 0, finished.output
    summary = finished.json("summary.json")
    assert summary["policy_version"] == summary["steps"] == finished.lines("metrics.jsonl")[-1]["step"]
    assert summary["num_rollouts"] == summary["steps"] * 16 * 8
    assert set(summary["eval_first"]) == set(summary["eval_last"]) == {"countdown"}
    for name in (
        "config.yaml",
        "groups.jsonl",
        "responses.jsonl",
        "report.html",
        f"checkpoints/step_{summary['steps']}/manifest.json",
    ):
        assert (finished.folder / name).is_file(), name


def test_every_step_has_the_public_keys_and_both_ends_agree(finished):
    first, *steps = finished.lines("metrics.jsonl")
    assert first["step"] == 0 and "eval/countdown/avg@4" in first
    for record in steps:
        assert record.keys() >= PUBLIC_KEYS
        assert all(key_of(name) for name in record)
        assert record["sync/policy_version"] == record["step"]
        assert record["sync/canary_diff"] < 1e-4 and record["train/mismatch_abs"] < 1e-4  # float32 on both ends
    assert "eval/countdown/avg@4" in steps[-1]


def test_every_group_is_logged_once(finished):
    groups = finished.lines("groups.jsonl")
    assert len({(group["step"], group["prompt_id"]) for group in groups}) == len(groups)
    assert len(groups) * 8 == finished.json("summary.json")["num_rollouts"]
    for group in groups:
        assert group["policy_version"] == group["step"] - 1
        assert 0 <= group["num_solved"] <= group["num_rollouts"] == 8


def test_the_answers_of_a_few_groups_of_every_step_are_kept(finished):
    solved = {(group["step"], group["prompt_id"]): group["num_solved"] for group in finished.lines("groups.jsonl")}
    kept = finished.lines("responses.jsonl")
    steps = finished.json("summary.json")["steps"]
    assert [line["step"] for line in kept] == [step for step in range(1, steps + 1) for _ in range(8)]
    for line in kept:
        assert sum(response["correct"] for response in line["responses"]) == solved[line["step"], line["prompt_id"]]
        assert len(line["responses"]) == 8 and line["prompt"] and "target" in line["answer"]


def test_the_number_of_workers_changes_neither_selection_nor_samples(single_run, many_run):
    def outcomes(run, step):
        return {
            g["prompt_id"]: (g["num_solved"], g["predicted"]) for g in run.lines("groups.jsonl") if g["step"] == step
        }

    assert outcomes(single_run, 1) == outcomes(many_run, 1)
    single, many = single_run.lines("metrics.jsonl"), many_run.lines("metrics.jsonl")
    assert single[0]["eval/countdown/avg@4"] == many[0]["eval/countdown/avg@4"]
    assert single[1]["train/loss"] == pytest.approx(many[1]["train/loss"], abs=1e-6)
    assert single[1]["train/grad_norm"] == pytest.approx(many[1]["train/grad_norm"], rel=1e-4)


def test_library_chatter_goes_to_the_logs_and_not_to_the_screen(finished):
    assert {"driver.log", "engine-0.log", "trainer-0.log"} <= {
        path.name for path in (finished.folder / "logs").iterdir()
    }
    for word in ("WARNING", "INFO", "DeepSpeed", "vllm"):
        assert word not in finished.output, finished.output


def test_ctrl_c_ends_everything_that_was_started(start, tmp_path):
    arguments = [
        "+recipe=quickstart",
        f"run.dir={tmp_path / 'run'}",
        "train.steps=1000",
        "eval.benchmarks=[]",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpsrl.train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.2)
    started = start.descendants(process)
    assert len(started) > 5
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in output
    assert start.left_of(started, within_s=1.0) == []
