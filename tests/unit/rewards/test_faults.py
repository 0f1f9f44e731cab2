"""Faults that are not the answer's doing cost no reward: processes killed or stopped from outside, dying parents."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dpsrl.rewards import Score, Scorer, scorer
from tests.unit.rewards.test_scorer import wait_until_dead

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[3]

FUNCTIONS = r"""
import os, signal, time

def function(response, answer):
    kind, _, seconds = response.partition(" ")
    if answer:  # a file: one line for each time that this was begun
        with open(answer, "a") as file:
            file.write("begun\n")
    if kind == "loop":
        while True:
            pass
    time.sleep(float(seconds.strip() or 0))
    if kind == "die":
        os._exit(3)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    return 0.5
"""
HALF = Score(0.5, False)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("faulty", None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_signal_to_busy_processes_costs_no_reward(number, folder):
    """Both at once, so that what one had in hand is not tried again on the other one, to be lost with it too."""
    begun = [folder / "first", folder / "second"]
    items = [("sleep 5", str(path)) for path in begun] + [("quick", "")] * 2  # few, so that each process has one
    with Scorer("faulty:function", num_workers=2, deadline_s=60.0) as pool:

        def strike():
            while not all(path.exists() for path in begun):
                time.sleep(0.01)
            for pid in pool.pids():
                os.kill(pid, number)

        striker = threading.Thread(target=strike, daemon=True)
        striker.start()
        assert pool.score(items) == [HALF] * len(items)
        striker.join()
        assert [path.read_text() for path in begun] == ["begun\n" * 2] * 2
        assert pool.missing == {"timeout": 0, "crash": 0, "invalid": 0}
        assert pool.num_replaced == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_signal_to_idle_processes_costs_no_reward(number):
    with Scorer("faulty:function", num_workers=2, deadline_s=5.0) as pool:
        while not all(worker.ready for worker in pool._workers):  # one still starting is not idle, nor missed so soon
            assert pool.score([("quick", "")] * 8) == [HALF] * 8
        before = pool.pids()
        for pid in before:
            os.kill(pid, number)
        assert pool.score([("quick", "")] * 8) == [HALF] * 8
        assert sum(pool.missing.values()) == 0
        assert pool.num_replaced == 2 and not set(before) & set(pool.pids())
        assert all(wait_until_dead(pid) for pid in before)


@pytest.mark.parametrize("size", [1, 5_000_000])
def test_a_chunk_that_is_not_acknowledged_goes_to_another_process(size, monkeypatch):
    """As when the process is stopped between the last look at it and the message; a large one fills the pipe."""
    monkeypatch.setattr(scorer._Worker, "is_stopped", lambda self: False)
    with Scorer("faulty:function", deadline_s=5.0) as pool:
        assert pool.score([("quick", "")]) == [HALF]
        os.kill(pool.pids()[0], signal.SIGSTOP)
        begun = time.monotonic()
        assert pool.score([("quick " + " " * size, "")] * 3) == [HALF] * 3
        assert scorer.TAKE_S <= time.monotonic() - begun
        assert pool.slowest_s < 5.0 + scorer.TAKE_S
        assert pool.num_replaced == 1 and sum(pool.missing.values()) == 0


@pytest.mark.parametrize(("kind", "reason"), [("die", "crash"), ("stop", "timeout")])
def test_what_ends_each_process_is_tried_twice_and_counted_once(kind, reason, folder):
    log = folder / "log"
    with Scorer("faulty:function", deadline_s=5.0) as pool:
        assert pool.score([("quick", ""), (kind, str(log)), ("quick", "")]) == [HALF, None, HALF]
        assert pool.missing == {"timeout": 0, "crash": 0, "invalid": 0} | {reason: 1}
        assert log.read_text().splitlines() == ["begun"] * 2
        assert pool.num_replaced == 2


def test_both_tries_share_one_deadline(folder):
    log = folder / "log"
    with Scorer("faulty:function", deadline_s=3.0) as pool:
        assert pool.score([("die 2", str(log))]) == [None]  # the second try has a second left of it
        assert pool.missing["timeout"] == 1
        assert log.read_text().splitlines() == ["begun"] * 2
        assert 2.9 < pool.slowest_s < 5.0


def test_pids_are_those_of_live_processes():
    with Scorer("faulty:function", num_workers=3) as pool:
        pids = pool.pids()
        assert len(set(pids)) == 3
        for pid in pids:
            os.kill(pid, 0)
    assert pool.pids() == []


# ---- no process is left behind ----

PRELUDE = """
import os, signal, sys, threading, time
from dpsrl.rewards import Scorer
scorer = Scorer("faulty:function", num_workers=2, deadline_s=600)
scorer.score([("quick", "")] * 2)
print(*scorer.pids(), flush=True)
items = [("loop", ""), ("sleep 600", "")]
"""
ENDINGS = {
    "exception": "raise RuntimeError",
    "exception while scoring": """
        signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
        signal.alarm(1)
        scorer.score(items)
    """,
    "exit": "sys.exit(3)",
    "killed while idle": "os.kill(os.getpid(), signal.SIGKILL)",
    "killed while they are busy": """
        threading.Thread(target=scorer.score, args=(items,), daemon=True).start()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    """,
    "killed while they are stopped": """
        for pid in scorer.pids():
            os.kill(pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    """,
    "terminated": """
        threading.Thread(target=scorer.score, args=(items,), daemon=True).start()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
    """,
}


def start_parent(folder, ending):
    (folder / "parent.py").write_text(PRELUDE + textwrap.dedent(ending))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_process_outlives_its_parent(ending, folder):
    parent, pids = start_parent(folder, ENDINGS[ending])
    assert parent.wait(60) != 0
    assert len(pids) == 2 and all(wait_until_dead(pid) for pid in pids)


@pytest.mark.slow
def test_a_loop_ends_by_its_processor_time_where_the_parent_cannot_end_it(folder):
    ending = "scorer.deadline_s = 600\n" + "scorer.score(items)"
    (folder / "parent.py").write_text(PRELUDE.replace("deadline_s=600", "deadline_s=1") + ending)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "parent.py"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                          text=True) as parent:  # fmt: skip
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        deadline = time.monotonic() + 10 * (os.cpu_count() + 4)
        try:
            while all(Path(f"/proc/{pid}").exists() for pid in pids):  # the one in the loop, on SIGXCPU
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            parent.kill()
