"""What one GPU can show: python scripts/gpu_check.py [CHECK ...] [--device cuda] [--out gpu_check.json]

Needs torch and transformers; DeepSpeed, Ray and vLLM are used where they are installed. Models have random weights, so
nothing is downloaded. On a CPU (--device cpu) it runs everything at toy sizes, to show that it works, not how fast.

    agreement   the card against the CPU, and flash against block attention
    trainer     tokens/s, share of the card's peak, memory, of the packed policy at 0.5B and 1.5B parameters; the same
                rollouts packed and padded, time against time
    sync        GB/s of a model's weights from GPU to GPU memory and to the host
    posterior   one dense step of the beliefs of ten million prompts beside copying their bytes, and the selector's own
    quickstart, math_0.5B, math_1.5B    whole runs, where vLLM is installed: steps of the math recipe with these shapes
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"  # as in the actors of a run; torch reads it as it is loaded

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dpsrl.algo.packing import MicroBatch, lay_out
from dpsrl.metrics import read_lines
from dpsrl.policy import Policy, has_flash_attention, load_policy, packed_batch
from dpsrl.types import TrainGroup

# hidden, intermediate, layers, heads, key-value heads, vocabulary: Qwen2.5's shapes
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "toy": (64, 128, 2, 4, 2, 500),
}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # bfloat16, dense
STEP_ROLLOUTS = 512  # of a step of the runs: 64 prompts, 8 rollouts each
RUN_KEYS = ["cluster=gpu1", "train.batch=64", "rollout.num_rollouts=8"]
MATH_KEYS = ["data.train=countdown", "data.countdown.format=short", "reward.fn=countdown", "eval.benchmarks=[]",
             "model.max_response_tokens=1024", "train.steps=3", *RUN_KEYS]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", default=list(CHECKS), help=f"of {', '.join(CHECKS)}; all when left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="gpu_check.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.checks) - set(CHECKS):
        parser.error(f"no check is called {', '.join(sorted(unknown))}: there are {', '.join(CHECKS)}")
    device = torch.device(arguments.device)
    report: dict = {
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.checks:
            report |= CHECKS[name](device, Path(folder))
            if on_card(device):  # what torch keeps for later would be missing to the runs
                gc.collect()
                torch.cuda.empty_cache()
            Path(arguments.out).write_text(json.dumps(report, indent=1))
    table = Table("what", "value", title=f"gpu_check on {report['card']}")
    for name, value in report.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def on_card(device: torch.device) -> bool:
    return device.type == "cuda"


def model_folder(size: str, folder: Path, dtype: torch.dtype) -> str:
    """A model of that shape with random weights, and the tiny model's tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from dpsrl.config import PACKAGE_DIR
    from dpsrl.data.build import load_tokenizer

    path = folder / f"{size}-{dtype}"
    if not path.exists():
        hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[size]
        config = Qwen2Config(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=32_768,
            eos_token_id=256, pad_token_id=257,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
        load_tokenizer(str(PACKAGE_DIR / "assets/tiny")).save_pretrained(path)
    return str(path)


def rollouts(num_groups: int, longest: int, vocab: int) -> list[TrainGroup]:
    """Groups of 8 with prompts of up to a quarter, and responses of a tenth to all of `longest` tokens."""
    rng, groups = np.random.default_rng(0), []
    for _ in range(num_groups):
        responses = [rng.integers(0, vocab, n).astype(np.int32) for n in rng.integers(longest // 10, longest, 8)]
        prompt = rng.integers(0, vocab, rng.integers(longest // 16, longest // 4)).astype(np.int32)
        logprobs = [np.full(response.size, -5.0, dtype=np.float32) for response in responses]
        groups.append(TrainGroup(prompt, responses, logprobs, rng.normal(0, 1, 8)))
    return groups


def seconds(action: Callable[[], None], device: torch.device, times: int = 5) -> float:
    """Median of `times`, after one that is not counted."""
    taken = []
    for _ in range(times + 1):
        if on_card(device):
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if on_card(device):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))


# --- the checks -------------------------------------------------------------------------------------------


def check_agreement(device: torch.device, folder: Path) -> dict:
    """Largest differences of logprobs, and of the gradient relative to its norm, in float32 and bfloat16."""
    groups = rollouts(4, 64, SHAPES["toy"][-1])
    ((micro,),) = lay_out(groups, 1, 1, 10**6)[0].ranks
    path, cpu = model_folder("toy", folder, torch.float32), torch.device("cpu")

    def run(where: torch.device, dtype: torch.dtype, flash: bool) -> tuple[torch.Tensor, torch.Tensor]:
        policy = load_policy(path, dtype, torch.float32).to(where)
        logprobs = policy(packed_batch(micro, where, flash))[0]
        logprobs.sum().backward()
        return logprobs.detach().cpu().double(), torch.cat(
            [p.grad.flatten().cpu().double() for p in policy.parameters()]
        )

    logprobs, gradient = run(cpu, torch.float32, False)
    cases = {"float32": (torch.float32, False), "bfloat16_blocks": (torch.bfloat16, False)}
    if has_flash_attention(device, torch.bfloat16):
        cases["bfloat16_flash"] = (torch.bfloat16, True)
    report = {}
    for name, (dtype, flash) in cases.items():
        other, other_gradient = run(device, dtype, flash)
        report[f"agreement/{name}/logprob"] = float((other - logprobs).abs().max())
        report[f"agreement/{name}/gradient"] = float((other_gradient - gradient).norm() / gradient.norm())
    return report


def check_trainer(device: torch.device, folder: Path) -> dict:
    """A forward and backward pass of one packed micro-batch, and the same rollouts padded, by transformers."""
    report = {}
    for size in ("0.5B", "1.5B") if on_card(device) else ("toy",):
        longest, budget = (1024, 16_384) if on_card(device) else (64, 1024)
        dtype = torch.bfloat16 if on_card(device) else torch.float32
        path = model_folder(size, folder, dtype)
        policy = load_policy(path, dtype, torch.float32, gradient_checkpointing=on_card(device)).to(device)
        micro = lay_out(rollouts(4, longest, 250), 1, 1, budget)[0].ranks[0][0]
        batch = packed_batch(micro, device, has_flash_attention(device, dtype))
        if on_card(device):
            torch.cuda.reset_peak_memory_stats()

        def packed(policy: Policy = policy, batch=batch) -> None:
            policy.zero_grad()
            policy(batch)[0].sum().backward()

        step_s = seconds(packed, device)
        num_tokens, num_rows = micro.token_ids_N.size, micro.row_tokens_M.size
        num_parameters = sum(p.numel() for p in policy.parameters())
        report[f"trainer/{size}/tokens_per_s"] = num_tokens / step_s
        report[f"trainer/{size}/rollout_tokens_per_s"] = num_rows / step_s  # as a framework counts that repeats prompts
        if on_card(device):
            peak = next((flops for card, flops in PEAK_TFLOPS.items() if card in torch.cuda.get_device_name()), None)
            tflops = flops_of(micro, num_parameters, SHAPES[size]) / step_s / 1e12
            report[f"trainer/{size}/tflops"] = tflops
            report[f"trainer/{size}/share_of_peak"] = tflops / peak if peak else float("nan")
            report[f"trainer/{size}/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        report[f"packing/{size}/gain"] = seconds(padded_pass(policy, path, micro, dtype, device), device) / step_s
        del policy
    return report


def flops_of(micro: MicroBatch, num_parameters: int, shape: tuple[int, ...]) -> float:
    """6 a parameter and token (recomputing is not useful work), and 12 x hidden for a layer and each pair of tokens."""
    pairs = float((micro.row_lengths_S.astype(np.float64) ** 2).sum()) / 2
    return 6.0 * num_parameters * micro.token_ids_N.size + 12.0 * shape[0] * shape[2] * pairs


def padded_pass(policy: Policy, path: str, micro: MicroBatch, dtype: torch.dtype, device: torch.device):
    """The micro-batch's rollouts padded to the longest, in mini-batches of 8, as without packing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device)
    if on_card(device):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    starts = np.cumsum(micro.row_lengths_S) - micro.row_lengths_S
    width = int(micro.row_lengths_S.max())
    ids, mask = (torch.zeros(micro.row_lengths_S.size, width, dtype=torch.long, device=device) for _ in range(2))
    for row, (start, length) in enumerate(zip(starts, micro.row_lengths_S, strict=True)):
        line = micro.row_tokens_M[start : start + length]
        ids[row, :length] = torch.tensor(micro.token_ids_N[line], device=device)
        mask[row, :length] = 1

    def run() -> None:
        model.zero_grad()
        for some_ids, some_mask in zip(ids.split(8), mask.split(8), strict=True):
            logits = model(input_ids=some_ids, attention_mask=some_mask, use_cache=False).logits
            logp = logits[:, :-1].float().log_softmax(-1).gather(-1, some_ids[:, 1:, None]).squeeze(-1)
            (logp * some_mask[:, 1:]).sum().backward()

    return run


def check_sync(device: torch.device, folder: Path) -> dict:
    """Copying all weights, bucket after bucket, as a sync does on one card (ipc) and through the host."""
    size = "0.5B" if on_card(device) else "toy"
    dtype = torch.bfloat16 if on_card(device) else torch.float32
    policy = load_policy(model_folder(size, folder, dtype), dtype, torch.float32).to(device)
    weights = [p.detach() for p in policy.parameters()]
    gigabytes = sum(w.numel() * w.element_size() for w in weights) / 1e9
    there = [torch.empty_like(w) for w in weights]
    host = [torch.empty_like(w, device="cpu", pin_memory=on_card(device)) for w in weights]

    def copy_to(targets: list[torch.Tensor]) -> None:
        for target, weight in zip(targets, weights, strict=True):
            target.copy_(weight, non_blocking=True)

    return {
        "sync/on_the_card_gb_per_s": gigabytes / seconds(lambda: copy_to(there), device),
        "sync/to_the_host_gb_per_s": gigabytes / seconds(lambda: copy_to(host), device),
    }


def check_posterior(device: torch.device, folder: Path) -> dict:
    """A dense step (forget, predict, select) of the beliefs on the device, and the selector's own, which is sparse."""
    from dpsrl.selection import build_selector

    num_prompts, batch = (10_000_000, 256) if on_card(device) else (100_000, 256)
    counts = torch.ones(num_prompts, 3, 3, device=device)
    posterior = torch.full((num_prompts, 3), 1 / 3, device=device)
    copy = torch.empty(num_prompts, 15, device=device)
    source = torch.ones_like(copy)

    def step() -> None:
        counts.sub_(1.0).mul_(0.7).add_(1.0)
        prior = torch.einsum("ns,nst->nt", posterior, counts / counts.sum(-1, keepdim=True))
        prior[:, 1].topk(batch)

    selector = build_selector("dps", num_prompts=num_prompts, num_rollouts=8, seed=0)
    rng = np.random.default_rng(0)

    def own_step() -> None:
        selector.observe(selector.select(batch), rng.integers(0, 9, batch), np.full(batch, 8))

    copy_s = seconds(lambda: copy.copy_(source), device)
    return {
        "posterior/prompts": num_prompts,
        "posterior/dense_step_ms": 1e3 * seconds(step, device),
        "posterior/copy_60_bytes_ms": 1e3 * copy_s,
        "posterior/selector_step_ms": 1e3 * seconds(own_step, torch.device("cpu")),
    }


def check_run(name: str, device: torch.device, folder: Path) -> dict:
    """A whole run on one GPU, engine and trainer in turns; metrics of its last step."""
    missing = [part for part in ("vllm", "ray", "deepspeed") if importlib.util.find_spec(part) is None]
    if missing or not on_card(device):
        return {name: f"left out: {', '.join(missing) + ' not installed' if missing else 'no GPU'}"}
    if name == "quickstart":
        keys = ["+recipe=quickstart", "model.dtype=bfloat16", "train.steps=8", *RUN_KEYS]
    else:
        size = name.removeprefix("math_")
        keys = ["+recipe=math", f"model.path={model_folder(size, folder, torch.bfloat16)}", *MATH_KEYS]
    run_dir = folder / name
    command = [sys.executable, "-m", "dpsrl.train", *keys, f"run.dir={run_dir}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        return {f"{name}/exit": done.returncode, f"{name}/output": done.stdout[-500:] + done.stderr[-1500:]}
    first, *_, last = read_lines(run_dir / "metrics.jsonl")[0]
    kept = ("time/step_s", "time/generate_s", "time/train_s", "time/sync_s", "sync/gb_per_s", "sync/canary_diff",
            "train/mismatch_kl", "train/mismatch_abs", "rollout/response_tokens")  # fmt: skip
    tokens = STEP_ROLLOUTS * last["rollout/response_tokens"]
    return {f"{name}/exit": 0, f"{name}/start_s": first["time/start_s"]} | {
        f"{name}/{key}": last[key] for key in kept if key in last
    } | {
        f"{name}/generated_tokens_per_s": tokens / last["time/generate_s"],
        f"{name}/trained_tokens_per_s": tokens / last["time/train_s"],
    }  # fmt: skip


RUNS = ("quickstart", "math_0.5B", "math_1.5B")
CHECKS = {
    "agreement": check_agreement, "trainer": check_trainer, "sync": check_sync, "posterior": check_posterior,
    **{name: partial(check_run, name) for name in RUNS},
}  # fmt: skip

if __name__ == "__main__":
    main()
