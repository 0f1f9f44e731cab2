"""Parties of a real run killed and frozen in the middle of it: it ends well, with every rollout accounted for.

The whole matrix is `scripts/faults.py`.
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "scripts/faults.py"
PLAN = {
    "2": ("engine", "generate", "SIGSTOP", 0.0),
    "3": ("reward", "score", "SIGKILL", 0.0),
    "4": ("trainer", "train", "SIGKILL", 0.0),
    "5": ("engine", "sync", "SIGKILL", 0.0),
}


def load_script():
    spec = importlib.util.spec_from_file_location("faults", FAULTS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_survives_the_loss_of_its_parties(tmp_path):
    result = load_script().run_with(PLAN, tmp_path, steps=6, extra=["eval.every=6"])
    assert result["codes"] == [0], result["output"]
    assert result["struck"] == set(PLAN)
    summary = result["summary"]
    assert summary["steps"] == summary["policy_version"] == 6 and summary["num_restarts"] == 1
    account = summary["rollouts"]
    assert account["holds"] and account["generated"] == account["trained"] == 6 * 8 * 4
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "event" not in line] == list(range(7))
    events = [line["text"] for line in lines if "event" in line]
    assert any("engine-0 kept silent" in text for text in events), events
    assert any("trainer-0 died while it should train" in text for text in events), events
    groups = [json.loads(line) for line in (tmp_path / "run/groups.jsonl").read_text().splitlines()]
    assert len({(g["step"], g["prompt_id"]) for g in groups}) == len(groups) == 6 * 8


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which needs root")
def test_a_disk_that_fills_up_costs_checkpoints_and_says_so(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=31m", "tmpfs", disk], check=True)
    try:
        run = start.train(disk / "run", "train.steps=3", "checkpoint.every=1")
        assert run.returncode == 0, run.output
        assert "checkpoints/step_2 could not be written" in run.output and "No space left on device" in run.output
        assert "warning: steps 2 to 3 are in no checkpoint" in run.output
        assert run.json("summary.json")["steps"] == 3
        assert [path.name for path in (disk / "run/checkpoints").iterdir()] == ["step_1"]
        fill(disk)
        full = start.train(disk / "other", "train.steps=1")
        assert full.returncode == 2 and "cannot be" in full.output and "Traceback" not in full.output
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(disk):
    """Leaves not a byte."""
    with pytest.raises(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
