"""The example's reward, data set, selection method and loss, all at once, in a real run from their folder."""

import json
from pathlib import Path

from dpsrl.checkpoint import read_state
from dpsrl.data.prompts import prompt_id

EXAMPLE = Path(__file__).parents[2] / "recipes/own_parts"
OWN = [
    "data.train=my_data:train", "eval.benchmarks=[my_data:heldout]", "reward.fn=my_reward:score",
    "selection.method=my_method:NearHalf", "algo.loss=my_loss:soft_clip",
]  # fmt: skip


def test_a_run_of_own_parts(start, tmp_path):
    done = start.run_module(
        "dpsrl.train", "+recipe=quickstart", *OWN, f"run.dir={tmp_path}/run", "train.steps=2", "train.batch=16",
        "selection.audit_share=0", "eval.num_rollouts=2", cwd=EXAMPLE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "my_data:train: 55 rows; 55 prompts kept" in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "eval/my_data:heldout/avg@2" in steps[-1] and steps[-1]["train/grad_norm"] > 0
    groups = [json.loads(line) for line in (tmp_path / "run/groups.jsonl").read_text().splitlines()]
    assert len({group["prompt_id"] for group in groups}) == 32  # the new ones come first

    rate = {f"{a} {b}={a + b}:": 0.5 for a in range(2, 12) for b in range(a, 12)}
    by_id = {prompt_id(problem): problem for problem in rate}
    for group in groups:
        problem = by_id[group["prompt_id"]]
        rate[problem] += 0.3 * (group["num_solved"] / group["num_rollouts"] - rate[problem])
    state = read_state(tmp_path / "run/checkpoints/step_2/controller")
    assert state["selector.belief.rate"].tolist() == list(rate.values())
