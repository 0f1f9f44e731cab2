import pytest
import torch

from dpsrl.sampler import PromptSampler
from dpsrl.selection import build_selector
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.trl import report_rewards

pytestmark = pytest.mark.process


def test_rewards_become_counts_and_missing_ones_leave_both():
    selector = build_selector("beta", num_prompts=5, num_rollouts=4, seed=0)
    sampler, nan = PromptSampler(selector, batch=3), float("nan")
    seen = []
    sampler.observe = lambda *counts: seen.append([c.tolist() for c in counts])
    rows = torch.tensor([4, 4, 4, 1, 1, 1])
    rewards = torch.tensor([[1.0, 0.1], [0.0, 0.1], [nan, nan], [nan, 0.1], [0.0, 0.1], [0.0, 0.0]])
    report_rewards(sampler, rows, rewards, torch.tensor([1.0, 1.0]), OutcomeRule(min_spread=0.5))
    assert seen == [[[1, 4], [0, 1], [3, 2]]]
