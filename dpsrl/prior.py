"""What is known of the prompts before a run's first step: pass rates from a file, or an earlier run's beliefs.

Owns the reading and matching by prompt id. The controller takes in what is found (`anchor`, `warm_start`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.checkpoint import read_state
from dpsrl.config import Config, selector_of
from dpsrl.controller import part_of
from dpsrl.own import is_own
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

MAX_ROLLOUTS = 10**9  # of a line; more is a mistake, and sums must stay whole


@dataclass(frozen=True)
class PassRates:
    """Solved and scored rollouts of each row of the data set, (N,); num_scored 0 where nothing is known."""

    path: str
    num_solved_N: np.ndarray
    num_scored_N: np.ndarray
    num_foreign: int  # lines about prompts that are not in the data set

    def of_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, num_solved, num_rollouts) of the prompts that are known."""
        rows = np.flatnonzero(self.num_scored_N)
        return rows, self.num_solved_N[rows], self.num_scored_N[rows]

    def sentence(self) -> str:
        rows, num_solved, num_scored = self.of_rows()
        mixed = ((num_solved > 0) & (num_solved < num_scored)).mean()
        foreign = f"; {self.num_foreign:,} lines are about other prompts" if self.num_foreign else ""
        return (
            f"pass rates of {rows.size:,} of {self.num_scored_N.size:,} prompts are known from {self.path} "
            f"({num_solved.sum() / num_scored.sum():.1%} solved, {mixed:.1%} mixed groups){foreign}"
        )


@dataclass(frozen=True)
class Prior:
    rates: PassRates | None = None
    state: dict[str, Any] | None = None  # of an earlier run's controller


def read_prior(config: Config, prompt_ids: np.ndarray) -> Prior:
    """What `selection.prior_rates` and `selection.warm_start` name; UserError where it cannot be used."""
    selection = config.selection
    rates = read_pass_rates(Path(selection.prior_rates), prompt_ids) if selection.prior_rates else None
    if not selection.warm_start:
        return Prior(rates)
    state = read_controller_state(Path(selection.warm_start))
    if not is_own(selection.method):
        _try(state, config)
    return Prior(rates, state)


def _try(state: dict[str, Any], config: Config) -> None:
    """A selector of one prompt takes over all that is not about single prompts."""
    try:
        selector_of(config, num_prompts=1).adopt(part_of(state, "selector."), np.full(len(state["prompt_ids"]), -1))
    except UserError as error:
        raise UserError(f"selection.warm_start={config.selection.warm_start}: {error}") from None


def read_pass_rates(path: Path, prompt_ids: np.ndarray) -> PassRates:
    """Sums over the lines of each prompt; prompt_ids: uint64 (N,).

    Any JSON lines with prompt_id, num_solved and num_rollouts will do: `pass_rates.jsonl` of an evaluation,
    `groups.jsonl` of a run.
    """
    if not path.is_file():
        raise UserError(
            f"selection.prior_rates={path} is not a file: give pass_rates.jsonl of an evaluation "
            "(python -m dpsrl.evaluate model.path=... data.train=... eval.benchmarks=[train])"
        )
    order = np.argsort(prompt_ids)
    counts_N2 = np.zeros((len(prompt_ids), 2), dtype=np.int64)
    num_foreign = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            prompt_id, num_solved, num_rollouts = parse_line(path, number, line)
            row = _row_of(prompt_id, prompt_ids, order)
            if row is None:
                num_foreign += 1
            else:
                counts_N2[row] += (num_solved, num_rollouts)
    if not counts_N2[:, 1].any():
        raise UserError(
            f"selection.prior_rates={path} knows none of the {len(prompt_ids):,} prompts "
            f"({num_foreign:,} lines are about others): take the pass rates of this data set, with these prompts"
        )
    return PassRates(str(path), counts_N2[:, 0], counts_N2[:, 1], num_foreign)


def _row_of(prompt_id: str, prompt_ids: np.ndarray, order: np.ndarray) -> int | None:
    try:
        number = np.uint64(int(prompt_id, 16))
    except (ValueError, OverflowError):
        return None
    place = min(int(np.searchsorted(prompt_ids, number, sorter=order)), order.size - 1)
    row = int(order[place])
    return row if prompt_ids[row] == number else None


def parse_line(path: Path, number: int, line: str) -> tuple[str, int, int]:
    """(prompt_id, num_solved, num_rollouts) of one line."""
    try:
        record = json.loads(line)
        prompt_id, num_solved, num_rollouts = record["prompt_id"], record["num_solved"], record["num_rollouts"]
        good = isinstance(prompt_id, str) and all(type(n) is int for n in (num_solved, num_rollouts))
        good = good and 0 <= num_solved <= num_rollouts <= MAX_ROLLOUTS
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise UserError(
            f"selection.prior_rates={path}, line {number}: {line.strip()[:80]!r} is not an object with "
            f"prompt_id (text) and whole numbers 0 <= num_solved <= num_rollouts <= {MAX_ROLLOUTS:,}"
        )
    return prompt_id, num_solved, num_rollouts


def read_controller_state(folder: Path) -> dict[str, Any]:
    """The controller's state in a checkpoint, or in the latest checkpoint of a run folder."""
    checkpoints = RunFolder(folder).list_checkpoints()
    folder = checkpoints[-1] if checkpoints else folder
    if not (folder / "controller" / "plain.json").is_file():
        raise UserError(
            f"selection.warm_start={folder} holds no controller's state: "
            "give a checkpoint (RUN/checkpoints/step_N) or a run folder"
        )
    return read_state(folder / "controller")
