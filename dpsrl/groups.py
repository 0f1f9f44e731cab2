"""Prompts in, scored groups out, each as soon as its last rollout has ended and its rewards are known.

Owns the way from a prompt to a scored group: the request with its seed, the decoded text, the scores. Knows
neither selection nor training: `train.py` and `evaluate.py` both draw from here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

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
    """Owns the seconds spent scoring, since scoring runs between the engines' answers."""

    def __init__(self, prompts: PromptSet, rollouts: RolloutPool, scorer: Scorer, tokenizer, seed: int) -> None:
        self.prompts, self.rollouts, self.scorer, self.tokenizer, self.seed = (
            prompts,
            rollouts,
            scorer,
            tokenizer,
            seed,
        )
        self.score_s = 0.0

    def stream(
        self, indices: Iterable[int], *, num_rollouts: int, temperature: float, purpose: int, step: int
    ) -> Iterator[tuple[Group, list[str]]]:
        """(group, its responses' texts), in the order in which the groups end; `add` feeds more prompts meanwhile."""
        self._asked: dict[int, Prompt] = {}
        self._kind = (num_rollouts, temperature, purpose, step)
        for request, rollouts, policy_version in self.rollouts.stream(self._requests(indices)):
            prompt = self._asked[request.request_id]
            texts = self.tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
            started = time.monotonic()
            scores = self.scorer.score([(text, prompt.answer) for text in texts])
            self.score_s += time.monotonic() - started
            yield Group(prompt.index, prompt.id, prompt.token_ids, rollouts, policy_version, scores), texts

    def add(self, indices: Iterable[int]) -> None:
        """More prompts of the same kind for the stream under way."""
        self.rollouts.add(self._requests(indices))

    def _requests(self, indices: Iterable[int]) -> list[RolloutRequest]:
        num_rollouts, temperature, purpose, step = self._kind
        prompts = {index: self.prompts[index] for index in indices}
        self._asked |= prompts
        return [
            RolloutRequest(index, p.token_ids, num_rollouts, temperature, request_seed(self.seed, purpose, step, index))
            for index, p in prompts.items()
        ]
