"""Selection in a real run: dynamic sampling, what is known beforehand, and where every group went."""

import pytest


@pytest.fixture(scope="module")
def informed_run(start, evaluation, tmp_path_factory):
    return start.train(
        tmp_path_factory.mktemp("informed") / "run", "train.steps=4", "selection=forecast",
        "selection.admission=mixed", "selection.audit_share=0.2",
        f"selection.prior_rates={evaluation.folder}/pass_rates.jsonl",
    )  # fmt: skip


def test_an_anchor_pass_counts_every_training_prompt(evaluation):
    asked = {row["prompt_id"] for row in evaluation.lines("responses.jsonl") if row["benchmark"] == "train"}
    lines = [line for line in evaluation.lines("pass_rates.jsonl") if line["prompt_id"] in asked]
    assert len(lines) == len({line["prompt_id"] for line in lines}) == 64
    assert all(0 <= line["num_solved"] <= line["num_rollouts"] == 4 for line in lines)


def test_a_run_that_knows_pass_rates_predicts_from_the_first_step(informed_run, evaluation):
    assert informed_run.returncode == 0, informed_run.output
    assert "pass rates of 64 of 64 prompts are known" in informed_run.output
    rates = {line["prompt_id"]: line for line in evaluation.lines("pass_rates.jsonl")}
    first = [group for group in informed_run.lines("groups.jsonl") if group["step"] == 1]
    mixed = [g["predicted"] for g in first if 0 < rates[g["prompt_id"]]["num_solved"] < 4]
    others = [g["predicted"] for g in first if not 0 < rates[g["prompt_id"]]["num_solved"] < 4]
    assert min(mixed) > max(others, default=0.0)


def test_every_group_is_trained_on_carried_or_dropped_with_a_reason(informed_run):
    groups, carried = informed_run.lines("groups.jsonl"), 0
    for record in informed_run.lines("metrics.jsonl")[1:]:
        of_step = [g for g in groups if g["step"] == record["step"]]
        count = {
            name: record[f"selection/num_{name}"] for name in ("generated", "trained", "carried", "unmixed", "unscored")
        }
        assert len({g["prompt_id"] for g in of_step}) == len(of_step) == count["generated"]
        assert all(g["admitted"] == (0 < g["num_solved"] < g["num_rollouts"]) for g in of_step)
        assert (
            carried + count["generated"] == count["trained"] + count["carried"] + count["unmixed"] + count["unscored"]
        )
        carried = count["carried"]
    assert record["rollout/num_trained"] <= record["rollout/num_rollouts"] == 8 * len(groups)


@pytest.mark.slow
def test_a_warm_start_takes_over_the_beliefs_of_a_checkpoint(start, many_run, tmp_path):
    """More prompts than before: those that the earlier run rolled out once are judged by that, the new ones are not."""
    run = start.train(
        tmp_path / "run", "train.steps=1", "train.batch=80", "data.countdown.num_train=80",
        f"selection.warm_start={many_run.folder}", "selection.audit_share=0",
    )  # fmt: skip
    assert run.returncode == 0, run.output
    assert f"are taken over from {many_run.folder}" in run.output
    earlier = {}
    for group in many_run.lines("groups.jsonl"):
        earlier.setdefault(group["prompt_id"], []).append(0 < group["num_solved"] < group["num_rollouts"])
    predicted = {group["prompt_id"]: group["predicted"] for group in run.lines("groups.jsonl")}
    known = {i: mixed[0] for i, mixed in earlier.items() if len(mixed) == 1 and i in predicted}
    assert len(predicted) == 80 and 0 < len(known) < 80
    of_new = [predicted[i] for i in predicted.keys() - earlier.keys()]
    assert of_new == pytest.approx([of_new[0]] * len(of_new))
    assert min(predicted[i] for i in known if known[i]) > max(predicted[i] for i in known if not known[i])
