"""Groups on disk: flat arrays with lengths, so that what was generated and not yet trained on outlives the process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.checkpoint import broken, read_state, write_state
from dpsrl.types import Group, Rollout, Score

# Of each array: its type, and the array whose sum is its length ("" for one row per group).
ARRAYS = {
    "index": (np.int64, ""),
    "prompt_length": (np.int64, ""),
    "prompt_tokens": (np.int32, "prompt_length"),
    "num_rollouts": (np.int64, ""),
    "response_length": (np.int64, "num_rollouts"),
    "tokens": (np.int32, "response_length"),
    "logprobs": (np.float32, "response_length"),
    "finish_reason": (np.int64, "num_rollouts"),  # places in the list `finish_reasons`
    "num_versions": (np.int64, "num_rollouts"),
    "version": (np.int64, "num_versions"),
    "version_tokens": (np.int64, "num_versions"),
    "num_scores": (np.int64, ""),
    "has_score": (np.bool_, "num_scores"),
    "reward": (np.float64, "num_scores"),  # 0 where the score is missing
    "correct": (np.bool_, "num_scores"),
}
LENGTHS = {counts for _, counts in ARRAYS.values()}


def write_groups(folder: Path, groups: Sequence[Group]) -> None:
    """Everything that the groups hold, to the bit."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [score for group in groups for score in group.scores]
    versions = [pair for rollout in rollouts for pair in rollout.versions]
    reasons = sorted({rollout.finish_reason for rollout in rollouts})
    assert all(len(rollout.token_ids) == len(rollout.logprobs) for rollout in rollouts)
    columns = {
        "index": [group.index for group in groups],
        "prompt_length": [len(group.prompt_token_ids) for group in groups],
        "prompt_tokens": joined([group.prompt_token_ids for group in groups], np.int32),
        "num_rollouts": [len(group.rollouts) for group in groups],
        "response_length": [len(rollout.token_ids) for rollout in rollouts],
        "tokens": joined([rollout.token_ids for rollout in rollouts], np.int32),
        "logprobs": joined([rollout.logprobs for rollout in rollouts], np.float32),
        "finish_reason": [reasons.index(rollout.finish_reason) for rollout in rollouts],
        "num_versions": [len(rollout.versions) for rollout in rollouts],
        "version": [version for version, _ in versions],
        "version_tokens": [num_tokens for _, num_tokens in versions],
        "num_scores": [len(group.scores) for group in groups],
        "has_score": [score is not None for score in scores],
        "reward": [0.0 if score is None else score.reward for score in scores],
        "correct": [score is not None and score.correct for score in scores],
    }
    arrays: dict[str, Any] = {name: np.asarray(column, dtype=ARRAYS[name][0]) for name, column in columns.items()}
    write_state(folder, arrays | {"prompt_ids": [group.prompt_id for group in groups], "finish_reasons": reasons})


def joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    assert all(array.dtype == dtype for array in arrays), f"not all of these are {dtype.__name__}"
    return np.concatenate([np.zeros(0, dtype), *arrays])


def read_groups(folder: Path) -> list[Group]:
    """What `write_groups` wrote; BrokenCheckpoint where the arrays do not fit each other."""
    state = read_state(folder)
    check_arrays(folder, state)
    of_group = {
        name: pieces(state[name], state[ARRAYS[name][1]])
        for name in ("prompt_tokens", "response_length", "has_score", "reward", "correct")
    }
    rollouts = pieces(read_rollouts(state), state["num_rollouts"])
    scores = [
        [Score(*values) if has else None for has, *values in zip(*(array.tolist() for array in columns))]
        for columns in zip(of_group["has_score"], of_group["reward"], of_group["correct"])
    ]
    columns = (state["index"].tolist(), state["prompt_ids"], of_group["prompt_tokens"], rollouts, scores)
    return [Group(*values) for values in zip(*columns, strict=True)]


def read_rollouts(state: dict[str, Any]) -> list[Rollout]:
    versions = list(zip(state["version"].tolist(), state["version_tokens"].tolist()))
    columns = (
        pieces(state["tokens"], state["response_length"]),
        pieces(state["logprobs"], state["response_length"]),
        [state["finish_reasons"][place] for place in state["finish_reason"].tolist()],
        pieces(versions, state["num_versions"]),
    )
    return [Rollout(*values) for values in zip(*columns, strict=True)]


def pieces(flat: Any, lengths: np.ndarray) -> list[Any]:
    """`flat`, an array or a list, cut into pieces of these lengths."""
    ends = np.cumsum(lengths).tolist()
    return [flat[end - length : end] for end, length in zip(ends, lengths.tolist())]


def check_arrays(folder: Path, state: dict[str, Any]) -> None:
    """BrokenCheckpoint unless each array is there, has its type, and is as long as the lengths say."""
    texts = ("prompt_ids", "finish_reasons")
    if state.keys() != {*ARRAYS, *texts}:
        wrong = sorted(state.keys() ^ {*ARRAYS, *texts})
        raise broken(folder, f"its groups have missing or unknown entries: {', '.join(wrong)}")
    for name in texts:
        if not isinstance(state[name], list) or not all(isinstance(text, str) for text in state[name]):
            raise broken(folder, f"{name} of its groups is not a list of texts")
    num_groups = len(state["prompt_ids"])
    for name, (dtype, counts) in ARRAYS.items():
        array = state[name]
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            raise broken(folder, f"{name}.npy of its groups is not a list of {dtype.__name__}")
        expected = sum(state[counts].tolist()) if counts else num_groups
        if len(array) != expected:
            raise broken(folder, f"{name}.npy of its groups has {len(array):,} entries where {expected:,} belong")
        if name in LENGTHS and (array < 0).any():
            raise broken(folder, f"{name}.npy of its groups holds negative lengths")
    places = state["finish_reason"]
    if ((places < 0) | (places >= len(state["finish_reasons"]))).any():
        raise broken(folder, "finish_reason.npy of its groups points outside of its list")
