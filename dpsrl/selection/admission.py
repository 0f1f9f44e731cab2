"""Which scored groups are trained on. Pure functions of a group's counts.

Every scored group is learned from by the selector, admitted or not: admission only decides what
the trainer sees.
"""

from __future__ import annotations

from collections.abc import Callable

from dpsrl.selection.options import check_choice

Admission = Callable[[int, int], bool]  # (num_solved, num_scored) -> train on it?


def admit_all(num_solved: int, num_scored: int) -> bool:
    """True for every group with at least one reward."""
    return num_scored > 0


def admit_mixed(num_solved: int, num_scored: int) -> bool:
    """True for groups that carry a gradient: DAPO's dynamic sampling (arXiv 2503.14476, eq. 11)."""
    return 0 < num_solved < num_scored


ADMISSIONS: dict[str, Admission] = {"all": admit_all, "mixed": admit_mixed}


def build_admission(name: str) -> Admission:
    """The admission rule of that name."""
    check_choice("admission", name, ADMISSIONS)
    return ADMISSIONS[name]
