"""Which checkpoints a run has, whatever happened while they were written."""

import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import dpsrl
from dpsrl.checkpoint import CheckpointError, read_state, verify, write_state
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

pytestmark = pytest.mark.process

ROOT = Path(dpsrl.__file__).parents[1]


def parts(value):
    """Two parts that say what they were written with."""
    return {
        "model": lambda folder: (folder / "weights").write_text(f"{value}"),
        "driver": lambda folder: write_state(folder, {"x": np.full(50, value), "value": value}),
    }


def save(run, step, value=None, **more):
    return run.save_checkpoint(step, parts(step if value is None else value), {}, **({"keep": 2} | more))


def value_of(checkpoint):
    state = read_state(checkpoint.path / "driver")
    assert (state["x"] == state["value"]).all()
    assert (checkpoint.path / "model/weights").read_text() == f"{state['value']}"
    return state["value"]


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def names(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


# --- which stay ----------------------------------------------------------------------------------------


def test_the_newest_stay_by_the_order_of_saving(run):
    for step in (2, 10, 100):
        save(run, step)
    assert [path.name for path in run.list_checkpoints()] == ["step_10", "step_100"] == names(run)
    save(run, 50)  # a person went back to step 10
    assert run.newest_checkpoint()[0].step == 50 and names(run) == ["step_100", "step_50"]
    save(run, 51)
    assert [path.name for path in run.list_checkpoints()] == ["step_50", "step_51"] == names(run)


def test_the_best_stays_beside_the_newest(run):
    for step, score in ((1, 0.5), (2, 0.7), (3, None), (4, 0.7), (5, 0.1), (6, math.nan), (7, -math.inf)):
        save(run, step, score=score, keep=1)
    assert names(run) == ["step_4", "step_7"]
    assert run.best_checkpoint().step == 4 and run.best_checkpoint().manifest.score == 0.7
    assert run.newest_checkpoint()[0].manifest.score is None
    save(run, 8, score=0.9, keep=1)
    assert names(run) == ["step_8"]


def test_the_best_that_is_whole_is_found(run):
    for step, score in ((1, 0.5), (2, 0.7)):
        save(run, step, score=score)
    (run.checkpoints / "step_2/model/weights").write_text("x")
    assert run.best_checkpoint().step == 1
    (run.checkpoints / "step_1/model/weights").write_text("x")
    assert run.best_checkpoint() is None
    assert RunFolder(run.path / "none").best_checkpoint() is None


def test_broken_ones_do_not_count_among_those_that_stay(run):
    for step in (1, 2):
        save(run, step)
    (run.checkpoints / "step_2/manifest.json").write_text("{}")
    save(run, 3)
    assert names(run) == ["step_1", "step_3"]


def test_saving_a_step_again_replaces_it(run):
    save(run, 1)
    save(run, 2, value=20)
    save(run, 2, value=21)
    newest, sentences = run.newest_checkpoint()
    assert (value_of(newest), sentences, names(run)) == (21, [], ["step_1", "step_2"])


def test_what_was_passed_over_is_said(run):
    assert run.newest_checkpoint() == (None, [])
    for step in (1, 2, 3):
        save(run, step, keep=9)
    (run.checkpoints / "step_1/manifest.json").unlink()  # older than the one found: nobody's concern
    (run.checkpoints / "step_3/manifest.json").unlink()
    (run.checkpoints / "step_4.tmp").mkdir()
    (run.checkpoints / "step_2").rename(run.checkpoints / "step_2.old")
    newest, sentences = run.newest_checkpoint()
    assert value_of(newest) == 2
    assert sentences == [
        f"checkpoint {run.checkpoints}/step_4.tmp was never finished",
        f"checkpoint {run.checkpoints}/step_3 is broken: manifest.json is missing",
    ]
    save(run, 5)
    assert names(run) == ["step_2", "step_5"]


# --- on the disk ---------------------------------------------------------------------------------------


def test_everything_is_synced_before_it_gets_its_name(run, monkeypatch):
    """What os.fsync was called on, by the kernel's word, and when the folder was renamed."""
    events, fsync, rename = [], os.fsync, os.rename

    def record_sync(descriptor):
        fsync(descriptor)
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def record_rename(source, target, **more):
        rename(source, target, **more)
        events.append("renamed")

    save(run, 1)
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    folder = save(run, 2, keep=9)
    unfinished = folder.with_suffix(".tmp")
    below = [folder, *folder.rglob("*")]
    written = {str(unfinished / path.relative_to(folder)) for path in below}
    at = events.index("renamed")
    assert set(events[:at]) == written and len(written) == 7
    assert events[:at].index(f"{unfinished}/manifest.json") > events.index(f"{unfinished}/model/weights")
    assert str(run.checkpoints) in events[at:] and str(run.path) in events[at:]


# --- killed --------------------------------------------------------------------------------------------

SAVER = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from dpsrl.checkpoint import write_state
from dpsrl.run_folder import RunFolder

def save(run, value):
    parts = {
        "model": lambda folder: (folder / "weights").write_text(f"{value}"),
        "driver": lambda folder: write_state(folder, {"x": np.full(50, value), "value": value}),
    }
    run.save_checkpoint((value + 1) // 2, parts, {}, keep=1)  # every second one replaces the one before
    print(value, flush=True)
"""

# Children that save on and on, each from where the one before it was killed.
AT_RANDOM = """
import random, time
from dpsrl.checkpoint import read_state

run, draw = RunFolder(Path(sys.argv[1])), random.Random(0)
save(run, 0)
for _ in range(50):
    newest, _ = run.newest_checkpoint()
    value = read_state(newest.path / "driver")["value"]
    print("found", value, flush=True)
    if not (pid := os.fork()):
        while True:
            value += 1
            save(run, value)
    time.sleep(draw.uniform(0.0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
print("found", read_state(run.newest_checkpoint()[0].path / "driver")["value"])
"""

# Children that die at the first, second, ... thing that they do to files, until one has nothing left to die at.
AT_EVERY_POINT = """
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}

def kill_at(fatal):
    count = 0
    def hook(event, _):
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

base, fatal, status = Path(sys.argv[1]), 0, 1
save(RunFolder(base / "0"), 3)
while status:
    fatal += 1
    shutil.copytree(base / "0", base / f"{fatal}")
    print("child", fatal, 3, flush=True)
    if not (pid := os.fork()):
        kill_at(fatal)
        for value in (4, 5):  # one replaces step 2, one is step 3, after which step 2 is removed
            save(RunFolder(base / f"{fatal}"), value)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (signal.SIGKILL, 0)
"""


def start(script, *arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, **more,
    )  # fmt: skip


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: killing a process loses nothing of what the kernel was given."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as path:
        yield Path(path)


def test_a_save_killed_at_any_point_leaves_the_last_one_or_a_newer(memory):
    output, _ = (process := start(SAVER + AT_EVERY_POINT, memory)).communicate(timeout=300)
    assert process.returncode == 0
    _, *children = output.split("child ")
    left = set()
    for child in children:
        fatal, *reported = map(int, child.split())
        run = RunFolder(memory / f"{fatal}")
        left |= {Path(name).suffix for name in names(run)}
        newest, _ = run.newest_checkpoint()
        assert reported[-1] <= value_of(newest) <= reported[-1] + 1, fatal
        save(run, 9)  # and the next save puts everything in order
        assert value_of(run.newest_checkpoint()[0]) == 9 and run.newest_checkpoint()[1] == []
        assert len(names(run)) == 2 and all(verify(path) for path in run.checkpoints.iterdir())
    assert reported == [3, 4, 5] and len(children) > 50
    assert left == {"", ".tmp", ".old", ".removed"}  # each of these states was met


def test_sigkill_at_random_moments(memory):
    output, _ = (process := start(SAVER + AT_RANDOM, memory)).communicate(timeout=300)
    assert process.returncode == 0
    _, *rounds = [[int(value) for value in part.split()] for part in output.split("found ")]
    for (*_, last), (found, *_) in itertools.pairwise(rounds):
        assert found in (last, last + 1)
    assert len(rounds) == 51 and found > 50
    assert value_of(RunFolder(memory).newest_checkpoint()[0]) == found


# --- errors --------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@contextmanager
def unharmed(run):
    """Whatever goes wrong in the block: step 1 is whole afterwards, alone, and the next save succeeds."""
    save(run, 1)
    with pytest.raises(CheckpointError) as caught:
        yield caught
    message = str(caught.value)
    assert message.startswith(f"checkpoint {run.checkpoints}/step_2 could not be written: ") and "\n" not in message
    assert "bytes are free on its disk, the one before it has" in message
    assert value_of(run.newest_checkpoint()[0]) == 1 and run.newest_checkpoint()[1] == [] and names(run) == ["step_1"]
    save(run, 3)


def test_a_full_disk_is_said_and_harms_nothing(disk):
    run = RunFolder(disk / "run")
    too_large = {"driver": lambda folder: write_state(folder, {"x": np.zeros(100_000)})}
    with unharmed(run) as caught:
        run.save_checkpoint(2, parts(2) | too_large, {}, keep=1)
    before = verify(run.checkpoints / "step_1").num_bytes if (run.checkpoints / "step_1").exists() else 0
    assert "writing driver/ failed: No space left on device" in str(caught.value)
    assert f"the one before it has {before:,}" in str(caught.value)
    assert "free some space or raise the limit, then resume" in str(caught.value)


def test_a_disk_that_fills_up_in_the_manifest(disk):
    run = RunFolder(disk / "run")

    def fill(folder):
        with pytest.raises(OSError, match="No space"):
            (folder / "weights").write_bytes(bytes(1 << 20))

    with unharmed(run) as caught:
        run.save_checkpoint(2, {"model": fill}, {"config": "x" * 9000}, keep=1)
    assert "could not be written: No space left on device" in str(caught.value)


def test_an_array_that_does_not_fit_by_some_bytes_is_an_error(disk):
    """numpy's own writing to a file loses the last page of such an array in silence."""
    write_state(disk / "s", {})  # room for the plain values
    (disk / "rest").write_bytes(bytes(240 << 10))
    header, entry, free = 128, 8, shutil.disk_usage(disk).free
    with pytest.raises(OSError, match="No space"):
        write_state(disk / "s", {"x": np.zeros((free - header) // entry + 1)})


def test_a_disk_that_turned_read_only(disk):
    run = RunFolder(disk / "run")
    with unharmed(run) as caught:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            save(run, 2)
        finally:
            with pytest.raises(UserError, match="cannot be locked .Read-only file system.*make it writable"):
                with run.lock():
                    pass
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert "Read-only file system" in str(caught.value) and "make the folder writable" in str(caught.value)


def test_a_limit_on_the_size_of_files(run):
    script = """
import resource
from dpsrl.checkpoint import CheckpointError
run = RunFolder(Path(sys.argv[1]))
save(run, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
large = {"driver": lambda folder: write_state(folder, {"x": np.zeros(100_000)})}
try:
    run.save_checkpoint(2, large, {}, keep=1)
except CheckpointError as error:
    print(error)
save(run, 5)
"""
    output, _ = start(SAVER + script, run.path).communicate(timeout=60)
    first, message, last = output.splitlines()
    assert (first, last) == ("1", "5") and "writing driver/ failed: File too large" in message
    assert names(run) == ["step_3"] and value_of(run.newest_checkpoint()[0]) == 5


def test_a_part_that_fails_or_writes_nothing(run):
    def fail(folder):
        (folder / "half").write_text("half")
        raise ZeroDivisionError("a traceback\nof another process\nsafetensors: I/O error")

    with unharmed(run) as caught:
        run.save_checkpoint(2, parts(2) | {"driver": fail}, {}, keep=1)
    assert "writing driver/ failed: ZeroDivisionError: safetensors: I/O error; " in str(caught.value)
    with pytest.raises(CheckpointError, match="nothing was written into model/; if another node writes it"):
        run.save_checkpoint(4, {"model": lambda folder: (folder / "empty").mkdir()}, {}, keep=1)
    with pytest.raises(CheckpointError, match="written: not a plain file .*/model/x.; "):
        run.save_checkpoint(4, {"model": lambda folder: (folder / "x").symlink_to("/etc/passwd")}, {}, keep=1)
    assert 4 not in [int(name[5:]) for name in names(run)]


def test_the_first_one_fails(run):
    with pytest.raises(CheckpointError, match="disk, 0 had been written; earlier checkpoints are untouched: mend this"):
        run.save_checkpoint(1, {"model": lambda folder: 1 / 0}, {}, keep=1)
    assert names(run) == []


def test_an_interrupt_stays_one(run):
    def interrupt(folder):
        raise KeyboardInterrupt

    save(run, 1)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(1, {"model": interrupt}, {}, keep=1)
    assert names(run) == ["step_1"] and value_of(run.newest_checkpoint()[0]) == 1
