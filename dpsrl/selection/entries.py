"""Which prompts have a belief of their own. numpy only.

Of ten million prompts a run touches some ten thousand. So beliefs are kept by *entry*: entry 0 stands for every
prompt that was never touched, and each prompt gets an entry of its own, in order, when it is first selected or
observed. What a step costs then depends on the prompts touched so far, not on the size of the data set.

Axes: N prompts (rows of the data set), E entries in use. Arrays are as long as they may ever get; the operating
system gives them memory only where they are written.
"""

from __future__ import annotations

import numpy as np

FRESH = 0  # the entry of every prompt that was never touched


class Entries:
    """Owns the way from a row to its entry and back."""

    def __init__(self, num_prompts: int) -> None:
        self.entry_N = np.zeros(num_prompts, dtype=np.int32)
        self.row_E = np.zeros(num_prompts + 1, dtype=np.int32)
        self.num = 1  # E

    @property
    def num_fresh(self) -> int:
        return self.entry_N.size - (self.num - 1)

    def touch(self, rows_B: np.ndarray) -> np.ndarray:
        """The entry of each row, int32 (B,); rows without one get the next, in the order given. Rows are distinct."""
        fresh = rows_B[self.entry_N[rows_B] == FRESH]
        new = slice(self.num, self.num + fresh.size)
        self.row_E[new] = fresh
        self.entry_N[fresh] = np.arange(new.start, new.stop, dtype=np.int32)
        self.num = new.stop
        return self.entry_N[rows_B]

    def draw_fresh(self, num_rows: int, generator: np.random.Generator) -> np.ndarray:
        """int64 (num_rows,): distinct rows never touched, each as likely as the other. There are that many."""
        if self.num_fresh < self.entry_N.size / 8 or num_rows > self.num_fresh / 8:
            fresh = np.flatnonzero(self.entry_N == FRESH)
            return fresh[generator.choice(fresh.size, num_rows, replace=False)]
        rows = np.empty(0, dtype=np.int64)
        while rows.size < num_rows:  # at least one draw in eight hits; the first of equals stays, so no row is favoured
            rows = np.concatenate([rows, generator.integers(self.entry_N.size, size=16 * (num_rows - rows.size))])
            rows = rows[self.entry_N[rows] == FRESH]
            rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
        return rows[:num_rows]

    def load(self, row_E: np.ndarray) -> None:
        """Takes over the rows of a saved state, entry 0 included."""
        self.entry_N[self.row_E[1 : self.num]] = FRESH
        self.num = row_E.size
        self.row_E[: self.num] = row_E
        self.entry_N[row_E[1:]] = np.arange(1, self.num, dtype=np.int32)
