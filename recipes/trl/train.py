"""GRPO with TRL on the tiny model and Countdown, without a GPU: `train.py [METHOD] [STEPS]`."""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from dpsrl.config import PACKAGE_DIR
from dpsrl.data.countdown import TINY_TASK, generate
from dpsrl.rewards.countdown import score
from dpsrl.trl import select_prompts


def reward(completions, answer, **columns):
    return [score(completion, a).reward for completion, a in zip(completions, answer, strict=True)]


def main(method: str = "forecast", steps: int = 20, folder: str = "runs/trl") -> None:
    tiny = PACKAGE_DIR / "assets" / "tiny"
    rows = generate(500, seed=0, **TINY_TASK)
    dataset = Dataset.from_list([{"prompt": row["problem"], "answer": row["answer"]} for row in rows])
    args = GRPOConfig(
        output_dir=folder, max_steps=steps, num_generations=8, per_device_train_batch_size=64, learning_rate=2e-4,
        max_completion_length=32, beta=0.0, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, bf16=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny), reward_funcs=reward, args=args, train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(tiny),
    )  # fmt: skip
    sampler = select_prompts(trainer, method)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "frac_reward_zero_std" in log]
    mixed = [1 - log["frac_reward_zero_std"] for log in logs]
    print(f"{method}: mixed share {sum(mixed) / len(mixed):.2f}, {sampler.selector.coverage:.0%} of the prompts seen")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
