"""Prompts in, scored groups out, each as soon as its last rollout has ended and its rewards are known.

Owns the way from a prompt to a scored group: the request with its seed, the decoded text, the scores. Knows
neither selection nor training: `train.py` and `evaluate.py` both draw from here.
"""

from __future__ import annotations

import time
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
        self._done: list[tuple[Group, list[str]]] = []

    @property
    def pending(self) -> int:
        """Groups that `take` can still wait for."""
        return len(self._asked) + len(self._done)

    def add(self, indices: Iterable[int], *, num_rollouts: int, temperature: float, purpose: int, step: int) -> None:
        prompts = {index: self.prompts[index] for index in indices}
        self._asked |= prompts
        self.rollouts.add(
            RolloutRequest(index, p.token_ids, num_rollouts, temperature, request_seed(self.seed, purpose, step, index))
            for index, p in prompts.items()
        )

    def take(self) -> list[tuple[Group, list[str]]]:
        """The groups that have ended since the last call, at least one: scored, with their responses' texts."""
        while not self._done:
            self._wait()
        done, self._done = self._done, []
        return done

    def drain(self) -> None:
        """Waits until every prompt under way has its group, for `take` to give: the engines are free then."""
        while self._asked:
            self._wait()

    def _wait(self) -> None:
        """Scores together what an engine handed over together: calls to workers cost more than most rewards."""
        finished = [(self._asked.pop(request.request_id), rollouts) for request, rollouts in self.rollouts.finished()]
        if not finished:
            return
        texts = self.tokenizer.batch_decode(
            [rollout.token_ids for _, rollouts in finished for rollout in rollouts], skip_special_tokens=True
        )
        answers = [prompt.answer for prompt, rollouts in finished for _ in rollouts]
        started = time.monotonic()
        with self.rollouts.cluster.watchdog.paused():
            scores = self.scorer.score(list(zip(texts, answers, strict=True)))
        self.score_s += time.monotonic() - started
        first = 0
        for prompt, rollouts in finished:
            mine = slice(first, first := first + len(rollouts))
            group = Group(prompt.index, prompt.id, prompt.token_ids, rollouts, scores[mine])
            self._done.append((group, texts[mine]))
