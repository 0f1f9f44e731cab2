"""`python -m dpsrl.simulate [worlds=a,b] [methods=a,b] [seeds=3] ...`: the real Controller against simulated prompts.

No model, no Ray: selection methods compared in seconds, with the same worlds for each. A clairvoyant that knows every
pass rate takes the likeliest groups to be mixed: the ceiling for one step, though not always for a whole run.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress

from dpsrl import plots, printed
from dpsrl.controller import Controller, Outcome
from dpsrl.exits import code_of
from dpsrl.files import check_writable, written_to
from dpsrl.machine import num_cores
from dpsrl.metrics import plain_record
from dpsrl.own import is_own, load_own
from dpsrl.selection import METHODS
from dpsrl.selection.options import nearest
from dpsrl.study.analysis import mean_interval
from dpsrl.types import UserError
from dpsrl.worlds import WORLDS, World, chance_mixed, rate_of

CLAIRVOYANT = "clairvoyant"
DYNAMIC = "uniform+mixed"  # DAPO's dynamic sampling
NUM_JUDGED = 256  # prompts per step drawn at random to judge predictions by, outside the run
USAGE = """usage: python -m dpsrl.simulate [key=value ...]

  worlds=a,b        of {worlds}, or my_module:MyWorld (a class or an instance of dpsrl.worlds.World)
  methods=a,b       of {methods}, or my_module:MyMethod;
                    METHOD+mixed admits mixed groups alone
  METHOD.option=x   an option of a method, as dps.decay=0.5
  seeds=3           runs of each; every method meets the same worlds
  steps=0           0: the world's own number
  batch=256         prompts per step, at most those of the smallest world
  rollouts=8        rollouts per prompt
  lag=0             steps that generation runs ahead of training
  against=uniform   differences are to this one of methods, paired by seed, with a 95% interval; without uniform
                    among them, to the first
  workers=0         processes; 0: one per core
  out=              folder of summary.json, simulate.png and simulate.svg; default runs/simulate-<time>"""


@dataclass
class Plan:
    """What the command line asked for."""

    worlds: list[str] = field(default_factory=lambda: list(WORLDS))
    methods: list[str] = field(default_factory=lambda: [*METHODS, DYNAMIC, CLAIRVOYANT])
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: int = 3
    steps: int = 0
    batch: int = 256
    rollouts: int = 8
    lag: int = 0
    against: str = "uniform"
    workers: int = 0
    out: str = ""


@dataclass
class Result:
    """One run: shares and Brier scores over all its steps; `mixed_T` per step."""

    world: str
    method: str
    seed: int
    mixed_share: float
    coverage: float
    brier_random: float  # of P(mixed), on prompts drawn at random
    brier_selected: float
    num_groups: int
    ms_per_step: float
    mixed_T: list[float]


# --- one run ----------------------------------------------------------------------------------------------


class Clairvoyant:
    """Stands in for a Controller and knows the pass rates, which `simulate` gives it before each step."""

    def __init__(self, batch: int, num_rollouts: int) -> None:
        self.batch, self.num_rollouts = batch, num_rollouts
        self.touched: set[int] = set()
        self.chance_N = np.zeros(0)

    def select(self) -> list[tuple[int, float]]:
        best = np.argpartition(-self.chance_N, self.batch)[: self.batch] if self.batch < self.chance_N.size else None
        rows = (np.arange(self.chance_N.size) if best is None else best).tolist()
        self.touched.update(rows)
        return [(row, float(self.chance_N[row])) for row in rows]

    def admit(self, outcomes: Sequence[Outcome]) -> None:
        pass

    def refill(self) -> list:
        return []

    def observe(self) -> None:
        pass


def simulate(world_name: str, method: str, seed: int, plan: Plan) -> Result:
    """One method in one world. The same seed gives the same start and the same noise, whatever the method."""
    world, n = find_world(world_name), plan.rollouts
    steps, batch = plan.steps or world.steps, plan.batch
    start, outcomes, judge = (np.random.default_rng([seed, stream]) for stream in range(3))
    logit_N, learnability_N = world.start(start)
    controller = build_controller(method, world.num_prompts, batch, seed, plan)
    past = deque([rate_of(logit_N)], maxlen=plan.lag + 1)  # pass rates under the latest policies, oldest first
    mixed_T, errors_selected, errors_random, num_groups, seconds = [], [], [], 0, 0.0
    for step in range(steps):
        rate_N, version = past[0], max(0, step - plan.lag)
        errors_random.append(judge_predictions(controller, rate_N, judge, n))
        mixed_of_round, rows_of_step = [], []
        seconds -= time.perf_counter()
        selected = controller.select()
        while selected:
            rows = np.array([row for row, _ in selected])
            chances = predicted(controller, rows)
            solved = outcomes.binomial(n, rate_N[rows])
            is_mixed = (solved > 0) & (solved < n)
            errors_selected.append(np.mean((chances - is_mixed) ** 2))
            mixed_of_round.append(is_mixed)
            rows_of_step.append(rows)
            controller.admit([Outcome(int(r), int(m), n, version) for r, m in zip(rows, solved, strict=True)])
            selected = controller.refill()
        controller.observe()
        seconds += time.perf_counter()
        mixed = np.concatenate([np.zeros(0, dtype=bool), *mixed_of_round])
        mixed_T.append(float(mixed.mean()) if mixed.size else 0.0)
        num_groups += mixed.size
        trained = np.concatenate(rows_of_step)[mixed] if mixed.size else np.zeros(0, dtype=np.int64)
        world.evolve(logit_N, learnability_N, trained[:batch], min(1.0, mixed.sum() / batch), step, start)
        past.append(rate_of(logit_N))
    coverage = len(controller.touched) / world.num_prompts if method == CLAIRVOYANT else controller.selector.coverage
    return Result(
        world_name, method, seed, float(np.mean(mixed_T)), coverage, float(np.mean(errors_random)),
        float(np.mean(errors_selected)), num_groups, 1e3 * seconds / steps, mixed_T,
    )  # fmt: skip


def judge_predictions(controller: Any, rate_N: np.ndarray, rng: np.random.Generator, num_rollouts: int) -> float:
    """Brier score of P(mixed) on prompts drawn at random, whose groups nobody learns from."""
    rows = rng.integers(rate_N.size, size=NUM_JUDGED)
    solved = rng.binomial(num_rollouts, rate_N[rows])
    if isinstance(controller, Clairvoyant):
        controller.chance_N = chance_mixed(rate_N, num_rollouts)
    return float(np.mean((predicted(controller, rows) - ((solved > 0) & (solved < num_rollouts))) ** 2))


def predicted(controller: Any, rows: np.ndarray) -> np.ndarray:
    """The chance of a mixed group; a third where the method predicts nothing, which is judged beside the others."""
    return controller.chance_N[rows] if isinstance(controller, Clairvoyant) else controller.selector.predict(rows)[:, 1]


def build_controller(method: str, num_prompts: int, batch: int, seed: int, plan: Plan) -> Any:
    if method == CLAIRVOYANT:
        return Clairvoyant(batch, plan.rollouts)
    name, _, admission = method.partition("+")
    config = {"method": name} | plan.options.get(name, {})
    ids = [str(row) for row in range(num_prompts)]
    return Controller(ids, batch, config, plan.rollouts, seed, admission=admission or "all")


def find_world(name: str) -> World:
    """A world by its name, or by the Python path of a class or an instance."""
    if name in WORLDS:
        return WORLDS[name]
    if not is_own(name):
        raise UserError(f"world {name!r} is unknown; {nearest(name, WORLDS)}, or give my_module:MyWorld.")
    found = load_own(name, f"world {name}")
    world = found() if isinstance(found, type) else found
    if not isinstance(world, World):
        raise UserError(f"world {name!r} is {type(world).__name__}, not a dpsrl.worlds.World; subclass that.")
    return world


# --- many runs --------------------------------------------------------------------------------------------


def run_all(plan: Plan, console: Console) -> list[Result]:
    """Every world x method x seed, spread over processes; longest worlds first."""
    jobs = [(w, m, s) for w in plan.worlds for m in plan.methods for s in range(plan.seeds)]
    jobs.sort(key=lambda job: -find_world(job[0]).num_prompts)
    num_workers = min(plan.workers or num_cores(), len(jobs))
    results = []
    with Progress(console=console, transient=True) as progress, ProcessPoolExecutor(num_workers) as pool:
        bar = progress.add_task("simulating", total=len(jobs))
        running = [pool.submit(simulate, *job, plan) for job in jobs]
        for done in as_completed(running):
            results.append(done.result())
            progress.advance(bar)
    return sorted(results, key=lambda r: (plan.worlds.index(r.world), plan.methods.index(r.method), r.seed))


def summarize(results: list[Result], plan: Plan) -> list[dict[str, Any]]:
    """One row per world and method: means over seeds, and the paired difference of the mixed share.

    None for what is no number: a share of the clairvoyant that did not run, an interval of one seed.
    """
    rows = []
    for world in plan.worlds:
        of = {m: [r for r in results if r.world == world and r.method == m] for m in plan.methods}
        ceiling = np.mean([r.mixed_share for r in of[CLAIRVOYANT]]) if CLAIRVOYANT in of else np.nan
        for method, runs in of.items():
            shares = np.array([r.mixed_share for r in runs])
            base = np.array([r.mixed_share for r in of[plan.against]]) if plan.against in of else shares * np.nan
            difference, half_width = mean_interval(shares - base)
            mean = {
                name: float(np.mean([getattr(r, name) for r in runs]))
                for name in ("coverage", "brier_random", "brier_selected", "num_groups", "ms_per_step")
            }
            row = {
                "world": world, "method": method, "mixed_share": float(shares.mean()),
                "of_clairvoyant": shares.mean() / ceiling if ceiling else None, "difference": difference,
                "half_width": half_width, **mean,
            }  # fmt: skip
            rows.append(plain_record(row))
    return rows


# --- what people see --------------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]], world: str, plan: Plan, console: Console) -> None:
    prompts, steps = find_world(world).num_prompts, plan.steps or find_world(world).steps
    head = [
        "method", "mixed share", "of clairvoyant", f"minus {plan.against}", "coverage", "Brier, random",
        "Brier, selected", "groups", "ms/step",
    ]  # fmt: skip
    lines = [head]
    for row in sorted((r for r in rows if r["world"] == world), key=lambda r: -r["mixed_share"]):
        own, ceiling = row["method"] in (plan.against, CLAIRVOYANT), row["of_clairvoyant"]
        interval = "" if row["half_width"] is None else f" ± {row['half_width']:.3f}"
        lines.append([
            row["method"], f"{row['mixed_share']:.3f}", "" if ceiling is None else f"{ceiling:.2f}",
            "" if own else f"{row['difference']:+.3f}{interval}", f"{row['coverage']:.2f}",
            f"{row['brier_random']:.3f}", f"{row['brier_selected']:.3f}", f"{row['num_groups']:,.0f}",
            f"{row['ms_per_step']:.1f}",
        ])  # fmt: skip
    title = f"{world}: {prompts:,} prompts, {steps} steps of {plan.batch} x {plan.rollouts}"
    printed.show(console, title, lines, set(head) - {"of clairvoyant", "Brier, selected"})


def draw(results: list[Result], plan: Plan, folder: Path) -> None:
    """Mixed share over steps, a panel per world: mean over seeds, and a centred moving mean."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(plots.STYLE):
        size = (3.1 * len(plan.worlds) + 0.6, 4.2)
        figure, panels = plt.subplots(1, len(plan.worlds), figsize=size, sharey=True, squeeze=False)
        for axes, world in zip(panels[0], plan.worlds, strict=True):
            for place, method in enumerate(plan.methods):
                curves = [r.mixed_T for r in results if r.world == world and r.method == method]
                mean_T = plots.smooth(np.mean(curves, axis=0))
                color, dash = ("#999999", ":") if method == CLAIRVOYANT else plots.style_of(place)
                width = 2.6 if method == "forecast" else 1.3
                axes.plot(np.arange(1, mean_T.size + 1), mean_T, dash, color=color, linewidth=width, label=method)
            axes.set_title(world)
            axes.set_xlabel("step")
        panels[0][0].set_ylabel("mixed share of generated groups")
        panels[0][0].set_ylim(0, 1)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"simulate.{suffix}", dpi=130)
        plt.close(figure)


# --- entry ------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> Plan:
    """The plan of a command line; UserError for what is unknown or out of range."""
    plan = Plan()
    whole = [name for name, value in vars(plan).items() if isinstance(value, int)]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not of the form key=value.")
        method, dot, option = name.rpartition(".")
        if dot:
            if method not in METHODS and not is_own(method):
                raise UserError(f"{argument}: method {method!r} is unknown; {nearest(method, METHODS)}.")
            try:
                plan.options.setdefault(method, {})[option] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise UserError(f"{argument}: {value!r} is no value; give a number, true, false or a word.") from None
        elif name in ("worlds", "methods"):
            setattr(plan, name, list(dict.fromkeys(part.strip() for part in value.split(",") if part.strip())))
        elif name in whole:
            if not value.isdecimal():
                raise UserError(f"{argument}: {name} must be a whole number.")
            setattr(plan, name, int(value))
        elif name in ("against", "out"):
            setattr(plan, name, value)
        else:
            raise UserError(f"unknown key {name!r}; {nearest(name, set(vars(plan)) - {'options'})}.")
    if plan.against not in plan.methods and any(argument.startswith("against=") for argument in arguments):
        raise UserError(f"against={plan.against} is not among methods; {nearest(plan.against, plan.methods)}.")
    return check(plan)


def check(plan: Plan) -> Plan:
    known = {*METHODS, CLAIRVOYANT, *(f"{method}+mixed" for method in METHODS)}
    for name, lowest in (("seeds", 1), ("batch", 1), ("rollouts", 2)):
        if getattr(plan, name) < lowest:
            raise UserError(f"{name}={getattr(plan, name)} must be at least {lowest}.")
    if not plan.worlds or not plan.methods:
        raise UserError("worlds and methods must name at least one each.")
    num_prompts, smallest = min((find_world(world).num_prompts, world) for world in plan.worlds)
    for method in plan.methods:
        if method not in known and not is_own(method.removesuffix("+mixed")):
            raise UserError(f"method {method!r} is unknown; {nearest(method, known)}.")
        if method != CLAIRVOYANT:
            batch = max(min(plan.batch, num_prompts), 2)
            build_controller(method, batch, 1, 0, plan)  # refuses options before anything runs
    for method in plan.options:
        if method not in {name.partition("+")[0] for name in plan.methods}:
            raise UserError(f"options of {method} would have no effect, since it is not among methods; leave them out.")
    if plan.batch > num_prompts:
        raise UserError(f"batch={plan.batch} is more than the {num_prompts} prompts of world {smallest}; give fewer.")
    if plan.against not in plan.methods:
        plan = replace(plan, against=plan.methods[0])
    return plan


def run(plan: Plan, console: Console) -> Path:
    """Simulates, prints the tables, and writes the folder, which it returns."""
    started = time.monotonic()
    folder = Path(plan.out or f"runs/simulate-{time.strftime('%Y%m%d-%H%M%S')}")
    check_writable(folder, "out")
    results = run_all(plan, console)
    rows = summarize(results, plan)
    for world in plan.worlds:
        show(rows, world, plan, console)
    content = {"plan": asdict(plan), "rows": rows, "runs": [asdict(result) for result in results]}
    with written_to(folder, "out"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(content, indent=1, allow_nan=False))
        draw(results, plan, folder)
    console.print(f"{len(results)} runs in {time.monotonic() - started:.0f} s; {folder}/simulate.png, summary.json")
    return folder


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(USAGE.format(worlds=", ".join(WORLDS), methods=", ".join([*METHODS, DYNAMIC, CLAIRVOYANT])))
        return 0

    def simulate() -> None:
        run(parse(arguments), Console())

    return code_of("dpsrl.simulate", simulate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
