"""Selectors: belief x score x pick plus one random generator; the published methods are presets of the three.

Owns how often each prompt was selected and the generator. Knows nothing of rollouts, admission or
prompts in flight: the caller passes those as `exclude`. numpy only.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np

from dpsrl.selection.beliefs import BELIEFS, Belief
from dpsrl.selection.picks import PICKS, Pick
from dpsrl.selection.scores import SCORES, Score
from dpsrl.types import UserError

METHODS: dict[str, dict[str, str]] = {
    "dps": {"belief": "dirichlet_hmm", "score": "partial", "pick": "top_k"},
    "uniform": {"belief": "none", "score": "least_selected", "pick": "top_k"},
}
PIECES: dict[str, dict[str, type]] = {"belief": BELIEFS, "score": SCORES, "pick": PICKS}


class Selector:
    """Chooses prompts and learns from how they went. Build it with `build_selector`.

    N prompts are known by their row, 0 to N - 1. `select` may be called any number of times per
    step; `observe` is called once, and moves every belief one step on.
    """

    def __init__(self, belief: Belief, score: Score, pick: Pick, num_prompts: int, seed: int) -> None:
        self.belief = belief
        self.num_prompts = num_prompts
        self.num_selected_N = np.zeros(num_prompts, dtype=np.int64)
        self._score = score
        self._pick = pick
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def select(self, num_picks: int, exclude: Iterable[int] | None = None) -> np.ndarray:
        """int64 (num_picks,), distinct, best first, none of `exclude`. Counts them as selected."""
        score_N = self.score()
        if exclude is not None:
            excluded = self._rows(list(exclude), "exclude")
            score_N[excluded] = -np.inf
        num_available = self.num_prompts if exclude is None else int((score_N > -np.inf).sum())
        if not 1 <= num_picks <= num_available:
            raise UserError(
                f"cannot select {num_picks} prompts: {num_available} of {self.num_prompts} are available; "
                "ask for fewer, or bring more prompts."
            )
        ids = self._pick(score_N, num_picks, self._generator)
        self.num_selected_N[ids] += 1
        return ids

    def observe(self, ids: np.ndarray, num_solved: np.ndarray, num_rollouts: np.ndarray) -> None:
        """Learns from one step's groups and moves the clock on by one step.

        Integers (B,) each. `num_rollouts` counts the rollouts that have a reward and may differ
        between prompts; a prompt with 0 of them is no evidence. Rows outside the data, a row
        twice, or counts outside 0 <= num_solved <= num_rollouts are a ValueError.
        """
        ids_B = self._rows(ids, "ids")
        num_solved_B = integers(num_solved, "num_solved")
        num_rollouts_B = integers(num_rollouts, "num_rollouts")
        if not ids_B.shape == num_solved_B.shape == num_rollouts_B.shape:
            raise ValueError(
                "ids, num_solved and num_rollouts must be of one length; "
                f"they have {ids_B.size}, {num_solved_B.size} and {num_rollouts_B.size} entries."
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
        seen = num_rollouts_B > 0
        self.belief.observe(ids_B[seen], num_solved_B[seen], num_rollouts_B[seen])

    def predict(self) -> np.ndarray:
        """P(unsolved), P(partial), P(solved) at the next step; float64 (N, 3), rows sum to 1.

        A third each where the method keeps no belief, as `uniform`.
        """
        return self.belief.predict()

    def score(self) -> np.ndarray:
        """float64 (N,): what `select` ranks on, higher first."""
        return self._score(self.belief, self.num_selected_N)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything that changes over a run, as numpy arrays (copies); options are not state."""
        return {name: array.copy() for name, array in self._arrays().items()} | {
            "generator": generator_to_array(self._generator)
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Goes on where `state` was taken. Checks all of it before changing anything."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise UserError(
                f"the selector's state has keys {sorted(state)} where {sorted(own)} are needed; "
                "it was saved by another selection method or version."
            )
        for name, array in own.items():
            given = np.asarray(state[name])
            if given.shape != array.shape or given.dtype != array.dtype:
                raise UserError(
                    f"the selector's state '{name}' is {given.dtype} {given.shape}, but "
                    f"{array.dtype} {array.shape} is needed; it was saved with another data set."
                )
        for name, array in self._arrays().items():
            np.copyto(array, state[name])
        array_to_generator(state["generator"], self._generator)

    def _arrays(self) -> dict[str, np.ndarray]:
        belief = {f"belief.{name}": array for name, array in self.belief.arrays().items()}
        return {"num_selected": self.num_selected_N} | belief

    def _rows(self, values: Any, name: str) -> np.ndarray:
        rows = integers(values, name)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_prompts):
            bad = rows[(rows < 0) | (rows >= self.num_prompts)][0]
            raise ValueError(f"{name} holds {bad}; the rows of the prompts are 0 to {self.num_prompts - 1}.")
        return rows


def build_selector(
    method: str,
    *,
    num_prompts: int,
    num_rollouts: int,
    seed: int,
    belief: str | None = None,
    score: str | None = None,
    pick: str | None = None,
    **options: Any,
) -> Selector:
    """A selector of a published method, or of one with a piece exchanged.

    Example: `build_selector("dps", num_prompts=7500, num_rollouts=8, seed=0, decay=0.5)`.

    method: a key of METHODS; `belief`, `score` and `pick` replace its pieces, by name.
    num_rollouts: the usual size of a group, at least 2.
    options: what the chosen pieces take. Unknown ones, ones without effect and values out of
    range are a UserError, so building a selector for one prompt is a check of a configuration.
    """
    check_choice("method", method, METHODS)
    check_count("num_prompts", num_prompts, 1)
    check_count("num_rollouts", num_rollouts, 2)
    check_count("seed", seed, 0)
    replaced = {"belief": belief, "score": score, "pick": pick}
    chosen = METHODS[method] | {piece: name for piece, name in replaced.items() if name is not None}
    for piece, name in chosen.items():
        check_choice(piece, name, PIECES[piece])
    classes = {piece: PIECES[piece][name] for piece, name in chosen.items()}
    check_options(options, method, chosen)
    own = {piece: {k: options[k] for k in options_of(cls) & options.keys()} for piece, cls in classes.items()}
    return Selector(
        classes["belief"](num_prompts, **own["belief"]),
        classes["score"](**own["score"]),
        classes["pick"](**own["pick"]),
        num_prompts,
        seed,
    )


def options_of(cls: type) -> set[str]:
    """The names of a piece's options: its keyword-only arguments."""
    if cls.__init__ is object.__init__:
        return set()
    parameters = inspect.signature(cls).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def check_options(options: dict[str, Any], method: str, chosen: dict[str, str]) -> None:
    """Refuses options that no piece knows, and options that the chosen pieces do not read."""
    known = {name for classes in PIECES.values() for cls in classes.values() for name in options_of(cls)}
    used = {name for piece, choice in chosen.items() for name in options_of(PIECES[piece][choice])}
    for name in options:
        if name not in known:
            raise UserError(f"selection option {name!r} is unknown; {nearest(name, known | PIECES.keys())}.")
        if name not in used:
            pieces = ", ".join(f"{piece} '{choice}'" for piece, choice in chosen.items())
            raise UserError(f"selection option '{name}' has no effect with method '{method}' ({pieces}); remove it.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        raise UserError(f"selection {name} {value!r} is unknown; {nearest(str(value), choices)}.")


def check_count(name: str, value: object, lowest: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < lowest:
        raise UserError(f"selection {name} is {value!r}; it must be a whole number of at least {lowest}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'?", or what there is when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'" if close else f"use one of: {', '.join(names)}"


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
