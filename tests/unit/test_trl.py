import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dpsrl.selection import build_selector
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.trl import PromptSampler, report_rewards
from dpsrl.types import UserError

pytestmark = pytest.mark.process


def build(num_prompts=12, batch=3, method="dps", **repeats):
    return PromptSampler(build_selector(method, num_prompts=num_prompts, num_rollouts=4, seed=0), batch, **repeats)


def test_the_order_is_that_of_a_repeating_sampler():
    sampler = build(repeat_prompt=2, repeat_batch=3)
    indices = np.array(list(sampler)).reshape(4, 3, 3, 2)  # batches, their repeats, prompts, their repeats
    assert len(sampler) == indices.size
    for batch in indices:
        assert (batch == batch[0]).all() and (batch[..., 0] == batch[..., 1]).all()
        assert len(set(batch[0, :, 0].tolist())) == 3


def test_a_batch_is_chosen_when_it_is_asked_for():
    sampler = build(num_prompts=40)
    batches = iter(DataLoader(np.arange(40), batch_size=3, sampler=sampler))
    first = next(batches).numpy()
    second = next(batches).numpy()  # asked for before any reward is known
    assert not set(first) & set(second)
    sampler.observe(first, np.full(3, 2), np.full(3, 4))
    assert set(next(batches).numpy()) == set(first)  # partial, so the best there is
    assert sampler.selector.clock == 1


def test_few_prompts_are_chosen_again_before_their_rewards():
    sampler = build(num_prompts=4, batch=3)
    batches = iter(sampler)
    assert len({next(batches) for _ in range(3)}) == 3
    assert len({sampler._select()[i] for i in range(1)}) == 1


def test_rewards_become_counts_and_missing_ones_leave_both():
    sampler, nan = build(method="beta", num_prompts=5), float("nan")
    seen = []
    sampler.observe = lambda *counts: seen.append([c.tolist() for c in counts])
    rows = torch.tensor([4, 4, 4, 1, 1, 1])
    rewards = torch.tensor([[1.0, 0.1], [0.0, 0.1], [nan, nan], [nan, 0.1], [0.0, 0.1], [0.0, 0.0]])
    report_rewards(sampler, rows, rewards, torch.tensor([1.0, 1.0]), OutcomeRule(min_spread=0.5))
    assert seen == [[[1, 4], [0, 1], [3, 2]]]


def test_a_resumed_epoch_goes_on_with_the_same_batches():
    def run(sampler, batches, num):
        chosen = []
        for rows in batches:
            chosen.append(rows.tolist())
            sampler.observe(rows.numpy(), rows.numpy() % 5, np.full(3, 4))
            if len(chosen) == num:
                return chosen
        return chosen

    def loader(sampler):
        return iter(DataLoader(np.arange(30), batch_size=3, sampler=sampler))

    whole, cut, resumed = build(num_prompts=30), build(num_prompts=30), build(num_prompts=30)
    chosen = run(whole, loader(whole), 10)
    first = run(cut, loader(cut), 4)
    resumed.load_state_dict(cut.state_dict())
    batches = loader(resumed)
    assert [next(batches).tolist() for _ in range(4)] == first == chosen[:4]  # what a trainer skips
    assert run(resumed, batches, 6) == chosen[4:]
    with pytest.raises(UserError, match="batches of 3 prompts, not 5"):
        build(num_prompts=30, batch=5).load_state_dict(cut.state_dict())


def test_refused_batches():
    with pytest.raises(UserError, match="batch of 13 prompts must be from 1 to the 12"):
        build(batch=13)
