"""The selector: belief x score x pick plus one random generator.

Owns the clock, the generator, which prompts were touched, and how often each was selected. Knows nothing of
rollouts, admission or prompts in flight: the caller passes those as `exclude`. numpy only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from dpsrl.selection.beliefs import Belief
from dpsrl.selection.entries import FRESH, Entries
from dpsrl.selection.options import check_count, check_share
from dpsrl.selection.picks import Choices, Pick
from dpsrl.selection.scores import Score
from dpsrl.types import UserError

MAX_TIMES_SELECTED = np.iinfo(np.uint16).max


class Selector:
    """Chooses prompts and learns from how they went. Build it with `methods.build_selector`.

    N prompts are known by their row, 0 to N - 1. `select` may be called any number of times per step; `observe` is
    called once, and moves the clock, and with it every belief, one step on.

    quota: share of every batch, in [0, 1], that is kept for prompts never selected, as long as there are any.
    rest: steps for which a prompt is not selected again, as long as enough others are left; 0 knows no rest. A policy
        that meets the same prompts step after step learns them by heart.
    """

    def __init__(
        self,
        belief: Belief,
        score: Score,
        pick: Pick,
        num_prompts: int,
        seed: int,
        *,
        quota: float = 0.0,
        rest: int = 0,
    ) -> None:
        self.belief = belief
        self.num_prompts = num_prompts
        self.quota = check_share("quota", quota)
        check_count("rest", rest, 0)
        self.rest = rest
        self.clock = 0
        self._score = score
        self._pick = pick
        self._entries = Entries(num_prompts)
        self._num_selected_E = np.zeros(num_prompts + 1, dtype=np.uint16)
        self._last_selected_E = np.zeros(num_prompts + 1, dtype=np.int32)
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._table_NS: Any = None  # what `predict` gave last
        self._table_references, self._table_fresh_S = 0, np.empty(0)

    @property
    def predicts(self) -> bool:
        """Whether the method predicts anything; else `predict` says a third each."""
        return self.belief.predicts

    @property
    def num_selected_N(self) -> np.ndarray:
        """How often each prompt was selected, int64 (N,)."""
        return self._num_selected_E[self._entries.entry_N].astype(np.int64)

    @property
    def coverage(self) -> float:
        """Share of the prompts selected at least once."""
        return float(np.count_nonzero(self._num_selected_E[1 : self._entries.num])) / self.num_prompts

    def uses(self) -> np.ndarray:
        """How often each prompt that was ever touched was selected, (E - 1,)."""
        return self._num_selected_E[1 : self._entries.num]

    def select(self, num_picks: int, exclude: Iterable[int] | None = None) -> np.ndarray:
        """int64 (num_picks,), distinct, best first, none of `exclude`. Counts them as selected."""
        check_count("num_picks", num_picks, 1)
        excluded = np.empty(0, dtype=np.int64) if exclude is None else np.unique(self._rows(list(exclude), "exclude"))
        num_available = self.num_prompts - excluded.size
        if num_picks > num_available:
            raise UserError(
                f"cannot select {num_picks} prompts: {num_available} of {self.num_prompts} are available; "
                "ask for fewer, or bring more prompts."
            )
        blocked = self._touch(excluded)
        if self.rest:
            resting = np.setdiff1d(self._resting(), blocked)
            if num_available - resting.size >= num_picks:
                blocked = np.concatenate([blocked, resting])
        num_reserved = min(round(self.quota * num_picks), self._entries.num_fresh)
        num_fresh = self._entries.num_fresh - num_reserved
        entries = np.full(num_reserved, FRESH)
        if num_picks > num_reserved:
            num_selected_E = self._num_selected_E[: self._entries.num]
            choices = Choices(self._score, self.belief, num_selected_E, blocked, num_fresh)
            entries = np.concatenate([self._pick(choices, num_picks - num_reserved, self._generator), entries])
        return self._take(entries)

    def _resting(self) -> np.ndarray:
        """Entries selected less than `rest` steps ago."""
        used = slice(0, self._entries.num)
        recent_E = self.clock - self._last_selected_E[used] <= self.rest
        return np.flatnonzero(recent_E & (self._num_selected_E[used] > 0))

    def mark_selected(self, ids: Iterable[int]) -> None:
        """Counts rows that the caller chose by himself as selected now, as `select` counts its own."""
        entries = self._touch(self._rows(ids, "ids"))
        times_B = self._num_selected_E[entries]
        self._num_selected_E[entries] = np.minimum(times_B, MAX_TIMES_SELECTED - 1) + 1
        self._last_selected_E[entries] = self.clock

    def _take(self, entries: np.ndarray) -> np.ndarray:
        """The rows of the picks, a fresh prompt drawn for every 0 among them."""
        ids = self._entries.row_E[entries].astype(np.int64)
        fresh = entries == FRESH
        ids[fresh] = self._entries.draw_fresh(int(fresh.sum()), self._generator)
        self.mark_selected(ids)
        return ids

    def observe(self, ids: np.ndarray, num_solved: np.ndarray, num_rollouts: np.ndarray, lag: Any = 0) -> None:
        """Learns from one step's groups and moves the clock on by one step.

        Integers (B,) each. `num_rollouts` counts the rollouts that have a reward and may differ between prompts; a
        prompt with 0 of them is no evidence. lag: how many steps before this one each group was sampled, one number
        or (B,): evidence enters the belief at the policy version that made it. Rows outside the data, a row twice,
        or counts outside 0 <= num_solved <= num_rollouts are a ValueError.
        """
        ids_B = self._rows(ids, "ids")
        num_solved_B = integers(num_solved, "num_solved")
        num_rollouts_B = integers(num_rollouts, "num_rollouts")
        lag_B = integers(np.full(ids_B.shape, lag) if np.ndim(lag) == 0 else lag, "lag")
        if not ids_B.shape == num_solved_B.shape == num_rollouts_B.shape == lag_B.shape:
            raise ValueError(
                "ids, num_solved, num_rollouts and lag must be of one length; "
                f"they have {ids_B.size}, {num_solved_B.size}, {num_rollouts_B.size} and {lag_B.size} entries."
            )
        if np.unique(ids_B).size != ids_B.size:
            raise ValueError("a prompt is observed twice in one step; join its rollouts into one group first.")
        bad = np.flatnonzero((num_solved_B < 0) | (num_solved_B > num_rollouts_B))
        if bad.size:
            row = bad[0]
            raise ValueError(
                f"prompt {ids_B[row]} has {num_solved_B[row]} solved of {num_rollouts_B[row]} rollouts; "
                "it must be 0 <= num_solved <= num_rollouts."
            )
        if (lag_B < 0).any() or (lag_B > self.clock).any():
            raise ValueError(
                f"lag holds {lag_B.min()} to {lag_B.max()}; it must be from 0 to the {self.clock} steps past."
            )
        seen = num_rollouts_B > 0
        entries_B = self._touch(ids_B)[seen]
        self.belief.observe(entries_B, num_solved_B[seen], num_rollouts_B[seen], (self.clock - lag_B)[seen])
        self.clock += 1
        self.belief.advance(self.clock)

    def predict(self, ids: Iterable[int] | None = None) -> np.ndarray:
        """P(unsolved), P(partial), P(solved) of a group at the next step; float (N, 3), rows sum to 1, read-only.

        A third each where the method keeps no belief, as `uniform`. The table is kept, so that asking again costs
        what was touched since and not N; one that somebody still holds is left as it was. ids: those rows alone.
        """
        now_ES = self.belief.predict()
        if ids is not None:
            return now_ES[self._entries.entry_N[self._rows(ids, "ids")]]
        held = self._table_NS is None or sys.getrefcount(self._table_NS) > self._table_references
        if held or not np.array_equal(self._table_fresh_S, now_ES[0]):
            self._table_NS = self._per_prompt(now_ES)
            self._table_references = sys.getrefcount(self._table_NS)
            self._table_fresh_S = now_ES[0].copy()
        else:
            self._table_NS[self._entries.row_E[1 : self._entries.num]] = now_ES[1:]
        table_NS = self._table_NS.view()
        table_NS.flags.writeable = False
        return table_NS

    def predict_partial(self, ids: np.ndarray) -> np.ndarray:
        """P(partial) of the rows given, (B,): what `predict` says of them, without a table of all prompts."""
        return self.belief.predict()[self._entries.entry_N[self._rows(ids, "ids")], 1]

    def score(self) -> np.ndarray:
        """float (N,): what `select` ranks on, higher first (a pick that draws at random adds to it)."""
        return self._per_prompt(self._score(self.belief, self._num_selected_E[: self._entries.num]))

    def _per_prompt(self, value_E: np.ndarray) -> np.ndarray:
        """A copy with one row per prompt, out of one per entry."""
        return np.take(value_E, self._entries.entry_N, axis=0)

    def _touch(self, rows_B: np.ndarray) -> np.ndarray:
        before = self._entries.num
        entries_B = self._entries.touch(rows_B)
        if self._entries.num > before:
            self._num_selected_E[before : self._entries.num] = 0
            self.belief.grow(self._entries.num)
        return entries_B

    def adopt(self, state: dict[str, np.ndarray], row_of_theirs: np.ndarray) -> int:
        """Takes over another selector's beliefs: its row r is row `row_of_theirs[r]` here, or is unknown here if -1.

        Use counts and the generator stay this selector's own. Returns how many prompts were taken over.
        """
        own = self.state_dict()
        rows = row_of_theirs[np.asarray(state["row"])]
        rows[0] = 0
        kept = np.flatnonzero(rows >= 0)
        per_entry = self._entry_arrays()
        if hasattr(self.belief, "fit_in") and state.keys() == own.keys():
            theirs = {name.removeprefix("belief."): array for name, array in state.items()}
            state = state | {f"belief.{name}": array for name, array in self.belief.fit_in(theirs).items()}
        taken = {name: array[..., kept] if name in per_entry else array for name, array in state.items()}
        for name in taken.keys() & own.keys():  # few prompts are kept in float64, many in float32
            if taken[name].dtype.kind == own[name].dtype.kind == "f":
                taken[name] = taken[name].astype(own[name].dtype)
        taken |= {"row": rows[kept].astype(np.int32), "num_prompts": own["num_prompts"], "generator": own["generator"]}
        taken |= {name: np.zeros_like(taken[name]) for name in ("num_selected", "last_selected")}
        self.load_state_dict(taken)
        return kept.size - 1

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything that changes over a run, as numpy arrays (copies); options are not state."""
        used = self._entries.num
        shared = {name: array.copy() for name, array in self._shared_arrays().items()}
        return shared | {name: array[..., :used].copy() for name, array in self._entry_arrays().items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Goes on where `state` was taken. Checks all of it before changing anything."""
        per_entry = self._entry_arrays()
        own = self._shared_arrays() | per_entry
        if state.keys() != own.keys():
            raise UserError(
                f"the selector's state has keys {sorted(state)} where {sorted(own)} are needed; "
                "it was saved by another selection method or version."
            )
        used = np.asarray(state["row"]).size
        for name, array in own.items():
            given = np.asarray(state[name])
            shape = (*array.shape[:-1], used) if name in per_entry else array.shape
            if given.shape != shape or given.dtype != array.dtype or (name == "num_prompts" and given != array):
                raise UserError(
                    f"the selector's state '{name}' is {describe(given)}, but {array.dtype} {shape} "
                    f"of {self.num_prompts} prompts is needed; it was saved with another data set."
                )
        row_E = np.asarray(state["row"])
        if not 1 <= used <= self.num_prompts + 1 or not 0 <= row_E.min() <= row_E.max() < self.num_prompts:
            raise UserError(f"the selector's state 'row' does not fit {self.num_prompts} prompts; the file is damaged.")
        if not are_distinct(row_E[1:], self.num_prompts):
            raise UserError("the selector's state 'row' holds a row twice; the file is damaged.")
        self.belief.grow(used)
        for name, array in per_entry.items():
            array[..., :used] = state[name]
        for name, array in self.belief.shared_arrays().items():
            np.copyto(array, state[f"belief.{name}"])
        self._entries.load(row_E)
        self._table_NS = None
        self.clock = int(state["clock"])
        self.belief.resume(self.clock)
        array_to_generator(state["generator"], self._generator)

    def _shared_arrays(self) -> dict[str, np.ndarray]:
        """What is kept once, by its name in the state."""
        own: dict[str, np.ndarray] = {
            "num_prompts": np.array(self.num_prompts),
            "clock": np.array(self.clock),
            "generator": generator_to_array(self._generator),
        }
        return own | {f"belief.{name}": array for name, array in self.belief.shared_arrays().items()}

    def _entry_arrays(self) -> dict[str, np.ndarray]:
        """What is kept per entry, at full length, by its name in the state."""
        own: dict[str, np.ndarray] = {
            "row": self._entries.row_E,
            "num_selected": self._num_selected_E,
            "last_selected": self._last_selected_E,
        }
        return own | {f"belief.{name}": array for name, array in self.belief.entry_arrays().items()}

    def _rows(self, values: Any, name: str) -> np.ndarray:
        rows = integers(values, name)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_prompts):
            bad = rows[(rows < 0) | (rows >= self.num_prompts)][0]
            raise ValueError(f"{name} holds {bad}; the rows of the prompts are 0 to {self.num_prompts - 1}.")
        return rows


def are_distinct(rows: np.ndarray, num_prompts: int) -> bool:
    """Sorts few rows, marks many: whichever is quicker."""
    if rows.size < num_prompts / 64:
        return np.unique(rows).size == rows.size
    return np.count_nonzero(np.bincount(rows, minlength=num_prompts)) == rows.size


def describe(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}" if array.ndim else f"{array.dtype} {array}"


def integers(values: Any, name: str) -> np.ndarray:
    """int64 (B,), or a ValueError: a float here is a rate where a count is due."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a flat list of whole numbers, not {array.dtype} of shape {array.shape}.")
    return array.astype(np.int64)


def generator_to_array(generator: np.random.Generator) -> np.ndarray:
    """The state of a PCG64 generator, uint64 (6,): any file format holds that, few hold 128-bit integers."""
    state = generator.bit_generator.state
    words = [part for key in ("state", "inc") for part in divmod(state["state"][key], 1 << 64)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], dtype=np.uint64)


def array_to_generator(words: np.ndarray, generator: np.random.Generator) -> None:
    """Puts the state that `generator_to_array` gave back into `generator`."""
    state_high, state_low, inc_high, inc_low, has_uint32, uinteger = (int(word) for word in words)
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": (state_high << 64) | state_low, "inc": (inc_high << 64) | inc_low},
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }
