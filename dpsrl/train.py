"""`python -m dpsrl.train +recipe=NAME key=value ...`: configuration -> parts -> train() -> train_step().

The step, as the algorithm box of the paper has it:

    select B prompts        predict the solving states one step ahead, take the likeliest to be partially solved
    roll out G each         vLLM engines; groups are scored and admitted as they end
    observe                 the posterior learns from every scored group
    update                  GRPO/DAPO loss of the admitted groups
    sync                    the engines take the new weights, and prove it
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dpsrl.algo.advantages import advantages
from dpsrl.algo.packing import Update, lay_out, shares
from dpsrl.checkpoint import RunFolder, check_model_folder
from dpsrl.cluster import Cluster, check_resources, num_local_gpus, resource_plan
from dpsrl.config import CONTROLLER_KEYS, Config, help_text, load_config
from dpsrl.controller import Outcome
from dpsrl.data.build import load_tokenizer, training_prompts
from dpsrl.data.prompts import PromptSet
from dpsrl.evaluate import Benchmarks, exit_code
from dpsrl.groups import TRAINING, GroupStream
from dpsrl.metrics import GroupLog, Metrics, WandbSink, read_lines, summarize, write_summary
from dpsrl.pools import ControllerHandle, RolloutPool, TrainerPool, Weights, transfer_backend
from dpsrl.prior import Prior, read_prior
from dpsrl.report import write_report
from dpsrl.rewards import Scorer, check_function
from dpsrl.screen import Screen
from dpsrl.selection import build_selector
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.types import Group, TrainGroup, UserError

MAX_CANARY_TOKENS = 256


@dataclass
class Run:
    """The parts of a run, the admitted groups not yet trained on, and counts of rollouts generated and trained on."""

    config: Config
    folder: RunFolder
    screen: Screen
    tokenizer: Any
    controller: ControllerHandle
    groups: GroupStream
    rollouts: RolloutPool
    trainers: TrainerPool
    weights: Weights
    benchmarks: Benchmarks
    metrics: Metrics
    group_log: GroupLog
    outcome_rule: OutcomeRule
    admitted: dict[int, Group] = field(default_factory=dict)
    num_rollouts: int = 0
    num_trained: int = 0


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
    config, metrics = run.config, run.metrics
    with metrics.timer("time/select_ms"):
        selected = run.controller.select()
    generate(run, step, selected)
    with metrics.timer("time/select_ms"):
        metrics.add(run.controller.observe())
        metrics.add({f"selection/occupancy/{state}": n for state, n in run.controller.occupancy().items()})
    groups = train_groups(run, batch_of(run, step), step)
    run.num_trained += sum(len(group.responses) for group in groups)
    metrics.add({"rollout/num_trained": run.num_trained})
    if len(groups) >= config.train.num_updates:
        updates = layout(groups, config)
        metrics.add({f"train/{name}_share": value for name, value in shares(updates).items()})
        trained = run.trainers.train_step(updates)
        metrics.add({"time/train_s": trained.pop("busy_s")})
        metrics.add({f"train/{name}": value for name, value in trained.items()})
    else:
        run.screen.line(f"warning: step {step} has no update, because only {len(groups)} groups can be trained on")
    with metrics.timer("time/sync_s"):
        metrics.add({"sync/canary_diff": run.weights.send(step), "sync/policy_version": step})


def generate(run: Run, step: int, selected: list[tuple[int, float]]) -> None:
    """Rolls out the selected prompts and those that admission asks for on top; `run.admitted` gets what is admitted."""
    config, metrics = run.config, run.metrics
    predicted = dict(selected)
    groups: list[Group] = []
    run.groups.score_s = 0.0
    started = time.monotonic()
    for group, _ in run.groups.stream(
        predicted, num_rollouts=config.rollout.num_rollouts, temperature=config.rollout.temperature,
        purpose=TRAINING, step=step,
    ):  # fmt: skip
        counts = run.outcome_rule.counts(group.rewards_G)
        (admitted,) = run.controller.admit([Outcome(group.index, *counts, group.policy_version)])
        run.group_log.write(step, group, counts, admitted, predicted[group.index])
        groups.append(group)
        if admitted:
            run.admitted[group.index] = group
        elif more := dict(run.controller.refill()):
            predicted |= more
            run.groups.add(more)
    elapsed_s = time.monotonic() - started
    metrics.add({"time/generate_s": elapsed_s - run.groups.score_s, "time/score_s": run.groups.score_s})
    run.num_rollouts += sum(len(group.rollouts) for group in groups)
    metrics.add({"rollout/num_rollouts": run.num_rollouts})
    if groups:
        metrics.add(rollout_metrics(groups) | {"selection/predicted_share": float(np.mean(list(predicted.values())))})


def batch_of(run: Run, step: int) -> list[Group]:
    """The groups that the step is trained on; says so when the cap on rollouts left it short of a batch."""
    groups = [run.admitted.pop(index) for index in run.controller.trained()]
    if run.config.selection.admission != "all" and len(groups) < run.config.train.batch:
        short = run.config.train.batch - len(groups)
        run.metrics.add({"selection/num_short": short})
        run.screen.line(
            f"warning: step {step} has {len(groups)} mixed groups of the {run.config.train.batch} wanted: no more "
            f"prompts were left to roll out, or selection.max_rounds={run.config.selection.max_rounds} was reached"
        )
    return groups


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    num_scored = sum(group.num_scored for group in groups)
    measures = {
        "rollout/response_tokens": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
        "rollout/truncated_share": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "rollout/num_missing": len(rollouts) - num_scored,
    }
    if num_scored:
        rewards = np.concatenate([group.rewards_G for group in groups])
        measures["rollout/solve_rate"] = sum(group.num_solved for group in groups) / num_scored
        measures["rollout/reward"] = float(np.nanmean(rewards))
    return measures


def train_groups(run: Run, groups: list[Group], step: int) -> list[TrainGroup]:
    """Every rollout that has a reward, with its advantage; groups shuffled, so that updates are alike."""
    config = run.config
    order = np.random.default_rng([config.seed, step]).permutation(len(groups))
    groups = [groups[place] for place in order]
    rewards = [group.rewards_G for group in groups]
    if config.algo.kl_coef and config.algo.kl_in == "reward":
        rewards = with_kl(run, groups, rewards)
    made = []
    for group, advantages_G in zip(groups, advantages(rewards, config.algo.advantage), strict=True):
        kept = [
            i for i, (rollout, score) in enumerate(zip(group.rollouts, group.scores, strict=True))
            if score is not None and not (config.algo.mask_truncated and rollout.finish_reason == "length")
        ]  # fmt: skip
        if kept:
            made.append(train_group(group, kept, advantages_G))
    return made


def train_group(group: Group, kept: list[int], advantages_G: np.ndarray) -> TrainGroup:
    rollouts = [group.rollouts[i] for i in kept]
    responses, logprobs = [rollout.token_ids for rollout in rollouts], [rollout.logprobs for rollout in rollouts]
    return TrainGroup(group.prompt_token_ids, responses, logprobs, advantages_G[kept])


def with_kl(run: Run, groups: list[Group], rewards: list[np.ndarray]) -> list[np.ndarray]:
    """The rewards less the KL of each rollout to the reference, k1 over its tokens (RLOO, arXiv 2402.14740, eq. 5)."""
    whole = [train_group(group, list(range(len(group.rollouts))), np.zeros(len(group.rollouts))) for group in groups]
    ratios = run.trainers.reference_log_ratios(layout(whole, run.config, num_updates=1, skip_constant=False)[0])
    run.metrics.add({"train/reference_kl": float(ratios.sum() / sum(r.size for g in whole for r in g.responses))})
    parts = np.split(ratios, np.cumsum([rewards_G.size for rewards_G in rewards])[:-1])
    return [rewards_G - run.config.algo.kl_coef * part for rewards_G, part in zip(rewards, parts, strict=True)]


def layout(
    groups: list[TrainGroup], config: Config, num_updates: int | None = None, skip_constant: bool | None = None
) -> list[Update]:
    """Groups without a gradient are left out where the loss is nothing but advantage x something."""
    algo = config.algo
    only_advantages = not algo.entropy_coef and not (algo.kl_coef and algo.kl_in == "loss")
    return lay_out(
        groups, config.trainer.num_workers, num_updates or config.train.num_updates, config.trainer.micro_batch_tokens,
        algo.aggregation, config.model.max_response_tokens,
        only_advantages if skip_constant is None else skip_constant,
    )  # fmt: skip


def evaluate(run: Run, step: int) -> None:
    if not run.benchmarks.prompts:
        return
    run.screen.stage("evaluating")
    with run.metrics.timer("time/eval_s"):
        for result in run.benchmarks.evaluate(run.rollouts, step):
            run.metrics.add({f"eval/{result.benchmark}/avg@{result.num_rollouts}": result.avg})
            run.metrics.add({f"eval/{result.benchmark}/pass@{k}": value for k, value in result.pass_at.items()})


def save(run: Run, step: int) -> None:
    def write_model(folder: Path) -> None:
        run.trainers.save_model(folder)
        run.tokenizer.save_pretrained(folder)

    with run.metrics.timer("time/checkpoint_s"):
        run.folder.save_checkpoint(step, write_model, run.controller.state_dict(), run.config.checkpoint.keep)


# --- from configuration to parts ------------------------------------------------------------------------


def selector_config(config: Config) -> dict[str, Any]:
    """`build_selector`'s arguments: the method, and those options that are not left to it."""
    options = vars(config.selection).items()
    return {name: value for name, value in options if value is not None and name not in CONTROLLER_KEYS}


def controller_arguments(config: Config, prompt_ids: list[str]) -> dict[str, Any]:
    selection, batch = config.selection, config.train.batch
    return {
        "prompt_ids": prompt_ids,
        "batch": batch,
        "selector_config": selector_config(config),
        "num_rollouts": config.rollout.num_rollouts,
        "seed": config.seed,
        "admission": selection.admission,
        "max_rounds": selection.max_rounds,
        "num_audit": max(1, round(selection.audit_share * batch)) if selection.audit_share else 0,
    }


def preflight(config: Config) -> tuple[RunFolder, Any, PromptSet, Benchmarks, Prior]:
    """Everything that can be checked before a process starts; UserError on the first fault."""
    if not config.cluster.address:
        check_resources(resource_plan(config), num_local_gpus())
    folder = RunFolder(Path(config.run.dir or f"runs/{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"))
    folder.check_free()
    check_model_folder(config.model.path)
    build_selector(**selector_config(config), num_prompts=1, num_rollouts=config.rollout.num_rollouts, seed=config.seed)
    check_function(config.reward.fn)
    tokenizer = load_tokenizer(config.model.path)
    prompts = training_prompts(config, tokenizer)
    if config.train.batch > len(prompts):
        raise UserError(
            f"train.batch={config.train.batch} is larger than the data set's {len(prompts)} prompts: "
            f"set train.batch to at most {len(prompts)}"
        )
    return folder, tokenizer, prompts, Benchmarks(config, tokenizer), read_prior(config, prompts.ids)


def batch_arithmetic(config: Config, prompts: PromptSet) -> list[str]:
    """What a step does in numbers, and what it needs."""
    batch, rollouts, updates = config.train.batch, config.rollout.num_rollouts, config.train.num_updates
    sequences = batch * rollouts
    return [
        f"{len(prompts):,} prompts; a step selects {batch}, x {rollouts} rollouts = {sequences:,} sequences",
        f"{updates} update{'s' * (updates > 1)} per step of {sequences // updates:,} sequences, "
        f"{sequences // updates / config.trainer.num_workers:,.0f} per trainer rank, "
        f"at most {config.trainer.micro_batch_tokens:,} tokens per micro-batch",
        f"{config.train.steps} steps = {config.train.steps * sequences:,} rollouts, "
        f"{config.train.steps * batch / len(prompts):.2f} selections per prompt",
        f"resources: {resource_plan(config).words}; weights travel by {transfer_backend(config)}",
    ]


def canary_tokens(config: Config, prompts: PromptSet, tokenizer) -> np.ndarray:
    """The fixed sequence of the weight-sync check: the first prompt, then its text again as a likely continuation."""
    prompt = prompts[0]
    text = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    context = config.model.max_prompt_tokens + config.model.max_response_tokens
    # The engine scores it as a prompt, which must leave room for one token.
    return np.concatenate([prompt.token_ids, np.asarray(text, dtype=np.int32)])[: min(MAX_CANARY_TOKENS, context - 1)]


def opening_lines(config: Config, prompts: PromptSet, benchmarks: Benchmarks) -> list[str]:
    """What was read, and what will be done with it."""
    read = [line for source in (prompts, *benchmarks.prompts.values()) for line in source.report.sentences()]
    return [*read, *batch_arithmetic(config, prompts)]


def launch(
    config: Config, folder: RunFolder, tokenizer, prompts: PromptSet, benchmarks: Benchmarks, prior: Prior,
    stack: ExitStack,
) -> Run:  # fmt: skip
    """Starts every part; `stack` ends them in reverse order."""
    stack.enter_context(benchmarks)
    reward = config.reward
    scorer = stack.enter_context(Scorer(reward.fn, num_workers=reward.num_workers, deadline_s=reward.deadline_s))
    folder.create()
    OmegaConf.save(OmegaConf.structured(config), folder.config)
    screen = stack.enter_context(Screen.capture(folder.logs / "driver.log"))
    for line in [*opening_lines(config, prompts, benchmarks), f"run folder {folder.path}"]:
        screen.line(line)
    screen.stage("starting the engines and the trainer")
    cluster = stack.enter_context(Cluster(config, folder.logs))
    backend = transfer_backend(config)
    rollouts, trainers = RolloutPool(cluster, config, backend), TrainerPool(cluster, config, backend)
    controller = ControllerHandle(cluster, **controller_arguments(config, prompts.ids))
    trainers.start()
    for line in start_beliefs(config, controller, prior):
        screen.line(line)
    rollouts.policy_versions()
    weights = Weights(
        trainers, rollouts, canary_tokens(config, prompts, tokenizer), config.weight_sync.canary_tolerance, screen.line
    )
    weights.verify_start()
    sinks = [screen.step]
    if config.log.wandb:
        plain_config = OmegaConf.to_container(OmegaConf.structured(config))
        sinks.append(stack.enter_context(WandbSink(folder.path, config.log.wandb_project, plain_config, screen.line)))
    metrics, group_log = Metrics(folder.metrics, sinks), GroupLog(folder.groups)
    groups = GroupStream(prompts, rollouts, scorer, tokenizer, config.seed)
    return Run(
        config,
        folder,
        screen,
        tokenizer,
        controller,
        groups,
        rollouts,
        trainers,
        weights,
        benchmarks,
        metrics,
        group_log,
        outcome_rule(config),
    )


def start_beliefs(config: Config, controller: ControllerHandle, prior: Prior) -> list[str]:
    """Tells the controller what is known before the first step; one sentence for each source."""
    lines = []
    if prior.state is not None:
        num_known = controller.warm_start(prior.state)
        lines.append(f"beliefs about {num_known:,} prompts are taken over from {config.selection.warm_start}")
    if prior.rates is not None:
        controller.anchor(*prior.rates.of_rows())
        lines.append(prior.rates.sentence())
    return lines


def outcome_rule(config: Config) -> OutcomeRule:
    return OutcomeRule(config.selection.unsolved_at, config.selection.solved_at, config.selection.min_spread)


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
