"""What a study keeps of a run: one small JSON object, from its folder.

`curve` has a value for each evaluation: step, accuracy, and what training had cost by then, in rollouts, seconds and
generated tokens. Seconds are those of the steps, without start-up, evaluations and checkpoints. `whole_batches` are the
rollouts of a sampler that asks for whole batches alone: what each step generated, rounded up to batches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.metrics import EVAL_KEY, Record, read_lines
from dpsrl.report.history import History, calibration, read_history
from dpsrl.run_folder import RunFolder

NUM_BINS = 10
CURVE = ("step", "accuracy", "rollouts", "seconds", "tokens", "whole_batches")
KEPT = {  # what tables and figures are made of
    "setting", "method", "seed", "arguments", "commits", "configuration", "group_size", "num_cores", "steps",
    "num_rollouts", "curve", "mixed_share", "mixed_T", "response_tokens", "coverage", "coverage_chosen", "uses_max",
    "short_steps", "select_ms", "selected", "audit",
}  # fmt: skip
NOT_TRAINING = ("time/eval_s", "time/checkpoint_s")


def is_whole(record: Any) -> bool:
    """Whether a record has all its parts, and each evaluation that its run was to make."""
    try:
        steps, curve = record["steps"], record["curve"]
        given = dict(argument.partition("=")[::2] for argument in record["arguments"])
        every = int(given.get("eval.every", curve["step"][1])) or steps
        due = [*range(0, steps, every), steps]
        return (
            record.keys() >= KEPT and int(given.get("train.steps", steps)) == steps
            and curve["step"] == due and all(len(curve[name]) == len(due) for name in CURVE)
        )  # fmt: skip
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False


def record_of(run_dir: Path, batch_rollouts: int) -> dict[str, Any]:
    """Of a finished run whose last checkpoint is still there, where the judged predictions are.

    batch_rollouts: in a whole batch.
    """
    folder = RunFolder(run_dir)
    records, _ = read_lines(folder.metrics)
    summary = json.loads(folder.summary.read_text())
    last = records[-1]
    steps = [record for record in records if record["step"] > 0]
    history = read_history(folder.groups)
    *_, (_, num_tokens, _) = generated(records, batch_rollouts)
    return {
        "measure": next(iter(summary["eval_measure"].values())),
        "steps": summary["steps"],
        "num_rollouts": summary["num_rollouts"],
        "wall_s": round(summary["wall_s"], 1),
        "num_restarts": summary.get("num_restarts", 0),
        "curve": curve(records, batch_rollouts),
        "mixed_share": summary["mixed_share"],
        "mixed_T": [round(share, 4) for share in values(steps, "selection/mixed_share")],
        "response_tokens": num_tokens / summary["num_rollouts"],
        "coverage": last.get("selection/coverage"),
        "coverage_chosen": chosen_coverage(history, last),
        "mixed_prompts": mixed_prompts(history),
        "uses_max": last.get("selection/uses_max"),
        "short_steps": sum(record.get("selection/num_short", 0) > 0 for record in steps),
        "num_missing": sum(record.get("rollout/num_missing", 0) for record in steps),
        "seconds": {name: total(steps, f"time/{name}_s") for name in ("generate", "train", "sync", "eval")},
        "select_ms": mean(steps, "time/select_ms"),
        "selected": judged_selected(history),
        "audit": judged_audit(folder),
    }


def curve(records: list[Record], batch_rollouts: int) -> dict[str, list[float]]:
    """step, accuracy, and each cost until then, at each evaluation of the first benchmark."""
    key = next(name for record in records for name in record if is_average(name))
    points, seconds = [], 0.0
    for record, (rollouts, tokens, whole) in zip(records, generated(records, batch_rollouts), strict=True):
        if record["step"] > 0:
            seconds += record["time/step_s"] - sum(record.get(name, 0.0) for name in NOT_TRAINING)
        if key in record:
            points.append((record["step"], record[key], rollouts, round(seconds, 3), round(tokens), whole))
    return {name: list(values) for name, values in zip(CURVE, zip(*points))}


def is_average(name: str) -> bool:
    match = EVAL_KEY.fullmatch(name)
    return match is not None and match["measure"] == "avg"


def total(steps: list[Record], key: str) -> float:
    return round(sum(record.get(key, 0.0) for record in steps), 3)


def mean(steps: list[Record], key: str) -> float | None:
    found = values(steps, key)
    return round(sum(found) / len(found), 3) if found else None


def values(steps: list[Record], key: str) -> list[float]:
    """Of the steps that have a number there."""
    return [record[key] for record in steps if record.get(key) is not None]


def generated(records: list[Record], batch_rollouts: int) -> Iterator[tuple[float, float, int]]:
    """Rollouts, their tokens, and rollouts in whole batches, of all steps up to each record."""
    rollouts, tokens, num_batches = 0.0, 0.0, 0
    for record in records:
        before, rollouts = rollouts, record.get("rollout/num_rollouts", rollouts)
        tokens += (rollouts - before) * record.get("rollout/response_tokens", 0.0)
        num_batches += math.ceil((rollouts - before) / batch_rollouts)
        yield rollouts, tokens, num_batches * batch_rollouts


def chosen_coverage(history: History, last: Record) -> float | None:
    """Share of the prompts that the method itself chose at least once; None where that was not written down."""
    num_prompts = sum(value for name, value in last.items() if name.startswith("selection/occupancy/"))
    num_chosen = np.unique(history.prompt_G[~history.audited_G]).size
    return num_chosen / num_prompts if num_prompts else None


def mixed_prompts(history: History) -> int | None:
    """How many prompts had a mixed group that was trained on; None where groups were not written down."""
    taught = history.prompt_G[history.mixed_G & history.admitted_G]
    return np.unique(taught).size if len(history) else None


def judged_selected(history: History) -> dict[str, float] | None:
    """Brier score and calibration error over the groups that the method chose; None without predictions."""
    found = calibration(replace(history, predicted_G=np.where(history.audited_G, math.nan, history.predicted_G)))
    if found is None:
        return None
    return {"brier": found.brier, "base_brier": found.base_brier, "calibration_error": found.error}


def judged_audit(folder: RunFolder) -> dict[str, Any] | None:
    """Of the prompts that were drawn at random, `all` and those `seen`, which had been scored before: sums that can be
    added up over runs. None where none was drawn.

    `num_K`, `predicted_K`, `mixed_K`: groups, and sums of predictions and of mixed ones, in NUM_BINS equal ranges of
    the prediction. `alarms`: groups whose likeliest state was *partial*; `hits`: of those, mixed ones; `mixed`: all
    mixed ones. `squared_error`: summed over groups, for the Brier score.
    """
    newest = folder.list_checkpoints()[-1:]
    path = newest[0] / "controller/audit.judged.npy" if newest else None
    if path is None or not path.exists():
        return None
    judged_A4 = np.load(path)
    return {"all": sums_of(judged_A4), "seen": sums_of(judged_A4[judged_A4[:, 3] > 0])} if judged_A4.size else None


def sums_of(judged_A4: np.ndarray) -> dict[str, Any]:
    predicted_A, mixed_A, likeliest_A, _ = judged_A4.T
    bin_A = np.minimum((predicted_A * NUM_BINS).astype(int), NUM_BINS - 1)
    return {
        "num_K": np.bincount(bin_A, minlength=NUM_BINS).tolist(),
        "predicted_K": np.bincount(bin_A, predicted_A, NUM_BINS).round(4).tolist(),
        "mixed_K": np.bincount(bin_A, mixed_A, NUM_BINS).astype(int).tolist(),
        "hits": int((likeliest_A * mixed_A).sum()),
        "alarms": int(likeliest_A.sum()),
        "mixed": int(mixed_A.sum()),
        "squared_error": round(float(((predicted_A - mixed_A) ** 2).sum()), 4),
    }
