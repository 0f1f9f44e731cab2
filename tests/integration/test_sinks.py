"""Copies of a real run's metrics, with the real wandb and TensorBoard; what must not be in them; no network."""

import socket
import time

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpsrl.sinks import open_sinks


def test_tensorboard_has_every_value_of_the_run(single_run):
    events = EventAccumulator(str(single_run.folder / "tensorboard"))
    events.Reload()
    for record in single_run.lines("metrics.jsonl"):
        for name in ("train/loss", "eval/countdown/avg@4", "time/step_s"):
            if record.get(name) is not None:
                (value,) = [event.value for event in events.Scalars(name) if event.step == record["step"]]
                assert abs(value - record[name]) < 1e-5 * max(1.0, abs(record[name]))


def test_wandb_is_offline_and_has_the_run(single_run):
    (file,) = (single_run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in file.read_bytes()
    assert "warning" not in single_run.output


def test_no_secret_of_the_environment_is_in_a_run_folder(single_run, many_run, start):
    for run in (single_run, many_run):
        assert all(value not in run.output for value in start.secrets.values())
        files = [path for path in run.folder.rglob("*") if path.is_file()]
        assert len(files) > 10
        for path in files:
            content = path.read_bytes()
            assert [name for name, value in start.secrets.items() if value.encode() in content] == [], path


def test_wandb_online_without_a_network_costs_the_copy_and_its_deadline(tmp_path, monkeypatch, start):
    with socket.socket() as taken:  # a port where nobody answers
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", start.secrets["WANDB_API_KEY"])
        monkeypatch.setattr("dpsrl.sinks.FINISH_S", 3.0)
        said = []
        (sink,) = open_sinks(["wandb"], tmp_path, "project", {"seed": 0}, -1, said.append)
        started = time.monotonic()
        for step in range(5):
            sink({"step": step, "train/loss": 0.5})
        assert time.monotonic() - started < 1.0, "no step waits"
        end = time.monotonic() + 60
        while not any("wandb-core" in process.name() for process in psutil.Process().children(recursive=True)):
            assert time.monotonic() < end and not said  # until it is at work
            time.sleep(0.1)
        theirs = psutil.Process(sink._process.pid).children(recursive=True)
        started = time.monotonic()
        sink.close()
    assert time.monotonic() - started < 3.0 + 10.0
    assert len(said) == 1 and said[0].startswith("warning: wandb ") and "metrics.jsonl is" in said[0]
    assert psutil.wait_procs(theirs, timeout=5)[1] == []
    assert all(
        start.secrets["WANDB_API_KEY"].encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()
    )
