"""Selection inside the real `GRPOTrainer`, on the tiny model."""

import numpy as np
import pytest

from dpsrl.config import PACKAGE_DIR
from dpsrl.data.countdown import TINY_TASK, generate
from dpsrl.rewards.countdown import score
from dpsrl.trl import INDEX, STATE_FILE, select_prompts
from dpsrl.types import UserError

trl = pytest.importorskip("trl")
TINY = PACKAGE_DIR / "assets" / "tiny"


def build(folder, max_steps, method="forecast"):
    """A trainer of 6 prompts x 4 rollouts a step, each batch used in two optimizer steps; and what it trained on."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = []

    def reward(completions, answer, **columns):
        trained.append(columns[INDEX][::4])
        return [score(c, a).reward for c, a in zip(completions, answer, strict=True)]

    rows = generate(60, seed=0, **TINY_TASK)
    dataset = Dataset.from_list([{"prompt": row["problem"], "answer": row["answer"]} for row in rows])
    args = trl.GRPOConfig(
        output_dir=str(folder), max_steps=max_steps, num_generations=4, per_device_train_batch_size=12,
        steps_per_generation=2, gradient_accumulation_steps=1, max_completion_length=16, beta=0.0, use_cpu=True,
        bf16=False, report_to=[], save_steps=4, disable_tqdm=True, lr_scheduler_type="constant", learning_rate=2e-4,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(TINY), reward_funcs=reward, args=args, train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(TINY),
    )  # fmt: skip
    return trainer, select_prompts(trainer, method), trained


def test_prompts_trained_on_are_those_selected_and_a_resume_goes_on_with_the_same(tmp_path):
    trainer, sampler, trained = build(tmp_path / "whole", max_steps=8)
    trainer.train()
    assert sampler.selector.clock == len(trained) == 4  # each generated batch is observed once
    chosen = [rows.tolist() for rows in sampler.history]
    assert trained == chosen[:4] and all(len(set(rows)) == 6 for rows in chosen)
    assert (tmp_path / "whole/checkpoint-4" / STATE_FILE).is_file()

    resumed, sampler_again, trained_again = build(tmp_path / "again", max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert trained_again == trained[2:]
    np.testing.assert_array_equal(sampler_again.selector.predict(), sampler.selector.predict())


def test_a_checkpoint_without_selection_is_refused(tmp_path):
    trainer, _, _ = build(tmp_path, max_steps=2)
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(UserError, match="saved without prompt selection"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-9"))
