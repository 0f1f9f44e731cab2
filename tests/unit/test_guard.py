"""What a process started ends soon after it, however it ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpsrl.guard import Guard, children, parents

pytestmark = pytest.mark.process

# The other one starts a third, in a session of its own and with its name and environment rewritten, as Ray's do.
STARTS_OTHERS = """
import os, subprocess, sys, time
from dpsrl.guard import Guard
with Guard() as guard:
    other = subprocess.Popen(
        [sys.executable, "-c", "import subprocess; p = subprocess.Popen(['sleep', '600'], env={{}}, "
         "start_new_session=True); print(p.pid, flush=True); p.wait()"], stdout=subprocess.PIPE, text=True,
    )
    guard.follow([other.pid])
    third = int(other.stdout.readline())
    time.sleep(2.5)
    {before}
    print(other.pid, third, guard.folder, flush=True)
    {then}
"""


def start(before="pass", then="time.sleep(600)"):
    code = STARTS_OTHERS.format(before=before, then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    *pids, folder = process.stdout.readline().split()
    assert Path(folder).is_dir()
    return process, list(map(int, pids)), Path(folder)


def gone(pids, folder):
    end = time.monotonic() + 30
    while (set(pids) & parents().keys() or folder.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    return not set(pids) & parents().keys() and not folder.exists()


@pytest.mark.parametrize(
    "before", ["pass", "os.kill(third, 19)", "other.kill(); other.wait()"], ids=["running", "stopped", "orphaned"]
)
def test_a_killed_process_takes_all_that_was_started_with_it(before):
    process, *started = start(before)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(*started)


def test_so_does_one_that_ends_well():
    process, *started = start(then="pass")
    assert process.wait(timeout=60) == 0 and gone(*started)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_guard_that_is_itself_killed_or_stopped_is_made_up_for(monkeypatch, number):
    monkeypatch.setattr("dpsrl.guard.ENDS_WITHIN_S", 1.0)
    with Guard() as guard:
        first = subprocess.Popen(["sleep", "600"])
        guard.follow([first.pid])
        os.kill(guard._process.pid, number)
        second = subprocess.Popen(["sleep", "600"])
        time.sleep(0.2)
        guard.follow([second.pid])
    assert first.wait(timeout=30) == second.wait(timeout=30) == -signal.SIGKILL
    assert not Path(guard.folder).exists()


def test_others_are_left_alone():
    mine = subprocess.Popen(["sleep", "600"])
    assert mine.pid in children(os.getpid())
    with Guard() as guard:
        followed = subprocess.Popen(["sleep", "600"])
        guard.follow([followed.pid])
    assert followed.wait() == -signal.SIGKILL and mine.poll() is None
    mine.kill()
    mine.wait()
