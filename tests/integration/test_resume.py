"""A run that was killed and taken up again is the run that was never killed: the same prompts, beliefs and weights."""

import json
import os
import signal
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from dpsrl.run_folder import RunFolder

STEPS, KILLED_AFTER = 4, 2


PLAIN = [f"train.steps={STEPS}", f"checkpoint.every={KILLED_AFTER}", "eval.every=2", "resume=auto"]


def kill_after(start, folder, step, *arguments):
    """SIGKILL soon after the checkpoint of `step` is whole; what is still there half a minute later."""
    log = folder.parent / "killed.txt"
    with log.open("w") as file:
        process = start.background(folder, file, *arguments)
        deadline = time.monotonic() + 500
        while not (folder / f"checkpoints/step_{step}").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        started = start.descendants(process)
        process.kill()
        process.wait()
    return start.left_of(started)


def history(run):
    """Per batch: prompt -> solved, scored, admitted, the version that sampled it."""
    batches = {}
    for g in run.lines("groups.jsonl"):
        known = (g["num_solved"], g["num_rollouts"], g["admitted"], g["policy_version"], g["predicted"])
        assert batches.setdefault(g["step"], {}).setdefault(g["prompt_id"], known) == known
    return batches


def last_checkpoint(run):
    return run.folder / f"checkpoints/step_{STEPS}"


def assert_same(run, whole):
    assert history(run) == history(whole)
    files = sorted(path.name for path in (last_checkpoint(whole) / "controller").iterdir())
    assert files == sorted(path.name for path in (last_checkpoint(run) / "controller").iterdir())
    for name in files:
        ours, theirs = last_checkpoint(run) / "controller" / name, last_checkpoint(whole) / "controller" / name
        assert ours.read_bytes() == theirs.read_bytes(), name
    weights, expected = (load_file(last_checkpoint(r) / "model/model.safetensors") for r in (run, whole))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    steps = [[record["step"] for record in r.lines("metrics.jsonl") if "event" not in record] for r in (run, whole)]
    assert steps[0] == steps[1] == list(range(STEPS + 1))
    assert run.lines("responses.jsonl") == whole.lines("responses.jsonl") != []
    account = run.json("summary.json")["rollouts"]
    assert account == whole.json("summary.json")["rollouts"] and account["holds"]


@pytest.mark.parametrize(
    "more",
    [
        ("selection=uniform", "selection.admission=mixed", "train.max_lag=1"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("train.max_lag=1",), marks=pytest.mark.slow),
        pytest.param(("selection.admission=mixed",), marks=pytest.mark.slow),
        *(
            pytest.param((f"selection={name}",), marks=pytest.mark.slow)
            for name in (
                "uniform",
                "dps",
                "beta",
                "mopps",
                "kalman",
                "ema_variance",
                "history_resampling",
                "greso",
            )  # fmt: skip
        ),
    ],
)
def test_killed_and_taken_up_again(start, tmp_path, more):
    memory_files = set(os.listdir("/dev/shm"))
    whole = start.train(tmp_path / "whole", *PLAIN, *more)
    assert whole.returncode == 0, whole.output
    assert kill_after(start, tmp_path / "run", KILLED_AFTER, *PLAIN, *more) == []
    run = start.train(tmp_path / "run", *PLAIN, *more)
    assert run.returncode == 0, run.output
    assert f"going on after step {KILLED_AFTER}" in run.output
    assert_same(run, whole)
    left = set(os.listdir("/dev/shm")) - memory_files
    assert not [name for name in left if not name.startswith(("sem.", "tmp"))]  # what other tests are at just now

    summary = (run.folder / "summary.json").read_bytes()
    again = start.train(tmp_path / "run", *PLAIN, *more)
    assert again.returncode == 0 and "has finished" in again.output, again.output
    assert (run.folder / "summary.json").read_bytes() == summary

    changed = start.train(tmp_path / "run", *PLAIN, *more, "seed=5")
    assert changed.returncode == 2 and "seed=5 (then 0)" in changed.output


def test_sigterm_saves_and_ends(start, tmp_path):
    folder = tmp_path / "run"
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = start.background(folder, file, "train.steps=1000", "resume=auto")
        deadline = time.monotonic() + 500
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        started = start.descendants(process)
        for one in [*started, process]:  # as a scheduler does: all processes of the job at once
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, log.read_text()
    assert "asked to stop (SIGTERM)" in log.read_text()
    newest, passed_over = RunFolder(folder).newest_checkpoint()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert passed_over == [] and newest.step == steps[-1] and steps == list(range(len(steps)))
    assert not (folder / "summary.json").exists()
    assert start.left_of(started) == []
