"""From scored groups to the trainer's, by hand."""

import numpy as np
import pytest

from dpsrl.batch import lay_out_step, rollout_metrics, shape_rewards, shuffled, train_groups, whole_groups
from dpsrl.config import load_config
from dpsrl.types import Group, Rollout, Score


def rollout(length, finish_reason="stop", versions=None):
    return Rollout(
        np.arange(length, dtype=np.int32), np.zeros(length, np.float32), finish_reason, versions or [(0, length)]
    )


def group(index, rewards, lengths, cut=()):
    rollouts = [rollout(n, "length" if place in cut else "stop") for place, n in enumerate(lengths)]
    scores = [None if reward is None else Score(reward, reward == 1.0) for reward in rewards]
    return Group(index, f"p{index}", np.array([1, 2], np.int32), rollouts, scores)


def config(*arguments):
    return load_config(["+recipe=quickstart", *arguments])


def test_rollouts_without_a_reward_are_left_out():
    one, none = group(0, [1.0, None, 0.0], [3, 4, 5]), group(1, [None, None], [3, 3])
    (made,) = train_groups([one, none], config("algo=dr_grpo"))
    assert [response.size for response in made.responses] == [3, 5]
    assert made.advantages.tolist() == [0.5, -0.5]


def test_truncated_responses_keep_their_part_in_the_baseline_and_are_not_trained_on():
    (made,) = train_groups(
        [group(0, [1.0, 0.0, 0.5], [3, 4, 5], cut=[1])], config("algo=dr_grpo", "algo.mask_truncated=true")
    )
    assert [response.size for response in made.responses] == [3, 5]
    assert made.advantages.tolist() == [0.5, 0.0]


def test_kl_lessens_the_reward():
    cfg = config("algo=dr_grpo", "algo.kl_coef=0.1", "algo.kl_in=reward")
    (made,) = train_groups([group(0, [1.0, 0.0], [3, 4])], cfg, kl=[np.array([5.0, 1.0])])
    assert made.advantages == pytest.approx([(0.5 - (-0.1)) / 2, -(0.5 - (-0.1)) / 2])


def test_overlong_responses_lose_reward_and_stay_right():
    one = group(0, [1.0, 1.0, None, 0.0], [20, 28, 32, 32])
    shape_rewards(one, config("reward.overlong_tokens=8"))
    assert [score and (score.reward, score.correct) for score in one.scores] == [
        (1.0, True), (0.5, True), None, (-1.0, False),
    ]  # fmt: skip


@pytest.mark.process
def test_groups_without_a_gradient_are_skipped_only_where_that_is_exact():
    groups = train_groups([group(0, [1.0, 1.0], [3, 3]), group(1, [1.0, 0.0], [3, 3])], config())
    for arguments, num_rollouts in (
        ([], 2), (["algo.entropy_coef=0.01"], 4),
        (["algo.kl_coef=0.1"], 4), (["algo.kl_coef=0.1", "algo.kl_in=reward"], 2), (["algo.loss=my:own"], 4),
    ):  # fmt: skip
        (update,) = lay_out_step(groups, config(*arguments))
        assert sum(micro.ids_S.size for micro in update.ranks[0]) == num_rollouts, arguments
        assert update.total_weight == 12
    (update,) = lay_out_step(
        whole_groups([group(0, [None, 1.0], [3, 3])]), config(), num_updates=1, skip_constant=False
    )
    assert update.ranks[0][0].ids_S.tolist() == [0, 1]


def test_shuffling_is_the_same_for_a_seed_and_step():
    groups = [group(i, [1.0], [1]) for i in range(9)]
    orders = [[g.index for g in shuffled(groups, 0, step)] for step in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(9))


def test_rollout_metrics_by_hand():
    one = group(0, [1.0, None, 0.0], [2, 4, 6], cut=[2])
    one.rollouts[0].versions = [(3, 1), (4, 1)]
    assert one.policy_version == 0
    assert rollout_metrics([one]) == {
        "rollout/response_tokens": 4.0, "rollout/truncated_share": pytest.approx(1 / 3),
        "rollout/continued_share": pytest.approx(1 / 3), "rollout/num_missing": 1,
        "rollout/solve_rate": 0.5, "rollout/reward": 0.5,
    }  # fmt: skip
