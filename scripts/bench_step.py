"""Full training steps beside TRL's, on the same model, prompts, batch and response length, step by step in turns.

Each contender is a process of its own that makes one step when it is told to, so that all of them meet the same
weather. Two lengths: about 11 tokens, as the model ends by itself, and 256, with a model that cannot end; there the
reward is a coin that falls by the response's text, since an endless answer is never right.

    python scripts/bench_step.py worker NAME LENGTH     one contender: a line on stdin, a step, a JSON line on stdout
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dpsrl.machine import num_cores

PROMPTS, ROLLOUTS, WARM_UP = 32, 8, 2
LENGTHS = {"short": (12, 12), "long": (256, 3)}  # response tokens, steps measured
CONTENDERS = {
    "trl": None,
    "uniform": ["selection=uniform"],
    "dps": ["selection=dps"],
    "dps_lag1": ["selection=dps", "train.max_lag=1"],
}
PHASES = ("select_ms", "generate_s", "score_s", "train_s", "sync_s")
LR = 1e-5
DTYPE = "float32"


def coin(response: str, answer: object) -> float:
    return float(zlib.crc32(response.encode()) % 2)


# --- the contenders, each in its own process --------------------------------------------------------------


def endless_model(folder: Path) -> Path:
    """The tiny model with an end token that it never says, so that every response has full length."""
    from dpsrl.config import PACKAGE_DIR

    model = folder / "model"
    shutil.copytree(PACKAGE_DIR / "assets/tiny", model)
    for name, end in (("config.json", 258), ("generation_config.json", 258), ("tokenizer_config.json", "<|system|>")):
        content = json.loads((model / name).read_text())
        content["eos_token" if isinstance(end, str) else "eos_token_id"] = end
        (model / name).write_text(json.dumps(content))
    return model


def worker(name: str, length: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not ours

    def tell(**answer) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = str(endless_model(Path(folder))) if length == "long" else None
        arguments = [f"model.max_response_tokens={LENGTHS[length][0]}", f"train.batch={PROMPTS}",
                     "eval.benchmarks=[]", f"trainer.lr={LR}", f"model.dtype={DTYPE}", f"run.dir={folder}/run",
                     "train.steps=100000"]  # fmt: skip
        if length == "long":
            arguments += [f"model.path={model}", "reward.fn=bench_step:coin"]
        (trl_steps if name == "trl" else own_steps)(name, arguments, stack, tell)


def own_steps(name: str, arguments: list[str], stack: ExitStack, tell) -> None:
    from dpsrl.config import load_config
    from dpsrl.launch import launch, open_run, preflight
    from dpsrl.train import train_step

    config = load_config(["+recipe=quickstart", *arguments, *CONTENDERS[name]])
    checked = preflight(config)
    run = launch(config, checked, open_run(config, checked, stack), stack, None)
    tell(ready=True)
    for step, _ in enumerate(sys.stdin, 1):
        before, started = run.driver.num_rollouts, time.perf_counter()
        train_step(run, step)
        elapsed_s = time.perf_counter() - started
        record = run.metrics.close_step(step)
        num_rollouts = run.driver.num_rollouts - before
        tell(
            s=elapsed_s, rollouts=num_rollouts, mixed=num_rollouts * record["selection/mixed_share"],
            phases={phase: record[f"time/{phase}"] for phase in PHASES},
            padding=record["train/padding_share"], gb_per_s=record["sync/gb_per_s"],
        )  # fmt: skip


def trl_steps(_: str, arguments: list[str], stack: ExitStack, tell) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from dpsrl.config import load_config
    from dpsrl.data.build import load_tokenizer, training_prompts
    from dpsrl.rewards.countdown import score

    coined = "reward.fn=bench_step:coin" in arguments
    torch.set_num_threads(num_cores())
    config = load_config(["+recipe=quickstart", "selection=uniform", *arguments])
    tokenizer = load_tokenizer(config.model.path)
    prompts = training_prompts(config, tokenizer)
    rows = [{"prompt": [{"role": "user", "content": p.text}], "answer": p.answer} for p in prompts]
    num_mixed: list[int] = []

    def reward(completions, answer, **columns):
        rewards = [
            coin(c[0]["content"], a) if coined else score(c[0]["content"], a).reward
            for c, a in zip(completions, answer, strict=True)
        ]
        num_mixed.append(int(sum(0 < sum(g) < ROLLOUTS for g in np.reshape(rewards, (-1, ROLLOUTS)))))
        return rewards

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if not sys.stdin.readline():
                os._exit(0)
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            elapsed_s = time.perf_counter() - self.started
            tell(s=elapsed_s, rollouts=PROMPTS * ROLLOUTS, mixed=num_mixed[-1] * ROLLOUTS)

    args = GRPOConfig(
        output_dir=config.run.dir, max_steps=100_000, num_generations=ROLLOUTS, learning_rate=LR, beta=0.0,
        per_device_train_batch_size=PROMPTS * ROLLOUTS, max_completion_length=config.model.max_response_tokens,
        temperature=1.0, top_p=1.0, top_k=0, use_cpu=True, bf16=DTYPE == "bfloat16", report_to=[], save_strategy="no",
        logging_steps=1000, lr_scheduler_type="constant", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=getattr(torch, DTYPE))
    trainer = GRPOTrainer(
        model, reward_funcs=reward, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[Turns()],
    )  # fmt: skip
    tell(ready=True)
    trainer.train()


# --- the race ---------------------------------------------------------------------------------------------


class Contender:
    def __init__(self, name: str, length: str) -> None:
        command = [sys.executable, __file__, "worker", name, length]
        log = Path("runs") / f"bench-{name}-{length}.log"
        self.name, self.log = name, log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": str(num_cores()), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)},
        )  # fmt: skip
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; its output is in {self.log}")
        return json.loads(line)

    def step(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def memory_gib(self) -> float:
        """Proportional set size of the process and all it started, so that shared pages count once."""
        import psutil

        processes = [psutil.Process(self.process.pid)]
        processes += processes[0].children(recursive=True)
        return sum(process.memory_full_info().pss for process in processes) / 2**30

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def race(length: str, names: list[str]) -> dict[str, dict]:
    """For each contender the medians over its steps."""
    contenders = [Contender(name, length) for name in names]
    steps: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(WARM_UP + LENGTHS[length][1]):
        for contender in contenders:
            answer = contender.step()
            if turn >= WARM_UP:
                steps[contender.name].append(answer)
            time.sleep(0.3)  # threads that wait for work by spinning have given up by then
    results = {}
    for contender in contenders:
        mine = steps[contender.name]
        median = {key: float(np.median([step[key] for step in mine])) for key in mine[0] if key != "phases"}
        if "phases" in mine[0]:
            median["phases"] = {p: float(np.median([step["phases"][p] for step in mine])) for p in PHASES}
        results[contender.name] = median | {
            "per_s": float(np.median([step["rollouts"] / step["s"] for step in mine])),
            "mixed_per_s": sum(step["mixed"] for step in mine) / sum(step["s"] for step in mine),
            "gib": contender.memory_gib(),
        }
        contender.end()
    return results


def race_to_report(report: dict, length: str) -> None:
    """Adds `step/<length>/...` to the report: throughput beside TRL's, and where our step goes."""
    results = race(length, [name for name in CONTENDERS if length == "short" or name != "uniform"])
    trl = results.pop("trl")

    def put(name: str, value: float, unit: str, baseline: float, higher: bool = True) -> None:
        report[f"step/{length}/{name}"] = {
            "value": value, "unit": unit, "baseline": baseline, "ratio": value / baseline, "higher_is_better": higher,
        }  # fmt: skip

    for name, mine in results.items():
        put(f"{name}/rollouts_per_s", mine["per_s"], "rollouts/s", trl["per_s"])
        put(f"{name}/mixed_per_s", mine["mixed_per_s"], "mixed rollouts/s", trl["mixed_per_s"])
        put(f"{name}/memory", mine["gib"], "GiB", trl["gib"], higher=False)
        phases = {
            phase.partition("_")[0]: s / (1000 if phase.endswith("ms") else 1) for phase, s in mine["phases"].items()
        }
        for phase, seconds in phases.items():
            put(f"{name}/{phase}", seconds, "s, beside the step", mine["s"], higher=False)
        put(f"{name}/select_and_sync", phases["select"] + phases["sync"], "s, beside the step", mine["s"], higher=False)
        put(f"{name}/padding", mine["padding"], "share, beside 5%", 0.05, higher=False)
    put("overlap_gain", results["dps_lag1"]["per_s"], "rollouts/s, beside max_lag=0", results["dps"]["per_s"])


if __name__ == "__main__":
    assert sys.argv[1] == "worker", __doc__
    worker(*sys.argv[2:4])
