"""The key table, the step's record and the files of a run folder."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from dpsrl import metrics
from dpsrl.metrics import (
    GroupLog,
    Metrics,
    key_of,
    read_events,
    read_lines,
    summarize,
    write_summary,
)
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.types import Group, Rollout, Score


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eval/countdown/avg@8", "eval/owner/name/pass@16", "train/loss", "step"])
def test_declared_keys_have_a_unit_and_a_meaning(name):
    assert key_of(name).unit and key_of(name).text


@pytest.mark.parametrize("name", ["train/los", "eval/countdown/avg", "eval/countdown/maj@8", "loss", ""])
def test_an_undeclared_key_is_refused(tmp_path, name):
    record = Metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(AssertionError, match="not in dpsrl.metrics.KEYS"):
        record.add({name: 1.0})


def test_every_key_reduces_in_a_known_way():
    assert {key.reduce for key in metrics.KEYS.values()} <= {"mean", "sum", "last"}


# --- records ------------------------------------------------------------------------------------------


def test_values_of_one_step_are_reduced_as_their_keys_say(tmp_path):
    record = Metrics(tmp_path / "metrics.jsonl")
    for solved, missing, rollouts in ((0.25, 1, 64), (0.5, 2, 128), (0.75, 0, 192)):
        record.add({"rollout/solve_rate": solved, "rollout/num_missing": missing, "rollout/num_rollouts": rollouts})
    expected = {
        "step": 1,
        "rollout/solve_rate": 0.5,
        "rollout/num_missing": 3,
        "rollout/num_rollouts": 192,
    }
    assert record.close_step(1) == expected
    assert record.close_step(2) == {"step": 2}, "nothing is carried into the next step"
    assert lines_of(tmp_path / "metrics.jsonl") == [expected, {"step": 2}]


def test_each_line_is_on_disk_when_the_step_closes_and_sinks_get_it(tmp_path):
    seen = []
    record = Metrics(tmp_path / "metrics.jsonl", sinks=[seen.append])
    record.add({"train/loss": 0.5})
    record.close_step(1)
    assert lines_of(tmp_path / "metrics.jsonl") == seen == [{"step": 1, "train/loss": 0.5}]


def test_values_that_are_not_finite_are_null_and_numpy_becomes_plain(tmp_path):
    record = Metrics(tmp_path / "metrics.jsonl")
    record.add({"train/loss": math.nan, "train/grad_norm": np.float32("inf"), "rollout/num_rollouts": np.int64(8)})
    record.add({"train/lr": np.float64(0.5)})
    record.close_step(1)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    assert json.loads(line) == {
        "step": 1, "train/loss": None, "train/grad_norm": None, "rollout/num_rollouts": 8, "train/lr": 0.5,
    }  # fmt: skip


def test_timers_add_up_in_the_unit_of_their_key(tmp_path, monkeypatch):
    now = iter([10.0, 12.5, 20.0, 21.0, 30.0, 30.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    record = Metrics(tmp_path / "metrics.jsonl")
    for name in ("time/train_s", "time/train_s", "time/select_ms"):
        with record.timer(name):
            pass
    assert record.close_step(1) == {"step": 1, "time/train_s": 3.5, "time/select_ms": 250.0}


def test_a_timer_lets_errors_through_and_leaves_no_value(tmp_path):
    record = Metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(KeyError):
        with record.timer("time/train_s"):
            raise KeyError("x")
    assert record.close_step(1) == {"step": 1}


def test_only_durations_can_be_timed(tmp_path):
    with pytest.raises(KeyError):
        with Metrics(tmp_path / "metrics.jsonl").timer("train/loss"):
            pass


def test_a_resumed_run_holds_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    for step in range(5):
        first.add({"train/loss": float(step)})
        first.close_step(step)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed while it wrote

    second = Metrics(path, last_step=2)
    for step in (3, 4):
        second.add({"train/loss": 10.0 * step})
        second.close_step(step)
    assert [(r["step"], r["train/loss"]) for r in lines_of(path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
        (4, 40),
    ]


def test_a_new_run_begins_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 0, "event": "restart", "text": "trainer-0 died"}\n')
    Metrics(path)
    assert [record["event"] for record in read_events(path)] == ["restart"]  # what happened has happened
    assert read_lines(path)[0] == []


# --- groups -------------------------------------------------------------------------------------------


def test_a_group_line_counts_scored_rollouts_only(tmp_path):
    log = GroupLog(tmp_path / "groups.jsonl")
    rollouts = [Rollout(np.array([5]), np.zeros(1), "stop", versions) for versions in ([(8, 1)], [(7, 1), (9, 2)])]
    scores = [Score(1.0, True), None, Score(0.0, False), Score(1.0, True)]
    group = Group(3, "9f2c", np.array([1, 2], np.int32), rollouts, scores)
    counts = OutcomeRule().counts(group.rewards_G)
    log.write(4, group, counts, admitted=True, audited=True, predicted=np.float64(0.625))
    log.write(4, group, counts, admitted=False, audited=False, predicted=None)
    common = {"step": 4, "prompt_id": "9f2c", "policy_version": 7, "num_solved": 2, "num_rollouts": 3}
    assert lines_of(tmp_path / "groups.jsonl") == [
        common | {"admitted": True, "audited": True, "predicted": 0.625},
        common | {"admitted": False, "audited": False, "predicted": None},
    ]


@pytest.mark.parametrize("line", [b"[" * 100_000, b"9" * 5000, b'{"step": ' + b"9" * 400 + b"}", b"\xff\0", b""])
def test_a_line_of_any_bytes_is_one_unreadable_line(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    assert read_lines(tmp_path / "x.jsonl") == ([{"step": 1}, {"step": 2}], 1)


# --- reading and summing up ---------------------------------------------------------------------------


def test_lines_that_cannot_be_read_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n{"step": "2"}\n{"step": 3, "train/loss": null}\n{"st\xc3')
    assert read_lines(path) == ([{"step": 1}, {"step": 3, "train/loss": None}], 3)


def groups(num_generated, num_unscored, mixed_share):
    counts = {"selection/num_generated": num_generated, "selection/num_unscored": num_unscored}
    return counts | {"selection/mixed_share": mixed_share}


def test_the_summary_of_a_run_worked_by_hand():
    records = [
        {"step": 0, "eval/countdown/avg@8": 0.25, "time/start_s": 20.0, "time/eval_s": 4.0},
        {"step": 1, "rollout/num_rollouts": 100, **groups(14, 4, 0.5), "time/select_ms": 250.0},
        {"step": 2, "rollout/num_rollouts": 400, **groups(30, 0, 0.9), "time/generate_s": 3.0},
        {"step": 3, "rollout/num_rollouts": 500, **groups(9, 9, None), "eval/countdown/pass@8": 0.9},
        {"step": 4, "eval/countdown/avg@8": 0.5, "eval/aime24/avg@4": 0.125, "time/eval_s": 6.0},
    ]
    assert summarize(records, policy_version=4, wall_s=60.0) == {
        "steps": 4,
        "num_rollouts": 500,
        "wall_s": 60.0,
        "eval_first": {"countdown": 0.25, "aime24": 0.125},
        "eval_last": {"countdown": 0.5},
        "eval_best": {"countdown": 0.5, "aime24": 0.125},
        "eval_best_step": {"countdown": 4, "aime24": 4},
        "eval_measure": {"countdown": "avg@8", "aime24": "avg@4"},
        "mixed_share": pytest.approx((10 * 0.5 + 30 * 0.9) / 40),
        "policy_version": 4,
        "time_s": {"start": 20.0, "eval": 10.0, "select": 0.25, "generate": 3.0},
    }


def test_the_summary_of_nothing():
    summary = summarize([], policy_version=0, wall_s=0.0)
    assert (summary["steps"], summary["num_rollouts"], summary["mixed_share"]) == (0, 0, None)


def test_a_summary_is_written_whole(tmp_path):
    write_summary(tmp_path / "summary.json", {"steps": 2, "eval_last": {"countdown": 0.5}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "steps": 2,
        "eval_last": {"countdown": 0.5},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


# --- going on after an end ------------------------------------------------------------------------------------


def test_events_are_lines_beside_the_steps_and_outlive_them(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(3):
        metrics.close_step(step)
    metrics.event("engine", "engine-0 died: replacing it")
    metrics.close()
    again = Metrics(tmp_path / "metrics.jsonl", last_step=1)
    again.restore({"step": 1})  # is there already
    again.close_step(2)
    again.close()
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")[0]] == [0, 1, 2]
    (event,) = read_events(tmp_path / "metrics.jsonl")
    assert event == {"step": 2, "event": "engine", "text": "engine-0 died: replacing it"}


def test_a_record_that_was_lost_between_checkpoint_and_line_is_written_again(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.close_step(0)
    metrics.add({"train/loss": 0.5})
    record = metrics.so_far(1)
    metrics.close_step(1)
    assert metrics.so_far(1) == record  # a checkpoint of a step that is closed has it too
    metrics.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')  # killed before that line
    seen = []
    again = Metrics(tmp_path / "metrics.jsonl", sinks=[seen.append], last_step=1)
    for _ in range(2):
        again.restore(record)
    assert seen == [record]
    assert read_lines(tmp_path / "metrics.jsonl")[0] == [{"step": 0}, {"step": 1, "train/loss": 0.5}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_lines_and_is_said_once(tmp_path):
    said = []
    metrics = Metrics(tmp_path / "metrics.jsonl", say=said.append)
    metrics._file._file = open("/dev/full", "ab", buffering=0)
    metrics.close_step(0)
    metrics.close_step(1)
    assert len(said) == 1 and "cannot be written (No space left on device)" in said[0]


def test_a_line_that_was_written_in_part_spoils_no_other(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", say=lambda _: None)
    metrics.close_step(0)
    whole = metrics._file._file

    class Filling:
        def __getattr__(self, name):
            return getattr(whole, name)

        def write(self, line):
            return whole.write(line[:5])

    metrics._file._file = Filling()
    metrics.close_step(1)
    metrics._file._file = whole  # there is space again
    metrics.close_step(2)
    records, num_unreadable = read_lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 2] and num_unreadable == 0
