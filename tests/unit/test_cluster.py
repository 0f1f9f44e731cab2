"""The resource plan: what a run needs, and the sentence when it is not there."""

import signal
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from dpsrl.cluster import Cluster, _remembered_interrupts, check_resources, num_local_gpus, resource_plan
from dpsrl.config import load_config
from dpsrl.types import UserError


def plan(*arguments):
    return resource_plan(load_config(["+recipe=math", *arguments]))


def test_gpus_add_up():
    assert plan().gpus == 8
    assert plan("rollout.num_workers=2", "rollout.tensor_parallel=2", "trainer.num_workers=3").gpus == 7
    assert plan("cluster.placement=colocate").gpus == 4
    assert plan("cluster=cpu", "model=tiny").gpus == 0
    assert resource_plan(load_config(["+recipe=math"]), with_trainer=False).gpus == 4


def test_a_shortfall_names_need_found_and_remedy():
    with pytest.raises(UserError) as error:
        check_resources(plan(), 2)
    for words in (
        "8 GPUs",
        "4 engines and 4 trainer ranks",
        "has 2",
        "rollout.num_workers",
        "cluster=cpu model=tiny",
    ):
        assert words in str(error.value)
    check_resources(plan(), 8)


def test_colocated_engines_span_one_gpu():
    with pytest.raises(UserError, match="tensor_parallel=2"):
        plan("cluster.placement=colocate", "rollout.tensor_parallel=2")


def test_visible_devices_are_counted(monkeypatch):
    for value, count in (("", 0), ("-1", 0), ("0", 1), ("2,5", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert num_local_gpus() == count


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_drops_is_remembered():
    """Raised in a destructor, KeyboardInterrupt goes nowhere; the next wait raises it again."""
    with ExitStack() as stack:
        interrupts = _remembered_interrupts(stack)

        class Dropping:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)

        thing = Dropping()
        del thing
        assert interrupts == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        cluster = SimpleNamespace(_interrupts=interrupts, actors={"a": "engine-0"})
        with pytest.raises(KeyboardInterrupt):
            Cluster.get(cluster, {"a": None}, "answer")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
