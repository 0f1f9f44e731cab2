"""From the configuration to the parts of a run: what can be checked before anything starts, then every process.

Owns `Run`, the preflight with the sentences it prints, and the start of all actors. What a step does with them is in
`train.py`.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dpsrl.checkpoint import RunFolder, check_model_folder
from dpsrl.cluster import Cluster
from dpsrl.config import CONTROLLER_KEYS, Config
from dpsrl.data.build import load_tokenizer, training_prompts
from dpsrl.data.prompts import PromptSet
from dpsrl.early import EarlyTraining
from dpsrl.evaluate import Benchmarks
from dpsrl.groups import GroupStream
from dpsrl.metrics import GroupLog, Metrics, WandbSink
from dpsrl.pools import ControllerHandle, RolloutPool, TrainerPool, Weights, transfer_backend
from dpsrl.prior import Prior, read_prior
from dpsrl.resources import check_here, resource_plan
from dpsrl.rewards import Scorer, check_function
from dpsrl.screen import Screen
from dpsrl.selection import build_selector
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.types import Group, UserError

MAX_CANARY_TOKENS = 256


@dataclass
class Run:
    """The parts of a run, and what goes from one step to the next."""

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
    admitted: dict[int, Group] = field(default_factory=dict)  # not yet in a batch
    predicted: dict[int, float] = field(default_factory=dict)  # P(mixed) of the prompts under way
    batches: deque[Any] = field(default_factory=deque)  # generated, not yet trained on
    num_generated: int = 0  # batches
    num_rollouts: int = 0
    num_trained: int = 0
    generating_s: float = 0.0  # in the step under way
    training_s: float = 0.0
    early: EarlyTraining | None = None  # of the batch under way, with train.streaming


def selector_config(config: Config) -> dict[str, Any]:
    """`build_selector`'s arguments: the method, and those options that are not left to it."""
    options = vars(config.selection).items()
    return {name: value for name, value in options if value is not None and name not in CONTROLLER_KEYS}


def controller_arguments(config: Config, prompt_ids: np.ndarray) -> dict[str, Any]:
    selection, batch = config.selection, config.train.batch
    return {
        "prompt_ids": prompt_ids,
        "batch": batch,
        "selector_config": selector_config(config),
        "num_rollouts": config.rollout.num_rollouts,
        "seed": config.seed,
        "admission": selection.admission,
        "max_rounds": selection.max_rounds,
        "num_spare": round(config.rollout.spare_share * batch),
        "num_audit": max(1, round(selection.audit_share * batch)) if selection.audit_share else 0,
    }


def preflight(config: Config) -> tuple[RunFolder, Any, PromptSet, Benchmarks, Prior]:
    """Everything that can be checked before a process starts; UserError on the first fault."""
    if not config.cluster.address:
        check_here(resource_plan(config))
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
    weights = Weights(trainers, rollouts, config, canary_tokens(config, prompts, tokenizer), screen.line)
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
