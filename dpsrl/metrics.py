"""What a run measures: the table of keys, the step's record, and the files it goes to.

Owns `metrics.jsonl`, `groups.jsonl` and `summary.json` of a run folder. A key that is not in the table is
refused, so that a name means one thing everywhere. Knows nothing of training, of the screen or of plots.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.files import write_text, written_beside
from dpsrl.types import Group

# --- the key table ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """`reduce` says how several values within one step become one: mean, sum or last."""

    unit: str
    text: str
    reduce: str = "mean"


KEYS: dict[str, Key] = {
    "step": Key("steps", "select-to-sync cycles finished; 0 is before training", "last"),
    "eval/<benchmark>/avg@<K>": Key("share", "mean accuracy over K samples of each held-out prompt", "last"),
    "eval/<benchmark>/pass@<K>": Key("share", "chance that at least one of K samples is right", "last"),
    "rollout/num_rollouts": Key("rollouts", "generated for training since the run began", "last"),
    "rollout/num_trained": Key("rollouts", "trained on since the run began", "last"),
    "rollout/solve_rate": Key("share", "right answers among the step's scored rollouts"),
    "rollout/reward": Key("reward", "mean over the step's scored rollouts"),
    "rollout/response_tokens": Key("tokens", "mean length of a response"),
    "rollout/truncated_share": Key("share", "responses cut at the token limit"),
    "rollout/continued_share": Key("share", "responses that went on after new weights had come"),
    "rollout/num_missing": Key("rollouts", "without a reward: its deadline passed or it crashed", "sum"),
    "selection/mixed_share": Key("share", "generated groups with both right and wrong answers"),
    "selection/predicted_share": Key("share", "mixed groups that the beliefs expected among those selected"),
    "selection/coverage": Key("share", "prompts rolled out at least once", "last"),
    "selection/brier": Key("squared share", "mean squared error of the predicted chance of a mixed group"),
    "selection/precision": Key("share", "mixed groups among those whose likeliest state was partial"),
    "selection/uses_mean": Key("selections", "per prompt that was selected at all", "last"),
    "selection/uses_max": Key("selections", "of the prompt selected most often", "last"),
    "selection/audit_brier": Key("squared share", "Brier score on the latest 512 prompts drawn at random", "last"),
    "selection/audit_calibration": Key("share", "mean |predicted - realised| of those, in 5 bins", "last"),
    "selection/audit_mixed_share": Key("share", "mixed groups of those: what a random choice would get", "last"),
    "selection/num_generated": Key("groups", "rolled out in the step", "sum"),
    "selection/num_trained": Key("groups", "trained on in the step", "sum"),
    "selection/num_carried": Key("groups", "admitted and waiting for the next step", "last"),
    "selection/num_unmixed": Key("groups", "dropped: all their rewards alike", "sum"),
    "selection/num_short": Key("groups", "missing from the batch when the cap on rollouts was reached", "sum"),
    "selection/num_lost": Key("prompts", "selected, but no group came back", "sum"),
    "selection/num_unscored": Key("prompts", "whose group has no reward at all", "sum"),
    "selection/occupancy/unseen": Key("prompts", "never scored", "last"),
    "selection/occupancy/unsolved": Key("prompts", "last seen with no right answer", "last"),
    "selection/occupancy/partial": Key("prompts", "last seen with right and wrong answers", "last"),
    "selection/occupancy/solved": Key("prompts", "last seen with right answers only", "last"),
    "train/loss": Key("nats", "policy loss, mean over the step's updates"),
    "train/mismatch_kl": Key("nats", "KL from the engine's to the trainer's token probabilities"),
    "train/mismatch_abs": Key("nats", "mean |trainer - engine| logprob of the batch's tokens"),
    "train/mismatch_ppl_ratio": Key("ratio", "the trainer's perplexity of a response over the engine's"),
    "train/correction_capped_share": Key("share", "tokens whose importance weight reached its maximum"),
    "train/correction_masked_share": Key("share", "tokens whose importance weight was out of bounds and set to 0"),
    "train/reference_kl": Key("nats", "KL from the policy to the model as it was before the first step, per token"),
    "train/policy_kl": Key("nats", "KL from the policy that the step began with to the updated one"),
    "train/clip_low_share": Key("share", "tokens whose ratio was clipped from below"),
    "train/clip_high_share": Key("share", "tokens whose ratio was clipped from above"),
    "train/dual_clip_share": Key("share", "tokens of negative advantage whose loss was bounded"),
    "train/entropy": Key("nats", "mean entropy of the policy over response tokens"),
    "train/grad_norm": Key("norm", "gradient norm before clipping"),
    "train/lr": Key("per update", "learning rate of the last update", "last"),
    "train/num_skipped": Key("updates", "left out, because their loss or gradient was not finite", "sum"),
    "train/padding_share": Key("share", "tokens of no rollout among those that go through the model"),
    "train/shared_share": Key("share", "tokens saved by running each prompt once for its group"),
    "sync/policy_version": Key("syncs", "weights that the engines serve after the step", "last"),
    "sync/gb_per_s": Key("GB/s", "weights sent, to all engines together", "last"),
    "sync/canary_diff": Key("nats", "mean |trainer - engine| logprob of one fixed sequence after the sync", "last"),
    "time/start_s": Key("s", "from the start of the run to its first evaluation or step", "sum"),
    "time/step_s": Key("s", "the whole step, evaluation and checkpoint included", "sum"),
    "time/select_ms": Key("ms", "choosing prompts, refilling and learning from outcomes", "sum"),
    "time/generate_s": Key("s", "waiting for the engines", "sum"),
    "time/score_s": Key("s", "waiting for rewards", "sum"),
    "time/train_s": Key("s", "the trainer at work", "sum"),
    "time/sync_s": Key("s", "sending weights and checking them", "sum"),
    "time/engine_idle_share": Key("share", "of select to sync, in which nothing is generated"),
    "time/trainer_idle_share": Key("share", "of select to sync, in which the trainer waits"),
    "time/eval_s": Key("s", "evaluation", "sum"),
    "time/checkpoint_s": Key("s", "writing checkpoints", "sum"),
}

# What a person calls the phases that time keys measure, in the order of a run.
PHASES = {
    "start": "starting up",
    "select": "selecting",
    "generate": "generating",
    "score": "scoring",
    "train": "training",
    "sync": "syncing weights",
    "eval": "evaluating",
    "checkpoint": "saving",
}

EVAL_KEY = re.compile(r"eval/(?P<benchmark>.+)/(?P<measure>avg|pass)@(?P<k>\d+)")


def key_of(name: str) -> Key:
    """The declared key. AssertionError where there is none."""
    match = EVAL_KEY.fullmatch(name)
    known = KEYS.get(f"eval/<benchmark>/{match['measure']}@<K>" if match else name)
    assert known is not None, f"metric {name!r} is not in dpsrl.metrics.KEYS: declare it there"
    return known


# --- the step's record --------------------------------------------------------------------------------

Record = dict[str, Any]  # "step" and metric keys; a value that is not finite is null in the files


class Measured:
    """What came in under each key, to become one value each."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            key_of(name)
            self._values.setdefault(name, []).append(value)

    def reduced(self) -> Record:
        return {name: reduce_values(key_of(name).reduce, values) for name, values in self._values.items()}


class Metrics:
    """One record per step, built by `add` and `timer`, written to metrics.jsonl and handed to each sink.

    last_step: as `Lines` has it.
    """

    def __init__(
        self, path: Path, sinks: Sequence[Callable[[Record], None]] = (), last_step: int = -1,
        say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self._file = Lines(path, last_step, say)
        self._sinks = sinks
        self.step = max(0, last_step)  # the last one finished
        self._measured = Measured()
        self._closed: Record = {}  # the last one written here

    def add(self, values: Mapping[str, float]) -> None:
        self._measured.add(values)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`, in the key's unit; an exception inside leaves no trace."""
        per_second = {"s": 1.0, "ms": 1000.0}[key_of(name).unit]
        start = time.perf_counter()
        yield
        self.add({name: (time.perf_counter() - start) * per_second})

    def close_step(self, step: int) -> Record:
        """Reduces what came in since the last call, writes it out and returns it."""
        self.step = step
        self._closed, self._measured = self.so_far(step), Measured()
        self._write(self._closed)
        return self._closed

    def _write(self, record: Record) -> None:
        record = plain_record(record)
        self._file.write(record)
        for sink in self._sinks:
            sink(record)

    def event(self, kind: str, text: str) -> None:
        """A line of its own for what happened beside the steps."""
        self._file.write({"step": self.step, "event": kind, "text": text})

    def so_far(self, step: int) -> Record:
        """The record that `close_step` would write now; of the step that it closed, what it wrote."""
        return self._closed if step == self._closed.get("step") else {"step": step} | self._measured.reduced()

    def restore(self, record: Record) -> None:
        """Writes a step's record where the run was killed between its checkpoint and its line."""
        if all(written["step"] != record["step"] for written in read_lines(self._file.path)[0]):
            self._write(record)

    def close(self) -> None:
        self._file.close()


def reduce_values(how: str, values: Sequence[float]) -> float:
    if how == "last":
        return values[-1]
    return sum(values) / (len(values) if how == "mean" else 1)


class GroupLog:
    """groups.jsonl: one line per scored group, admitted or not."""

    def __init__(self, path: Path, last_step: int = -1, say: Callable[[str], None] = print) -> None:
        self._file = Lines(path, last_step, say)

    def write(
        self, step: int, group: Group, counts: tuple[int, int], admitted: bool, audited: bool, predicted: float | None
    ) -> None:
        """counts: solved and scored, as selection reads the rewards; audited: drawn at random, not chosen; predicted:
        the chance of a mixed group that its selection went by, None where there was none.
        """
        line = {
            "step": step,
            "prompt_id": group.prompt_id,
            "policy_version": group.policy_version,
            "num_solved": counts[0],
            "num_rollouts": counts[1],
            "admitted": admitted,
            "audited": audited,
            "predicted": predicted,
        }
        self._file.write(line)

    def close(self) -> None:
        self._file.close()


# --- lines --------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value JSON can hold: numpy scalars become Python's, floats that are not finite become None."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_record(record: Mapping[str, Any]) -> Record:
    return {name: plain(value) for name, value in record.items()}


class Lines:
    """A JSON-lines file that is open for more.

    last_step: the step a resumed run goes on from, -1 for its beginning; lines of later steps are dropped, events
    apart, so that the file never holds a step twice. A line that cannot be written is left out, and the first one is
    said.
    """

    def __init__(self, path: Path, last_step: int, say: Callable[[str], None]) -> None:
        self.path, self._say = path, say
        self._num_lost = 0
        with written_beside(path) as partial, partial.open("w", encoding="utf-8") as kept:
            for record in each_line(path) if path.exists() else ():
                if record is not None and (0 <= record["step"] <= last_step or "event" in record):
                    kept.write(json.dumps(record) + "\n")
        self._file = path.open("ab", buffering=0)  # a killed run keeps every line it wrote

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(plain_record(record), allow_nan=False)
        try:
            whole, start = f"{line}\n".encode(), self._file.seek(0, os.SEEK_END)
            if self._file.write(whole) != len(whole):
                self._file.truncate(start)  # part of a line would spoil the next one too
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._num_lost += 1
            if self._num_lost == 1:
                self._say(f"warning: {self.path} cannot be written ({error.strerror}): its lines are lost from here on")

    def close(self) -> None:
        self._file.close()


MAX_STEP = 2**53  # what a float can count to


def read_lines(path: Path) -> tuple[list[Record], int]:
    """The records of a JSON-lines file, and how many lines could not be read (a killed run cuts its last)."""
    records, num_unreadable = _read_all(path)
    return [record for record in records if "event" not in record], num_unreadable


def read_events(path: Path) -> list[Record]:
    """What happened beside the steps: lines with `step`, `event` and `text`."""
    return [record for record in _read_all(path)[0] if "event" in record]


def _read_all(path: Path) -> tuple[list[Record], int]:
    records = list(each_line(path))
    good = [record for record in records if record is not None]
    return good, len(records) - len(good)


def each_line(path: Path) -> Iterator[Record | None]:
    """The objects with a whole `step` in a JSON-lines file, one after the other; None for a line that is none."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):  # no JSON, numbers of thousands of digits, or nested without end
                record = None
            step = record.get("step") if isinstance(record, dict) else None
            yield record if isinstance(step, int) and abs(step) <= MAX_STEP else None


# --- the whole run ------------------------------------------------------------------------------------


def summarize(records: Sequence[Record], policy_version: int, wall_s: float) -> dict[str, Any]:
    """summary.json of a run from its records.

    `eval_first`, `eval_last` and `eval_best`: benchmark -> accuracy, `eval_last` of those evaluated more than once;
    `eval_best_step` has the best one's step, `eval_measure` says which measure, as avg@8. `mixed_share` weighs steps by
    their scored groups. `time_s`: seconds by phase; phases that run at once may exceed `wall_s`.
    """
    evals: dict[str, list[tuple[str, float]]] = {}
    best: dict[str, tuple[float, int]] = {}  # the first of equal ones
    time_s: dict[str, float] = {}
    for record in records:
        for name, value in record.items():
            match = EVAL_KEY.fullmatch(name)
            if match and match["measure"] == "avg" and value is not None:
                evals.setdefault(match["benchmark"], []).append((f"avg@{match['k']}", value))
                if match["benchmark"] not in best or value > best[match["benchmark"]][0]:
                    best[match["benchmark"]] = value, record["step"]
        for phase, seconds in phase_seconds(record).items():
            time_s[phase] = time_s.get(phase, 0.0) + seconds
    return {
        "steps": max((record["step"] for record in records), default=0),
        "num_rollouts": int(max((record.get("rollout/num_rollouts") or 0 for record in records), default=0)),
        "wall_s": wall_s,
        "eval_first": {benchmark: values[0][1] for benchmark, values in evals.items()},
        "eval_last": {benchmark: values[-1][1] for benchmark, values in evals.items() if len(values) > 1},
        "eval_best": {benchmark: value for benchmark, (value, _) in best.items()},
        "eval_best_step": {benchmark: step for benchmark, (_, step) in best.items()},
        "eval_measure": {benchmark: values[-1][0] for benchmark, values in evals.items()},
        "mixed_share": mixed_share(records),
        "policy_version": policy_version,
        "time_s": time_s,
    }


def phase_seconds(record: Record) -> dict[str, float]:
    """Phase -> seconds, of those in PHASES that the step's record has."""
    seconds = {}
    for phase in PHASES:
        for name, per_second in ((f"time/{phase}_s", 1.0), (f"time/{phase}_ms", 1000.0)):
            if record.get(name) is not None:
                seconds[phase] = record[name] / per_second
    return seconds


def mixed_share(records: Sequence[Record]) -> float | None:
    """Mixed groups among all that were generated and scored; None before the first."""
    scored = [record for record in records if record.get("selection/mixed_share") is not None]
    shares = [record["selection/mixed_share"] for record in scored]
    weights = [(r.get("selection/num_generated") or 0) - (r.get("selection/num_unscored") or 0) for r in scored]
    return float(np.average(shares, weights=weights)) if sum(weights) > 0 else None


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
