"""The time a process was awake, and the end of one that hangs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dpsrl.watchdog import EXIT_CODE, Watchdog

pytestmark = pytest.mark.process

HANGS = """
import time
from dpsrl.watchdog import Watchdog
with Watchdog(1.0, lambda: print("ended the others", flush=True)) as watchdog:
    {before}
    def the_hanging_place():
        time.sleep(60)
    the_hanging_place()
"""


def start(before="pass"):
    return subprocess.Popen(
        [sys.executable, "-c", HANGS.format(before=before)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_process_that_hangs_ends_with_its_stacks():
    process = start()
    out, err = process.communicate(timeout=50)
    assert process.returncode == EXIT_CODE
    assert "ended the others" in out
    assert "made no progress for 1 s" in err and "the_hanging_place" in err


def test_work_with_deadlines_of_its_own_is_no_hang():
    process = start("with watchdog.paused(): time.sleep(4); print('done', flush=True)")
    assert process.stdout.readline() == "done\n"
    process.kill()
    process.wait()


def test_a_frozen_process_was_not_awake():
    code = (
        "import time\nfrom dpsrl.watchdog import Watchdog\n"
        "with Watchdog(60.0, print) as watchdog:\n"
        "    print('up', flush=True)\n    input()\n    time.sleep(1.5)\n    print(watchdog.awake_s, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(12)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate("\n", timeout=50)
    assert 1.0 < float(out) < 8.0  # not the 12 s


def test_beats_keep_it_alive():
    with Watchdog(1.0, lambda: None) as watchdog:
        for _ in range(8):
            time.sleep(0.3)
            watchdog.beat()
        assert watchdog.awake_s > 1.0
