"""Copies of the metrics: complete where all goes well, one sentence and no more where it does not."""

import json
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpsrl.sinks import Sink, check_sinks, open_sinks, wandb_id
from dpsrl.types import UserError

RECORDS = [
    {"step": 1, "train/loss": 0.5, "eval/countdown/avg@8": 0.25, "train/entropy": float("nan")},
    {"step": 2, "train/loss": np.float64(0.25), "rollout/num_rollouts": np.int64(512)},
]
# What `sink_process.py` speaks; {body} says what is done with each record.
PROCESS = """
import json, os, sys, time
sys.stdin.readline()
print("taken", flush=True)
for line in sys.stdin:
    record = json.loads(line)
    {body}
    print("taken", flush=True)
{end}
"""


@pytest.fixture
def sink(tmp_path):
    """A sink whose process does what `body` says, and the list of what it says."""

    def make(body, end="", **options):
        path = tmp_path / "process.py"
        path.write_text(PROCESS.format(body=body, end=end))
        said = []
        return Sink("wandb", {}, said.append, process=path, **options), said

    return make


def hand_over(sink, records=RECORDS):
    """Each is taken, or the copy has ended, before the next comes."""
    for record in records:
        sink(record)
        end = time.monotonic() + 20
        while sink._lines.unfinished_tasks and sink._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)


def test_every_record_arrives_with_null_for_what_is_not_finite(tmp_path, sink):
    copy, said = sink(f"open({str(tmp_path / 'copy')!r}, 'a').write(line)")
    for record in RECORDS:
        copy(record)
    copy.close()
    assert [json.loads(line) for line in (tmp_path / "copy").read_text().splitlines()] == [
        {"step": 1, "train/loss": 0.5, "eval/countdown/avg@8": 0.25, "train/entropy": None},
        {"step": 2, "train/loss": 0.25, "rollout/num_rollouts": 512},
    ]
    assert said == []


def test_an_error_is_told_once_with_its_reason_and_ends_the_copy(sink):
    copy, said = sink("print('error OSError: [Errno 28] No space left on device', flush=True); sys.exit(1)")
    hand_over(copy, RECORDS * 3)
    copy.close()
    assert said == [
        "warning: wandb stopped (OSError: [Errno 28] No space left on device): its copy is not complete, "
        "metrics.jsonl is"
    ]


@pytest.mark.parametrize("body, why", [("os._exit(7)", "code 7"), ("os.kill(os.getpid(), 9)", "code -9")])
def test_a_process_that_dies_costs_the_copy_alone(sink, body, why):
    copy, said = sink(body)
    hand_over(copy)
    copy.close()
    assert len(said) == 1 and why in said[0]


def test_an_error_at_the_end_is_told(sink):
    copy, said = sink("pass", end="print('error TimeoutError: upload', flush=True); sys.exit(1)")
    hand_over(copy)
    copy.close()
    assert len(said) == 1 and "upload" in said[0]


def test_one_that_hangs_delays_no_step_and_is_ended(sink):
    now = [0.0]
    copy, said = sink("time.sleep(600)", silent_s=120.0, clock=lambda: now[0])
    started = time.monotonic()
    copy(RECORDS[0])
    while copy._lines.qsize():  # until the process has the record
        time.sleep(0.01)
    now[0] = 119.0
    copy(RECORDS[1])
    assert said == [] and copy._process.poll() is None
    now[0] = 121.0
    for record in RECORDS:
        copy(record)
    copy.close()
    assert time.monotonic() - started < 20
    assert len(said) == 1 and "has taken nothing for 120 s" in said[0]
    assert copy._process.poll() is not None


def test_one_that_hangs_at_the_end_costs_its_deadline(sink):
    copy, said = sink("pass", end="time.sleep(600)", finish_s=1.0)
    hand_over(copy)
    started = time.monotonic()
    copy.close()
    assert 0.9 < time.monotonic() - started < 10
    assert len(said) == 1 and "did not finish within 1 s" in said[0]
    assert copy._process.poll() is not None


def test_what_is_not_installed_is_one_sentence():
    check_sinks([])
    check_sinks(["tensorboard", "wandb"])
    with pytest.raises(UserError, match=r"log.to=\[no_such_sink\] needs no_such_sink, which is not installed"):
        check_sinks(["tensorboard", "no_such_sink"])


def test_the_id_at_wandb_outlives_the_process(tmp_path):
    assert wandb_id(tmp_path) == wandb_id(tmp_path) != ""


# --- TensorBoard ------------------------------------------------------------------------------------------------


def write(folder, last_step, records, config=None):
    said = []
    (copy,) = open_sinks(["tensorboard", "tensorboard"], folder, "", config or {}, last_step, said.append)
    with copy:
        hand_over(copy, records)
    assert said == []


def curve(folder, tag):
    """As TensorBoard reads it."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)], events


def test_tensorboard_has_the_keys_as_tags_and_the_configuration_as_text(tmp_path):
    write(tmp_path, -1, RECORDS, {"train": {"batch": 64}})
    loss, events = curve(tmp_path, "train/loss")
    assert loss == [(1, 0.5), (2, 0.25)]
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/countdown/avg@8", "rollout/num_rollouts"}
    (text,) = events.Tensors("config/text_summary")
    assert '"batch": 64' in text.tensor_proto.string_val[0].decode()


def test_a_resumed_run_goes_on_in_the_same_curve_with_each_step_once(tmp_path):
    write(tmp_path, -1, [{"step": step, "train/loss": float(step)} for step in range(6)])
    write(tmp_path, 3, [{"step": step, "train/loss": 10.0 * step} for step in range(4, 8)])
    loss, _ = curve(tmp_path, "train/loss")
    assert loss == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]


def test_a_folder_that_cannot_be_written_is_said_and_costs_nothing_else(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    said = []
    (copy,) = open_sinks(["tensorboard"], tmp_path, "", {}, -1, said.append)
    with copy:
        hand_over(copy)
    assert len(said) == 1 and said[0].startswith("warning: tensorboard stopped (")
