"""Any selection method inside TRL's `GRPOTrainer`.

    trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=dataset)
    select_prompts(trainer, "forecast")
    trainer.train()

Owns the hook that tells the sampler how its prompts went, and the file beside TRL's checkpoints that lets a resumed run
go on with the same selections. Knows nothing of the rest of dpsrl's training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsrl.sampler import PromptSampler
from dpsrl.selection import build_selector
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.types import UserError

STATE_FILE = "dpsrl_selection.npz"
INDEX = "dpsrl_index"  # column of the data set: the row, which rewards are reported by


def select_prompts(
    trainer: Any, method: str = "forecast", *, rule: OutcomeRule | None = None, **options: Any
) -> PromptSampler:
    """Lets `method` choose the prompts of a `GRPOTrainer` that is built and not yet trained. Returns its sampler.

    rule: how rewards become counts (see `OutcomeRule`); options: as `build_selector` takes them. The reward is the
    weighted sum that the trainer's advantage uses; one that every reward function left out (None) is missing. Every
    process keeps a selector of its own, and all see the same rewards, so they choose alike.
    """
    from transformers import TrainerCallback

    dataset = trainer.train_dataset
    if not hasattr(dataset, "add_column"):
        raise UserError(
            f"the trainer's data set is a {type(dataset).__name__}, which has no rows to choose; "
            "use a map-style Dataset."
        )
    trainer.train_dataset = dataset.add_column(INDEX, np.arange(len(dataset)))
    trainer.args.remove_unused_columns = False
    selector = build_selector(
        method, num_prompts=len(dataset), num_rollouts=trainer.num_generations, seed=trainer.args.seed, **options
    )
    sampler = PromptSampler(
        selector,
        batch=trainer.args.generation_batch_size // trainer.num_generations,
        repeat_prompt=trainer.num_generations,
        repeat_batch=trainer.num_iterations * trainer.args.steps_per_generation,
        ahead=1,  # accelerate looks for the end of an epoch one batch early
    )

    class Saving(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                arrays: dict[str, Any] = sampler.state_dict()
                np.savez(folder / STATE_FILE, **arrays)

    calculate_rewards, load_checkpoint = trainer._calculate_rewards, trainer._load_from_checkpoint

    def calculate_and_observe(inputs, *args, **kwargs):
        rewards_per_func = calculate_rewards(inputs, *args, **kwargs)  # of all processes
        if trainer.model.training:
            rows = torch.tensor([example[INDEX] for example in inputs], device=rewards_per_func.device)
            report_rewards(sampler, trainer.accelerator.gather(rows), rewards_per_func, trainer.reward_weights, rule)
        return rewards_per_func

    def load_with_selection(checkpoint, *args, **kwargs):
        path = Path(checkpoint) / STATE_FILE
        if not path.is_file():
            raise UserError(
                f"{checkpoint} has no {STATE_FILE}: it was saved without prompt selection; start a new run."
            )
        with np.load(path, allow_pickle=False) as state:
            sampler.load_state_dict(dict(state), replay=True)
        return load_checkpoint(checkpoint, *args, **kwargs)

    trainer._get_train_sampler = lambda dataset=None: sampler
    trainer._calculate_rewards = calculate_and_observe
    trainer._load_from_checkpoint = load_with_selection
    trainer.add_callback(Saving())
    return sampler


def report_rewards(
    sampler: PromptSampler,
    rows: torch.Tensor,
    rewards_per_func: torch.Tensor,
    weights: torch.Tensor,
    rule: OutcomeRule | None,
) -> None:
    """Tells the sampler how one generation batch went. rows (R,), rewards_per_func (R, F), NaN where there is none."""
    missing_R = rewards_per_func.isnan().all(dim=1)
    weighted_R = (rewards_per_func * weights.to(rewards_per_func.device)).nansum(dim=1).double()
    rewards_R = weighted_R.masked_fill(missing_R, float("nan")).cpu().numpy()
    rule, rows_R = rule or OutcomeRule(), rows.cpu().numpy()
    distinct = np.unique(rows_R)
    counts = np.array([rule.counts(rewards_R[rows_R == row]) for row in distinct])
    sampler.observe(distinct, *counts.T)
