"""`python -m dpsrl.train +recipe=NAME key=value ...`: configuration -> parts -> train() -> train_step().

The step, as the algorithm box of the paper has it:

    select B prompts        predict the solving states one step ahead, take the likeliest to be partially solved
    roll out G each         vLLM engines; groups are scored and admitted as they end
    observe                 the posterior learns from every scored group
    update                  GRPO/DAPO loss of the admitted groups
    sync                    the engines take the new weights, and prove it

With train.max_lag the first three, for the next batch, run during the update of this one.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.algo.packing import shares
from dpsrl.batch import lay_out_step, rollout_metrics, shape_rewards, shuffled, train_groups, whole_groups
from dpsrl.config import Config, help_text, load_config
from dpsrl.controller import Outcome
from dpsrl.early import EarlyTraining
from dpsrl.evaluate import exit_code
from dpsrl.groups import TRAINING
from dpsrl.launch import Run, launch, opening_lines, preflight
from dpsrl.metrics import read_lines, summarize, write_summary
from dpsrl.report import write_report
from dpsrl.types import Group


def train(run: Run) -> None:
    """Evaluates, runs every step, evaluates again; a checkpoint at the end in any case."""
    config = run.config
    evaluate(run, 0)
    run.metrics.close_step(0)
    run.screen.progress(config.train.steps)
    for step in range(1, config.train.steps + 1):
        last = step == config.train.steps
        with run.metrics.timer("time/step_s"):
            train_step(run, step)
            if last or (config.eval.every and step % config.eval.every == 0):
                evaluate(run, step)
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                save(run, step)
        run.metrics.close_step(step)


def train_step(run: Run, step: int) -> None:
    """One select-to-sync cycle."""
    metrics, started = run.metrics, time.monotonic()
    run.generating_s = run.training_s = 0.0
    if not run.batches:
        run.batches.append(generate(run))
    run.weights.begin_training()
    training = begin_update(run, run.batches.popleft(), step)
    while may_run_ahead(run, training):
        run.batches.append(generate(run))
    finish_update(run, training, step)
    with metrics.timer("time/sync_s"):
        metrics.add(run.weights.send(step) | {"sync/policy_version": step})
    elapsed_s = time.monotonic() - started
    metrics.add({"time/engine_idle_share": max(0.0, 1.0 - run.generating_s / elapsed_s)})
    metrics.add({"time/trainer_idle_share": max(0.0, 1.0 - run.training_s / elapsed_s)})


def generate(run: Run) -> list[Group]:
    """The next batch: selects, rolls out, scores, admits, refills, and lets the controller observe."""
    config, metrics = run.config, run.metrics
    run.num_generated += 1
    run.groups.score_s = 0.0
    started = time.monotonic()
    with metrics.timer("time/select_ms"):
        selected = run.controller.select()
    roll_out(run, selected)
    if config.train.streaming:
        run.early = EarlyTraining(config, run.trainers)
        for group in run.admitted.values():
            run.early.take(group)
    groups: list[Group] = []
    while run.groups.pending and not has_enough(run):
        groups.append(next_group(run))
    elapsed_s = time.monotonic() - started
    run.generating_s += elapsed_s
    metrics.add({"time/generate_s": elapsed_s - run.groups.score_s, "time/score_s": run.groups.score_s})
    run.num_rollouts += sum(len(group.rollouts) for group in groups)
    metrics.add({"rollout/num_rollouts": run.num_rollouts})
    if groups:
        metrics.add(rollout_metrics(groups))
    with metrics.timer("time/select_ms"):
        begun = tuple(run.early.begun) if run.early else ()
        metrics.add(run.controller.observe(ahead=run.groups.pending > 0, begun=begun))
        metrics.add({f"selection/occupancy/{state}": n for state, n in run.controller.occupancy().items()})
    return next_batch(run)


def roll_out(run: Run, selected: list[tuple[int, float]]) -> None:
    predicted, rollout = dict(selected), run.config.rollout
    run.predicted |= predicted
    run.groups.add(
        predicted, num_rollouts=rollout.num_rollouts, temperature=rollout.temperature,
        purpose=TRAINING, step=run.num_generated,
    )  # fmt: skip


def has_enough(run: Run) -> bool:
    """Whether the batch is there, where a step need not wait for what still runs."""
    return run.config.rollout.spare_share > 0 and len(run.admitted) >= run.config.train.batch


def next_group(run: Run) -> Group:
    """Waits for a group, asks whether it is trained on, and rolls out more prompts where it is not."""
    group, _ = run.groups.next()
    shape_rewards(group, run.config)
    counts = run.outcome_rule.counts(group.rewards_G)
    (admitted,) = run.controller.admit([Outcome(group.index, *counts, group.policy_version)])
    predicted = run.predicted.pop(group.index)
    run.metrics.add({"selection/predicted_share": predicted})
    run.group_log.write(run.num_generated, group, counts, admitted, predicted)
    if admitted:
        run.admitted[group.index] = group
        if run.early:
            run.early.take(group)
    elif more := run.controller.refill():
        roll_out(run, more)
    return group


def next_batch(run: Run) -> list[Group]:
    """The groups that the controller puts into the batch; says so when the cap on rollouts left it short."""
    groups = [run.admitted.pop(index) for index in run.controller.trained()]
    if run.config.selection.admission != "all" and len(groups) < run.config.train.batch:
        short = run.config.train.batch - len(groups)
        run.metrics.add({"selection/num_short": short})
        run.screen.line(
            f"warning: batch {run.num_generated} has {len(groups)} mixed groups of the {run.config.train.batch} "
            "wanted: no more prompts were left to roll out, or "
            f"selection.max_rounds={run.config.selection.max_rounds} was reached"
        )
    return groups


def may_run_ahead(run: Run, training: Any) -> bool:
    """Whether to generate another batch while the trainer is at work; the first of them always fits in."""
    train = run.config.train
    if len(run.batches) >= train.max_lag or run.num_generated >= train.steps:
        return False
    return not run.batches or (training is not None and run.trainers.running(training))


def begin_update(run: Run, batch: list[Group], step: int) -> Any:
    """Starts the trainer on the batch; None when there is too little for an update."""
    config, metrics = run.config, run.metrics
    if run.early:
        training, updates, run.early = run.early.finish(), run.early.updates, None
    else:
        batch = shuffled(batch, config.seed, step)
        groups = train_groups(batch, config, reference_kl(run, batch))
        enough = len(groups) >= config.train.num_updates
        updates = lay_out_step(groups, config) if enough else []
        training = run.trainers.begin(updates) if enough else None
    if training is None:
        run.screen.line(f"warning: step {step} has no update, because only {len(batch)} groups can be trained on")
    else:
        metrics.add({f"train/{name}_share": value for name, value in shares(updates).items()})
    run.num_trained += sum(score is not None for group in batch for score in group.scores)
    metrics.add({"rollout/num_trained": run.num_trained})
    return training


def reference_kl(run: Run, batch: list[Group]) -> list[np.ndarray] | None:
    """Nats by rollout, k1 over its tokens, where the KL to the reference is in the reward (RLOO 2402.14740, eq. 5)."""
    algo = run.config.algo
    if not (algo.kl_coef and algo.kl_in == "reward"):
        return None
    groups = whole_groups(batch)
    (update,) = lay_out_step(groups, run.config, num_updates=1, skip_constant=False)
    kl = run.trainers.reference_log_ratios(update)
    run.metrics.add({"train/reference_kl": float(kl.sum() / sum(r.size for g in groups for r in g.responses))})
    return np.split(kl, np.cumsum([len(group.responses) for group in groups])[:-1])


def finish_update(run: Run, training: Any, step: int) -> None:
    """Waits for the trainer; warns when engine and trainer have drifted apart."""
    if training is None:
        return
    measures = run.trainers.finish(training)
    run.training_s = measures.pop("busy_s")
    run.metrics.add({"time/train_s": run.training_s} | {f"train/{name}": value for name, value in measures.items()})
    if measures["mismatch_kl"] > run.config.algo.mismatch_alarm:
        run.screen.line(
            f"warning: step {step}: engine and trainer differ by {measures['mismatch_kl']:.3g} nats of KL, more than "
            f"algo.mismatch_alarm={run.config.algo.mismatch_alarm}: lower train.max_lag or trainer.lr, or check that "
            "both ends compute in the same type"
        )


def evaluate(run: Run, step: int) -> None:
    if not run.benchmarks.prompts:
        return
    run.screen.stage("evaluating")
    with run.metrics.timer("time/eval_s"):
        run.groups.drain()
        for result in run.benchmarks.evaluate(run.rollouts, step):
            run.metrics.add({f"eval/{result.benchmark}/avg@{result.num_rollouts}": result.avg})
            run.metrics.add({f"eval/{result.benchmark}/pass@{k}": value for k, value in result.pass_at.items()})


def save(run: Run, step: int) -> None:
    def write_model(folder: Path) -> None:
        run.trainers.save_model(folder)
        run.tokenizer.save_pretrained(folder)

    with run.metrics.timer("time/checkpoint_s"):
        run.folder.save_checkpoint(step, write_model, run.controller.state_dict(), run.config.checkpoint.keep)


def run(config: Config) -> None:
    started = time.monotonic()
    folder, tokenizer, prompts, benchmarks, prior = preflight(config)
    if config.dry_run:
        print("\n".join(opening_lines(config, prompts, benchmarks)))
        return
    with ExitStack() as stack:
        parts = launch(config, folder, tokenizer, prompts, benchmarks, prior, stack)
        parts.metrics.add({"time/start_s": time.monotonic() - started})
        train(parts)
        parts.screen.stage("writing the report")
        records, _ = read_lines(folder.metrics)
        summary = summarize(records, parts.weights.policy_version, time.monotonic() - started)
        write_summary(folder.summary, summary)
        report = write_report(folder.path)
        parts.screen.table(summary, folder.path, report)


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(help_text("train"))
        return 0
    return exit_code("dpsrl", lambda: run(load_config(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
