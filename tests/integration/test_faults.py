"""Parties of a real run killed and frozen in the middle of it: it ends well, with every rollout accounted for.

The whole matrix is `scripts/faults.py`.
"""

import importlib.util
import json
from pathlib import Path

FAULTS = Path(__file__).parents[2] / "scripts/faults.py"
PLAN = {
    "2": ("engine", "generate", "SIGSTOP"),
    "3": ("reward", "score", "SIGKILL"),
    "4": ("trainer", "train", "SIGKILL"),
    "5": ("engine", "sync", "SIGKILL"),
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
