"""Prompts in, scored groups out, each as soon as its last rollout has ended and its rewards are known.

Owns the way from a prompt to a scored group: the request with its seed, the decoded text, the scores. Knows
neither selection nor training: `train.py` and `evaluate.py` both draw from here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import numpy as np

from dpsrl.data.prompts import PromptSet
from dpsrl.pools import RolloutPool
from dpsrl.rewards import Scorer
from dpsrl.types import Group, Prompt, RolloutRequest

TRAINING, EVALUATION = 0, 1  # purposes: the same step and prompt are sampled anew for each


def request_seed(seed: int, purpose: int, step: int, index: int) -> int:
    """A 31-bit seed of its own for each prompt of each step, whichever engine serves it."""
    return int(np.random.SeedSequence([seed, purpose, step, index]).generate_state(1)[0] >> 1)


class GroupStream:
    """Owns the prompts under way, and the seconds spent scoring: scoring runs between the engines' answers."""

    def __init__(self, prompts: PromptSet, rollouts: RolloutPool, scorer: Scorer, tokenizer, seed: int) -> None:
        self.prompts, self.rollouts, self.scorer, self.tokenizer, self.seed = (
            prompts,
            rollouts,
            scorer,
            tokenizer,
            seed,
        )
        self.score_s = 0.0
        self._asked: dict[int, Prompt] = {}
        self._done: deque[tuple[Group, list[str]]] = deque()

    @property
    def pending(self) -> int:
        """Groups that `next` can still wait for."""
        return len(self._asked) + len(self._done)

    def add(self, indices: Iterable[int], *, num_rollouts: int, temperature: float, purpose: int, step: int) -> None:
        prompts = {index: self.prompts[index] for index in indices}
        self._asked |= prompts
        self.rollouts.add(
            RolloutRequest(index, p.token_ids, num_rollouts, temperature, request_seed(self.seed, purpose, step, index))
            for index, p in prompts.items()
        )

    def next(self) -> tuple[Group, list[str]]:
        """The next group to end, scored, and its responses' texts."""
        while not self._done:
            self._wait()
        return self._done.popleft()

    def drain(self) -> None:
        """Waits until every prompt under way has its group, for `next` to give: the engines are free then."""
        while self._asked:
            self._wait()

    def _wait(self) -> None:
        for request, rollouts in self.rollouts.finished():
            prompt = self._asked.pop(request.request_id)
            texts = self.tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
            started = time.monotonic()
            scores = self.scorer.score([(text, prompt.answer) for text in texts])
            self.score_s += time.monotonic() - started
            self._done.append((Group(prompt.index, prompt.id, prompt.token_ids, rollouts, scores), texts))
