"""The scoring processes: hostile items cost only themselves, and no process outlives its Scorer."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from dpsrl.rewards import Score, Scorer
from dpsrl.rewards.worker import as_score
from dpsrl.types import UserError

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[3]

HOSTILE = """
import os, signal, subprocess, sys, time
from dpsrl.rewards import Score

RETURNED = {
    "none": None, "nan": float("nan"), "inf": float("inf"), "text": "1", "list": [1.0], "huge": 10**400,
    "score_nan": Score(float("nan"), True), "score_text": Score("1", True),
}

def function(response, answer):
    if response == "loop":
        while True:
            pass
    if response == "sleep":
        time.sleep(3600)
    if response == "long multiplication":  # holds the interpreter's lock
        return 7 ** (10 ** 9)
    if response == "child":
        child = subprocess.Popen(["sleep", "3600"])
        open(answer, "w").write(str(child.pid))
        time.sleep(3600)
    if response == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if response == "exit":
        os._exit(0)
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "leave":
        sys.exit()
    if response == "raise":
        raise ValueError("bad \\ud800\\n answer")
    if response == "memory":
        return len(bytearray(8 << 30))
    if response == "deep":
        return function_that_calls_itself(response)
    if response == "pid":
        return os.getpid()
    if response == "print":
        print("chatter")
    if response in RETURNED:
        return RETURNED[response]
    return Score(0.5, len(response) == int(answer))

def function_that_calls_itself(response):
    return function_that_calls_itself(response) + 1

def one_argument(response):
    return 1.0

not_a_function = 3
"""


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """A folder with hostile.py in it, found from the working directory alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("work")
        (folder / "hostile.py").write_text(HOSTILE)
        (folder / "broken.py").write_text("def f(:")
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder
        sys.modules.pop("hostile", None)


def alive(pid):
    """Whether the process runs: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_dead(pid):
    for _ in range(1000):
        if not alive(pid):
            return True
        threading.Event().wait(0.01)
    return False


def pids_of(scorer):
    return {worker.process.pid for worker in scorer._workers}


def test_hostile_items_cost_only_themselves(working_directory):
    child_pid = working_directory / "child.pid"
    timeouts = ["loop", "sleep", "long multiplication", "child", "stop"]
    crashes = ["exit", "segfault", "leave", "raise", "memory", "deep"]
    invalid = ["none", "nan", "inf", "text", "list", "huge", "score_nan", "score_text"]
    good = ["ab", "\x00", "\ud800", "x" * 1_000_000, "print"]
    items = []
    for hostile in [*timeouts, *crashes, *invalid]:  # good items before, between and after
        items += [(text, str(len(text))) for text in good]
        items.append((hostile, str(child_pid)))
    items += [("wrong", "1")]
    with Scorer("hostile:function", num_workers=2, deadline_s=1.0) as scorer:
        scores = scorer.score(items)
        assert len(pids_of(scorer)) == 2
    expected = ([Score(0.5, True)] * len(good) + [None]) * 19 + [Score(0.5, False)]
    assert scores == expected
    assert scorer.missing == {"timeout": len(timeouts), "crash": len(crashes), "invalid": len(invalid)}
    assert wait_until_dead(int(child_pid.read_text()))  # what a killed worker had started


def test_countdown_in_order_over_many_calls():
    right = ("3*5", {"numbers": [3, 5], "target": 15})
    wrong = ("3+5", {"numbers": [3, 5], "target": 15})
    with Scorer("countdown", num_workers=2) as scorer:
        assert scorer.score([]) == []
        pids = pids_of(scorer)
        for count in (1, 2, 7, 500):
            scores = scorer.score([right, wrong] * count)
            assert [score.correct for score in scores] == [True, False] * count
        assert pids_of(scorer) == pids
        assert scorer.missing == {"timeout": 0, "crash": 0, "invalid": 0}


def test_math_bombs_time_out_and_the_rest_is_scored():
    bomb = (r"\boxed{9^{9^{9^{9}}}}", "5")
    items = [(r"\boxed{5}", "5"), bomb, (r"\boxed{\frac12}", "0.5"), ("6", ["5", "7"])]
    with Scorer("math", deadline_s=2.0) as scorer:
        assert scorer.score(items) == [Score(1.0, True), None, Score(1.0, True), Score(0.0, False)]
        assert scorer.missing["timeout"] == 1


def test_workers_killed_while_idle_lose_nothing():
    with Scorer("hostile:function", num_workers=2) as scorer:
        before = scorer.score([("pid", "")] * 8)
        for worker in scorer._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
        after = scorer.score([("pid", "")] * 8)
        assert None not in before + after
        assert not {score.reward for score in before} & {score.reward for score in after}


def test_a_call_that_fails_leaves_nothing_behind():
    with Scorer("countdown") as scorer:
        with pytest.raises(Exception, match="(?i)pickle"):
            scorer.score([("3", {"numbers": [3], "target": 3}), ("3", lambda: 0)])
        assert scorer.score([("3", {"numbers": [3], "target": 3})]) == [Score(1.0, True)]


def test_scores_off_the_main_thread_and_after_that_thread_ends():
    with Scorer("hostile:function") as scorer:
        results = []
        for _ in range(2):  # a worker must not die with the thread that started it
            items = [("exit", ""), ("ab", "2")]
            thread = threading.Thread(target=lambda items=items: results.append(scorer.score(items)))
            thread.start()
            thread.join()
        assert results == [[None, Score(0.5, True)]] * 2
        assert scorer.score([("ab", "2")]) == [Score(0.5, True)]
        assert scorer.missing["crash"] == 2


def test_close_ends_the_processes():
    scorer = Scorer("countdown", num_workers=2)
    pids = pids_of(scorer)
    scorer.close()
    scorer.close()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(UserError, match="closed"):
        scorer.score([])


def run_script(folder, body):
    """A script without a main guard, run by path; its working directory is `folder`."""
    (folder / "script.py").write_text(textwrap.dedent(body))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_script_without_a_main_guard(working_directory):
    run = run_script(
        working_directory,
        """
        print("main runs")
        import sys
        from dpsrl.rewards import Scorer
        with Scorer("hostile:function") as scorer:
            print(scorer.score([("ab", "2"), ("print", "5")]))
        print([name for name in ("sympy", "torch", "multiprocessing.spawn") if name in sys.modules])
        """,
    )
    assert run.stdout.splitlines() == ["main runs", f"{[Score(0.5, True)] * 2}", "[]"]
    assert "chatter" in run.stderr  # what a reward function prints stays out of the output


def test_workers_die_with_a_killed_parent_even_in_one_long_multiplication(working_directory):
    run = run_script(
        working_directory,
        """
        import os, signal, threading
        from dpsrl.rewards import Scorer
        scorer = Scorer("hostile:function", num_workers=2, deadline_s=600)
        scorer.score([("ab", "2")] * 2)
        print(*[worker.process.pid for worker in scorer._workers], flush=True)
        items = [("long multiplication", ""), ("sleep", "")]
        threading.Thread(target=scorer.score, args=(items,), daemon=True).start()
        threading.Event().wait(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert run.returncode == -signal.SIGKILL
    pids = run.stdout.split()
    assert len(pids) == 2 and all(wait_until_dead(pid) for pid in pids)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("maths", "reward.fn=maths must be one of math, countdown or my_module:function."),
        ("hostile:", "must be one of"),
        ("../hostile:function", "must be one of"),
        ("no_such_module:f", "there is no module no_such_module in .*check the name, or start in its folder"),
        ("broken:f", "broken failed on import with SyntaxError"),
        ("hostile:missing", "there is no missing in hostile"),
        ("hostile:not_a_function", "not_a_function is int, which cannot be called"),
        ("hostile:one_argument", r"takes \(response\) .*write it as def score\(response: str, answer\) -> float"),
    ],
)
def test_unusable_functions_are_refused_at_once(name, sentence):
    with pytest.raises(UserError, match=sentence):
        Scorer(name)


def test_arguments_out_of_range():
    with pytest.raises(UserError, match="num_workers=0"):
        Scorer("countdown", num_workers=0)
    with pytest.raises(UserError, match="deadline_s=nan"):
        Scorer("countdown", deadline_s=float("nan"))


def test_processes_that_cannot_start_are_one_sentence(working_directory):
    # Importable here, dead on arrival there.
    (working_directory / "stillborn.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    os._exit(7)\ndef f(response, answer): return 1.0\n"
    )
    with Scorer("stillborn:f", num_workers=2) as scorer:
        with pytest.raises(UserError, match=r"its process ended \(exit code 7\), 3 times in a row"):
            scorer.score([("", "")])


@pytest.mark.parametrize(
    ("result", "score"),
    [
        (True, Score(1.0, True)),
        (np.bool_(False), Score(0.0, False)),
        (1, Score(1.0, True)),
        (0.99, Score(0.99, False)),
        (np.float32(2.0), Score(2.0, True)),
        (np.int64(-1), Score(-1.0, False)),
        (Score(np.float64(0.1), np.bool_(True)), Score(0.1, True)),
        (None, None),
        (np.array([1.0]), None),
        (1j, None),
        ({}, None),
    ],
)
def test_as_score(result, score):
    assert as_score(result) == score
