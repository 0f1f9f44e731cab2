"""`python -m dpsrl.train +recipe=NAME key=value ...`: configuration -> parts -> train() -> train_step().

The step, as the algorithm box of the paper has it:

    select B prompts        predict the solving states one step ahead, take the likeliest to be partially solved
    roll out G each         vLLM engines; groups are scored and admitted as they end
    observe                 the posterior learns from every scored group
    update                  GRPO/DAPO loss of the admitted groups
    sync                    the engines take the new weights, and prove it

With train.max_lag the first three, for the next batch, run during the update of this one. What was measured of a batch
stands in the line of the step that trains on it, as its groups do; seconds stand where they were spent.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl import sweep
from dpsrl.algo.packing import shares
from dpsrl.batch import lay_out_step, rollout_metrics, shape_rewards, shuffled, train_groups, whole_groups
from dpsrl.checkpoint import CheckpointError, write_state
from dpsrl.cluster import PartyLost, StallError
from dpsrl.config import Config, help_text, load_config
from dpsrl.controller import Outcome
from dpsrl.crew import Keeper
from dpsrl.early import EarlyTraining
from dpsrl.evaluate import exit_code
from dpsrl.launch import Checked, Run, ask, dry_run, launch, open_run, preflight
from dpsrl.metrics import Measured, read_events, read_lines, summarize, write_summary
from dpsrl.report import write_report
from dpsrl.resume import refuse_if_lost
from dpsrl.run_folder import unwritable
from dpsrl.screen import Screen
from dpsrl.stops import StopRequests
from dpsrl.types import Group

OF_SCORED = ("rollout/solve_rate", "selection/mixed_share", "selection/brier")  # null where nothing has a reward


def train(run: Run) -> bool:
    """Evaluates, runs every step, evaluates again; a checkpoint at the end in any case. False if asked to stop."""
    steps, every = run.config.train.steps, run.config.checkpoint.every
    if run.driver.step < 0:
        evaluate(run, 0)
        run.metrics.close_step(0)
        run.driver.step = 0
    run.screen.progress(steps, run.driver.step, read_lines(run.checked.folder.metrics)[0])
    for step in range(run.driver.step + 1, steps + 1):
        if run.cluster.stops.num:
            break
        with run.metrics.timer("time/step_s"):
            train_step(run, step)
            score = evaluate(run, step) if is_due(step, run.config.eval.every, steps) else None
            run.driver.step = step
            if is_due(step, every, steps):
                save(run, score)
        run.metrics.close_step(step)
    if run.driver.step > run.saved:
        save(run, None)
    return run.driver.step >= steps


def is_due(step: int, every: int, last: int) -> bool:
    return step == last or every > 0 and step % every == 0


def train_step(run: Run, step: int) -> None:
    """One select-to-sync cycle."""
    metrics, batches, started = run.metrics, run.driver.batches, time.monotonic()
    run.generating_s = run.training_s = 0.0
    metrics.add({"time/select_ms": 0.0, "time/generate_s": 0.0, "time/score_s": 0.0})  # ahead, it was in steps before
    if not batches:
        batches.append(generate(run))
    run.weights.begin_training()
    batch = batches.popleft()
    metrics.add(run.driver.measured.popleft())
    training = begin_update(run, batch, step)
    while may_run_ahead(run, training):
        batches.append(generate(run))
    finish_update(run, training, batch, step)
    metrics.add({"rollout/num_rollouts": run.driver.num_rollouts})
    run.screen.stage("syncing weights")
    with metrics.timer("time/sync_s"):
        metrics.add(run.weights.send(step) | {"sync/policy_version": step})
    elapsed_s = time.monotonic() - started
    metrics.add({"time/engine_idle_share": max(0.0, 1.0 - run.generating_s / elapsed_s)})
    metrics.add({"time/trainer_idle_share": max(0.0, 1.0 - run.training_s / elapsed_s)})


def generate(run: Run) -> list[Group]:
    """The next batch: selects, rolls out, scores, admits, refills, and lets the controller observe."""
    config, metrics, driver = run.config, run.metrics, run.driver
    driver.num_generated += 1
    run.groups.score_s, run.of_batch = 0.0, Measured()
    started = time.monotonic()
    with metrics.timer("time/select_ms"):
        selected = run.controller.select()
    roll_out(run, selected)
    if config.train.streaming:
        run.early = EarlyTraining(config, run.trainers)
        for group in driver.admitted.values():
            run.early.take(group)
    groups: list[Group] = []
    while run.groups.pending and not has_enough(run):
        run.screen.stage("generating", len(groups), len(groups) + run.groups.pending, "groups")
        groups += next_groups(run)
    run.response_log.write(driver.num_generated, run.checked.prompts)
    elapsed_s = time.monotonic() - started
    run.generating_s += elapsed_s
    metrics.add({"time/generate_s": elapsed_s - run.groups.score_s, "time/score_s": run.groups.score_s})
    driver.num_rollouts += sum(len(group.rollouts) for group in groups)
    if groups:
        run.of_batch.add(rollout_metrics(groups))
        check_rewards(run, groups)
    with metrics.timer("time/select_ms"):
        begun = tuple(run.early.begun) if run.early else ()
        run.of_batch.add(run.controller.observe(ahead=run.groups.pending > 0, begun=begun))
        run.of_batch.add({f"selection/occupancy/{state}": n for state, n in run.controller.occupancy().items()})
    batch = next_batch(run)
    driver.measured.append(dict.fromkeys(OF_SCORED, math.nan) | run.of_batch.reduced())
    return batch


def roll_out(run: Run, selected: list[tuple[int, float]]) -> None:
    step = run.driver.num_generated
    run.driver.under_way |= {index: (step, predicted) for index, predicted in selected}
    ask(run, [index for index, _ in selected], step)


def has_enough(run: Run) -> bool:
    """Whether the batch is there, where a step need not wait for what still runs."""
    return run.config.rollout.spare_share > 0 and len(run.driver.admitted) >= run.config.train.batch


def next_groups(run: Run) -> list[Group]:
    """Waits for groups, asks which are trained on, and rolls out more prompts in place of the others."""
    driver = run.driver
    taken = run.groups.take()
    groups = [group for group, _ in taken]
    for group in groups:
        shape_rewards(group, run.config)
    counts = [run.outcome_rule.counts(group.rewards_G) for group in groups]
    outcomes = [Outcome(group.index, *count, group.policy_version) for group, count in zip(groups, counts)]
    with run.metrics.timer("time/select_ms"):
        admitted, audited, more = run.controller.came_back(outcomes)
    for (group, texts), count, is_admitted, is_audited in zip(taken, counts, admitted, audited, strict=True):
        _, predicted = driver.under_way.pop(group.index)
        if predicted == predicted:  # NaN where the method predicts nothing
            run.of_batch.add({"selection/predicted_share": predicted})
        run.group_log.write(driver.num_generated, group, count, is_admitted, is_audited, predicted)
        run.response_log.offer(driver.num_generated, group, count, texts)
        driver.ledger.came_back(group, is_admitted)
        if is_admitted:
            driver.admitted[group.index] = group
            if run.early:
                run.early.take(group)
    if more:
        roll_out(run, more)
    return groups


def next_batch(run: Run) -> list[Group]:
    """The groups that the controller puts into the batch; says so when the cap on rollouts left it short."""
    groups = [run.driver.admitted.pop(index) for index in run.controller.trained()]
    if run.config.selection.admission != "all" and len(groups) < run.config.train.batch:
        short = run.config.train.batch - len(groups)
        run.of_batch.add({"selection/num_short": short})
        run.screen.line(
            f"warning: batch {run.driver.num_generated} has {len(groups)} mixed groups of the "
            f"{run.config.train.batch} wanted: no more prompts were left to roll out, or "
            f"selection.max_rounds={run.config.selection.max_rounds} was reached"
        )
    return groups


def check_rewards(run: Run, groups: list[Group]) -> None:
    """Ends the run where too many rewards are missing: a broken reward would else starve it without a word."""
    num_rollouts = sum(len(group.rollouts) for group in groups)
    num_missing = num_rollouts - sum(group.num_scored for group in groups)
    limit = run.config.reward.max_missing_share
    if num_missing > limit * num_rollouts:
        raise StallError(
            f"{num_missing} of {num_rollouts} rewards of batch {run.driver.num_generated} are missing, more than "
            f"reward.max_missing_share={limit} (so far {run.groups.scorer.missing}): mend reward.fn="
            f"{run.config.reward.fn} or raise reward.deadline_s={run.config.reward.deadline_s:g}, then resume=auto"
        )


def may_run_ahead(run: Run, training: Any) -> bool:
    """Whether to generate another batch while the trainer is at work; the first of them always fits in."""
    train, driver = run.config.train, run.driver
    if len(driver.batches) >= train.max_lag or driver.num_generated >= train.steps:
        return False
    return not driver.batches or (training is not None and run.trainers.running(training))


def begin_update(run: Run, batch: list[Group], step: int) -> Any:
    """Starts the trainer on the batch; None when there is too little for an update."""
    config, metrics, ledger = run.config, run.metrics, run.driver.ledger
    if run.early:
        training, updates, run.early = run.early.finish(), run.early.updates, None
        run.in_update = [sum(update.num_rollouts for update in updates)]
    else:
        in_order = shuffled(batch, config.seed, step)
        groups = train_groups(in_order, config, reference_kl(run, in_order))
        enough = len(groups) >= config.train.num_updates
        updates = lay_out_step(groups, config) if enough else []
        training = run.trainers.begin(updates) if enough else None
        run.in_update = [update.num_rollouts for update in updates]
    if training is None:
        run.screen.line(f"warning: step {step} has no update, because only {len(batch)} groups can be trained on")
    else:
        metrics.add({f"train/{name}_share": value for name, value in shares(updates).items()})
    ledger.taken(batch, config.algo.mask_truncated, has_update=training is not None)
    return training


def reference_kl(run: Run, batch: list[Group]) -> list[np.ndarray] | None:
    """Nats by rollout, k1 over its tokens, where the KL to the reference is in the reward (RLOO 2402.14740, eq. 5)."""
    algo = run.config.algo
    if not batch or not (algo.kl_coef and algo.kl_in == "reward"):
        return None
    groups = whole_groups(batch)
    (update,) = lay_out_step(groups, run.config, num_updates=1, skip_constant=False)
    kl = run.trainers.reference_log_ratios(update)
    run.metrics.add({"train/reference_kl": float(kl.sum() / sum(r.size for g in groups for r in g.responses))})
    return np.split(kl, np.cumsum([len(group.responses) for group in groups])[:-1])


def finish_update(run: Run, training: Any, batch: list[Group], step: int) -> None:
    """Waits for the trainer; warns when engine and trainer have drifted apart, or numbers were not finite."""
    measures: dict[str, Any] = {"loss": math.nan, "mismatch_kl": math.nan}  # of no update
    if training is not None:
        run.screen.stage("training")
        measures |= run.trainers.finish(training)
        run.training_s, skipped = measures.pop("busy_s"), measures.pop("skipped")
        run.driver.ledger.skipped(
            sum(num for num, is_skipped in zip(run.in_update, skipped, strict=True) if is_skipped)
        )
        watch_skipped(run, skipped, step)
    run.metrics.add({"time/train_s": run.training_s} | {f"train/{name}": x for name, x in measures.items()})
    run.metrics.add({"rollout/num_trained": run.driver.ledger.trained})
    mismatch_kl = measures["mismatch_kl"]
    if mismatch_kl > run.config.algo.mismatch_alarm:
        run.screen.line(
            f"warning: step {step}: engine and trainer differ by {mismatch_kl:.3g} nats of KL, more than "
            f"algo.mismatch_alarm={run.config.algo.mismatch_alarm}: lower train.max_lag or trainer.lr, or check that "
            "both ends compute in the same type"
        )


def watch_skipped(run: Run, skipped: list[bool], step: int) -> None:
    """Ends the run after too many updates in a row that were skipped. skipped: of each update of the step."""
    if num_skipped := sum(skipped):
        run.event("skipped", f"step {step}: {num_skipped} updates were skipped, since loss or gradient was not finite")
    longest = 0
    for is_skipped in skipped:
        run.num_skipped = run.num_skipped + 1 if is_skipped else 0
        longest = max(longest, run.num_skipped)
    if longest >= run.config.trainer.max_skipped:
        newest = next(reversed(run.checked.folder.list_checkpoints()), None)
        raise StallError(
            f"{longest} updates in a row were not finite, trainer.max_skipped="
            f"{run.config.trainer.max_skipped}: lower trainer.lr={run.config.trainer.lr}; "
            f"the last good checkpoint is {newest or 'none yet'}"
        )


def evaluate(run: Run, step: int) -> float | None:
    """The mean accuracy on the first benchmark, where there is one."""
    benchmarks = run.checked.benchmarks
    if not benchmarks.prompts:
        return None
    run.screen.stage("evaluating")
    with run.metrics.timer("time/eval_s"):
        run.groups.drain()
        results = benchmarks.evaluate(run.rollouts, step, watch=run.screen.stage)
        for result in results:
            run.metrics.add({f"eval/{result.benchmark}/avg@{result.num_rollouts}": result.avg})
            run.metrics.add({f"eval/{result.benchmark}/pass@{k}": value for k, value in result.pass_at.items()})
    return results[0].avg


def save(run: Run, score: float | None) -> None:
    """Writes a checkpoint; one that cannot be written costs nothing but itself."""

    def write_model(folder: Path) -> None:
        run.trainers.save_model(folder)
        run.checked.tokenizer.save_pretrained(folder)

    record = run.metrics.so_far(run.driver.step)
    parts = {
        "model": write_model,
        "trainer": run.trainers.save_state,
        "controller": lambda folder: write_state(folder, run.controller.state_dict()),
        "driver": lambda folder: run.driver.write(folder, run.elapsed_s(), record),
    }
    run.screen.stage("saving")
    try:
        with run.metrics.timer("time/checkpoint_s"):
            run.checked.folder.save_checkpoint(
                run.driver.step, parts, run.checked.about, run.config.checkpoint.keep, score,
                say=lambda text: run.event("checkpoint", text), tick=run.cluster.watchdog.beat,
            )  # fmt: skip
        run.saved = run.driver.step
    except CheckpointError as error:  # whatever went wrong in a part
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, PartyLost):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        run.event("checkpoint", f"warning: {error}")


# --- the whole run ------------------------------------------------------------------------------------


def run(config: Config, keeper: Keeper | None = None) -> None:
    """keeper: of the processes that go from one run to the next, where more than one is made."""
    if config.dry_run:
        print("\n".join(dry_run(config)))
        return
    checked = preflight(config)
    if is_finished(config, checked):
        print(f"{checked.folder.path} has finished, all {config.train.steps} steps: train.steps=N takes it further")
        return
    with ExitStack() as stack:
        stops = stack.enter_context(StopRequests())
        screen = open_run(config, checked, stack)
        summary = train_until_done(config, checked, screen, stops, keeper)
        if summary is None:
            return
        screen.stage("writing the report")
        try:
            write_summary(checked.folder.summary, summary)
        except OSError as error:
            screen.table(summary, checked.folder.path, None)
            raise unwritable(checked.folder.path, error) from error
        screen.table(summary, checked.folder.path, reported(checked.folder.path, screen))


def is_finished(config: Config, checked: Checked) -> bool:
    """Whether nothing is left to do, summary included."""
    checkpoint = checked.checkpoint
    return checkpoint is not None and checkpoint.step >= config.train.steps and checked.folder.summary.is_file()


def reported(run_dir: Path, screen: Screen) -> Path | None:
    """The page of a run that has ended; that it cannot be written is no reason to end badly."""
    try:
        return write_report(run_dir)
    except OSError as error:
        screen.line(f"warning: the report cannot be written ({error.strerror}): python -m dpsrl.report {run_dir} later")
        return None


def train_until_done(
    config: Config, checked: Checked, screen: Screen, stops: StopRequests, keeper: Keeper | None = None
) -> dict[str, Any] | None:
    """Trains, and goes back to the last checkpoint when a party is lost that the run cannot do without.

    The summary; None if the run was asked to stop before its end.
    """
    checkpoint, loss, has_started = checked.checkpoint, "", False
    for attempt in range(config.run.max_restarts + 1):
        try:
            with ExitStack() as stack:
                parts = launch(config, checked, screen, stack, checkpoint, stops, keeper)
                has_started = True
                return train_from(parts, checked, screen, loss)
        except PartyLost as lost:
            if attempt == config.run.max_restarts or not has_started:  # what kept it from starting would again
                raise
            newest, passed_over = checked.folder.newest_checkpoint()
            checkpoint = newest or checked.checkpoint
            if checkpoint is None:
                refuse_if_lost(checked.folder, [str(lost), *passed_over])
            back = f"step {checkpoint.step}" if checkpoint else "the start"
            if stops.num:
                screen.line(f"{lost}: asked to stop (SIGTERM), and this was not saved; resume=auto goes on from {back}")
                return None
            loss = f"{lost}: going back to {back} (restart {attempt + 1} of {config.run.max_restarts})"
            for line in [*passed_over, loss]:
                screen.line(line)
    raise AssertionError("the last attempt returns or raises")


def train_from(parts: Run, checked: Checked, screen: Screen, loss: str) -> dict[str, Any] | None:
    """Trains to the end, or to a request to stop. loss: why the run was started anew, if it was."""
    if loss:
        parts.metrics.event("restart", loss)
    else:
        parts.metrics.add({"time/start_s": time.monotonic() - checked.started})
    is_done = train(parts)
    first = max(parts.saved, 0) + 1  # of the steps that no checkpoint has
    if first <= parts.driver.step:
        screen.line(f"warning: steps {first} to {parts.driver.step} are in no checkpoint, for the reason given above")
    if not is_done:
        screen.line(f"asked to stop (SIGTERM): resume=auto goes on with step {first}")
        return None
    records, events = read_lines(checked.folder.metrics)[0], read_events(checked.folder.metrics)
    summary = summarize(records, parts.weights.policy_version, parts.elapsed_s())
    account = parts.driver.ledger.balance(parts.driver.num_carried)
    if not account["holds"]:
        parts.event("conservation", f"warning: rollouts are unaccounted for, which is a fault of dpsrl: {account}")
    return summary | {"rollouts": account, "num_restarts": sum(e["event"] == "restart" for e in events)}


def main(arguments: list[str], keeper: Keeper | None = None) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(help_text("train"))
        return 0
    if set(arguments) & set(sweep.FLAGS):
        return sweep.main(arguments)
    return exit_code("dpsrl", lambda: run(load_config(arguments), keeper))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
