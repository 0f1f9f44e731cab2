"""Generation and training at the same time: the same batches, whole accounts, tokens that know their weights."""

import pytest

from tests.integration.test_train import PUBLIC_KEYS

PLAIN = ["train.steps=2", "eval.every=2"]  # as single_run


def test_generation_one_step_ahead_learns_from_the_weights_before_the_last(start, single_run, tmp_path):
    run = start.train(tmp_path / "run", "train.steps=4", "train.max_lag=1")
    assert run.returncode == 0, run.output
    groups, records = run.lines("groups.jsonl"), run.lines("metrics.jsonl")[1:]
    assert {(g["step"], g["policy_version"]) for g in groups} == {(1, 0), (2, 0), (3, 1), (4, 2)}
    assert [record["rollout/num_rollouts"] for record in records] == [256, 384, 512, 512]
    for record in records:  # of the batch that the step trained on, whenever it was generated
        mixed = [0 < g["num_solved"] < g["num_rollouts"] for g in groups if g["step"] == record["step"]]
        assert record["selection/mixed_share"] == pytest.approx(sum(mixed) / len(mixed))
        assert record.keys() >= PUBLIC_KEYS
    assert run.json("summary.json")["num_rollouts"] == records[-1]["rollout/num_trained"] == 512
    assert [record["sync/policy_version"] for record in records] == [1, 2, 3, 4]
    # The first batch is that of a run that waits, and the correction has something to correct from the second on.
    first = single_run.lines("metrics.jsonl")[1]
    assert records[0]["train/grad_norm"] == pytest.approx(first["train/grad_norm"], rel=1e-5)
    assert records[0]["train/mismatch_abs"] < 1e-4 < records[1]["train/mismatch_abs"]
    assert all(0 <= record[f"time/{side}_idle_share"] <= 1 for record in records for side in ("engine", "trainer"))


@pytest.mark.slow
def test_an_early_start_gives_the_same_update(start, single_run, tmp_path):
    run = start.train(tmp_path / "run", *PLAIN, "train.streaming=true", "trainer.micro_batch_tokens=300")
    assert run.returncode == 0, run.output
    for record, expected in zip(run.lines("metrics.jsonl")[1:], single_run.lines("metrics.jsonl")[1:], strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert record[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_what_still_runs_at_the_end_of_a_step_goes_on_with_the_next_weights(start, tmp_path):
    run = start.train(
        tmp_path / "run", "train.steps=4", "eval.every=2", "rollout.spare_share=0.5", "rollout.max_num_seqs=32",
        "weight_sync.checksum=true", "selection.admission=mixed",
    )  # fmt: skip
    assert run.returncode == 0, run.output
    groups, records = run.lines("groups.jsonl"), run.lines("metrics.jsonl")[1:]
    assert sum(record["rollout/continued_share"] for record in records) > 0
    assert any(g["policy_version"] < g["step"] - 1 for g in groups)
    carried = 0
    for record in records:
        moved = {name: record[f"selection/num_{name}"] for name in ("generated", "trained", "carried", "unmixed")}
        assert carried + moved["generated"] == moved["trained"] + moved["carried"] + moved["unmixed"]
        carried = moved["carried"]


@pytest.mark.slow
def test_sides_that_share_their_place_take_turns(start, single_run, tmp_path):
    run = start.train(tmp_path / "run", "train.steps=2", "eval.every=2", "cluster.placement=colocate")
    assert run.returncode == 0, run.output
    first = [{g["prompt_id"] for g in r.lines("groups.jsonl") if g["step"] == 1} for r in (run, single_run)]
    assert first[0] == first[1]
    assert run.json("summary.json")["eval_last"] == single_run.json("summary.json")["eval_last"]
