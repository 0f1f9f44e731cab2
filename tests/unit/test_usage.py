"""How busy a machine is: what nvidia-smi says, and that nothing waits for it."""

import os
import stat
import time

import pytest

from dpsrl import usage
from dpsrl.usage import Usage, ask_gpus, read_gpus


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A shell script in its place."""

    def put(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


def test_lines_of_nvidia_smi():
    assert read_gpus("93, 40960, 81920\n0, 0, 81920\n[N/A], 5, 6\nNo devices were found\n") == (
        (0.93, 40.0, 80.0),
        (0.0, 0.0, 80.0),
    )


def test_gpus_are_asked_for_by_their_numbers(nvidia_smi, monkeypatch):
    nvidia_smi('echo "50, 1024, 2048"; test "$3 $4" = "-i 0,1" && echo "60, 1024, 2048"; true')
    assert ask_gpus() == ((0.5, 1.0, 2.0),)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert len(ask_gpus()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ask_gpus() == ()


def test_no_answer_is_no_gpu(nvidia_smi, monkeypatch):
    monkeypatch.setattr(usage, "ANSWER_WITHIN_S", 0.2)
    for script in ("exec sleep 60", "echo 50, 1, 2; exit 9", "echo nonsense"):
        nvidia_smi(script)
        started = time.monotonic()
        assert ask_gpus() == ()
        assert time.monotonic() - started < 10
    monkeypatch.setenv("PATH", "")
    assert ask_gpus() == ()


def test_the_thread_answers_and_ends(nvidia_smi):
    nvidia_smi('echo "50, 1024, 2048"')
    watched = Usage()
    end = time.monotonic() + 30
    while watched.machine is None and time.monotonic() < end:
        time.sleep(0.05)
    watched.stop()
    assert watched.machine.gpus == ((0.5, 1.0, 2.0),)
    assert 0 <= watched.machine.cpu <= 1 and 0 < watched.machine.memory[0] < watched.machine.memory[1]
    watched._thread.join(10)
    assert not watched._thread.is_alive()
