"""Whose run folder it is: one run's at a time, and never one that holds something else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dpsrl
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

pytestmark = pytest.mark.process


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from dpsrl.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    if not (forked := os.fork()):
        time.sleep(60)
        os._exit(0)
    print(forked, subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL).pid, flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_and_the_lock_of_a_killed_one(run):
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    environment = os.environ | {"PYTHONPATH": str(Path(dpsrl.__file__).parents[1])}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    children = [int(pid) for pid in holder.stdout.readline().split()]
    words = f"is in use by another run .process {holder.pid} on {os.uname().nodename}.: wait for its end, stop it, or"
    with pytest.raises(UserError, match=words), run.lock():
        pass
    holder.kill()
    holder.wait()
    assert all(Path(f"/proc/{child}").exists() for child in children)  # its children live on, without the lock
    with run.lock():
        run.create()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), RunFolder(run.path).lock():
            pass
    with run.lock():
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_an_occupied_run_folder_is_refused(run):
    run.check_free()
    run.create()
    for resume, words in (
        (False, "is occupied: choose"),
        (True, "is occupied, but not by a run"),
    ):
        with pytest.raises(UserError, match=words):
            run.create(resume=resume)
    (run.checkpoints / "step_1.tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="not by a run"):
        run.create(resume=True)
    run.save_checkpoint(1, {"model": lambda folder: (folder / "weights").touch()}, {}, keep=1)
    run.create(resume=True)
    with pytest.raises(UserError, match="is occupied: choose"):
        run.create()
    with pytest.raises(UserError, match="is not a folder"):
        RunFolder(run.checkpoints / "step_1/manifest.json").check_free()


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_run_folder_is_free(run, resume):
    run.path.mkdir()
    with run.lock():
        run.create(resume=resume)
        assert run.logs.is_dir()
