"""The live panel on a terminal: a pseudo-terminal, read as a terminal emulator reads it."""

import os
import select
import signal
import subprocess
import sys
import time

import pyte
import pytest

from dpsrl.panel import NUM_ROWS

pytestmark = pytest.mark.process

DRIVE = """
import os, sys, time
from pathlib import Path
from dpsrl.screen import Screen

def record(step, **more):
    return {"step": step, "rollout/reward": 0.5, "selection/mixed_share": 0.75, "selection/predicted_share": 0.7,
            "rollout/num_rollouts": 512 * step, "rollout/num_trained": 500 * step, "time/generate_s": 3.0,
            "time/train_s": 1.0, **more}

SUMMARY = {"steps": 9, "num_rollouts": 4608, "wall_s": 9.0, "eval_first": {}, "eval_last": {}, "eval_measure": {},
           "mixed_share": 0.5, "time_s": {"train": 4.5}}
Path("logs").mkdir()
print("before the run")
with Screen.capture(Path("logs/driver.log")) as screen:
    screen.stage("starting Ray")
    screen.step({"step": 0, "eval/countdown/avg@8": 0.25})
    screen.progress(total=9)
    time.sleep(0.5)
    for step in (1, 2, 3):
        screen.step(record(step))
    print("chatter of a library")
    screen.line("warning: an engine was replaced, " + "which takes a line that is longer than the screen is wide " * 2)
    screen.stage("generating", 37, 64, "groups")
    time.sleep(0.7)
    os.write(9, b"x")  # so far
    ACTION
"""


class Terminal:
    """A process on a pseudo-terminal of its own, and what its screen looks like."""

    def __init__(self, folder, action, columns=80, lines=24, term="xterm-256color"):
        self.leader, follower = os.openpty()
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        self.resize(columns, lines)
        mark, self._mark = os.pipe()
        self._ready = mark
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TERM": term,
        }  # fmt: skip
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            environment.pop(name, None)
        code = f"import os; os.dup2({self._mark}, 9)\n" + DRIVE.replace("ACTION", action)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower, cwd=folder, env=environment,
            pass_fds=[self._mark], start_new_session=True, preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(follower)
        os.close(self._mark)

    def resize(self, columns, lines):
        import fcntl
        import struct
        import termios

        self.screen.resize(lines, columns)
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self, until, within_s=60.0):
        """Feeds the screen until `until()` holds."""
        end = time.monotonic() + within_s
        while not until():
            assert time.monotonic() < end, self.text()
            if select.select([self.leader], [], [], 0.05)[0]:
                try:
                    self.stream.feed(os.read(self.leader, 65536))
                except OSError:  # its other end is closed
                    break

    def started(self):
        """Until the run is under way."""
        self.read(lambda: select.select([self._ready], [], [], 0)[0])
        self.look(0.0)
        return self

    def look(self, for_s=2.0):
        """Feeds the screen for a while, and to the end of a frame."""
        end = time.monotonic() + for_s
        self.read(lambda: time.monotonic() > end and not select.select([self.leader], [], [], 0.1)[0])

    def ended(self):
        self.read(lambda: self.process.poll() is not None)
        self.read(lambda: not select.select([self.leader], [], [], 0.3)[0])
        return self.process.wait()

    def rows(self):
        return [row.rstrip() for row in self.screen.display]

    def text(self):
        return "\n".join(self.rows()).strip()

    def all_text(self):
        """With what was scrolled away."""
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        return "\n".join(row.rstrip() for row in [*above, *self.rows()]).strip()


def own_terminal():
    """Makes the pseudo-terminal the controlling one, so that it turns ^C into a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(tmp_path):
    open_ones = []

    def start(action, **size):
        open_ones.append(Terminal(tmp_path, action, **size))
        return open_ones[-1]

    yield start
    for one in open_ones:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        os.close(one.leader)
        os.close(one._ready)


def panel_of(rows):
    """The one panel on the screen, and that nothing is below it."""
    tops = [i for i, row in enumerate(rows) if row.startswith("╭")]
    assert len(tops) == 1 and sum(row.startswith("╰") for row in rows) == 1, "\n".join(rows)
    panel = rows[tops[0] : tops[0] + NUM_ROWS]
    assert panel[-1].startswith("╰") and not any(rows[tops[0] + NUM_ROWS :])
    assert len({len(row) for row in panel}) == 1
    return "\n".join(panel)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_panel_stands_below_the_lines(terminal, columns):
    one = terminal("time.sleep(60)", columns=columns).started()
    panel = panel_of(one.rows())
    for part in ("step 3/9", "left", "generating 37/64 groups", "accuracy   0.250  best 0.250", "75%", "70%", "1,536"):
        assert part in panel, part
    lines = one.text().split("╭")[0].split()
    expected = "before the run before training: countdown avg@8 0.250 warning: an engine was replaced, which takes"
    assert lines[: len(expected.split())] == expected.split()
    assert "chatter" not in one.all_text() and "starting Ray" not in one.all_text()


def test_at_the_end_the_table_takes_its_place(terminal):
    one = terminal("screen.table(SUMMARY, Path('runs/mine'), Path('runs/mine/report.html'))")
    assert one.ended() == 0
    text = one.all_text()
    assert "╭" not in text and "generating" not in text and not one.screen.cursor.hidden
    assert text.count("where the time went") == 1 and text.endswith("report      runs/mine/report.html")


@pytest.mark.parametrize("columns", [60, pytest.param(80, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_clean_terminal_and_the_last_step(terminal, columns):
    one = terminal("time.sleep(60)", columns=columns).started()
    os.write(one.leader, b"\x03")
    assert one.ended() == -signal.SIGINT
    text = one.all_text()
    assert "╭" not in text and "╰" not in text and not one.screen.cursor.hidden
    assert "step 3/9  reward  0.50" in text and "KeyboardInterrupt" in text.split("step 3/9")[1]


def test_an_error_is_printed_on_a_clean_terminal(terminal):
    one = terminal("raise RuntimeError('the reason')")
    assert one.ended() == 1
    text = one.all_text()
    assert "╭" not in text and text.endswith("RuntimeError: the reason") and not one.screen.cursor.hidden


def test_a_terminal_that_becomes_narrower_and_wider_has_one_panel(terminal):
    one = terminal("time.sleep(60)", columns=120).started()
    for columns, lines in ((70, 24), (64, 20), (100, 30)):
        one.resize(columns, lines)
        one.look()
        panel = panel_of(one.rows())
        assert "generating 37/64 groups" in panel and len(panel.split("\n")[0]) == columns - 3
        assert "warning: an engine was replaced" in one.text()
    one.resize(80, 10)
    one.look()
    assert "╭" not in one.text() and "step 3/9" in one.text() and "generating 37/64" in one.text()


def test_a_dumb_terminal_gets_plain_lines(terminal):
    one = terminal("pass", term="dumb")
    assert one.ended() == 0
    text = one.all_text()
    assert "starting Ray" in text and "step 1/9  reward" in text and "╭" not in text and "generating" not in text


def test_a_terminal_that_takes_nothing_stops_no_run_and_is_drawn_anew_afterwards(terminal):
    one = terminal("[screen.line(f'line {i} ' + 'x' * 900) for i in range(20)]; os.write(9, b'x'); time.sleep(60)")
    os.read(one.started()._ready, 1)
    end = time.monotonic() + 60
    while not select.select([one._ready], [], [], 0.1)[0]:  # nobody reads until all of it is written or dropped
        assert time.monotonic() < end
    one.look(3.0)
    assert "generating 37/64 groups" in panel_of(one.rows()) and "line 19" in one.text()
