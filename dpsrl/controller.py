"""Which prompts are rolled out next, which groups are trained on, and what is learned from them.

Owns the selector, the admission rule, the prompts in flight, the prompts carried over, and the outcomes of the step
under way. A plain class: knows nothing of processes, tokens, rewards or the trainer.

One step: `select`, then `admit` and `refill` as groups come back, `observe` once at the end, and `trained` names the
groups of the update. What is in flight at `observe` and never came back is lost, unless it goes on in the next step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpsrl.audit import Audit
from dpsrl.selection import Selector, build_selector
from dpsrl.selection.admission import build_admission
from dpsrl.selection.hmm import PARTIAL, SOLVED, UNSOLVED, observed_state
from dpsrl.types import UserError

UNSEEN = -1
YIELD_MEMORY = 0.9  # share of the past steps' counts that the expected yield of a group keeps


class Outcome(NamedTuple):
    """How one group went: `Outcome(7, 3, 8)`: prompt 7, 3 right among 8 rollouts that have a reward.

    policy_version: weight syncs before it was sampled; None: the policy of the step under way.
    """

    index: int  # type: ignore[assignment]  # in place of tuple's method of that name
    num_solved: int
    num_scored: int
    policy_version: int | None = None


class Flight(NamedTuple):
    """What was thought of a prompt when it was selected."""

    partial: float  # P(partial)
    likeliest_partial: bool
    audited: bool  # drawn at random, not chosen
    seen: bool  # scored in a step before


class Controller:
    """Selection with its book-keeping for N prompts.

    prompt_ids: one stable, distinct id per row, as uint64 (N,) or texts; batch: groups per update.
    selector_config: {"method": "dps", **options} as `build_selector` takes them.
    admission: a name in ADMISSIONS. With `mixed`, prompts are refilled until `batch` groups are admitted, but at most
    `max_rounds * batch` prompts are rolled out in a step; mixed groups beyond `batch` are carried over to the next.
    num_spare: groups decoded beyond a batch, so that a step need not wait for its last ones.
    num_audit: prompts per step drawn at random from all, so that predictions can be judged on prompts that were
    not chosen for them; they are trained on like the others.
    """

    def __init__(
        self,
        prompt_ids: Sequence[str] | np.ndarray,
        batch: int,
        selector_config: dict[str, Any],
        num_rollouts: int,
        seed: int,
        admission: str = "all",
        max_rounds: int = 4,
        num_audit: int = 0,
        num_spare: int = 0,
    ) -> None:
        ids_N = prompt_ids if isinstance(prompt_ids, np.ndarray) else id_hashes(prompt_ids)
        if num_repeated := ids_N.size - np.unique(ids_N).size:
            raise ValueError(f"prompt ids must be distinct; {num_repeated} are repeated.")
        if not 1 <= batch <= len(prompt_ids):
            raise UserError(
                f"train.batch is {batch}, but the data set has {len(prompt_ids)} prompts; "
                f"set train.batch from 1 to {len(prompt_ids)}, or bring more prompts."
            )
        self.batch, self.num_spare = batch, num_spare
        self.selector: Selector = build_selector(
            **selector_config, num_prompts=len(prompt_ids), num_rollouts=num_rollouts, seed=seed
        )
        self.policy_version = 0
        self.max_prompts = max_rounds * batch
        self._admits = build_admission(admission)
        self._refills = admission != "all"
        self._ids_N = ids_N
        self._audit = Audit(num_audit, seed)
        self._last_state_N = np.full(len(prompt_ids), UNSEEN, dtype=np.int8)
        self._in_flight: dict[int, Flight] = {}
        self._order: list[int] = []  # prompts of the step under way, as they were selected
        # Of them, from the first on: how many outcomes have gone into `refill`, and how many of these were admitted.
        self._num_settled = self._num_settled_admitted = 0
        self._came_back: dict[int, tuple[Outcome, Flight]] = {}  # of the step under way
        self._admitted: dict[int, None] = {}  # of the step under way, in the order of coming back
        self._carried: list[int] = []  # admitted in earlier steps, not yet trained on
        self._trained: list[int] = []
        # Groups admitted and groups come back, discounted step by step; their ratio is what a prompt is expected to
        # yield. It begins at 1, so that a first step asks for no more than it needs.
        self._yield = np.array([batch / 2, batch / 2])

    # --- a step -------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> list[tuple[int, float]]:
        """(index, P(partial) when selected) of every prompt without an outcome, in order of selection.

        After a restart from a state saved in mid-step these are to be rolled out again.
        """
        return [(index, self._told(flight.partial)) for index, flight in self._in_flight.items()]

    def select(self, num_prompts: int | None = None) -> list[tuple[int, float]]:
        """(index, P(partial)) of prompts to roll out, in flight from here on; with admission `all` as many as make a
        batch and the spare ones, with those in flight and carried over. NaN where the method predicts nothing.

        Never a prompt in flight, carried over, or come back in this step. UserError when too few are left, except that
        a refilling admission takes what there is.
        """
        if num_prompts is None and self._refills:
            return self._ask_for_more()
        if num_prompts is None:
            num_prompts = self.batch + self.num_spare - len(self._in_flight) - len(self._carried)
            num_prompts = max(0, min(num_prompts, self.selector.num_prompts - len(self._busy())))
        if num_prompts == 0:
            return []
        audited = self._audit.draw(self.selector.num_prompts, self._busy(), num_prompts) if not self._came_back else []
        self.selector.mark_selected(audited)
        chosen: Collection[int] = audited
        if num_prompts > len(audited):
            picked = self.selector.select(num_prompts - len(audited), exclude=[*self._busy(), *audited])
            chosen = np.concatenate([picked, np.asarray(audited, dtype=np.int64)])
        return self._take_off(chosen, len(audited))

    def refill(self) -> list[tuple[int, float]]:
        """(index, P(partial)) of prompts still to be rolled out in this step; none when enough are on their way.

        Enough is when the groups admitted and carried over, and what those in flight are expected to yield, make a
        batch; or when `max_rounds` batches were rolled out, or no prompt is left. Outcomes are taken into account in
        the order of selection, not in that of coming back, so that a run can be repeated to the bit.
        """
        selected = []
        while self._refills and self._num_settled < len(self._order):
            index = self._order[self._num_settled]
            if index not in self._came_back:
                break
            self._num_settled += 1
            self._num_settled_admitted += index in self._admitted
            selected += self._ask_for_more()
        return selected

    def _ask_for_more(self) -> list[tuple[int, float]]:
        """What is missing by the outcomes that are settled."""
        admitted, back = self._yield + (self._num_settled_admitted, self._num_settled)
        expected_yield = max(admitted / back, 1 / self.max_prompts)
        wanted = self.batch + self.num_spare - len(self._carried) - self._num_settled_admitted
        missing = wanted - expected_yield * (len(self._order) - self._num_settled)
        room = min(self.max_prompts - len(self._order), self.selector.num_prompts - len(self._busy()))
        num_prompts = min(math.ceil(missing / expected_yield - 1e-9), room)
        return self.select(num_prompts) if num_prompts > 0 else []

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
            if outcome.policy_version is not None and not 0 <= outcome.policy_version <= self.policy_version:
                raise ValueError(f"{outcome}: the policy is at version {self.policy_version}.")
            seen.add(outcome.index)
        admitted = [self._admits(outcome.num_solved, outcome.num_scored) for outcome in outcomes]
        for outcome, is_admitted in zip(outcomes, admitted, strict=True):
            self._came_back[outcome.index] = (outcome, self._in_flight.pop(outcome.index))
            if is_admitted:
                self._admitted[outcome.index] = None
        return admitted

    def came_back(self, outcomes: Sequence[Outcome]) -> tuple[list[bool], list[bool], list[tuple[int, float]]]:
        """Of each group, whether to train on it and whether its prompt was drawn for the audit; and the prompts to roll
        out in place of those that are not trained on.
        """
        admitted = self.admit(outcomes)
        return admitted, self.audited([outcome.index for outcome in outcomes]), self.refill()

    def audited(self, ids: Sequence[int]) -> list[bool]:
        """Of prompts that came back in this step, whether each was drawn at random for the audit."""
        return [self._came_back[index][1].audited for index in ids]

    def observe(self, ahead: bool = False, begun: Sequence[int] = ()) -> dict[str, float]:
        """Ends the step: the selector learns from all its outcomes at once. Returns the step's metrics.

        A prompt still in flight is lost and released without evidence; with `ahead`, it belongs to a later step and
        stays in flight. begun: admitted prompts whose groups the trainer has begun on, which are in this step's batch
        before others. Shares and the Brier score are over the groups with at least one reward, and left out when
        there is none. A method that predicts nothing has the Brier score of a third each, and no audited one.
        """
        # By index, so that the order in which groups came back cannot change the last bit of anything.
        came_back = [self._came_back[index] for index in sorted(self._came_back)]
        counts_B3 = np.array([outcome[:3] for outcome, _ in came_back], dtype=np.int64).reshape(-1, 3)
        lag_B = np.array([self._lag(outcome) for outcome, _ in came_back], dtype=np.int64)
        flights = [flight for _, flight in came_back]
        num_lost = 0 if ahead else len(self._in_flight)

        self.selector.observe(counts_B3[:, 0], counts_B3[:, 1], counts_B3[:, 2], lag=lag_B)
        self.policy_version += 1
        scored_B = counts_B3[:, 2] > 0
        ids_B, num_solved_B, num_scored_B = counts_B3[scored_B].T
        state_B = observed_state(num_solved_B, num_scored_B)
        self._last_state_N[ids_B] = state_B
        metrics = self._close_batch(counts_B3, begun)
        metrics["selection/num_lost"] = float(num_lost)
        if not ahead:
            self._in_flight.clear()
        self._came_back.clear()
        self._begin_step()

        mixed_B = state_B == PARTIAL
        partial_B, likeliest_B, audited_B, seen_B = np.array(flights, dtype=np.float64).reshape(-1, 4)[scored_B].T
        if ids_B.size:
            metrics["selection/mixed_share"] = float(mixed_B.mean())
            metrics["selection/brier"] = float(((partial_B - mixed_B) ** 2).mean())
        if likeliest_B.any():
            metrics["selection/precision"] = float(mixed_B[likeliest_B > 0].mean())
        audited = audited_B > 0
        self._audit.record(partial_B[audited], mixed_B[audited], likeliest_B[audited], seen_B[audited])
        uses = self.selector.uses()
        if uses.any():
            metrics |= {"selection/uses_mean": float(uses[uses > 0].mean()), "selection/uses_max": float(uses.max())}
        return metrics | self._audit.metrics(self.selector.predicts)

    def trained(self) -> list[int]:
        """The prompts whose groups are trained on in the step that `observe` ended: carried over first, then new."""
        return self._trained

    def _close_batch(self, counts_B3: np.ndarray, begun: Sequence[int]) -> dict[str, float]:
        """Splits what is admitted into this step's batch and what is carried over; counts where every group went."""
        first = set(begun)
        ready = [*begun, *(i for i in self._carried + sorted(self._admitted) if i not in first)]
        self._trained, self._carried = ready[: self.batch], ready[self.batch :]
        num_scored, num_admitted = int((counts_B3[:, 2] > 0).sum()), len(self._admitted)
        self._yield = YIELD_MEMORY * (self._yield + (num_admitted, len(counts_B3)))
        self._admitted = {}
        return {
            "selection/coverage": self.selector.coverage,
            "selection/num_generated": float(len(counts_B3)),
            "selection/num_trained": float(len(self._trained)),
            "selection/num_carried": float(len(self._carried)),
            "selection/num_unmixed": float(num_scored - num_admitted),
            "selection/num_unscored": float(len(counts_B3) - num_scored),
        }

    def _begin_step(self) -> None:
        self._order = list(self._in_flight)
        self._num_settled = self._num_settled_admitted = 0

    def _busy(self) -> list[int]:
        return [*self._in_flight, *self._came_back, *self._carried]

    def _lag(self, outcome: Outcome) -> int:
        return 0 if outcome.policy_version is None else self.policy_version - outcome.policy_version

    def _take_off(self, ids: Collection[int], num_audited: int) -> list[tuple[int, float]]:
        """Puts the prompts in flight, the last `num_audited` of them as audited."""
        states_BS = self.selector.predict(ids)
        selected = []
        for place, (index, states_S) in enumerate(zip(np.asarray(ids).tolist(), states_BS.tolist(), strict=True)):
            partial = states_S[PARTIAL]
            likeliest = partial > max(states_S[UNSOLVED], states_S[SOLVED])
            audited, seen = place >= len(ids) - num_audited, bool(self._last_state_N[index] != UNSEEN)
            self._in_flight[index] = Flight(partial, likeliest, audited, seen)
            selected.append((index, self._told(partial)))
        self._order += [index for index, _ in selected]
        return selected

    def _told(self, partial: float) -> float:
        return partial if self.selector.predicts else math.nan

    # --- what is known ------------------------------------------------------------------------------------

    def occupancy(self) -> dict[str, int]:
        """How many of the N prompts were last seen in each solving state; the four counts add up to N."""
        counts = np.bincount(self._last_state_N + 1, minlength=4)
        names = {"unseen": UNSEEN, "unsolved": UNSOLVED, "partial": PARTIAL, "solved": SOLVED}
        return {name: int(counts[state + 1]) for name, state in names.items()}

    def anchor(self, ids: Sequence[int], num_solved: Sequence[int], num_rollouts: Sequence[int]) -> None:
        """Learns from groups that were sampled before the run, as one step of the clock in front of the first."""
        self.selector.observe(np.asarray(ids), np.asarray(num_solved), np.asarray(num_rollouts))

    def warm_start(self, state: dict[str, Any]) -> int:
        """Takes over the beliefs of an earlier run about the prompts that this one has too; returns how many.

        Prompts are matched by id, so the data set may have changed. Use counts begin anew.
        """
        hashes = self._ids_N
        order = np.argsort(hashes)
        theirs = state["prompt_ids"]
        place = np.searchsorted(hashes, theirs, sorter=order).clip(max=hashes.size - 1)
        row_of_theirs = np.where(hashes[order[place]] == theirs, order[place], -1)
        return self.selector.adopt(part_of(state, "selector."), row_of_theirs)

    # --- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Flat: numpy arrays only.

        Outcomes not yet observed count as in flight: those prompts are to be rolled out again. Of groups carried over
        it has the prompts; the groups themselves are their owner's to keep.
        """
        under_way = self._in_flight | {index: flight for index, (_, flight) in self._came_back.items()}
        in_flight = {index: under_way[index] for index in self._order}
        own = {
            "prompt_ids": self._ids_N,
            "policy_version": np.array(self.policy_version),
            "last_state": self._last_state_N.copy(),
            "in_flight_index": np.array(list(in_flight), dtype=np.int64),
            "in_flight_thought": np.array(list(in_flight.values()), dtype=np.float64).reshape(-1, 4),
            "carried_index": np.array(self._carried, dtype=np.int64),
            "yield": self._yield.copy(),
        }
        own |= {f"audit.{name}": array for name, array in self._audit.state_dict().items()}
        return own | {f"selector.{name}": array for name, array in self.selector.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. UserError for other prompts, or missing or unknown keys."""
        needed = self.state_dict().keys()
        if state.keys() != needed:
            raise UserError(
                f"the controller's state has keys {sorted(state)} where {sorted(needed)} are needed; "
                "it was saved with another selection method or version."
            )
        hashes = self._ids_N
        if not np.array_equal(state["prompt_ids"], hashes):
            shared = np.intersect1d(state["prompt_ids"], hashes).size
            raise UserError(
                f"the controller's state belongs to other prompts ({len(state['prompt_ids'])}, of which {shared} are "
                f"among these {len(hashes)}); resume with the data set of the saved run."
            )
        self.selector.load_state_dict(part_of(state, "selector."))
        self._audit.load_state_dict(part_of(state, "audit."))
        self.policy_version = int(state["policy_version"])
        thought_F4 = state["in_flight_thought"].tolist()
        self._last_state_N[:] = state["last_state"]
        thoughts = [Flight(partial, *map(bool, others)) for partial, *others in thought_F4]
        self._in_flight = dict(zip(state["in_flight_index"].tolist(), thoughts, strict=True))
        self._yield = np.array(state["yield"])
        self._came_back, self._admitted, self._carried = {}, {}, state["carried_index"].tolist()
        self._begin_step()


def part_of(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def id_hashes(prompt_ids: Sequence[str]) -> np.ndarray:
    """uint64 (N,): 8 bytes that stand for each text."""
    return np.array(
        [int.from_bytes(hashlib.blake2b(i.encode(), digest_size=8).digest(), "little") for i in prompt_ids],
        dtype=np.uint64,
    )
