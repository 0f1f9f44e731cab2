"""From scored groups to what the trainer is given: shaped rewards, advantages, and the layout of the updates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpsrl.algo.advantages import advantages, overlong_penalty
from dpsrl.algo.packing import Update, lay_out
from dpsrl.config import Config
from dpsrl.own import is_own
from dpsrl.types import Group, TrainGroup


def shape_rewards(group: Group, config: Config) -> None:
    """Takes the penalty for overlong responses off the group's rewards; whether they are right stays as it is."""
    limit, buffer = config.model.max_response_tokens, config.reward.overlong_tokens
    if buffer:
        group.scores = [
            score and replace(score, reward=score.reward + overlong_penalty(rollout.token_ids.size, limit, buffer))
            for rollout, score in zip(group.rollouts, group.scores, strict=True)
        ]


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    num_scored = sum(group.num_scored for group in groups)
    measures = {
        "rollout/response_tokens": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
        "rollout/truncated_share": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "rollout/continued_share": float(np.mean([len(rollout.versions) > 1 for rollout in rollouts])),
        "rollout/num_missing": len(rollouts) - num_scored,
    }
    if num_scored:
        rewards = np.concatenate([group.rewards_G for group in groups])
        measures["rollout/solve_rate"] = sum(group.num_solved for group in groups) / num_scored
        measures["rollout/reward"] = float(np.nanmean(rewards))
    return measures


def shuffled(groups: list[Group], seed: int, step: int) -> list[Group]:
    """In an order that is neither the data set's nor that of coming back, so that a step's updates are alike."""
    return [groups[place] for place in np.random.default_rng([seed, step]).permutation(len(groups))]


def train_groups(groups: list[Group], config: Config, kl: list[np.ndarray] | None = None) -> list[TrainGroup]:
    """Every rollout that has a reward, with its advantage. kl: nats per rollout that the reward is lessened by."""
    rewards = [group.rewards_G for group in groups]
    if kl is not None:
        rewards = [rewards_G - config.algo.kl_coef * kl_G for rewards_G, kl_G in zip(rewards, kl, strict=True)]
    made = []
    for group, advantages_G in zip(groups, advantages(rewards, config.algo.advantage), strict=True):
        kept = [
            i for i, (rollout, score) in enumerate(zip(group.rollouts, group.scores, strict=True))
            if score is not None and not (config.algo.mask_truncated and rollout.finish_reason == "length")
        ]  # fmt: skip
        if kept:
            made.append(train_group(group, kept, advantages_G))
    return made


def train_group(group: Group, kept: list[int], advantages_G: np.ndarray) -> TrainGroup:
    rollouts = [group.rollouts[i] for i in kept]
    responses, logprobs = [rollout.token_ids for rollout in rollouts], [rollout.logprobs for rollout in rollouts]
    return TrainGroup(group.prompt_token_ids, responses, logprobs, advantages_G[kept])


def whole_groups(groups: list[Group]) -> list[TrainGroup]:
    """Every rollout, without an advantage: what the reference is to score."""
    return [train_group(group, list(range(len(group.rollouts))), np.zeros(len(group.rollouts))) for group in groups]


def lay_out_step(
    groups: list[TrainGroup], config: Config, num_updates: int | None = None, skip_constant: bool | None = None
) -> list[Update]:
    """Groups without a gradient are left out where the loss is known to be nothing but advantage x something."""
    algo = config.algo
    if skip_constant is None:
        in_loss = algo.entropy_coef or (algo.kl_coef and algo.kl_in == "loss")
        skip_constant = not in_loss and not is_own(algo.loss)
    return lay_out(
        groups, config.trainer.num_workers, num_updates or config.train.num_updates, config.trainer.micro_batch_tokens,
        algo.aggregation, config.model.max_response_tokens, skip_constant,
    )  # fmt: skip
