"""`python -m dpsrl.study.peer +recipe=NAME key=value ...`: the same task trained by TRL's `GRPOTrainer`.

The model, prompts, reward, batch, learning rate, steps and held-out prompts are those of the same configuration, and
what is left in the run folder is read like a run of `dpsrl.train`. Sampling and training are TRL's own, on all cores,
with its loss at the same clipping. A run that was stopped begins anew. It ends with the study that started it, whose
guard sees to that.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.config import Config, load_config
from dpsrl.exits import code_of
from dpsrl.machine import num_cores
from dpsrl.metrics import Metrics, read_lines, summarize, write_summary
from dpsrl.run_folder import RunFolder
from dpsrl.types import UserError

# Sequences in one forward and backward pass.
MICRO_BATCH = 128


def train(config: Config) -> None:
    folder = RunFolder(Path(config.run.dir))
    with folder.lock():
        train_in(folder, config)


def train_in(folder: RunFolder, config: Config) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOTrainer

    from dpsrl.data.build import benchmark_prompts, load_tokenizer, training_prompts
    from dpsrl.rewards.countdown import score

    started = time.monotonic()
    torch.set_num_threads(num_cores())
    folder.create(resume=True)
    folder.config.write_text(f"seed: {config.seed}\n")
    folder.summary.unlink(missing_ok=True)
    tokenizer = load_tokenizer(config.model.path)
    prompts = training_prompts(config, tokenizer)
    rows = [
        {"prompt": [{"role": "user", "content": prompts[row].text}], "answer": prompts[row].answer, "row": row}
        for row in range(len(prompts))
    ]
    (benchmark,) = config.eval.benchmarks
    course = Course(
        config, Metrics(folder.metrics), benchmark, benchmark_prompts(benchmark, config, tokenizer), len(rows)
    )

    def reward(completions: list, answer: list, row: list, completion_ids: list, **columns: Any) -> list[float]:
        rewards = [score(c[0]["content"], a).reward for c, a in zip(completions, answer, strict=True)]
        course.generated(np.array(rewards), row, [len(ids) for ids in completion_ids])
        return rewards

    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=getattr(torch, config.model.dtype))
    trainer = GRPOTrainer(
        model, reward_funcs=reward, args=grpo_config(config), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[callback(course, tokenizer)],
    )  # fmt: skip
    trainer.train()
    course.metrics.close()
    records = read_lines(folder.metrics)[0]
    write_summary(folder.summary, summarize(records, config.train.steps, time.monotonic() - started))


def grpo_config(config: Config) -> Any:
    from trl import GRPOConfig

    sequences = config.train.batch * config.rollout.num_rollouts
    micro_batch = min(MICRO_BATCH, sequences)
    if sequences % micro_batch:
        raise UserError(f"train.batch x rollout.num_rollouts is {sequences}: make it a multiple of {micro_batch}")
    return GRPOConfig(
        output_dir=f"{config.run.dir}/trl", seed=config.seed, max_steps=config.train.steps, use_cpu=True,
        bf16=config.model.dtype == "bfloat16", num_generations=config.rollout.num_rollouts,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=sequences // micro_batch,
        max_completion_length=config.model.max_response_tokens, temperature=config.rollout.temperature, top_p=1.0,
        top_k=0, learning_rate=config.trainer.lr, weight_decay=config.trainer.weight_decay,
        lr_scheduler_type="constant",
        max_grad_norm=config.trainer.max_grad_norm, beta=0.0, loss_type="dapo", epsilon=config.algo.clip_low,
        epsilon_high=config.algo.clip_high, report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip


class Course:
    """Writes the metrics of the run: what each step generated, how long it took, and the evaluations."""

    def __init__(self, config: Config, metrics: Metrics, benchmark: str, held_out: Any, num_prompts: int) -> None:
        self.config, self.metrics, self.benchmark, self.held_out = config, metrics, benchmark, held_out
        self.num_prompts, self.num_rollouts, self.seen = num_prompts, 0, set[int]()
        self.step_started = 0.0

    def generated(self, rewards: np.ndarray, rows: list[int], lengths: list[int]) -> None:
        """One batch of rollouts, group by group."""
        solved_B = (rewards.reshape(-1, self.config.rollout.num_rollouts) >= 1.0).sum(axis=1)
        self.num_rollouts += rewards.size
        self.seen.update(rows)
        self.metrics.add(
            {
                "rollout/num_rollouts": self.num_rollouts,
                "rollout/solve_rate": float(np.mean(rewards >= 1.0)),
                "rollout/response_tokens": float(np.mean(lengths)),
                "selection/mixed_share": float(np.mean((solved_B > 0) & (solved_B < self.config.rollout.num_rollouts))),
                "selection/num_generated": solved_B.size,
                "selection/coverage": len(self.seen) / self.num_prompts,
            }
        )

    def is_due(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.config.train.steps or every > 0 and step % every == 0

    def evaluate(self, model: Any, tokenizer: Any) -> None:
        with self.metrics.timer("time/eval_s"):
            accuracy = held_out_accuracy(model, tokenizer, self.held_out, self.config)
        self.metrics.add({f"eval/{self.benchmark}/avg@{self.config.eval.num_rollouts}": accuracy})


def callback(course: Course, tokenizer: Any) -> Any:
    from transformers import TrainerCallback

    class Measuring(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_):
            course.evaluate(model, tokenizer)
            course.metrics.close_step(0)

        def on_step_begin(self, args, state, control, **_):
            course.step_started = time.monotonic()

        def on_step_end(self, args, state, control, model=None, **_):
            trained = time.monotonic()
            if course.is_due(state.global_step):
                course.evaluate(model, tokenizer)
            course.metrics.add({"time/train_s": trained - course.step_started})
            course.metrics.add({"time/step_s": time.monotonic() - course.step_started})
            course.metrics.close_step(state.global_step)

    return Measuring()


def held_out_accuracy(model: Any, tokenizer: Any, prompts: Any, config: Config) -> float:
    """Mean over `eval.num_rollouts` samples of every held-out prompt, by transformers' own generation."""
    import torch

    from dpsrl.rewards.countdown import score

    was_training = model.training
    model.eval()
    random_state = torch.random.get_rng_state()  # an evaluation leaves the training run as it was
    torch.manual_seed(config.seed)
    right = []
    items = [prompt for prompt in prompts for _ in range(config.eval.num_rollouts)]
    for start in range(0, len(items), 512):
        chunk = items[start : start + 512]
        token_ids = [prompt.token_ids for prompt in chunk]
        inputs = tokenizer.pad({"input_ids": token_ids}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            output = model.generate(
                **inputs, do_sample=True, temperature=config.eval.temperature, top_p=1.0, top_k=0,
                max_new_tokens=config.model.max_response_tokens, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [score(text, prompt.answer).correct for text, prompt in zip(texts, chunk, strict=True)]
    torch.random.set_rng_state(random_state)
    model.train(was_training)
    return float(np.mean(right))


def main(arguments: list[str]) -> int:
    return code_of("dpsrl.study.peer", lambda: train(load_config(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
