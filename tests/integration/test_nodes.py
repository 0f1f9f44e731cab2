"""A run over several Ray nodes, simulated on one machine."""

import os
import signal
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import dpsrl.cluster
from dpsrl.config import load_config

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


class Sleeper:
    def sleep_long(self) -> None:
        time.sleep(300)


def test_a_silent_process_on_another_node_writes_its_stacks_and_is_killed_even_when_stopped(three_nodes, tmp_path):
    config = load_config(["+recipe=quickstart", f"cluster.address={three_nodes.address}"])
    with dpsrl.cluster.Cluster(config, tmp_path) as cluster:
        here = ray.get_runtime_context().get_node_id()
        other = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here)
        options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(other, soft=False)}
        sleeper = cluster.start(Sleeper, "sleeper", env={}, options=options)
        ((node, process),) = cluster.get({sleeper: sleeper.process.remote()}, "start")
        assert node == other and "sleeper" not in cluster.processes()
        with pytest.raises(dpsrl.cluster.PartyLost, match="sleeper did not sleep within 3 s"):
            cluster.get({sleeper: sleeper.sleep_long.remote()}, "sleep", deadline_s=3)
        assert "sleep_long" in (tmp_path / "sleeper.log").read_text()
        os.kill(process, signal.SIGSTOP)
        cluster.kill(sleeper)
        assert psutil.wait_procs([psutil.Process(process)] if psutil.pid_exists(process) else [], timeout=20)[1] == []
