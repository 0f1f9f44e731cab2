"""Batches for a DataLoader: chosen late, given once, and taken up where they were."""

import itertools
import warnings

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dpsrl.sampler import PromptSampler
from dpsrl.selection import build_selector
from dpsrl.types import UserError


def build(num_prompts=12, batch=3, **options):
    return PromptSampler(build_selector("dps", num_prompts=num_prompts, num_rollouts=4, seed=0), batch, **options)


def test_the_order_is_that_of_a_repeating_sampler():
    sampler = build(repeat_prompt=2, repeat_batch=3, ahead=9)
    indices = np.array(list(sampler)).reshape(4, 3, 3, 2)  # batches, their repeats, prompts, their repeats
    assert len(sampler) == indices.size
    for batch in indices:
        assert (batch == batch[0]).all() and (batch[..., 0] == batch[..., 1]).all()
        assert len(set(batch[0, :, 0].tolist())) == 3


def test_a_batch_is_chosen_when_it_is_asked_for():
    sampler = build(num_prompts=40, ahead=9)
    batches = iter(DataLoader(np.arange(40), batch_size=3, sampler=sampler))
    first = next(batches).numpy()
    second = next(batches).numpy()  # asked for before any reward is known
    assert not set(first) & set(second)
    sampler.observe(first, np.full(3, 2), np.full(3, 4))
    assert set(next(batches).numpy()) == set(first)  # partial, so the best there is
    assert sampler.selector.clock == 1


def test_few_prompts_are_chosen_again_before_their_rewards():
    sampler = build(num_prompts=4, batch=3, ahead=9)
    batches = iter(sampler)
    assert len({next(batches) for _ in range(3)}) == 3
    assert len({sampler._select()[i] for i in range(1)}) == 1


def loader(sampler, **options):
    return iter(
        DataLoader(np.arange(sampler.selector.num_prompts), batch_size=sampler.batch, sampler=sampler, **options)
    )


def train(sampler, batches, num=10**9):
    """The batches trained on, of which each prompt is solved as often as its row says."""
    chosen = []
    for rows in itertools.islice(batches, num):
        chosen.append(rows.tolist())
        sampler.observe(rows.numpy(), rows.numpy() % 5, np.full(rows.numel(), 4))
    return chosen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:prompts are chosen")
def test_a_resumed_epoch_goes_on_where_it_was(workers):
    """Also with batches that workers had fetched already; and the epoch after it is a whole one."""
    whole, cut, resumed = (build(num_prompts=30) for _ in range(3))
    chosen = train(whole, loader(whole, num_workers=workers))
    assert len(chosen) == 10
    assert train(cut, loader(cut, num_workers=workers), 4) == chosen[:4]
    resumed.load_state_dict(cut.state_dict())
    assert train(resumed, loader(resumed, num_workers=workers)) == chosen[4:]
    again = build(num_prompts=30)
    again.load_state_dict(resumed.state_dict())
    assert len(train(again, loader(again))) == 10


def test_a_trainer_that_skips_meets_what_it_skips():
    whole, cut, resumed = (build(num_prompts=30) for _ in range(3))
    chosen = train(whole, loader(whole))
    train(cut, loader(cut), 4)
    resumed.load_state_dict(cut.state_dict(), replay=True)
    batches = loader(resumed)
    assert [next(batches).tolist() for _ in range(4)] == chosen[:4]
    assert train(resumed, batches) == chosen[4:]
    with pytest.raises(UserError, match="batches of 3 prompts, not 5"):
        build(num_prompts=30, batch=5).load_state_dict(cut.state_dict())


def test_a_stateful_loader_takes_the_state_with_its_own():
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    data, samplers = np.arange(30), [build(num_prompts=30) for _ in range(3)]
    loaders = [stateful(data, batch_size=3, sampler=sampler) for sampler in samplers]
    chosen = train(samplers[0], iter(loaders[0]))
    assert train(samplers[1], iter(loaders[1]), 4) == chosen[:4]
    loaders[2].load_state_dict(loaders[1].state_dict())
    assert train(samplers[2], iter(loaders[2])) == chosen[4:]


def test_fetching_ahead_is_said_once():
    sampler = build(num_prompts=30)
    with pytest.warns(UserWarning, match="while 3 still wait for their rewards.*num_workers=0") as said:
        train(sampler, loader(sampler, num_workers=1))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quiet in (build(num_prompts=30), build(num_prompts=30, ahead=1)):
            train(quiet, loader(quiet))


def test_whole_batches():
    sampler = build(repeat_prompt=2, ahead=4)
    batches = list(DataLoader(np.arange(12), batch_sampler=sampler.batches()))
    assert [len(batch) for batch in batches] == [6] * 4
    assert all((batch[::2] == batch[1::2]).all() and len(set(batch.tolist())) == 3 for batch in batches)


def test_refused_batches():
    with pytest.raises(UserError, match="batch of 13 prompts must be from 1 to the 12"):
        build(batch=13)
