"""Which prompts are rolled out next, which groups are trained on, and what is learned from them.

Owns the selector, the admission rule, the prompts in flight and the outcomes of the step under
way. A plain class: knows nothing of processes, tokens, rewards or the trainer.

One step: `select` (again for a refill), `admit` as groups come back, `observe` once at the end.
The next step's `select` comes after this step's `observe`, so what is in flight at `observe` and
never came back is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpsrl.selection import Selector, build_selector
from dpsrl.selection.admission import build_admission
from dpsrl.selection.hmm import PARTIAL, SOLVED, UNSOLVED, observed_state
from dpsrl.types import UserError

UNSEEN = -1


class Outcome(NamedTuple):
    """How one group went: `Outcome(7, 3, 8)`: prompt 7, 3 right among 8 rollouts that have a reward."""

    index: int
    num_solved: int
    num_scored: int


class Controller:
    """Selection with its book-keeping for N prompts.

    prompt_ids: one stable, distinct id per row; batch: prompts per `select`.
    selector_config: {"method": "dps", **options} as `build_selector` takes them.
    admission: a name in ADMISSIONS.
    """

    def __init__(
        self,
        prompt_ids: Sequence[str],
        batch: int,
        selector_config: dict[str, Any],
        num_rollouts: int,
        seed: int,
        admission: str = "all",
    ) -> None:
        if len(set(prompt_ids)) != len(prompt_ids):
            raise ValueError(f"prompt ids must be distinct; {len(prompt_ids) - len(set(prompt_ids))} are repeated.")
        if not 1 <= batch <= len(prompt_ids):
            raise UserError(
                f"train.batch is {batch}, but the data set has {len(prompt_ids)} prompts; "
                f"set train.batch from 1 to {len(prompt_ids)}, or bring more prompts."
            )
        self.batch = batch
        self.selector: Selector = build_selector(
            **selector_config, num_prompts=len(prompt_ids), num_rollouts=num_rollouts, seed=seed
        )
        self._admits = build_admission(admission)
        self._prompt_ids_sha256 = hashlib.sha256("\n".join(prompt_ids).encode()).hexdigest()
        self._last_state_N = np.full(len(prompt_ids), UNSEEN, dtype=np.int8)
        self._in_flight: dict[int, float] = {}  # index -> P(partial) when it was selected
        self._came_back: dict[int, tuple[Outcome, float]] = {}  # of the step under way, with the same prediction

    @property
    def in_flight(self) -> list[tuple[int, float]]:
        """(index, P(partial) when selected) of every prompt without an outcome, in order of selection.

        After a restart from a state saved in mid-step these are to be rolled out again.
        """
        return list(self._in_flight.items())

    def select(self, num_prompts: int | None = None) -> list[tuple[int, float]]:
        """(index, P(partial)) of `num_prompts` prompts, `batch` unless told; they are in flight from here on.

        Never a prompt in flight, nor one that came back in this step. UserError when too few are left.
        """
        busy = [*self._in_flight, *self._came_back]
        partial_N = self.selector.predict()[:, PARTIAL]
        ids = self.selector.select(self.batch if num_prompts is None else num_prompts, exclude=busy)
        selected = [(int(index), float(partial_N[index])) for index in ids]
        self._in_flight.update(selected)
        return selected

    def admit(self, outcomes: Sequence[Outcome]) -> list[bool]:
        """For each group, whether to train on it. Keeps the outcomes for `observe`; learns nothing yet.

        ValueError, with nothing recorded, when a prompt is not in flight or a count is impossible.
        """
        seen: set[int] = set()
        for outcome in outcomes:
            if outcome.index not in self._in_flight or outcome.index in seen:
                raise ValueError(
                    f"prompt {outcome.index} came back but is not in flight; select it first, admit it once."
                )
            if not 0 <= outcome.num_solved <= outcome.num_scored:
                raise ValueError(f"{outcome}: it must be 0 <= num_solved <= num_scored.")
            seen.add(outcome.index)
        for outcome in outcomes:
            self._came_back[outcome.index] = (outcome, self._in_flight.pop(outcome.index))
        return [self._admits(outcome.num_solved, outcome.num_scored) for outcome in outcomes]

    def observe(self) -> dict[str, float]:
        """Ends the step: the selector learns from all its outcomes at once. Returns the step's metrics.

        A prompt still in flight is lost: it is released without evidence. Shares and the Brier
        score are over the groups with at least one reward, and left out when there is none.
        """
        # By index, so that the order in which groups came back cannot change the last bit of anything.
        came_back = [self._came_back[index] for index in sorted(self._came_back)]
        counts_B3 = np.array([outcome for outcome, _ in came_back], dtype=np.int64).reshape(-1, 3)
        predicted_B = np.array([predicted for _, predicted in came_back])
        num_lost = len(self._in_flight)

        self.selector.observe(*counts_B3.T)
        scored_B = counts_B3[:, 2] > 0
        ids_B, num_solved_B, num_scored_B = counts_B3[scored_B].T
        state_B = observed_state(num_solved_B, num_scored_B)
        self._last_state_N[ids_B] = state_B
        self._in_flight.clear()
        self._came_back.clear()

        metrics = {
            "selection/coverage": float((self.selector.num_selected_N > 0).mean()),
            "selection/num_lost": float(num_lost),
            "selection/num_unscored": float((~scored_B).sum()),
        }
        if ids_B.size:
            mixed_B = state_B == PARTIAL
            metrics["selection/mixed_share"] = float(mixed_B.mean())
            metrics["selection/brier"] = float(((predicted_B[scored_B] - mixed_B) ** 2).mean())
        return metrics

    def occupancy(self) -> dict[str, int]:
        """How many of the N prompts were last seen in each solving state; the four counts add up to N."""
        counts = np.bincount(self._last_state_N + 1, minlength=4)
        names = {"unseen": UNSEEN, "unsolved": UNSOLVED, "partial": PARTIAL, "solved": SOLVED}
        return {name: int(counts[state + 1]) for name, state in names.items()}

    def state_dict(self) -> dict[str, Any]:
        """Flat: numpy arrays and one string.

        Outcomes not yet observed count as in flight: those prompts are to be rolled out again.
        """
        in_flight = self._in_flight | {index: predicted for index, (_, predicted) in self._came_back.items()}
        own = {
            "prompt_ids_sha256": self._prompt_ids_sha256,
            "last_state": self._last_state_N.copy(),
            "in_flight_index": np.array(list(in_flight), dtype=np.int64),
            "in_flight_predicted": np.array(list(in_flight.values()), dtype=np.float64),
        }
        return own | {f"selector.{name}": array for name, array in self.selector.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. UserError for other prompts, or missing or unknown keys."""
        needed = self.state_dict().keys()
        if state.keys() != needed:
            raise UserError(
                f"the controller's state has keys {sorted(state)} where {sorted(needed)} are needed; "
                "it was saved with another selection method or version."
            )
        saved_sha256 = str(state["prompt_ids_sha256"])
        if saved_sha256 != self._prompt_ids_sha256:
            raise UserError(
                f"the controller's state belongs to other prompts (hash {saved_sha256[:12]}..., "
                f"not {self._prompt_ids_sha256[:12]}...); resume with the data set of the saved run."
            )
        selector_state = {key.removeprefix("selector."): state[key] for key in needed if key.startswith("selector.")}
        self.selector.load_state_dict(selector_state)
        self._last_state_N[:] = state["last_state"]
        self._in_flight = dict(
            zip(state["in_flight_index"].tolist(), state["in_flight_predicted"].tolist(), strict=True)
        )
        self._came_back = {}
