"""A run over several Ray nodes, simulated on one machine."""

import pytest
from ray.cluster_utils import Cluster

TWO_OF_EACH = ["rollout.num_workers=2", "trainer.num_workers=2", "trainer.zero_stage=2"]


@pytest.fixture(scope="module")
def three_nodes():
    """Four cores in all, so that two engines and two ranks are on all three."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def test_a_run_over_three_nodes_is_the_run_of_one(start, three_nodes, many_run, tmp_path):
    run = start.train(
        tmp_path / "run", "train.steps=2", "eval.every=2", f"cluster.address={three_nodes.address}", *TWO_OF_EACH
    )
    assert run.returncode == 0, run.output
    outcomes = [
        {(g["prompt_id"], g["num_solved"]) for g in r.lines("groups.jsonl") if g["step"] == 1} for r in (run, many_run)
    ]
    assert outcomes[0] == outcomes[1]
    record, expected = run.lines("metrics.jsonl")[1], many_run.lines("metrics.jsonl")[1]
    assert record["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)


def test_more_than_there_is_is_refused_with_the_shortfall(start, three_nodes, tmp_path):
    run = start.train(
        tmp_path / "run", f"cluster.address={three_nodes.address}", "rollout.num_workers=3", "trainer.num_workers=3"
    )
    assert run.returncode == 2
    for words in ("needs 6 CPUs (3 engines and 3 trainer ranks", "has 4 CPUs, 2 CPUs short", "rollout.num_workers"):
        assert words in run.output
