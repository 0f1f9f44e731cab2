"""Which scored groups are trained on. Pure functions of a group's counts.

Every scored group is learned from by the selector, admitted or not: admission only decides what
the trainer sees.
"""

from __future__ import annotations

from collections.abc import Callable

from dpsrl.types import UserError

Admission = Callable[[int, int], bool]  # (num_solved, num_scored) -> train on it?


def admit_all(num_solved: int, num_scored: int) -> bool:
    """True for every group with at least one reward."""
    return num_scored > 0


ADMISSIONS: dict[str, Admission] = {"all": admit_all}


def build_admission(name: str) -> Admission:
    """The admission rule of that name."""
    if name not in ADMISSIONS:
        raise UserError(f"selection.admission is {name!r}, which is unknown; use one of: {', '.join(ADMISSIONS)}.")
    return ADMISSIONS[name]
