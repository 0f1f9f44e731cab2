"""Records that cross a process boundary, and the one error meant for people. numpy only.

A worked example used below: a prompt of 3 tokens, G = 2 rollouts of 2 and 3 tokens, the first
one right and the second one wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class UserError(ValueError):
    """A mistake a person can mend. The message is one sentence: what is wrong, the value, what to do."""


class StateLost(RuntimeError):
    """What a process holds is of no use any more: the run goes back to its last checkpoint."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One dataset item, tokenized: `Prompt(7, "9f2c..", [5, 6, 7], "3 5=8:", {...})`."""

    index: int  # row in the PromptSet; what selectors and the controller count with
    id: str  # content hash: stable when rows move, the same in every run
    token_ids: np.ndarray  # int32 (prompt_len,), chat template applied
    text: str  # what the person wrote, before the template
    answer: Any  # what the reward function is given beside the response


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward function says of one response.

    `reward` is what the advantage uses; `correct` is what solving states and accuracy count.
    """

    reward: float
    correct: bool


@dataclass(slots=True)
class Rollout:
    """One response as the engine sampled it: `Rollout([8, 2], [-0.1, -0.3], "stop", [(4, 2)])`."""

    token_ids: np.ndarray  # int32 (response_len,), the closing EOS included
    logprobs: np.ndarray  # float32 (response_len,), of the sampled tokens, at sampling temperature
    finish_reason: str  # "stop": ended by EOS; "length": cut at the token limit
    versions: list[tuple[int, int]]  # (policy version, tokens it sampled), in order; one unless weights came meanwhile


@dataclass(slots=True)
class Group:
    """The G rollouts of one prompt, and after scoring their rewards.

    Example: rewards [1, 0], correct [True, False] -> num_solved 1, num_scored 2, mixed.
    A rollout whose reward failed is missing (`scores[i] is None`): it leaves both counts.
    """

    index: int
    prompt_id: str
    prompt_token_ids: np.ndarray  # int32 (prompt_len,)
    rollouts: list[Rollout]
    scores: list[Score | None] = field(default_factory=list)

    @property
    def policy_version(self) -> int:
        """The oldest weights that sampled any of it."""
        return min(version for rollout in self.rollouts for version, _ in rollout.versions)

    @property
    def num_solved(self) -> int:
        return sum(score.correct for score in self.scores if score is not None)

    @property
    def num_scored(self) -> int:
        return sum(score is not None for score in self.scores)

    @property
    def mixed(self) -> bool:
        """Both right and wrong answers: the group carries a learning signal."""
        return 0 < self.num_solved < self.num_scored

    @property
    def rewards_G(self) -> np.ndarray:
        """float64 (G,), NaN where the reward is missing."""
        return np.array([np.nan if s is None else s.reward for s in self.scores])


@dataclass(frozen=True, slots=True)
class TrainGroup:
    """The rollouts of one prompt ready for the trainer; those without a reward are left out.

    `TrainGroup([5, 6, 7], [[8, 2], [9, 9, 2]], [[-0.1, -0.3], [-1.2, -0.4, -0.1]], [0.7, -0.7])`.
    """

    prompt_token_ids: np.ndarray  # int32 (prompt_len,)
    responses: list[np.ndarray]  # int32 (response_len,) each
    rollout_logprobs: list[np.ndarray]  # float32 (response_len,) each
    advantages: np.ndarray  # float64, one per response


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One prompt to sample: the same request gives the same tokens from the same weights."""

    request_id: int
    prompt_token_ids: np.ndarray  # int32 (prompt_len,)
    num_rollouts: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of a weight sync: `Sent({1: "died"}, {0: (4, [-0.1, -2.3])}, [-0.1, -2.3])`."""

    failures: dict[int, str]  # by engine
    answers: dict[int, tuple[int, np.ndarray]]  # by engine: policy version, float32 logprobs of the canary
    logprobs: np.ndarray | None  # the trainer's


@dataclass(frozen=True, slots=True)
class WeightMeta:
    """One parameter on the wire, with its full shape: `WeightMeta("lm_head.weight", "float32", (264, 192))`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)
