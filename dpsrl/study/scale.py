"""`python -m dpsrl.study.scale`: what selection saves on large clusters, and which part gives out first, on paper.

Arithmetic alone, on the constants of docs/study/constants.json, each of which says where it comes from. A step is the
sum of its parts, on a cluster of which half the GPUs generate and half train (`cluster=gpu8`, `train.max_lag=0`); with
more GPUs the batch grows, so that each has as much to do as before. Prints what comes out, and puts all tables into
docs/results.md.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from os import cpu_count
from pathlib import Path
from typing import Any

from rich.console import Console

from dpsrl import printed
from dpsrl.checkpoint import reason
from dpsrl.exits import code_of
from dpsrl.files import write_text
from dpsrl.study.marks import fill_marks, markdown_of
from dpsrl.study.stored import Damaged, of_git, read_object
from dpsrl.types import UserError

CONSTANTS, PAGE = Path("docs/study/constants.json"), Path("docs/results.md")
BENCH = 'make bench ARGS="scale keep"'
Constants = dict[str, float]
Lines = list[list[str]]  # of a table, the first its columns


# --- what is reckoned with --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Qwen2.5's shapes. gpus_per_engine: tensor parallelism."""

    name: str
    num_parameters: float
    num_layers: int
    hidden: int
    kv_heads: int
    gpus_per_engine: int = 1

    @property
    def weight_bytes(self) -> float:
        return 2 * self.num_parameters  # bfloat16

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in bfloat16, heads of 128."""
        return 2 * 2 * self.num_layers * self.kv_heads * 128


@dataclass(frozen=True)
class Step:
    """A step's work. Lengths in tokens; longest: of the longest response an engine makes in it."""

    prompts_per_gpu: int = 16
    num_rollouts: int = 8
    prompt_tokens: int = 256
    response_tokens: float = 2048  # on average
    longest: float = 8192


@dataclass(frozen=True)
class Method:
    """mixed: share of generated groups. refills: generates until there is a batch of mixed groups, all at once or in
    whole batches, each of which waits for the one before and whose surplus is thrown away. longer: the responses it
    generates, over uniform sampling's; those of mixed groups, which are trained on, are as long for all.
    """

    name: str
    mixed: float
    refills: bool = False
    whole_batches: bool = False
    longer: float = 1.0

    @property
    def rounds(self) -> int:
        """Of generating in a step, one after the other."""
        return math.ceil(1 / self.mixed) if self.refills and self.whole_batches else 1

    def groups(self, batch: int) -> tuple[float, float]:
        """(generated, mixed and trained on) in a step. The others have no gradient, and the trainer leaves them out."""
        if not self.refills:
            return batch, batch * self.mixed
        return (self.rounds * batch if self.whole_batches else batch / self.mixed), batch


MODELS = (
    Model("1.5B", 1.54e9, 28, 1536, 2),
    Model("7B", 7.62e9, 28, 3584, 4),
    Model("32B", 32.8e9, 64, 5120, 8, gpus_per_engine=4),
)
CLUSTERS = (8, 64, 512)
SAVINGS = (("dps", "dynamic"), ("dps", "uniform"), ("dps, refilled", "dynamic"))  # whose, of whose time
MIDDLE = MODELS[1], CLUSTERS[1]  # where one input at a time is changed
ONE_PLACE = ("sync", "select", "controller", "store", "lay_out")  # parts that more GPUs do not make shorter
WORDS = {
    "generate": "generating", "train": "training", "sync": "the sync", "select": "selection",
    "controller": "messages to the controller", "store": "moving groups through the object store",
    "lay_out": "laying out the update",
}  # fmt: skip


def methods(c: Constants) -> dict[str, Method]:
    uniform, dps = c["mixed_share_uniform"], c["mixed_share_dps"]
    made = (
        Method("uniform", uniform), Method("dynamic", uniform, refills=True),
        Method("dps", dps), Method("dps, refilled", dps, refills=True),
    )  # fmt: skip
    return {method.name: method for method in made}


def record_measured(path: Path, found: dict[str, float], load: float) -> None:
    """Puts newly measured values into the file, with the day and the machine; their units and notes stay."""
    entries = json.loads(path.read_text())
    where = f"{platform.system()} {platform.machine()}, {cpu_count()} cores, no GPU, load {load:.1f}"
    fresh = {"from": "measured", "where": where, "date": datetime.now(UTC).date().isoformat(), "command": BENCH}
    for name, value in found.items():
        entries[name] = entries[name] | {"value": float(f"{value:.3g}")} | fresh
    write_constants(path, entries)


def write_constants(path: Path, entries: dict[str, Any]) -> None:
    """A constant a line."""
    lines = ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in entries.items())
    write_text(path, f"{{\n{lines}\n}}\n")


# --- a step -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by part, and what it trained on."""

    parts: dict[str, float]
    num_trained: float
    num_gpus: int
    ahead: bool = False  # generating the next batch while training on this one

    @property
    def step_s(self) -> float:
        hidden = min(self.parts["generate"], self.parts["train"]) if self.ahead else 0.0
        return sum(self.parts.values()) - hidden

    @property
    def hours(self) -> float:
        """For a thousand mixed groups that are trained on."""
        return self.step_s / 3600 * 1000 / self.num_trained

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_gpus

    def share(self, part: str) -> float:
        return self.parts[part] / self.step_s


def cost(model: Model, num_gpus: int, method: Method, step: Step, c: Constants, ahead: bool = False) -> Cost:
    longer = replace(step, response_tokens=step.response_tokens * method.longer)
    generated, trained = method.groups(step.prompts_per_gpu * num_gpus)
    engines = max(1.0, num_gpus / 2 / model.gpus_per_engine)
    generate = method.rounds * generate_s(model, longer, generated / method.rounds / engines, c)
    length = step.response_tokens / Step.response_tokens  # constants of messages are of groups as long as Step's
    parts = {
        "generate": generate,
        "train": train_s(model, step, trained / (num_gpus / 2), c),
        "sync": sync_s(model, num_gpus, c),
        "select": select_s(generated, c),
        # A group that comes back is one call at most; select, observe, trained, occupancy come once.
        "controller": (generated + 4) * c["call_ms"] / 1e3,
        # Each engine is polled once a second at least, and called once to submit and three times in a sync.
        "store": (
            generated * (c["request_ms"] + c["rollouts_ms"] * length * method.longer)
            + trained * c["update_ms"] * length
            + engines * (generate + 4) * c["call_ms"]
        ) / 1e3,
        "lay_out": trained * c["lay_out_ms"] * length / 1e3,
    }  # fmt: skip
    return Cost(parts, trained, num_gpus, ahead)


def generate_s(model: Model, step: Step, num_groups: float, c: Constants) -> float:
    """One engine on so many groups: a decoding step reads all weights, and each token its cache.

    There are as many decoding steps as the longest response has tokens, or more where not all rollouts fit in at once.
    """
    gpus, num_rollouts, length = model.gpus_per_engine, num_groups * step.num_rollouts, step.response_tokens
    context = step.prompt_tokens + length / 2  # tokens in the cache of a rollout, on average
    room = c["engine_memory_share"] * c["gpu_memory_gb"] * 1e9 * gpus - model.weight_bytes
    together = min(num_rollouts, c["max_num_seqs"], room / (context * model.kv_bytes))
    decoding_steps = max(step.longest, num_rollouts * length / together)
    num_bytes = decoding_steps * model.weight_bytes + num_rollouts * length * context * model.kv_bytes
    memory_s = num_bytes / (gpus * c["memory_gb_per_s"] * 1e9 * c["generate_share_of_bandwidth"])
    return max(memory_s, 2 * model.num_parameters * num_rollouts * length / (gpus * c["peak_tflops"] * 1e12))


def train_s(model: Model, step: Step, num_groups: float, c: Constants) -> float:
    """One GPU on so many groups: a prompt goes through the layers once; 6 FLOP a parameter and token, and attention."""
    tokens = num_groups * (step.prompt_tokens + step.num_rollouts * step.response_tokens)
    pairs = num_groups * step.num_rollouts * (step.prompt_tokens + step.response_tokens) ** 2 / 2
    flop = 6 * model.num_parameters * tokens + 12 * model.hidden * model.num_layers * pairs
    return flop / (c["peak_tflops"] * 1e12 * c["train_share_of_peak"])


def sync_s(model: Model, num_gpus: int, c: Constants) -> float:
    """Rank 0 gathers all weights, sends them to all engines at once (nccl), and each copies its own into place."""
    link = c["nvlink_gb_per_s" if num_gpus <= 8 else "network_gb_per_s"] * 1e9
    copied = model.weight_bytes / model.gpus_per_engine / (c["copy_gb_per_s"] * 1e9)
    return c["sync_fixed_s"] + 2 * model.weight_bytes / link + copied


def select_s(num_groups: float, c: Constants) -> float:
    """A step of the controller with ten million prompts: the straight line through both batches measured."""
    (low, low_ms), (high, high_ms) = ((n, c[f"controller_{n}_ms"]) for n in (128, 8192))
    return max(low_ms, low_ms + (high_ms - low_ms) * (num_groups - low) / (high - low)) / 1e3


def store_gb(method: Method, num_gpus: int, c: Constants) -> float:
    """What passes through the object store in a step."""
    generated, trained = method.groups(Step.prompts_per_gpu * num_gpus)
    return (generated * (c["request_mb"] + c["rollouts_mb"]) + trained * c["update_mb"]) / 1e3


def saving(own: Cost, other: Cost) -> float:
    """Share of the other's time for as many mixed groups, on the same GPUs."""
    return 1 - own.hours / other.hours


def limit_gpus(model: Model, part: str, c: Constants, share: float = 0.1) -> float:
    """The smallest cluster, of powers of two, in which the part takes more than `share` of a step of dps; or inf."""
    sizes = (2**power for power in range(3, 21))
    return next((n for n in sizes if cost(model, n, methods(c)["dps"], Step(), c).share(part) > share), math.inf)


def fits(model: Model, num_gpus: int, c: Constants) -> bool:
    """Whether 18 bytes a parameter, split over ranks, leave room: weights 2, gradients, masters, two moments 4."""
    return 18 * model.num_parameters / (num_gpus / 2) <= 0.8 * c["gpu_memory_gb"] * 1e9


# --- tables -----------------------------------------------------------------------------------------------


def inputs(entries: dict[str, Any]) -> Lines:
    """Every constant, with where it comes from."""
    rows = [["constant", "value", "unit", "", "where, when", "command"]]
    for name, entry in entries.items():
        where = ", ".join(part for part in (entry["where"], entry.get("date", "")) if part)
        command = f"`{entry['command']}`" if entry.get("command") else ""
        rows.append([f"`{name}`", f"{entry['value']:,g}", entry["unit"], entry["from"], where, command])
    return rows


def savings(c: Constants) -> Lines:
    """GPU-hours, and hours in brackets."""
    rows = [
        ["model", "GPUs", *(f"`{name}`" for name in methods(c)), *(f"`{own}` saves of `{of}`" for own, of in SAVINGS)]
    ]
    for model in MODELS:
        for num_gpus in CLUSTERS:
            costs = costs_of(model, num_gpus, c)
            rows.append([
                model.name, f"{num_gpus}{'' if fits(model, num_gpus, c) else ' (does not fit)'}",
                *(f"{one.gpu_hours:.2f} ({one.hours:.3g})" for one in costs.values()), *saved(costs),
            ])  # fmt: skip
    return rows


def costs_of(model: Model, num_gpus: int, c: Constants) -> dict[str, Cost]:
    return {name: cost(model, num_gpus, method, Step(), c) for name, method in methods(c).items()}


def saved(costs: dict[str, Cost]) -> list[str]:
    return [f"{round(saving(costs[own], costs[of]), 3) + 0.0:.1%}" for own, of in SAVINGS]  # without "-0.0%"


def parts(c: Constants) -> Lines:
    """Where a step of dps goes."""
    rows = [["model", "GPUs", "step, s", *(f"{WORDS[part]}, s" for part in WORDS), "through the object store, GB"]]
    for model in MODELS:
        for num_gpus in CLUSTERS:
            dps = methods(c)["dps"]
            one = cost(model, num_gpus, dps, Step(), c)
            seconds = [f"{one.parts[part]:.3g}" for part in WORDS]
            rows.append([model.name, str(num_gpus), f"{one.step_s:.1f}", *seconds, f"{store_gb(dps, num_gpus, c):.2f}"])
    return rows


def limits(c: Constants) -> Lines:
    """The cluster from which on each part that does not shrink takes more than a tenth of a step."""
    rows = [["model", *(WORDS[part] for part in ONE_PLACE)]]
    for model in MODELS:
        sizes = [limit_gpus(model, part, c) for part in ONE_PLACE]
        rows.append([model.name, *("never" if math.isinf(size) else f"{size:,} GPUs" for size in sizes)])
    return rows


def sentences(c: Constants) -> list[str]:
    """What is saved; for each model its largest part and which part becomes the limit; and what never does."""
    made = []
    for own, of in SAVINGS:
        cells = [costs_of(model, num_gpus, c) for model in MODELS for num_gpus in CLUSTERS]
        low, *_, high = sorted(saving(cell[own], cell[of]) for cell in cells)
        made.append(f"`{own}` saves {low:.0%} to {high:.0%} of the time of `{of}`.")
    for model in MODELS:
        costs = {n: cost(model, n, methods(c)["dps"], Step(), c) for n in (CLUSTERS[0], CLUSTERS[-1])}
        largest = {n: max(one.parts, key=one.share) for n, one in costs.items()}
        at = " and ".join(f"{WORDS[part]} on {n} GPUs ({costs[n].share(part):.0%})" for n, part in largest.items())
        sizes = sorted((limit_gpus(model, part, c), -costs[CLUSTERS[-1]].share(part), part) for part in ONE_PLACE)
        passing = [f"{WORDS[part]} at {size:,} GPUs" for size, _, part in sizes if math.isfinite(size)]
        order = ", then by ".join(passing) or "none of it"
        made.append(
            f"**{model.name}:** largest is {at}. Of what more GPUs do not shorten, more than a tenth of a step "
            f"is taken by {order}."
        )
    gb = store_gb(methods(c)["dps"], CLUSTERS[-1], c)
    made.append(
        f"A step on {CLUSTERS[-1]} GPUs moves {gb:.1f} GB through the object store, {gb / c['object_store_gb']:.0%} of "
        f"what Ray gives it at most; the controller of ten million prompts takes {c['controller_gib']:.2f} GiB. The "
        f"driver made {1e3 / c['call_wall_ms']:,.0f} small calls a second where everything shared two cores, and its "
        f"own CPU time would allow {1e3 / c['call_ms']:,.0f}."
    )
    return made


def sensitivity(c: Constants) -> Lines:
    """What is saved in the middle of the table when one input is another."""
    model, num_gpus = MIDDLE
    uniform = c["mixed_share_uniform"]

    def row(
        what: str, constants: Constants | None = None, step: Step | None = None, ahead: bool = False,
        dps: dict[str, Any] | None = None, dynamic: dict[str, Any] | None = None,
    ) -> list[str]:  # fmt: skip
        changed = {"dps": dps or {}, "dps, refilled": dps or {}, "dynamic": dynamic or {}}
        costs = {
            name: cost(
                model, num_gpus, replace(method, **changed.get(name, {})), step or Step(), c | (constants or {}), ahead
            )
            for name, method in methods(c | (constants or {})).items()
        }
        return [what, f"{costs['dps'].share('generate'):.0%}", f"{costs['dps'].gpu_hours:.2f}", *saved(costs)]

    nothing = {name: 0.0 for name in c if name.endswith("_ms") or name == "sync_fixed_s"}
    nothing |= dict.fromkeys(("nvlink_gb_per_s", "network_gb_per_s", "copy_gb_per_s"), math.inf)
    return [
        ["what is changed", "generating, of a step of `dps`", "GPU-hours, `dps`",
         *(f"`{own}` saves of `{of}`" for own, of in SAVINGS)],
        row("nothing"),
        row("responses of 1,024 tokens, the longest 4,096", step=Step(response_tokens=1024, longest=4096)),
        row("responses of 4,096 tokens, the longest 16,384", step=Step(response_tokens=4096, longest=16_384)),
        row("no long tail: every response has 2,048", step=Step(longest=Step.response_tokens)),
        row("`dps` generates responses 30% longer", dps={"longer": 1.3}),
        row("`uniform` has half as many mixed groups", {"mixed_share_uniform": uniform / 2}),
        row("`dps` has 0.9 of its groups mixed, as the paper says", {"mixed_share_dps": 0.9}),
        row("`dps` chooses no better than `uniform`", {"mixed_share_dps": uniform}),
        row("`dynamic` in whole batches, one after the other, as in the paper", dynamic={"whole_batches": True}),
        row("generating at half the bandwidth", {"generate_share_of_bandwidth": 0.5}),
        row("training at 40% of peak", {"train_share_of_peak": 0.4}),
        row("both", {"generate_share_of_bandwidth": 0.5, "train_share_of_peak": 0.4}),
        row("training at 40% of peak, and `dynamic` in whole batches", {"train_share_of_peak": 0.4},
            dynamic={"whole_batches": True}),
        row("generating one step ahead (`train.max_lag=1`)", ahead=True),
        row("no sync, messages or selection", nothing),
    ]  # fmt: skip


def tables(entries: dict[str, Any]) -> dict[str, Lines]:
    c = {name: entry["value"] for name, entry in entries.items()}
    makers: dict[str, Callable[[Constants], Lines]] = {
        "savings": savings, "parts": parts, "limits": limits, "sensitivity": sensitivity,
    }  # fmt: skip
    return {"inputs": inputs(entries)} | {name: make(c) for name, make in makers.items()}


def fill(page: str, entries: dict[str, Any]) -> str:
    """The page with what stands between marks as the constants give it."""
    made = {name: markdown_of(lines) for name, lines in tables(entries).items()}
    said = sentences({name: entry["value"] for name, entry in entries.items()})
    made["sentences"] = "\n".join(f"- {sentence}" for sentence in said)
    return fill_marks(page, "scale", made.__getitem__)


def read_all(path: Path = CONSTANTS) -> tuple[dict[str, Any], dict[str, Lines]]:
    """The constants and their tables; UserError where they are not there or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is not here: run this in a clone's first folder")
    entries = read_object(path, of_git(path))
    try:
        return entries, tables(entries)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path} lacks constants or parts of them ({reason(error)}): {of_git(path)}") from error


def show(console: Console) -> None:
    entries, made = read_all()
    if not PAGE.is_file():
        raise UserError(f"{PAGE} is not here, which the tables go into: {of_git(PAGE)}")
    savings_shown = [name for name in made["savings"][0] if "saves" in name]
    printed.show(console, "of the time for as many mixed groups", made["savings"], ["model", "GPUs", *savings_shown])
    printed.show(console, "where a part takes a tenth of a step", made["limits"], made["limits"][0])
    printed.tell(console, sentences({name: entry["value"] for name, entry in entries.items()}))
    console.print(f"\nall tables are in {PAGE}, the constants in {CONSTANTS}", highlight=False)
    write_text(PAGE, fill(PAGE.read_text(), entries))


def main(arguments: list[str]) -> int:
    if arguments:
        print(__doc__)
        return 0 if arguments[0] in ("-h", "--help") else 2
    return code_of("dpsrl.study.scale", lambda: show(Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
