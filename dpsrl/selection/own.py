"""A selection method of a user's own: a class of arrays over all prompts, wrapped so that selectors can drive it.

    class MyMethod:
        def __init__(self, num_prompts, num_rollouts):            # and options with defaults
        def observe(self, ids, num_solved, num_rollouts):         # once a step; int arrays (B,), B may be 0
        def score(self):                                          # float (N,), the highest are picked
        def predict(self):                                        # float (N, 3): P(unsolved), P(partial), P(solved)

One of `score` and `predict` will do: without `score` it is P(partial), without `predict` nothing is predicted. All
that changes is to be in the object's attributes, as arrays, numbers or a numpy generator: they are its state.
numpy only. A step costs what there are prompts, not what was touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpsrl.own import check_call, load_own, told
from dpsrl.selection.hmm import NUM_STATES
from dpsrl.selection.selectors import Selector, array_to_generator, generator_to_array
from dpsrl.types import UserError

INIT = "def __init__(self, num_prompts, num_rollouts), and options with defaults"
OBSERVE = "def observe(self, ids, num_solved, num_rollouts)"


class OwnBelief:
    """Stands between a selector and the user's object, whose arrays have a place for every prompt.

    Entry e of the selector is prompt e - 1; entry 0 is nobody's, since `OwnSelector` touches all prompts at once.
    """

    # of the subclass that `own_belief` makes
    path: str = ""
    cls: type[Any] = object
    methods: Sequence[str] = ()

    def __init__(self, max_entries: int, num_rollouts: int, **options: Any) -> None:
        self.num_prompts, self.num_rollouts = max_entries - 1, num_rollouts
        self._object = self._told("__init__", lambda: self.cls(self.num_prompts, num_rollouts, **options))
        self._kinds = {name: kind_of(value) for name, value in self.arrays().items()}

    @property
    def predicts(self) -> bool:
        return "predict" in self.methods

    def grow(self, num_entries: int) -> None:
        pass

    def observe(
        self, entries_B: np.ndarray, num_solved_B: np.ndarray, num_rollouts_B: np.ndarray, made_B: np.ndarray
    ) -> None:
        groups = (entries_B.astype(np.int64) - 1, num_solved_B, num_rollouts_B)
        self._told("observe", lambda: self._object.observe(*groups))

    def advance(self, clock: int) -> None:
        pass

    def predict(self) -> np.ndarray:
        """A third of each where the method predicts nothing."""
        if not self.predicts:
            return np.broadcast_to(1 / NUM_STATES, (self.num_prompts + 1, NUM_STATES))
        states_NS = self._floats("predict", (self.num_prompts, NUM_STATES))
        if states_NS.min() < 0 or np.abs(states_NS.sum(axis=1) - 1).max() > 1e-6:
            raise UserError(f"{self._label('predict')} returned rows that are no probabilities, which add up to 1.")
        return np.concatenate([np.full((1, NUM_STATES), 1 / NUM_STATES), states_NS])

    def own_score(self) -> np.ndarray:
        return np.concatenate([np.zeros(1), self._floats("score", (self.num_prompts,))])

    def _floats(self, method: str, shape: tuple[int, ...]) -> np.ndarray:
        value = self._told(method, getattr(self._object, method))
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            array = np.empty(0)
        if array.shape != shape or not np.isfinite(array).all():
            what = f"an array {np.shape(value)}" if isinstance(value, np.ndarray) else type(value).__name__
            if array.shape == shape:
                what += f" that holds {'NaN' if np.isnan(array).any() else 'inf'}"
            raise UserError(f"{self._label(method)} returned {what}; it must be {shape} finite numbers.")
        return array

    def _told(self, method: str, call: Any) -> Any:
        try:
            return call()
        except (Exception, SystemExit) as error:  # whatever a person's method does
            raise UserError(f"{self._label(method)} failed with {told(error)}; mend it.") from error

    def _label(self, method: str) -> str:
        return f"selection method {self.path}: {method}"

    # --- state ----------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """A copy of every attribute of the object. UserError for one that no array can hold."""
        attributes = self._told("__init__", lambda: vars(self._object))
        return {name: self._array(name, value) for name, value in attributes.items()}

    def _array(self, name: str, value: Any) -> np.ndarray:
        if isinstance(value, np.random.Generator) and isinstance(value.bit_generator, np.random.PCG64):
            return generator_to_array(value)
        array = np.array(value) if isinstance(value, np.ndarray | np.generic | bool | int | float) else None
        if array is None or array.dtype.kind not in "biuf":
            raise UserError(
                f"selection method {self.path}: a checkpoint cannot hold its attribute {name}, {type(value).__name__}; "
                "use numpy arrays, numbers or numpy.random.default_rng(seed)."
            )
        return array

    def shared_arrays(self) -> dict[str, np.ndarray]:
        """Copies, which `resume` puts back. UserError where one is of another kind than at the start."""
        self._copies = self.arrays()
        for name in sorted(self._kinds.keys() | self._copies):
            before, now = self._kinds.get(name), self._copies.get(name)
            if now is None or before != kind_of(now):
                raise UserError(
                    f"selection method {self.path}: attribute {name} was {before or 'not there'} after __init__ and "
                    f"is {'gone' if now is None else kind_of(now)} now, so no checkpoint could be taken up; set it in "
                    "__init__, with the type and shape that it keeps."
                )
        return self._copies

    def entry_arrays(self) -> dict[str, np.ndarray]:
        return {}

    def resume(self, clock: int) -> None:
        for name, array in self._copies.items():
            now = getattr(self._object, name)
            if isinstance(now, np.random.Generator):
                array_to_generator(array, now)
            else:
                setattr(self._object, name, array if isinstance(now, np.ndarray) else type(now)(array.item()))


class OwnScore:
    """What the object's `score` says."""

    needs = ("own_score",)

    def __call__(self, belief: OwnBelief, num_selected_E: np.ndarray) -> np.ndarray:
        return belief.own_score()


class OwnSelector(Selector):
    """Every prompt has an entry from the start, in the order of rows."""

    def __init__(self, *pieces: Any, **options: Any) -> None:
        super().__init__(*pieces, **options)
        self._touch(np.arange(self.num_prompts))

    def adopt(self, state: dict[str, np.ndarray], row_of_theirs: np.ndarray) -> int:
        """As a selector's, row by row in each array whose first axis is the prompts; others are taken whole."""
        mine, taken = self.state_dict(), dict(state)
        known = np.flatnonzero(row_of_theirs >= 0)
        for name in mine.keys() & state.keys() - {"clock"}:
            per_prompt = state[name].shape[:1] == row_of_theirs.shape and mine[name].shape[:1] == (self.num_prompts,)
            if not name.startswith("belief."):
                taken[name] = mine[name]
            elif per_prompt:
                mine[name][row_of_theirs[known]] = state[name][known]
                taken[name] = mine[name]
        self.load_state_dict(taken)
        return int(np.count_nonzero(np.asarray(state["num_selected"])[1 + known]))


def kind_of(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}" if array.ndim else str(array.dtype)


def own_belief(path: str) -> type[OwnBelief]:
    """The belief that wraps the class at `path`. UserError where it lacks what a method needs."""
    label = f"selection method {path}"
    cls = load_own(path, label)
    if not isinstance(cls, type):
        raise UserError(f"{label} is {type(cls).__name__}; it must be a class.")
    methods = [method for method in ("observe", "score", "predict") if callable(getattr(cls, method, None))]
    if "observe" not in methods or len(methods) < 2:
        raise UserError(
            f"{label} has {' and '.join(methods) or 'nothing'} of what a method needs; "
            "give the class observe, and score or predict."
        )
    check_call(cls, label, 2, INIT)
    for method in methods:
        num, form = (4, OBSERVE) if method == "observe" else (1, f"def {method}(self)")
        function = getattr(cls, method)
        check_call(function, f"{label}: {method}", num, form)
        for kind, is_of_it in KINDS_REFUSED.items():
            if is_of_it(function):
                raise UserError(f"{label}: {method} is {kind}, whose call runs none of it; write it as {form}.")
    own = {"path": path, "cls": cls, "methods": methods, "__signature__": signature_of(cls)}
    return type("Belief", (OwnBelief,), own)


KINDS_REFUSED = {
    "a generator": inspect.isgeneratorfunction,
    "a coroutine": inspect.iscoroutinefunction,
    "an asynchronous generator": inspect.isasyncgenfunction,
}


def signature_of(cls: type[Any]) -> inspect.Signature:
    """That of the class, with all that has a default after the first two as keyword-only: its options."""
    parameters = list(inspect.signature(cls).parameters.values())
    options = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters[2:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    return inspect.Signature([*parameters[:2], *options, *(p for p in parameters[2:] if p.kind is p.KEYWORD_ONLY)])


def rehearse(build: Any, num_prompts: int, num_rollouts: int) -> None:
    """Plays three steps with selectors of a user's own method; UserError where one could not go on after a restart."""
    first, second = build(), build()
    for step in range(3):
        if step == 2:
            second.load_state_dict(first.state_dict())
        for selector in (first, second) if step == 2 else (first,):
            ids = selector.select(min(4, num_prompts))
            num_solved = (ids + step) % (num_rollouts + 1)
            selector.observe(ids, num_solved, np.full(ids.size, num_rollouts))
    before, after = (s.state_dict() | {"score": s.score(), "predict": s.predict()} for s in (first, second))
    for name in before:
        if not np.array_equal(before[name], after[name], equal_nan=before[name].dtype.kind == "f"):
            raise UserError(
                f"selection method {first.belief.path} does not go on alike after a restart, {name} differs; keep all "
                "that changes in attributes, and draw at random from one: self.random = numpy.random.default_rng(seed)."
            )
