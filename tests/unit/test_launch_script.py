"""scripts/launch.py: what it hands to dpsrl.train, and how it ends."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "launch.py"


@pytest.fixture
def launch(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("DPSRL_", "RAY_"))]:
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("launch_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, handler)


def test_keys_given_by_hand_go_before_those_of_the_launcher(launch):
    environment = {
        "DPSRL_ARGS": "+recipe=math 'data.instruction={problem} \"think\"' resume=no",
        "DPSRL_RUN_DIR": "runs/math", "DPSRL_ADDRESS": "10.0.0.1:7000",
    }  # fmt: skip
    assert launch.run_arguments(["train.steps=3"], environment) == [
        "+recipe=math", 'data.instruction={problem} "think"', "resume=no", "train.steps=3", "run.dir=runs/math",
        "cluster.address=10.0.0.1:7000",
    ]  # fmt: skip
    assert launch.run_arguments(["run.dir=mine"], {"DPSRL_RUN_DIR": "runs/math"}) == ["run.dir=mine", "resume=auto"]
    one_recipe = launch.run_arguments(["+recipe=countdown", "seed=1"], {"DPSRL_ARGS": "+recipe=math train.steps=3"})
    assert one_recipe == ["train.steps=3", "+recipe=countdown", "seed=1", "resume=auto"]


@pytest.mark.parametrize(
    "before, after, code, ends_with",
    [
        (None, "new", 0, 0),  # finished
        (None, None, 0, 75),  # stopped
        ("old", None, 0, 75),  # stopped before it began
        ("old", "gone", 0, 75),  # a longer run of a finished one, stopped
        ("old", "new", 0, 0),
        (None, None, 2, 2),  # a mistake
    ],
)
def test_a_run_that_was_stopped_ends_with_75(launch, monkeypatch, tmp_path, before, after, code, ends_with):
    summary = tmp_path / "summary.json"
    if before:
        summary.write_text(before)
        os.utime(summary, (1, 1))

    def train(arguments):
        assert f"run.dir={tmp_path}" in arguments
        if after == "gone":
            summary.unlink()
        elif after:
            summary.write_text(after)
        return code

    monkeypatch.setattr(launch.train, "main", train)
    monkeypatch.setenv("DPSRL_RUN_DIR", str(tmp_path))
    assert launch.main(["+recipe=quickstart"]) == ends_with


@pytest.mark.parametrize(
    "arguments, environment, words",
    [
        (["+recipe=quickstart"], {}, "set DPSRL_RUN_DIR"),
        (["+recipe=quickstart", "train.stepz=3"], {"DPSRL_RUN_DIR": "runs/x"}, "train.stepz"),
        (["head"], {}, "DPSRL_ADDRESS='' is not HOST:PORT"),
        (["head"], {"DPSRL_ADDRESS": "10.0.0.1"}, "is not HOST:PORT"),
        (["head"], {"DPSRL_ADDRESS": "10.0.0.1:7000", "DPSRL_NODES": "two"}, "DPSRL_NODES=two"),
        (["head", "+recipe=quickstart"], {"DPSRL_ADDRESS": "10.0.0.1:7000"}, "RAY_AUTH_TOKEN_PATH"),
    ],
)
def test_a_mistake_is_one_sentence(launch, monkeypatch, capsys, arguments, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_asked_to_stop_before_the_first_step_it_ends_with_75_as_well(launch, monkeypatch, tmp_path):
    monkeypatch.setattr(launch.train, "main", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setenv("DPSRL_RUN_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        launch.main(["+recipe=quickstart"])
    assert ended.value.code == 75


def test_stop_asks_runs_and_nobody_else(launch):
    is_run = launch._is_run
    assert is_run(["python", str(SCRIPT), "+recipe=math"]) and is_run(["python", str(SCRIPT), "head"])
    assert is_run(["/opt/dpsrl/.venv/bin/python", "/opt/dpsrl/scripts/launch.py"])
    for command in (
        [], ["python"], ["python", str(SCRIPT), "stop"], ["python", str(SCRIPT), "worker"], ["vim", "scripts/slurm.sh"],
        ["/bin/sh", "-c", f"cd /work && exec python {SCRIPT}"], ["tini", "--", "python", str(SCRIPT)],
    ):  # fmt: skip
        assert not is_run(command)
