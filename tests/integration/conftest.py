"""Real runs on the tiny model, shared by the tests of this folder: real vLLM, Ray and DeepSpeed."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.integration.ranks import Ranks

HANG_GUARD_S = 600
SECRETS = {"WANDB_API_KEY": "planted" + "w" * 33, "HF_TOKEN": "hf_planted" + "h" * 27}  # no file may have them
SMALL = ["data.countdown.num_train=64", "data.countdown.num_test=16", "train.batch=16", "eval.num_rollouts=4"]


@dataclass
class FinishedRun:
    folder: Path
    output: str
    returncode: int

    def json(self, name: str):
        return json.loads((self.folder / name).read_text())

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def run_module(module: str, *arguments: str, cwd: Path | None = None, runs: int = 1) -> subprocess.CompletedProcess:
    """runs: as many as it makes one after another; each may take as long as a run may."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=runs * HANG_GUARD_S, check=False, cwd=cwd,
        env=os.environ | SECRETS,
    )  # fmt: skip


def train_arguments(folder: Path, *arguments: str) -> list[str]:
    return ["dpsrl.train", "+recipe=quickstart", f"run.dir={folder}", *SMALL, *arguments]


def train(folder: Path, *arguments: str) -> FinishedRun:
    done = run_module(*train_arguments(folder, *arguments))
    return FinishedRun(folder, done.stdout + done.stderr, done.returncode)


@pytest.fixture(scope="session")
def many_run(tmp_path_factory) -> FinishedRun:
    """Three steps on two engines and two ZeRO-3 ranks."""
    return train(
        tmp_path_factory.mktemp("many") / "run", "train.steps=3", "eval.every=2", "checkpoint.every=2",
        "rollout.num_workers=2", "trainer.num_workers=2", "trainer.zero_stage=3",
    )  # fmt: skip


@pytest.fixture(scope="session")
def single_run(tmp_path_factory) -> FinishedRun:
    """Two steps of the same run on one engine and one rank without ZeRO, with all copies of its metrics."""
    folder = tmp_path_factory.mktemp("single") / "run"
    return train(folder, "train.steps=2", "eval.every=2", "log.to=[wandb,tensorboard]")


@pytest.fixture(scope="session")
def evaluation(many_run, tmp_path_factory) -> FinishedRun:
    """The run's checkpoint on its benchmark, and on its own 64 training prompts."""
    folder = tmp_path_factory.mktemp("evaluation") / "eval"
    model = many_run.folder / "checkpoints/step_3/model"
    done = run_module("dpsrl.evaluate", f"model.path={model}", "eval.benchmarks=[countdown,train]", f"run.dir={folder}")
    return FinishedRun(folder, done.stdout + done.stderr, done.returncode)


@pytest.fixture(scope="session")
def start():
    """For runs of a test's own: to the end, or in the background."""

    def background(folder: Path, log, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", *train_arguments(folder, *arguments)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    return SimpleNamespace(
        train=train,
        secrets=SECRETS,
        run_module=run_module,
        background=background,
        descendants=descendants,
        left_of=left_of,
    )


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def left_of(processes: list[psutil.Process], within_s: float = 30.0) -> list[psutil.Process]:
    """Those that are alive after that time; dead ones may still wait for init to take note of it."""
    return [process for process in psutil.wait_procs(processes, timeout=within_s)[1] if is_alive(process)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """`ranks(2)`: two ranks, started at the first call."""
    started = {}

    def start(num: int) -> Ranks:
        if num not in started:
            started[num] = Ranks(num, tmp_path_factory.mktemp("ranks"))
        return started[num]

    yield start
    for pool in started.values():
        pool.close()
