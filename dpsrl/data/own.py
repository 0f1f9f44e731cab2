"""Rows from a function of a user's own: `data.train=my_module:function`, which takes nothing and gives rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dpsrl.own import check_call, load_own, told
from dpsrl.types import UserError

EXPECTED = "def {name}(): with a return or yield of rows, each a dict or a pair (problem, answer)"
NO_ROW = "neither a mapping nor a pair of problem and answer"


def own_rows(source: str, prompt_key: str, answer_key: str) -> Iterator[dict[str, Any] | str]:
    """The columns of each row, or why it is none. UserError where the function fails or gives no rows."""
    label, expected = f"data set {source}", EXPECTED.format(name=source.partition(":")[2])
    function = load_own(source, label)
    check_call(function, label, 0, expected)
    number = 0
    try:
        rows = function()
        if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
            raise UserError(f"{label} returned {type(rows).__name__}, not rows; write it as {expected}.")
        for row in rows:
            number += 1
            yield _columns(row, prompt_key, answer_key)
    except (UserError, GeneratorExit):
        raise
    except (Exception, SystemExit) as error:  # whatever a person's function does
        raise UserError(f"{label} failed after row {number:,} with {told(error)}; mend it.") from error


def _columns(row: Any, prompt_key: str, answer_key: str) -> dict[str, Any] | str:
    if isinstance(row, Mapping):
        columns = dict(row)
    elif isinstance(row, tuple | list) and len(row) == 2:
        columns = {prompt_key: row[0], answer_key: row[1]}
    else:
        return NO_ROW
    # numpy's numbers are no Python numbers, which an answer has to be
    return {str(name): value.item() if isinstance(value, np.generic) else value for name, value in columns.items()}
