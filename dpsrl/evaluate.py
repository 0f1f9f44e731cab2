"""`python -m dpsrl.evaluate model.path=... eval.benchmarks=[...]`: avg@K and pass@k of a model, every response kept.

A checkpoint inside a run folder is evaluated with that run's prompt format and lengths unless told otherwise.
`train.py` calls the same `evaluate`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpsrl.checkpoint import CheckpointError, check_model_folder
from dpsrl.cluster import Cluster, StallError
from dpsrl.config import Config, help_text, load_config
from dpsrl.data.build import benchmark_prompts, load_tokenizer, reward_of
from dpsrl.data.prompts import PromptSet
from dpsrl.exits import code_of
from dpsrl.files import check_writable, write_text
from dpsrl.groups import EVALUATION, GroupStream
from dpsrl.installed import check_installed
from dpsrl.metrics import Lines, plain_record
from dpsrl.pools import RolloutPool, transfer_backend
from dpsrl.resources import check_here, num_local_gpus, resource_plan
from dpsrl.rewards import Scorer, try_function
from dpsrl.run_folder import RunFolder, readable, unwritable
from dpsrl.screen import Screen
from dpsrl.selection.outcomes import OutcomeRule
from dpsrl.types import Group, Prompt, UserError

Z_95 = 1.959964


@dataclass(frozen=True)
class EvalResult:
    """avg@K with its 95% interval over prompts, and pass@k for k = 1, 2, 4, ..., K."""

    benchmark: str
    num_prompts: int
    num_rollouts: int
    avg: float
    low: float
    high: float
    pass_at: dict[int, float]
    truncated_share: float
    num_missing: int


class Benchmarks:
    """Owns the benchmarks' prompts and a scorer for each reward function they need."""

    def __init__(self, config: Config, tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.prompts: dict[str, PromptSet] = {
            name: benchmark_prompts(name, config, tokenizer) for name in config.eval.benchmarks
        }
        self._open = ExitStack()
        self._scorers: dict[str, Scorer] = {}

    def __enter__(self) -> Benchmarks:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._scorers.clear()

    def scorer(self, name: str) -> Scorer:
        fn = reward_of(name, self.config)
        if fn not in self._scorers:
            reward = self.config.reward
            scorer = Scorer(fn, num_workers=reward.num_workers, deadline_s=reward.deadline_s)
            self._scorers[fn] = self._open.enter_context(scorer)
        return self._scorers[fn]

    def evaluate(
        self, rollouts: RolloutPool, step: int, log: AnswerLog | None = None, watch: Callable[..., None] | None = None
    ) -> list[EvalResult]:
        """One result per benchmark. watch: told what is going on, as `Screen.stage` is."""
        results = []
        for name, prompts in self.prompts.items():
            groups = GroupStream(prompts, rollouts, self.scorer(name), self.tokenizer, self.config.seed)
            results.append(evaluate(name, groups, self.config, step, log, watch))
        return results


class AnswerLog:
    """responses.jsonl and pass_rates.jsonl of an evaluation; what cannot be written is said once, and left out."""

    def __init__(self, folder: Path, rule: OutcomeRule, say: Callable[[str], None]) -> None:
        self.rule = rule
        self.responses, self.pass_rates = folder / "responses.jsonl", folder / "pass_rates.jsonl"
        self._responses, self._pass_rates = Lines(self.responses, -1, say), Lines(self.pass_rates, -1, say)

    def write(self, name: str, step: int, prompt: Prompt, group: Group, texts: list[str]) -> None:
        for text, rollout, score in zip(texts, group.rollouts, group.scores, strict=True):
            line = {
                "benchmark": name, "step": step, "prompt_id": prompt.id, "prompt": prompt.text, "answer": prompt.answer,
                "response": text, "correct": score and score.correct, "reward": score and score.reward,
                "num_tokens": len(rollout.token_ids), "finish_reason": rollout.finish_reason,
            }  # fmt: skip
            self._responses.write(line)
        num_solved, num_rollouts = self.rule.counts(group.rewards_G)
        line = {"prompt_id": group.prompt_id, "num_solved": num_solved, "num_rollouts": num_rollouts}
        self._pass_rates.write(line)

    def close(self) -> None:
        self._responses.close()
        self._pass_rates.close()


def evaluate(
    name: str, groups: GroupStream, config: Config, step: int, log: AnswerLog | None = None,
    watch: Callable[..., None] | None = None,
) -> EvalResult:  # fmt: skip
    """`eval.num_rollouts` samples of every prompt of one benchmark, scored."""
    finished: list[Group] = []
    groups.add(
        range(len(groups.prompts)),
        num_rollouts=config.eval.num_rollouts,
        temperature=config.eval.temperature,
        purpose=EVALUATION,
        step=0,  # every evaluation of a run draws with the same seeds: differences are the policy's
    )
    while groups.pending:
        if watch:
            watch("evaluating", len(finished), len(groups.prompts), f"{name} prompts")
        for group, texts in groups.take():
            finished.append(group)
            if log:
                log.write(name, step, groups.prompts[group.index], group, texts)
    finished.sort(key=lambda group: group.index)
    solved_N = np.array([group.num_solved for group in finished])
    scored_N = np.array([group.num_scored for group in finished])
    avg, low, high = mean_with_interval(solved_N[scored_N > 0] / scored_N[scored_N > 0])
    rollouts = [rollout for group in finished for rollout in group.rollouts]
    return EvalResult(
        name, len(finished), config.eval.num_rollouts, avg, low, high,
        pass_at(solved_N, scored_N),
        float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        len(rollouts) - int(scored_N.sum()),
    )  # fmt: skip


def outcome_rule(config: Config) -> OutcomeRule:
    return OutcomeRule(config.selection.unsolved_at, config.selection.solved_at, config.selection.min_spread)


def mean_with_interval(values_N: np.ndarray) -> tuple[float, float, float]:
    """Mean of per-prompt accuracies and its 95% interval; NaN for no values.

    Wilson's score interval (1927) at the effective number of trials p (1 - p) / var(mean), with the variance taken over
    prompts, since the samples of one prompt are not independent. Where all prompts agree it is the number of prompts,
    so that no success in 30 prompts gives 0 to 0.11 and not a certainty.
    """
    if values_N.size == 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(values_N.mean())
    variance = float(values_N.var(ddof=1)) / values_N.size if values_N.size > 1 else 0.0
    trials = mean * (1.0 - mean) / variance if variance > 0.0 else float(values_N.size)
    centre = (mean + Z_95**2 / (2.0 * trials)) / (1.0 + Z_95**2 / trials)
    half = Z_95 / (1.0 + Z_95**2 / trials) * math.sqrt(mean * (1.0 - mean) / trials + (Z_95 / (2.0 * trials)) ** 2)
    return mean, max(0.0, centre - half), min(1.0, centre + half)


def pass_at(solved_N: np.ndarray, scored_N: np.ndarray) -> dict[int, float]:
    """Mean over prompts of 1 - C(n - c, k) / C(n, k), the unbiased pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    k runs over the powers of two up to the smallest number of scored samples, prompts without any left out.
    """
    solved_N, scored_N = solved_N[scored_N > 0], scored_N[scored_N > 0]
    result, k = {}, 1
    while scored_N.size and k <= scored_N.min():
        i_K = np.arange(k)
        miss_N = np.prod(np.clip((scored_N - solved_N)[:, None] - i_K, 0, None) / (scored_N[:, None] - i_K), axis=1)
        result[k] = float(1.0 - miss_N.mean())
        k *= 2
    return result


# --- entry --------------------------------------------------------------------------------------------


def exit_code(program: str, action: Callable[[], None]) -> int:
    """As `code_of`, for entries that start a cluster."""
    return code_of(program, action, (UserError, StallError, CheckpointError))


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(help_text("evaluate"))
        return 0
    if not any(argument.startswith("cluster=") for argument in arguments):
        arguments = [f"cluster={'gpu1' if num_local_gpus() else 'cpu'}", *arguments]
    return exit_code("dpsrl.evaluate", lambda: run(load_config(arguments, entry="evaluate")))


def run(config: Config) -> None:
    """Evaluates one model and writes responses, pass rates and summary.json into a folder of its own."""
    folder, benchmarks, lines = preflight(config)
    if config.dry_run:
        print("\n".join(lines))
        return
    with ExitStack() as stack:
        stack.enter_context(benchmarks)
        stack.enter_context(folder.lock())
        try:
            folder.create()
            screen = stack.enter_context(Screen.capture(folder.logs / "driver.log"))
            log = stack.enter_context(closing(AnswerLog(folder.path, outcome_rule(config), screen.line)))
        except OSError as error:
            raise unwritable(folder.path, error) from error
        for line in lines:
            screen.line(line)
        screen.stage("starting the engines")
        cluster = stack.enter_context(Cluster(config, folder.logs, with_trainer=False))
        rollouts = RolloutPool(cluster, config, transfer_backend(config))
        rollouts.wait_until_up()
        results = benchmarks.evaluate(rollouts, 0, log, watch=screen.stage)
        screen.console.print(results_table(results))
        try:
            write_results(folder.summary, results)
        except OSError as error:
            raise unwritable(folder.path, error) from error
        screen.line(f"responses: {log.responses}")
        screen.line(f"pass rates, for selection.prior_rates: {log.pass_rates}")


def preflight(config: Config) -> tuple[RunFolder, Benchmarks, list[str]]:
    """The folder, the prompts, and what is to be said at the start; UserError on the first fault, nothing started."""
    check_installed()
    plan = resource_plan(config, with_trainer=False)
    if not config.cluster.address:
        check_here(plan)
    folder = RunFolder(Path(config.run.dir or f"runs/evaluate-{time.strftime('%Y%m%d-%H%M%S')}"))
    with readable():
        check_model_folder(config.model.path)
        folder.check_free()
        check_writable(folder.path, "run.dir")
        benchmarks = Benchmarks(config, load_tokenizer(config.model.path))
    samples, read, planned, remarks = config.eval.num_rollouts, [], [], []
    for name, prompts in benchmarks.prompts.items():
        read += prompts.report.sentences()
        planned.append(f"{name}: {len(prompts):,} prompts x {samples} samples = {len(prompts) * samples:,} responses")
        remarks += try_function(reward_of(name, config), prompts[0].answer, config.reward.deadline_s)
    return folder, benchmarks, [*read, *planned, f"resources: {plan.words}", *remarks]


def write_results(path: Path, results: list[EvalResult]) -> None:
    """What is no number, where not one reward was to be had, is null."""
    rows = [plain_record(vars(result)) for result in results]
    write_text(path, json.dumps(rows, indent=1, allow_nan=False))


def results_table(results: list[EvalResult]):
    from rich.table import Table

    table = Table("benchmark", "prompts", "avg@K", "95% interval", "pass@k", "cut", "missing")
    for r in results:
        passes = "  ".join(f"{k}: {value:.3f}" for k, value in r.pass_at.items())
        table.add_row(
            r.benchmark, str(r.num_prompts), f"avg@{r.num_rollouts} {r.avg:.3f}", f"{r.low:.3f} to {r.high:.3f}",
            passes, f"{r.truncated_share:.1%}", str(r.num_missing),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
