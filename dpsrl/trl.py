"""Any selection method inside TRL's `GRPOTrainer`, or any torch training loop.

    trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=dataset)
    select_prompts(trainer, "forecast")
    trainer.train()

Owns the sampler that asks a selector for the next prompts, the hook that tells it how they went, and the file beside
TRL's checkpoints that lets a resumed run go on with the same selections. Knows nothing of the rest of dpsrl's training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from dpsrl.selection import Selector, build_selector
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.types import UserError

STATE_FILE = "dpsrl_selection.npz"
INDEX = "dpsrl_index"  # column of the data set: the row, which rewards are reported by


class PromptSampler(Sampler):
    """Row indices for a DataLoader, chosen batch by batch as late as possible.

    An epoch is num_prompts // batch batches, whichever prompts are in them. Each batch is yielded `repeat_batch`
    times, and each of its prompts `repeat_prompt` times in a row. A loader that fetches ahead asks for a batch before
    the rewards of the one before are known: prompts without rewards are not selected again meanwhile, as long as
    enough others are left.
    """

    def __init__(self, selector: Selector, batch: int, repeat_prompt: int = 1, repeat_batch: int = 1) -> None:
        if not 1 <= batch <= selector.num_prompts:
            raise UserError(
                f"the batch of {batch} prompts must be from 1 to the {selector.num_prompts} of the data set; "
                "make it smaller or bring more prompts."
            )
        self.selector, self.batch = selector, batch
        self.repeat_prompt, self.repeat_batch = repeat_prompt, repeat_batch
        self.history: list[np.ndarray] = []  # batches of this epoch, to be gone through again by a resumed run
        self._replay: list[np.ndarray] = []
        self._waiting: dict[int, None] = {}  # selected, rewards not known yet

    def __len__(self) -> int:
        return self.selector.num_prompts // self.batch * self.batch * self.repeat_prompt * self.repeat_batch

    def __iter__(self) -> Iterator[int]:
        self.history, replay, self._replay = [], self._replay, []
        for number in range(self.selector.num_prompts // self.batch):
            rows = replay[number] if number < len(replay) else self._select()
            self.history.append(rows)
            for _ in range(self.repeat_batch):
                for row in rows.tolist():
                    yield from [row] * self.repeat_prompt

    def _select(self) -> np.ndarray:
        busy = list(self._waiting)
        if self.selector.num_prompts - len(busy) < self.batch:
            busy = []
        rows = self.selector.select(self.batch, exclude=busy)
        self._waiting |= dict.fromkeys(rows.tolist())
        return rows

    def observe(self, rows: np.ndarray, num_solved: np.ndarray, num_rollouts: np.ndarray) -> None:
        """How one batch of groups went; see `Selector.observe`. Once per generation batch."""
        self.selector.observe(rows, num_solved, num_rollouts)
        for row in np.asarray(rows).tolist():
            self._waiting.pop(row, None)

    def state_dict(self) -> dict[str, np.ndarray]:
        own = {
            "history": np.array(self.history, dtype=np.int64).reshape(-1, self.batch),
            "waiting": np.array(list(self._waiting), dtype=np.int64),
        }
        return own | {f"selector.{name}": array for name, array in self.selector.state_dict().items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """The next epoch begins with the batches that were chosen in the saved one, and goes on from there."""
        if state["history"].shape[1] != self.batch:
            raise UserError(
                f"the saved selection has batches of {state['history'].shape[1]} prompts, not {self.batch}; "
                "resume with the same batch size and number of generations."
            )
        selector_state = {k.removeprefix("selector."): v for k, v in state.items() if k.startswith("selector.")}
        self.selector.load_state_dict(selector_state)
        self._replay = list(state["history"])
        self._waiting = dict.fromkeys(state["waiting"].tolist())


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
            sampler.load_state_dict(dict(state))
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
