"""The resource plan: what a run needs, and the sentence when it is not there."""

import pytest

from dpsrl.config import load_config
from dpsrl.resources import check_resources, num_local_gpus, resource_plan
from dpsrl.types import UserError

pytestmark = pytest.mark.process  # each configuration takes a quarter of a second


def plan(*arguments):
    return resource_plan(load_config(["+recipe=math", *arguments]))


def test_gpus_add_up():
    assert plan().total["GPU"] == 8
    assert plan("rollout.num_workers=2", "rollout.tensor_parallel=2", "trainer.num_workers=3").total["GPU"] == 7
    assert plan("cluster.placement=colocate").total["GPU"] == 4
    assert plan("cluster=cpu", "model=tiny").total["GPU"] == 0
    assert resource_plan(load_config(["+recipe=math"]), with_trainer=False).total["GPU"] == 4


def test_a_shortfall_names_need_found_and_remedy():
    with pytest.raises(UserError) as error:
        check_resources(plan(), [{"GPU": 2, "CPU": 64}])
    for words in (
        "8 GPUs",
        "4 engines and 4 trainer ranks",
        "has 2",
        "6 GPUs short",
        "rollout.num_workers",
        "cluster=cpu model=tiny",
    ):
        assert words in str(error.value)
    check_resources(plan(), [{"GPU": 4, "CPU": 16}, {"GPU": 4, "CPU": 16}])


def test_colocated_engines_span_one_gpu():
    with pytest.raises(UserError, match="tensor_parallel=2"):
        plan("cluster.placement=colocate", "rollout.tensor_parallel=2")


def test_visible_devices_are_counted(monkeypatch):
    for value, count in (("", 0), ("-1", 0), ("0", 1), ("2,5", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert num_local_gpus() == count


def test_cores_of_a_cluster_can_be_short_too():
    small = resource_plan(load_config(["+recipe=quickstart", "rollout.num_workers=2", "trainer.num_workers=2"]))
    with pytest.raises(
        UserError, match="needs 4 CPUs .* the cluster x has 3 CPUs, 1 CPU short: set rollout.num_workers"
    ):
        check_resources(small, [{"CPU": 1}] * 3, "the cluster x")
    check_resources(small, [{"CPU": 2}] * 2, "the cluster x")


def test_a_wide_engine_must_fit_on_one_machine():
    wide = plan("rollout.num_workers=1", "rollout.tensor_parallel=4", "trainer.num_workers=2")
    machines = [{"GPU": 3, "CPU": 64}] * 2
    with pytest.raises(UserError, match="needs 4 GPUs and 4 CPUs together on one machine .* lower rollout.tensor_par"):
        check_resources(wide, machines, "the cluster x")
    check_resources(wide, [{"GPU": 4, "CPU": 64}, {"GPU": 2, "CPU": 64}])
