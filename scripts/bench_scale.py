"""What a large cluster asks of the processes that there is one of: the controller, and the driver with its messages.

`python scripts/bench.py scale`, a minute or two; `scale keep` puts what it finds into docs/study/constants.json, which
`dpsrl.study.scale` reckons with. The controller is the real one, with ten million prompts and the batches of 8 and of
512 GPUs, without Ray. Messages go through a local Ray: groups as the engines hand them to the driver, parts of an
update as the driver hands them to trainer ranks, and the small calls that a driver makes to many engines, here to a few
actors that do nothing. What others do at the same time, engines and Ray's own processes, is not in
the driver's CPU time; what a network adds is in nothing here.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable

import numpy as np

from dpsrl.algo.packing import Update, lay_out
from dpsrl.controller import Controller, Outcome
from dpsrl.study.scale import CONSTANTS, Step, record_measured
from dpsrl.types import Rollout, RolloutRequest, TrainGroup

NUM_PROMPTS, BATCHES, ROUNDS = 10_000_000, (128, 8192), 15
GROUPS, ACTORS, CALLS = 16, 4, 512  # of a message; that are called; outstanding at once, as 512 engines would have


def cpu_ms(action: Callable[[], object]) -> float:
    """Of this process alone, so that others on the machine count little. Median, after one that is not counted."""
    return float(np.median(times(action, time.process_time)))


def wall_ms(action: Callable[[], object]) -> float:
    """The least of all, which is what the machine does when the others let it."""
    return min(times(action, time.perf_counter))


def times(action: Callable[[], object], clock: Callable[[], float]) -> list[float]:
    """In ms, without the first."""
    taken = []
    for _ in range(1 + ROUNDS):
        start = clock()
        action()
        taken.append(1e3 * (clock() - start))
    return taken[1:]


def resident_gib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def bench_scale(report: dict) -> None:
    """Beside them: copying 60 bytes a prompt; pickling a message and back; its tokens and logprobs; a lone call."""
    for name, (value, baseline) in (controller() | messages()).items():
        report[f"scale/{name}"] = {
            "value": value, "unit": name.rpartition("_")[2], "baseline": baseline, "ratio": value / baseline,
            "higher_is_better": False,
        }  # fmt: skip


def keep(report: dict) -> None:
    """Makes what was found the constants of the cost model."""
    found = {name.removeprefix("scale/"): row["value"] for name, row in report.items() if name.startswith("scale/")}
    record_measured(CONSTANTS, found, os.getloadavg()[0])


# --- the controller ---------------------------------------------------------------------------------------


def controller() -> dict[str, tuple[float, float]]:
    """ms of CPU of a step: select, admit and observe; GiB of a controller of ten million prompts after them."""
    source, target = np.ones(60 * NUM_PROMPTS, dtype=np.uint8), np.ones(60 * NUM_PROMPTS, dtype=np.uint8)
    copy_ms = cpu_ms(lambda: np.copyto(target, source))
    found, before, rng = {}, resident_gib(), np.random.default_rng(0)
    for batch in BATCHES:
        mine = Controller(np.arange(NUM_PROMPTS, dtype=np.uint64), batch, {"method": "dps"}, num_rollouts=8, seed=0)

        def step(mine: Controller = mine) -> None:
            selected = mine.select()
            solved = rng.integers(0, 9, len(selected)).tolist()
            mine.admit([Outcome(index, right, 8) for (index, _), right in zip(selected, solved, strict=True)])
            mine.observe()
            mine.trained()

        found[f"controller_{batch}_ms"] = cpu_ms(step), copy_ms
        found["controller_gib"] = resident_gib() - before, source.nbytes / 2**30
        del mine
    return found


# --- messages ---------------------------------------------------------------------------------------------


def groups(num: int, step: Step) -> list[TrainGroup]:
    """Groups of a step as long as the model reckons with; all of its rollouts have a gradient."""
    rng = np.random.default_rng(0)
    return [
        TrainGroup(
            rng.integers(0, 150_000, step.prompt_tokens).astype(np.int32),
            [rng.integers(0, 150_000, int(step.response_tokens)).astype(np.int32) for _ in range(step.num_rollouts)],
            [rng.normal(-1, 1, int(step.response_tokens)).astype(np.float32) for _ in range(step.num_rollouts)],
            rng.normal(0, 1, step.num_rollouts),
        )
        for _ in range(num)
    ]


def messages() -> dict[str, tuple[float, float]]:
    """ms of the driver's CPU and MB for each group on its way; ms a call, of its CPU and in all."""
    import ray

    step = Step()
    some = groups(GROUPS, step)
    requests = [RolloutRequest(i, group.prompt_token_ids, 8, 1.0, i) for i, group in enumerate(some)]
    answer = [
        (i, [Rollout(*pair, "stop", [(0, pair[0].size)]) for pair in zip(g.responses, g.rollout_logprobs, strict=True)])
        for i, g in enumerate(some)
    ]

    def laid_out() -> list[Update]:
        return lay_out(some, 1, 1, 16_384, skip_constant=True)

    parts = laid_out()[0].ranks[0]
    ray.init(num_cpus=ACTORS, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:

        @ray.remote(num_cpus=0)
        class Engine:
            def submit(self, requests: list[RolloutRequest]) -> None:
                pass

            def poll(self, num_groups: int) -> list:
                """As an engine that has so many groups finished."""
                return answer[:num_groups]

        engines = [Engine.remote() for _ in range(ACTORS)]

        def each(method: str, argument: object, calls: int) -> list:
            return ray.get([getattr(engines[i % ACTORS], method).remote(argument) for i in range(calls)])

        sent = {
            "request": (requests, cpu_ms(lambda: ray.get(engines[0].submit.remote(requests)))),
            "rollouts": (answer, cpu_ms(lambda: each("poll", 1, GROUPS))),
            "update": (parts, cpu_ms(lambda: ray.get(ray.put(parts)))),
        }
        call_ms, wall_call_ms = (clock(lambda: each("poll", 0, CALLS)) / CALLS for clock in (cpu_ms, wall_ms))
        lone_ms, wall_lone_ms = (clock(lambda: each("poll", 0, 1)) for clock in (cpu_ms, wall_ms))
    finally:
        ray.shutdown()
    pickle_ms = {
        name: cpu_ms(lambda what=what: pickle.loads(pickle.dumps(what, 5))) for name, (what, _) in sent.items()
    }
    raw_mb = {"request": 4e-6 * step.prompt_tokens}
    found = {f"{name}_ms": (ms / GROUPS, pickle_ms[name] / GROUPS) for name, (_, ms) in sent.items()}
    for name, (what, _) in sent.items():
        mb = len(pickle.dumps(what, 5)) / 1e6 / GROUPS
        found[f"{name}_mb"] = mb, raw_mb.get(name, 8e-6 * step.num_rollouts * step.response_tokens)
    return found | {
        "lay_out_ms": (cpu_ms(laid_out) / GROUPS, pickle_ms["rollouts"] / GROUPS),
        "call_ms": (call_ms, lone_ms), "call_wall_ms": (wall_call_ms, wall_lone_ms),
    }  # fmt: skip
