"""One process for many runs: what it answers, where it writes, how it ends. Runs that are refused start nothing."""

import signal

import pytest

from dpsrl.lane import Lane

pytestmark = pytest.mark.process


def test_runs_that_are_refused_are_told_of_and_the_next_one_is_made(tmp_path):
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    lane = Lane(logs[0])
    refused = [["+recipe=quickstart", "train.stepss=2"], ["+recipe=nothing"], ["+recipe=quickstart", "dry_run=true"]]
    assert [lane.run(arguments, log) for arguments, log in zip(refused, logs, strict=True)] == [2, 2, 0]
    for log, word in zip(logs, ("train.stepss", "recipe=nothing", "a step selects"), strict=True):
        assert log.read_text().count(word) == 1, log.read_text()
    assert lane.close() == 0


def test_one_that_was_killed_says_so(tmp_path):
    lane = Lane(tmp_path / "log")
    lane.process.kill()
    assert lane.run(["+recipe=quickstart"], tmp_path / "log") == -signal.SIGKILL
