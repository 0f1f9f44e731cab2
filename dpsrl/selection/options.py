"""Checks of the options of beliefs, scores and picks: a refusal names the option, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np

from dpsrl.types import UserError


def is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_share(name: str, value: float) -> float:
    """`value` as a float in [0, 1]."""
    return check_number(name, value, lowest=0.0, highest=1.0)


def check_number(name: str, value: float, lowest: float = -np.inf, highest: float = np.inf) -> float:
    """`value` as a finite float between the bounds, both allowed."""
    if not is_number(value) or not np.isfinite(value) or not lowest <= value <= highest:
        bounds = [f" from {lowest:g}"] * (lowest > -np.inf) + [f" to {highest:g}"] * (highest < np.inf)
        raise UserError(f"selection option '{name}' is {value!r}; it must be a finite number{''.join(bounds)}.")
    return float(value)


def check_flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"selection option '{name}' is {value!r}; it must be true or false.")
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        raise UserError(f"selection {name} {value!r} is unknown; {nearest(str(value), choices)}.")


def check_count(name: str, value: object, lowest: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < lowest:
        raise UserError(f"selection {name} is {value!r}; it must be a whole number of at least {lowest}.")


def as_floats(name: str, value: object, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as finite float64 of `shape`."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = None
    if array is None or array.shape != shape or not np.isfinite(array).all():
        raise UserError(
            f"selection option '{name}' is {value!r}; it must be {' x '.join(map(str, shape))} finite numbers."
        )
    return array


def nearest(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'?", or what there is when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'" if close else f"use one of: {', '.join(names)}"
