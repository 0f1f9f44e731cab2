"""A run folder as far as it can be read: a run that was killed, and files cut short or broken, still give a `Run`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpsrl.config import SelectionConfig
from dpsrl.metrics import Record, read_events, read_lines, summarize
from dpsrl.plots import number
from dpsrl.report.explorer import Kept, read_kept
from dpsrl.report.history import MAX_COUNT, Calibration, History, calibration, read_history
from dpsrl.report.spending import Spending, spending
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

MAX_NAMED = 8  # runs in a folder of them
LATER = {"eval_best", "eval_best_step"}  # earlier versions wrote no such keys


@dataclass(frozen=True)
class Run:
    """What a run folder holds; `notes` says what could not be read."""

    name: str
    dir: Path
    records: list[Record]
    events: list[Record]
    summary: dict[str, Any]
    config: str
    history: History
    kept: Kept
    notes: list[str]

    def setting(self, key: str) -> Any:
        """A value of config.yaml, None where there is none."""
        value: Any = self._settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @cached_property
    def _settings(self) -> Any:
        try:
            return OmegaConf.to_container(OmegaConf.create(self.config)) if self.config.strip() else {}
        except (OmegaConfBaseException, ValueError, RecursionError):
            return {}
        except Exception as error:  # the YAML library's own errors, whose module is not ours to know
            if type(error).__module__.startswith("yaml"):
                return {}
            raise

    @property
    def batch(self) -> int:
        """Prompts per step; where the configuration does not say, the most groups that any step had."""
        batch = self.setting("train.batch")
        if isinstance(batch, int) and batch > 0:
            return batch
        return max((int(number(record.get("selection/num_generated"), 1.0)) for record in self.records), default=1) or 1

    @property
    def num_prompts(self) -> int | None:
        """Of the data set, as the last count of states has it."""
        for record in reversed(self.records):
            counts = [number(v) for k, v in record.items() if k.startswith("selection/occupancy/")]
            known = [count for count in counts if count is not None]
            if len(known) == len(counts) == 4 and 0 < sum(known) <= MAX_COUNT:
                return int(sum(known))
        return None

    @cached_property
    def calibration(self) -> Calibration | None:
        return calibration(self.history)

    @cached_property
    def spending(self) -> Spending | None:
        known_before = self.setting("selection.prior_rates") or self.setting("selection.warm_start")
        share = number(self.setting("selection.audit_share"), SelectionConfig.audit_share)
        num_audited = max(1, round(min(share, 1.0) * self.batch))
        return spending(self.history, self.records, self.batch, not known_before, num_audited)


def load_run(run_dir: Path) -> Run:
    """UserError where there is no run folder."""
    if run_dir.is_file():
        raise UserError(f"{str(run_dir)!r} is a file: give its run folder, {str(run_dir.parent)!r}")
    if not run_dir.is_dir():
        raise UserError(f"run folder {str(run_dir)!r} does not exist: give one that dpsrl.train made")
    folder = RunFolder(run_dir)
    if not is_run(folder):
        if inside := [path for path in sorted(run_dir.iterdir()) if is_run(RunFolder(path))]:
            more = " ..." if len(inside) > MAX_NAMED else ""
            raise UserError(
                f"{str(run_dir)!r} is not a run folder, but holds {len(inside)}: give those, "
                f"{shlex.join(map(str, inside[:MAX_NAMED]))}{more}"
            )
        raise UserError(
            f"{str(run_dir)!r} is not a run folder: it has neither metrics.jsonl nor config.yaml; "
            "give one that dpsrl.train made"
        )
    records, num_unreadable = read_lines(folder.metrics) if folder.metrics.exists() else ([], 0)
    records = sound(records)
    history, kept = read_history(folder.groups), read_kept(folder.responses)
    notes = [
        f"This run has no {path.name}: {what} cannot be shown."
        for path, what in (
            (folder.metrics, "how it went, step by step,"), (folder.groups, "what selection did and its prompts")
        ) if not path.exists()
    ]  # fmt: skip
    for name, num in (
        ("metrics", num_unreadable), ("groups", history.num_unreadable), ("responses", kept.num_unreadable)
    ):  # fmt: skip
        if num:
            notes.append(f"Lines of {name}.jsonl that could not be read and are left out: {num:,}.")
    summary = read_summary(folder.summary)
    if summary is None:
        summary = summarize(records, policy_version=0, wall_s=time_so_far_s(records))
        last = f"after step {summary['steps']:,}" if records else "before its first step ended"
        notes.append(f"This run has no summary.json: it is under way, or stopped {last}.")
    events = read_events(folder.metrics) if folder.metrics.exists() else []
    text = folder.config.read_text(encoding="utf-8", errors="replace") if folder.config.exists() else ""
    return Run(run_dir.resolve().name, run_dir, records, events, summary, text, history, kept, notes)


def is_run(folder: RunFolder) -> bool:
    return folder.metrics.exists() or folder.config.exists()


def sound(records: Sequence[Record]) -> list[Record]:
    """The records without values that are no numbers, which only a broken file has."""
    return [{name: value for name, value in record.items() if number(value) is not None} for record in records]


def read_summary(path: Path) -> dict[str, Any] | None:
    """None where it is missing or not whole."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return summary if is_summary(summary) else None


def is_summary(summary: Any) -> bool:
    model = summarize([], 0, 0.0)
    if not isinstance(summary, dict) or not model.keys() - LATER <= summary.keys():
        return False
    for name in ("eval_first", "eval_last", "time_s"):
        values = summary[name]
        if not isinstance(values, Mapping) or any(number(value) is None for value in values.values()):
            return False
    measures = summary["eval_measure"]
    if not isinstance(measures, Mapping) or not summary["eval_first"].keys() <= measures.keys():
        return False
    counts = [summary[name] for name in ("steps", "num_rollouts", "wall_s", "policy_version")]
    share = summary["mixed_share"]
    return all(number(count) is not None for count in counts) and (share is None or number(share) is not None)


def time_so_far_s(records: Iterable[Record]) -> float:
    keys = ("time/start_s", "time/step_s")
    return sum(number(record.get(key), 0.0) for record in records for key in keys)
