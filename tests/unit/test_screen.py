"""What a person sees, on a terminal and in a file, and what goes to the log instead."""

import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpsrl.screen import Screen, duration, result_rows, time_rows

pytestmark = pytest.mark.process

SUMMARY = {
    "steps": 80,
    "num_rollouts": 20480,
    "wall_s": 200.0,
    "eval_first": {"countdown": 0.25, "aime24": 0.5},
    "eval_last": {"countdown": 0.5},
    "eval_measure": {"countdown": "avg@8", "aime24": "avg@4"},
    "mixed_share": 0.615,
    "policy_version": 80,
    "time_s": {"generate": 100.0, "train": 50.0, "select": 0.2},
}


def record(step, **extra):
    return {
        "step": step,
        "rollout/reward": 0.5,
        "rollout/solve_rate": 0.25,
        "selection/mixed_share": 0.75,
        **extra,
    }


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


# --- without a terminal -------------------------------------------------------------------------------


def test_plain_lines_say_how_it_goes_and_how_long_it_takes():
    out, clock = io.StringIO(), Clock()
    screen = Screen(out, clock)
    screen.step({"step": 0, "eval/countdown/avg@8": 0.3, "eval/countdown/pass@8": 0.9})
    screen.progress(total=10)
    clock.now_s = 6.0
    screen.step(record(1))
    assert out.getvalue().splitlines() == [
        "before training: countdown avg@8 0.300",
        "step 1/10  reward 0.50  solved 25%  mixed 75%  accuracy 0.300  54 s left",
    ]


def test_quick_steps_share_a_line_but_the_last_and_evaluations_are_shown():
    out, clock = io.StringIO(), Clock()
    screen = Screen(out, clock)
    screen.progress(total=20)
    for step in range(1, 21):
        clock.now_s = float(step)
        screen.step(record(step, **({"eval/countdown/avg@8": 0.4} if step == 9 else {})))
    steps = [line.split("  ")[0] for line in out.getvalue().splitlines()]
    assert steps == [
        "step 1/20",
        "step 6/20",
        "step 9: countdown avg@8 0.400",
        "step 11/20",
        "step 16/20",
        "step 20/20",
    ]


def test_a_resumed_run_measures_its_own_pace():
    out, clock = io.StringIO(), Clock()
    screen = Screen(out, clock)
    screen.progress(total=100, done=90)
    clock.now_s = 2.0
    screen.step(record(91))
    assert out.getvalue().strip().endswith("18 s left")


def test_text_is_printed_as_it_is_and_not_folded():
    out = io.StringIO()
    text = "[bold]not markup[/bold] :smile: " + "/long/path" * 30
    Screen(out).line(text)
    assert out.getvalue() == text + "\n"


def test_stages_before_training_are_lines_and_later_ones_are_silent():
    out = io.StringIO()
    screen = Screen(out)
    screen.stage("starting Ray")
    screen.progress(total=5)
    screen.stage("evaluating")
    assert out.getvalue() == "starting Ray\n"


def test_the_closing_table_holds_every_figure_and_both_paths():
    out = io.StringIO()
    Screen(out).table(SUMMARY, Path("runs/quick"), Path("runs/quick/report.html"))
    text = out.getvalue()
    parts = ["countdown avg@8", "0.250 before, 0.500 after (+0.250)", "20,480", "61.5%", "3:20", "generating"]
    parts += ["1:40", "50%", "everything else", "run folder  runs/quick", "runs/quick/report.html"]
    assert [part for part in parts if part not in text] == []


def test_rows_of_the_closing_table_worked_by_hand():
    assert result_rows(SUMMARY)[:2] == [
        ("countdown avg@8", "0.250 before, 0.500 after (+0.250)"),
        ("aime24 avg@4", "0.500 before"),
    ]
    assert time_rows(SUMMARY) == [
        ("selecting", 0.2, pytest.approx(0.001)),
        ("generating", 100.0, 0.5),
        ("training", 50.0, 0.25),
        ("everything else", pytest.approx(49.8), pytest.approx(0.249)),
    ]


def test_phases_that_overlap_leave_no_rest():
    rows = time_rows(SUMMARY | {"time_s": {"generate": 150.0, "train": 100.0}})
    assert [name for name, _, _ in rows] == ["generating", "training"]


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (60, "1:00"),
        (187.2, "3:07"),
        (7509, "2:05:09"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- on a terminal ------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_and_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    leader, follower = pty.openpty()
    shown = bytearray()

    def read():
        while b"the end" not in shown:
            shown.extend(os.read(leader, 4096))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    clock = Clock()
    with Screen(os.fdopen(follower, "w"), clock) as screen:
        screen.stage("starting Ray")
        screen.progress(total=200, done=100)
        clock.now_s = 30.0
        screen.step(record(101, **{"eval/countdown/avg@8": 0.4}))
        screen.stage("evaluating")
        screen.step(record(200))
        screen.stop_progress()
        screen.line("the end")
        reader.join(10)
    text = shown.decode()
    assert "starting Ray" in text and "evaluating" in text and "step 200/200" in text
    line = next(line for line in text.splitlines() if "step 101/200" in line)
    assert line.endswith("reward 0.50  mixed 75%  accuracy 0.400  49:30 left"), "all of it, in 80 columns"
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0


# --- what goes to the log -----------------------------------------------------------------------------

NOISY = """
import ctypes, os, subprocess, sys
from pathlib import Path
from dpsrl.screen import Screen
print("python before")
with Screen.capture(Path("log.txt")) as screen:
    print("python inside")
    print("stderr inside", file=sys.stderr)
    ctypes.CDLL(None).printf(b"C inside\\n")
    subprocess.run(["sh", "-c", "echo child inside; echo child stderr >&2"])
    screen.line("for the person")
    if "fail" in sys.argv: raise RuntimeError("the reason")
print("python after")
screen.restore()
"""


def run_noisy(tmp_path, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, "-c", NOISY, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_chatter_goes_to_the_log_and_messages_to_the_screen(tmp_path):
    result = run_noisy(tmp_path)
    assert result.stdout == "python before\nfor the person\npython after\n"
    assert (result.returncode, result.stderr) == (0, "")
    log = (tmp_path / "log.txt").read_text()
    for part in ("python inside", "stderr inside", "C inside", "child inside", "child stderr"):
        assert part in log
    assert "before" not in log and "after" not in log and "person" not in log


def test_an_error_gives_the_terminal_back_before_it_is_printed(tmp_path):
    result = run_noisy(tmp_path, "fail")
    assert result.returncode == 1
    assert "RuntimeError: the reason" in result.stderr
    assert "the reason" not in (tmp_path / "log.txt").read_text()
