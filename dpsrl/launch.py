"""From the configuration to the parts of a run: what can be checked before anything starts, then every process.

Owns `Run`, the preflight with the sentences it prints, and the start of all actors, new or from a checkpoint. What a
step does with them is in `train.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dpsrl.checkpoint import Checkpoint, check_model_folder, read_state
from dpsrl.cluster import Cluster
from dpsrl.config import Config, selector_config, selector_of
from dpsrl.crew import Keeper
from dpsrl.data.build import load_tokenizer, training_prompts
from dpsrl.data.prompts import PromptSet
from dpsrl.early import EarlyTraining
from dpsrl.evaluate import Benchmarks, outcome_rule
from dpsrl.files import check_writable, written_beside
from dpsrl.groups import TRAINING, GroupStream
from dpsrl.installed import check_installed
from dpsrl.metrics import GroupLog, Measured, Metrics
from dpsrl.own import is_own
from dpsrl.pools import ControllerHandle, RolloutPool, TrainerPool, transfer_backend
from dpsrl.prior import Prior, read_prior
from dpsrl.resources import check_here, resource_plan, shortfalls
from dpsrl.responses import ResponseLog
from dpsrl.resume import Driver, about_run, check_same_run, choose_checkpoint, read_driver
from dpsrl.rewards import Scorer, check_function, try_function
from dpsrl.run_folder import RunFolder, readable, unwritable
from dpsrl.screen import Screen
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.sinks import check_sinks, open_sinks
from dpsrl.stops import StopRequests
from dpsrl.types import UserError
from dpsrl.weights import Weights

MAX_CANARY_TOKENS = 256


@dataclass
class Run:
    """The parts of a run, and what goes from one step to the next."""

    config: Config
    checked: Checked
    screen: Screen
    cluster: Cluster
    controller: ControllerHandle
    groups: GroupStream
    rollouts: RolloutPool
    trainers: TrainerPool
    weights: Weights
    metrics: Metrics
    group_log: GroupLog
    response_log: ResponseLog
    outcome_rule: OutcomeRule
    driver: Driver  # what is saved of all this
    generating_s: float = 0.0  # in the step under way
    training_s: float = 0.0
    in_update: list[int] = field(default_factory=list)  # rollouts of each update under way
    num_skipped: int = 0  # updates in a row
    saved: int = -1  # step of the last checkpoint
    early: EarlyTraining | None = None  # of the batch under way, with train.streaming
    of_batch: Measured = field(default_factory=Measured)  # of the batch that is being generated

    def elapsed_s(self) -> float:
        """Since the run began, with what it took before it was taken up again."""
        return self.checked.elapsed_s + time.monotonic() - self.checked.started

    def event(self, kind: str, text: str) -> None:
        """A line on the screen and one in metrics.jsonl."""
        self.screen.line(text)
        self.metrics.event(kind, text)


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


@dataclass(frozen=True)
class Checked:
    """What preflight read, and where the run goes on from."""

    folder: RunFolder
    tokenizer: Any
    prompts: PromptSet
    benchmarks: Benchmarks
    prior: Prior
    saved: list[Path]  # the checkpoints that were there
    checkpoint: Checkpoint | None
    about: dict[str, Any]  # the run, in every checkpoint of it
    remarks: list[str]
    started: float  # on the monotonic clock
    elapsed_s: float  # of the run until that checkpoint


def preflight(config: Config) -> Checked:
    """Everything that can be checked before a process starts; UserError on the first fault."""
    with readable():
        return _checked(config, time.monotonic())


def _checked(config: Config, started: float) -> Checked:
    check_installed()
    if not config.cluster.address:
        check_here(resource_plan(config))
    folder = RunFolder(run_path(config))
    folder.check_free(resume=config.resume != "no")
    check_writable(folder.path, "run.dir")
    check_model_folder(config.model.path)
    own_method = is_own(config.selection.method)
    if not own_method:
        selector_of(config, num_prompts=1)
    check_function(config.reward.fn)
    check_loss(config)
    check_sinks(config.log.to)
    saved = folder.list_checkpoints()
    checkpoint, remarks = choose_checkpoint(config, folder)
    tokenizer = load_tokenizer(config.model.path)
    prompts = training_prompts(config, tokenizer)
    if config.train.batch > len(prompts):
        raise UserError(
            f"train.batch={config.train.batch} is larger than the data set's {len(prompts)} prompts: "
            f"set train.batch to at most {len(prompts)}"
        )
    if own_method:  # which may keep something for these prompts alone
        selector_of(config, len(prompts))
    remarks = remarks + try_function(config.reward.fn, prompts[0].answer, config.reward.deadline_s)
    benchmarks, prior = Benchmarks(config, tokenizer), read_prior(config, prompts.ids)
    about = about_run(config, prompts, benchmarks.prompts)
    if checkpoint is not None:
        remarks = remarks + check_same_run(checkpoint, config, about)
    elapsed_s = read_driver(checkpoint).elapsed_s
    return Checked(folder, tokenizer, prompts, benchmarks, prior, saved, checkpoint, about, remarks, started, elapsed_s)


def check_loss(config: Config) -> None:
    """Tries out a loss of the user's own; torch takes seconds to load."""
    if is_own(config.algo.loss):
        from dpsrl.algo.losses import load_loss

        load_loss(config.algo.loss)


def dry_run(config: Config) -> list[str]:
    """What a run would do and need. Where something is missing here, it prints what it can and raises UserError."""
    if not (short := shortfalls(config)):
        return opening_lines(config, preflight(config))
    print("\n".join(batch_arithmetic(config)), flush=True)
    numbered = "; ".join(f"({number}) {sentence}" for number, sentence in enumerate(short, 1))
    raise UserError(f"the run cannot start here. {numbered}" if len(short) > 1 else short[0])


def run_path(config: Config) -> Path:
    """run.dir; without it a new folder of the run's name and the time, or with resume=auto the last unfinished one."""
    if config.run.dir:
        return Path(config.run.dir)
    if config.resume == "auto":
        runs = map(RunFolder, sorted(Path("runs").glob(f"{config.run.name}-[0-9]*")))
        if unfinished := [run.path for run in runs if run.config.exists() and not run.summary.exists()]:
            return unfinished[-1]
    return Path(f"runs/{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def batch_arithmetic(config: Config, num_prompts: int = 0) -> list[str]:
    """What a step does in numbers, and what it needs. num_prompts: 0 where it is not known."""
    batch, rollouts, updates = config.train.batch, config.rollout.num_rollouts, config.train.num_updates
    sequences = batch * rollouts
    return [
        f"{f'{num_prompts:,} prompts; ' if num_prompts else ''}a step selects {batch}, x {rollouts} rollouts = "
        f"{sequences:,} sequences",
        f"{updates} update{'s' * (updates > 1)} per step of {sequences // updates:,} sequences, "
        f"{sequences // updates / config.trainer.num_workers:,.0f} per trainer rank, "
        f"at most {config.trainer.micro_batch_tokens:,} tokens per micro-batch",
        f"{config.train.steps} steps = {config.train.steps * sequences:,} rollouts"
        + (f", {config.train.steps * batch / num_prompts:.2f} selections per prompt" if num_prompts else ""),
        f"resources: {resource_plan(config).words}; weights travel by {transfer_backend(config)}",
    ]


def canary_tokens(config: Config, prompts: PromptSet, tokenizer) -> np.ndarray:
    """The fixed sequence of the weight-sync check: the first prompt, then its text again as a likely continuation."""
    prompt = prompts[0]
    text = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    context = config.model.max_prompt_tokens + config.model.max_response_tokens
    # The engine scores it as a prompt, which must leave room for one token.
    return np.concatenate([prompt.token_ids, np.asarray(text, dtype=np.int32)])[: min(MAX_CANARY_TOKENS, context - 1)]


def opening_lines(config: Config, checked: Checked) -> list[str]:
    """What was read, and what will be done with it."""
    sources = (checked.prompts, *checked.benchmarks.prompts.values())
    read = [line for source in sources for line in source.report.sentences()]
    return [*read, *batch_arithmetic(config, len(checked.prompts)), *checked.remarks]


def open_run(config: Config, checked: Checked, stack: ExitStack) -> Screen:
    """Takes the run folder, and turns what libraries print over to its logs."""
    folder = checked.folder
    stack.enter_context(folder.lock())
    if folder.list_checkpoints() != checked.saved:
        raise UserError(
            f"run.dir={folder.path} was written to by another run just now: start again, to go on from there"
        )
    try:
        folder.create(resume=config.resume != "no")
        with written_beside(folder.config) as partial:
            OmegaConf.save(OmegaConf.structured(config), partial)
        if checked.checkpoint is None or checked.checkpoint.step < config.train.steps:
            folder.summary.unlink(missing_ok=True)  # of the same run when it was to be shorter
        screen = stack.enter_context(Screen.capture(folder.logs / "driver.log"))
    except OSError as error:
        raise unwritable(folder.path, error) from error
    for line in [*opening_lines(config, checked), f"run folder {folder.path}"]:
        screen.line(line)
    return screen


def launch(
    config: Config, checked: Checked, screen: Screen, stack: ExitStack, checkpoint: Checkpoint | None,
    stops: StopRequests | None = None, keeper: Keeper | None = None,
) -> Run:  # fmt: skip
    """Starts every part, as it was at the checkpoint if there is one; `stack` ends them in reverse order.

    keeper: has the engines and the trainer of a run before, where there was one.
    """
    folder, tokenizer, prompts = checked.folder, checked.tokenizer, checked.prompts
    stack.enter_context(checked.benchmarks)
    reward = config.reward
    scorer = stack.enter_context(Scorer(reward.fn, num_workers=reward.num_workers, deadline_s=reward.deadline_s))
    screen.stage("starting the engines and the trainer")
    crew = stack.enter_context((keeper or Keeper()).crew(config, folder.logs, stops))
    cluster, rollouts, trainers = crew.cluster, crew.rollouts, crew.trainers
    controller = ControllerHandle(cluster, **controller_arguments(config, prompts.ids))
    crew.wait_until_up()
    driver = read_driver(checkpoint)
    plain_config: Any = OmegaConf.to_container(OmegaConf.structured(config))
    try:
        sinks = open_sinks(config.log.to, folder.path, config.log.wandb_project, plain_config, driver.step, screen.line)
        metrics = Metrics(folder.metrics, [screen.step, *map(stack.enter_context, sinks)], driver.step, screen.line)
        stack.callback(metrics.close)
        num_generated = driver.num_generated
        group_log = GroupLog(folder.groups, num_generated, screen.line)
        stack.callback(group_log.close)
        response_log = ResponseLog(folder.responses, config.log.responses, config.seed, num_generated, screen.line)
        stack.callback(response_log.close)
    except OSError as error:
        raise unwritable(folder.path, error) from error
    if driver.record:
        metrics.restore(driver.record)

    def say(text: str) -> None:
        screen.line(text)
        metrics.event("engine", text)

    weights = Weights(trainers, rollouts, config, canary_tokens(config, prompts, tokenizer), say)
    groups = GroupStream(prompts, rollouts, scorer, tokenizer, config.seed)
    run = Run(
        config, checked, screen, cluster, controller, groups, rollouts, trainers, weights, metrics, group_log,
        response_log, outcome_rule(config), driver, saved=driver.step,
    )  # fmt: skip
    if checkpoint is None:
        for line in start_beliefs(config, controller, checked.prior):
            screen.line(line)
        if crew.is_new:
            weights.verify_start()
        else:
            weights.restore(0)
    else:
        take_up(run, checkpoint)
    return run


def take_up(run: Run, checkpoint: Checkpoint) -> None:
    """Puts every part where it was; prompts whose rollouts were under way are rolled out again."""
    run.trainers.load_state(checkpoint.path / "trainer")
    run.controller.load_state_dict(read_state(checkpoint.path / "controller"))
    run.weights.restore(checkpoint.step)
    for index, (step, _) in run.driver.under_way.items():
        ask(run, [index], step)


def ask(run: Run, indices: Iterable[int], step: int) -> None:
    """Has prompts rolled out for training, with the seeds of that step."""
    rollout = run.config.rollout
    run.groups.add(
        indices, num_rollouts=rollout.num_rollouts, temperature=rollout.temperature, purpose=TRAINING, step=step
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
