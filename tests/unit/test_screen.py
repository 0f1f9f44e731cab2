"""What a person sees, on a terminal and in a file, and what goes to the log instead."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpsrl.screen import Screen, duration, result_rows, rollout_rows, time_rows

pytestmark = pytest.mark.process

SUMMARY = {
    "steps": 80,
    "num_rollouts": 20480,
    "wall_s": 200.0,
    "eval_first": {"countdown": 0.25, "aime24": 0.5},
    "eval_last": {"countdown": 0.5},
    "eval_measure": {"countdown": "avg@8", "aime24": "avg@4"},
    "eval_best": {"countdown": 0.55, "aime24": 0.5},
    "eval_best_step": {"countdown": 60, "aime24": 0},
    "mixed_share": 0.615,
    "policy_version": 80,
    "time_s": {"generate": 100.0, "train": 50.0, "select": 0.2},
    "rollouts": {
        "generated": 20480,
        "trained": 10240,
        "carried": 0,
        "dropped": {"not mixed": 8192, "missing": 2048},
        "holds": True,
    },
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
        "step  1/10  reward  0.50  solved  25%  mixed  75%  predicted    -  accuracy 0.300  54 s left",
    ]


def test_quick_steps_share_a_line_but_the_last_and_evaluations_are_shown():
    out, clock = io.StringIO(), Clock()
    screen = Screen(out, clock)
    screen.progress(total=20)
    for step in range(1, 21):
        clock.now_s = float(step)
        screen.step(record(step, **({"eval/countdown/avg@8": 0.4} if step == 9 else {})))
    steps = [line.split("  reward")[0] for line in out.getvalue().splitlines()]
    assert steps == [
        "step  1/20",
        "step  6/20",
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


def test_the_time_left_goes_down_within_a_step():
    clock = Clock()
    screen = Screen(io.StringIO(), clock)
    screen.progress(total=10)
    assert screen._frame().left_s is None
    clock.now_s = 10.0
    screen.step(record(1))
    for now_s, left_s in ((10.0, 90.0), (13.0, 87.0), (25.0, 80.0)):  # the second step takes longer than the first
        clock.now_s = now_s
        assert screen._frame().left_s == left_s
    screen.stage("generating")
    clock.now_s = 65.0
    screen.stage("generating", 3, 4)
    assert (screen._frame().stage.seconds, screen._frame().elapsed_s) == (40.0, 65.0)


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


def test_a_step_of_minutes_says_once_a_minute_how_far_it_is():
    out, clock = io.StringIO(), Clock()
    screen = Screen(out, clock)
    screen.progress(total=10, done=2)
    for second in range(0, 200, 10):
        clock.now_s = float(second)
        screen.stage("generating", second // 4, 50, "groups")
    assert out.getvalue().splitlines() == [
        "step 3/10: generating 15/50 groups",
        "step 3/10: generating 30/50 groups",
        "step 3/10: generating 45/50 groups",
    ]


def test_columns_stay_where_they_are():
    out, clock = io.StringIO(), Clock()
    screen = Screen(out, clock)
    screen.step({"step": 0, "eval/countdown/avg@8": 0.3})
    screen.progress(total=1000)
    rows = [(1, 0.5, 0.05, None), (10, -0.25, 1.0, 0.7), (999, 0.0, None, 0.123)]
    for step, reward, mixed, predicted in rows:
        clock.now_s += 10
        values = {"rollout/reward": reward, "selection/mixed_share": mixed, "selection/predicted_share": predicted}
        screen.step(record(step, **values))
    lines = out.getvalue().splitlines()[1:]
    for word in ("reward", "solved", "mixed", "predicted", "accuracy"):
        assert len({line.index(word) for line in lines}) == 1, lines


def test_a_run_that_is_taken_up_shows_what_was_before(tmp_path):
    screen = Screen(io.StringIO())
    before = [{"step": 0, "eval/countdown/avg@8": 0.3}, record(1, **{"eval/countdown/avg@8": 0.6}), record(2)]
    screen.progress(total=9, done=2, records=before)
    assert screen._view.figures.best == 0.6 and screen._view.figures.mixed == (0.75, 0.75)
    screen.progress(total=9, done=1, records=before[:2])  # a lost trainer
    assert screen._view.figures.mixed == (0.75,) and screen._view.done == 1


def test_the_closing_table_holds_every_figure_and_both_paths():
    out = io.StringIO()
    Screen(out).table(SUMMARY, Path("runs/quick"), Path("runs/quick/report.html"))
    text = out.getvalue()
    parts = [
        "countdown avg@8",
        "0.250 before, 0.500 after (+0.250), best 0.550 at step 60",
        "20,480",
        "61.5%",
        "3:20",
        "generating",
    ]
    parts += ["1:40", "50%", "everything else", "where the rollouts went", "dropped: not mixed", "8,192", "40%"]
    parts += ["run folder  runs/quick", "runs/quick/report.html"]
    assert [part for part in parts if part not in text] == []


def test_rows_of_the_closing_table_worked_by_hand():
    assert result_rows(SUMMARY)[:2] == [
        ("countdown avg@8", "0.250 before, 0.500 after (+0.250), best 0.550 at step 60"),
        ("aime24 avg@4", "0.500 before"),
    ]
    assert time_rows(SUMMARY) == [
        ("selecting", 0.2, pytest.approx(0.001)),
        ("generating", 100.0, 0.5),
        ("training", 50.0, 0.25),
        ("everything else", pytest.approx(49.8), pytest.approx(0.249)),
    ]


def test_every_rollout_has_its_row():
    assert rollout_rows(SUMMARY) == [
        ("trained on", 10240, 0.5),
        ("dropped: not mixed", 8192, 0.4),
        ("dropped: missing", 2048, 0.1),
    ]
    assert rollout_rows({"steps": 1}) == [], "a summary of an earlier version"


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


# --- streams that go away -----------------------------------------------------------------------------


class Gone(io.StringIO):
    """A terminal that was closed, after some characters."""

    def write(self, text):
        if len(self.getvalue()) > 20:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_a_run_outlives_its_terminal():
    out = Gone()
    with Screen(out) as screen:
        for index in range(9):
            screen.line(f"line {index} of the run")
        screen.progress(total=2)
        screen.step(record(1))
        screen.table(SUMMARY, Path("runs/quick"), None)
    assert out.getvalue().startswith("line 0") and "line 8" not in out.getvalue()


def test_no_escape_codes_without_a_terminal_whatever_the_environment_says(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    out = io.StringIO()
    with Screen(out) as screen:
        screen.stage("starting Ray")
        screen.progress(total=2)
        screen.stage("generating", 1, 4, "groups")
        screen.step(record(1))
        screen.table(SUMMARY, Path("runs/quick"), None)
    assert "step 1/2" in out.getvalue() and "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


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
