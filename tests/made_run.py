"""Run folders made by a toy process in place of training: as long as one likes, in seconds, the same each time."""

import json
import random
from pathlib import Path

import numpy as np

from dpsrl.metrics import summarize, write_summary

ROLLOUTS = 8
# 2,000 words that nobody knows, so that texts deflate as real ones do.
WORDS = ["".join(random.Random(i).choices("aeioutnrslhd", k=2 + i % 9)) for i in range(2000)]


def make_run(
    folder: Path, num_steps: int = 30, batch: int = 20, num_prompts: int = 200, finished: bool = True, kept: int = 2,
    words: int = 60, seed: int = 0,
) -> Path:  # fmt: skip
    """Prompts that get easier with each visit; selection goes by a noisy view of their chance of a mixed group."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    skill_N = rng.normal(-1.5, 2.5, num_prompts)
    last_N, visits_N = np.full(num_prompts, -1), np.zeros(num_prompts, dtype=int)
    records = [{"step": 0, "eval/countdown/avg@8": 0.3, "time/start_s": 20.0, "time/eval_s": 3.0}]
    groups, responses, audited, trained = [], [], [], 0
    for step in range(1, num_steps + 1):
        skill_N += rng.normal(0.004, 0.05, num_prompts)
        rate_N = 1 / (1 + np.exp(-skill_N))
        chance_N = 1 - rate_N**ROLLOUTS - (1 - rate_N) ** ROLLOUTS
        predicted_N = np.clip(np.where(visits_N > 0, chance_N + rng.normal(0, 0.15, num_prompts), 0.4), 0.01, 0.99)
        audit = rng.choice(num_prompts, max(1, batch // 20), replace=False)
        rest = np.setdiff1d(np.argsort(-(predicted_N + rng.random(num_prompts) * 0.2)), audit, assume_unique=True)
        chosen = np.concatenate([rest[: batch - audit.size], audit])
        solved = rng.binomial(ROLLOUTS, rate_N[chosen])
        for place, (prompt, num_solved) in enumerate(zip(chosen.tolist(), solved.tolist())):
            line = {"step": step, "prompt_id": f"{prompt:016x}", "policy_version": step - 1, "num_solved": num_solved}
            line |= {"num_rollouts": ROLLOUTS, "admitted": True, "predicted": float(predicted_N[prompt])}
            groups.append(line)
            if place < kept:
                responses.append(kept_line(step, prompt, num_solved, words))
        audited += (((solved > 0) & (solved < ROLLOUTS))[-audit.size :]).tolist()
        trained += ROLLOUTS * batch
        last_N[chosen] = np.where(solved == 0, 0, np.where(solved == ROLLOUTS, 2, 1))
        visits_N[chosen] += 1
        skill_N[chosen] += 0.12
        records.append(record_of(step, solved, predicted_N[chosen], last_N, visits_N, audited, trained))
    records[-1] |= {"eval/countdown/avg@8": 0.55, "time/eval_s": 3.0}
    write_lines(folder / "metrics.jsonl", records)
    write_lines(folder / "groups.jsonl", groups)
    write_lines(folder / "responses.jsonl", responses)
    (folder / "config.yaml").write_text(f"seed: {seed}\ntrain:\n  batch: {batch}\nselection:\n  method: dps\n")
    if finished:
        account = {"generated": trained, "trained": trained - 64, "carried": 0, "dropped": {"truncated": 64}}
        summary = summarize(records, policy_version=num_steps, wall_s=6.0 * num_steps + 30)
        write_summary(folder / "summary.json", summary | {"rollouts": account, "num_restarts": 0})
    return folder


def record_of(step, solved, predicted, last_N, visits_N, audited, trained):
    mixed = (solved > 0) & (solved < ROLLOUTS)
    record = {
        "step": step, "rollout/num_rollouts": trained, "rollout/num_trained": trained,
        "rollout/reward": float(solved.mean() / ROLLOUTS), "rollout/solve_rate": float(solved.mean() / ROLLOUTS),
        "selection/mixed_share": float(mixed.mean()), "selection/predicted_share": float(predicted.mean()),
        "selection/coverage": float((visits_N > 0).mean()), "time/step_s": 6.0, "time/generate_s": 3.2,
        "time/score_s": 0.3, "time/train_s": 2.0, "time/sync_s": 0.3, "time/select_ms": 20.0,
    }  # fmt: skip
    for state, name in ((-1, "unseen"), (0, "unsolved"), (1, "partial"), (2, "solved")):
        record[f"selection/occupancy/{name}"] = int((last_N == state).sum())
    return record | ({"selection/audit_mixed_share": float(np.mean(audited[-512:]))} if len(audited) >= 20 else {})


def kept_line(step, prompt, num_solved, words):
    draw = random.Random(f"{step}/{prompt}")
    responses = []
    for i in range(ROLLOUTS):
        text = f"prompt {prompt}: {' '.join(draw.choices(WORDS, k=words))}, rollout {i}, step {step}"
        response = {"text": text, "reward": float(i < num_solved), "correct": i < num_solved, "num_tokens": words}
        responses.append(response | {"finish_reason": "stop"})
    asked = {"prompt": f"Reach {prompt} with {prompt % 7} and {prompt % 11}.", "answer": str(prompt)}
    known = {"step": step, "prompt_id": f"{prompt:016x}"} | asked | {"policy_version": step - 1}
    return known | {"responses": responses}


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
