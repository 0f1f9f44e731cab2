"""A torch `Sampler` that a selector fills: prompt selection in any training loop with a `DataLoader`.

    sampler = PromptSampler(build_selector("forecast", num_prompts=len(dataset), num_rollouts=8, seed=0), batch=32)
    for batch in DataLoader(dataset, sampler=sampler, batch_size=32):
        ...                                                # roll out, score, update
        sampler.observe(rows, num_solved, num_rollouts)    # once for each batch

Owns the order of batches and what is waiting for its rewards. Knows nothing of trainers; that of TRL is in `trl.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from torch.utils.data import BatchSampler, Sampler

from dpsrl.selection import Selector
from dpsrl.types import UserError


class PromptSampler(Sampler):
    """Row indices for a DataLoader, chosen batch by batch as late as possible.

    An epoch is num_prompts // batch batches, whichever prompts are in them. Each batch is yielded `repeat_batch`
    times, and each of its prompts `repeat_prompt` times in a row. A loader that fetches ahead (`num_workers` above 0)
    asks for a batch before the rewards of those before are known: prompts without rewards are not selected again
    meanwhile, as long as enough others are left, and a warning says so once there are more than `ahead` such batches.
    """

    def __init__(
        self, selector: Selector, batch: int, repeat_prompt: int = 1, repeat_batch: int = 1, ahead: int = 0
    ) -> None:
        if not 1 <= batch <= selector.num_prompts:
            raise UserError(
                f"the batch of {batch} prompts must be from 1 to the {selector.num_prompts} of the data set; "
                "make it smaller or bring more prompts."
            )
        self.selector, self.batch = selector, batch
        self.repeat_prompt, self.repeat_batch, self.ahead = repeat_prompt, repeat_batch, ahead
        self.history: list[np.ndarray] = []  # batches of this epoch, in order
        self._ended = False  # this epoch
        self._before: list[np.ndarray] = []  # of an epoch that is taken up: batches that are done,
        self._again: list[np.ndarray] = []  # and those to be given again
        self._waiting: dict[int, None] = {}  # selected, rewards not known yet

    def __len__(self) -> int:
        return self.selector.num_prompts // self.batch * self.batch * self.repeat_prompt * self.repeat_batch

    def __iter__(self) -> Iterator[int]:
        self.history, again, self._ended = self._before, self._again, False
        self._before, self._again = [], []
        while len(self.history) < self.selector.num_prompts // self.batch:
            rows = again.pop(0) if again else self._select()
            self.history.append(rows)
            for _ in range(self.repeat_batch):
                for row in rows.tolist():
                    yield from [row] * self.repeat_prompt
        self._ended = True

    def batches(self) -> BatchSampler:
        """For `DataLoader(dataset, batch_sampler=...)`: lists of the rows of one batch, repeats included."""
        return BatchSampler(self, self.batch * self.repeat_prompt, drop_last=True)

    def _select(self) -> np.ndarray:
        busy = list(self._waiting)
        if len(busy) > self.ahead * self.batch:
            warnings.warn(
                f"prompts are chosen while {len(busy)} still wait for their rewards: the DataLoader fetches ahead, or "
                "observe() was not called; with num_workers=0 every choice knows all rewards",
                stacklevel=3,
            )
            self.ahead = self.selector.num_prompts  # said once
        if self.selector.num_prompts - len(busy) < self.batch:
            busy = []
        rows = self.selector.select(self.batch, exclude=busy)
        self._waiting |= dict.fromkeys(rows.tolist())
        return rows

    def observe(self, rows: np.ndarray, num_solved: np.ndarray, num_rollouts: np.ndarray) -> None:
        """How one batch of groups went; see `Selector.observe`. Once per generation batch."""
        self.selector.observe(rows, num_solved, num_rollouts)
        for row in np.asarray(rows).tolist():
            self._waiting.pop(row, None)

    def state_dict(self) -> dict[str, np.ndarray]:
        own = {
            "history": np.array(self.history, dtype=np.int64).reshape(-1, self.batch),
            "ended": np.array(self._ended),
            "waiting": np.array(list(self._waiting), dtype=np.int64),
        }
        return own | {f"selector.{name}": array for name, array in self.selector.state_dict().items()}

    def load_state_dict(self, state: dict[str, np.ndarray], replay: bool = False) -> None:
        """The next epoch is the rest of the saved one: first the batches whose rewards were not known, then new ones.

        replay: for trainers that skip what an epoch has had, as transformers does: it begins with all its batches.
        """
        if state["history"].shape[1] != self.batch:
            raise UserError(
                f"the saved selection has batches of {state['history'].shape[1]} prompts, not {self.batch}; "
                "resume with the same batch size and number of generations."
            )
        selector_state = {k.removeprefix("selector."): v for k, v in state.items() if k.startswith("selector.")}
        self.selector.load_state_dict(selector_state)
        self._waiting = dict.fromkeys(state["waiting"].tolist())
        latest = {row: place for place, rows in enumerate(state["history"].tolist()) for row in rows}
        waits = {latest[row] for row in self._waiting if row in latest}
        again = [not state["ended"] if replay else place in waits for place in range(len(state["history"]))]
        is_over = state["ended"] and not any(again)
        self._before = [rows for rows, is_again in zip(state["history"], again) if not (is_again or is_over)]
        self._again = [rows for rows, is_again in zip(state["history"], again) if is_again]
