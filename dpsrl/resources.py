"""What a run needs, what the machines have, and the difference in words. Knows neither Ray nor CUDA.

A bundle is what one process, or two that take turns on a GPU, must find on one machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsrl.checkpoint import check_model_folder
from dpsrl.config import PACKAGE_DIR, Config, load_config
from dpsrl.data.datasets import SUFFIXES, find_benchmark
from dpsrl.types import UserError

Amounts = dict[str, int]  # "GPU" and "CPU"


@dataclass(frozen=True)
class Plan:
    """The bundles of a run, engines before trainer ranks; colocated ones share theirs."""

    num_engines: int
    num_ranks: int
    bundles: list[Amounts]
    shared: bool
    words: str

    @property
    def total(self) -> Amounts:
        return {kind: sum(bundle[kind] for bundle in self.bundles) for kind in ("GPU", "CPU")}

    def engine_bundle(self, index: int) -> int:
        return index

    def rank_bundle(self, index: int) -> int:
        return index if self.shared else self.num_engines + index


def resource_plan(config: Config, with_trainer: bool = True) -> Plan:
    engines, width = config.rollout.num_workers, config.rollout.tensor_parallel
    ranks = config.trainer.num_workers if with_trainer else 0
    cpus = config.cluster.cpus_per_worker
    parts = f"{engines} engine{'s' * (engines > 1)}" + f" and {ranks} trainer rank{'s' * (ranks > 1)}" * (ranks > 0)
    if (
        config.cluster.device == "cpu"
    ):  # threads are shared out among the processes of a machine, so that one core will do
        return Plan(engines, ranks, [{"GPU": 0, "CPU": 1}] * (engines + ranks), False, f"{parts} on CPU cores")
    if config.cluster.placement == "colocate":
        if width > 1:
            raise UserError(f"rollout.tensor_parallel={width} with cluster.placement=colocate: use split, or 1")
        bundles = [{"GPU": 1, "CPU": 2 * cpus}] * max(engines, ranks)
        return Plan(engines, ranks, bundles, True, f"{parts} on shared GPUs")
    bundles = [{"GPU": width, "CPU": cpus}] * engines + [{"GPU": 1, "CPU": cpus}] * ranks
    return Plan(engines, ranks, bundles, False, f"{parts}, {engines} x {width} + {ranks} GPUs of their own")


def num_local_gpus() -> int:
    """GPUs that this process may use, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def check_here(plan: Plan) -> None:
    """Of this machine only GPUs can be short: threads that are more than its cores are slow, not impossible."""
    check_resources(plan, [{"GPU": num_local_gpus(), "CPU": plan.total["CPU"]}])


def needs_here(arguments: list[str]) -> dict[str, Any]:
    """What `dpsrl.train` would need with these arguments, for the doctor.

    `device`, `needs` in words and `short`, a list of sentences; or `refused` alone, the sentence it would end with.
    """
    try:
        config = load_config(arguments)
        plan = resource_plan(config)
    except UserError as error:
        return {"refused": str(error)}
    model = config.model.path.replace(f"{PACKAGE_DIR}/", "")
    needs = f"{plan.words}; model {model}; data {config.data.train}"
    return {"device": config.cluster.device, "needs": needs, "short": shortfalls(config)}


def shortfalls(config: Config) -> list[str]:
    """What a run needs and this machine has not, a sentence each: GPUs, the model, files of data."""
    checks: list[Callable[[Config], None]] = [_check_model, _check_data]
    if not config.cluster.address:
        checks.insert(0, lambda config: check_here(resource_plan(config)))
    short = []
    for check in checks:
        try:
            check(config)
        except UserError as error:
            short.append(str(error))
    return short


def _check_model(config: Config) -> None:
    path = config.model.path
    check_model_folder(path)
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
    kept = os.path.exists(path) or (cache / f"models--{path.replace('/', '--')}").is_dir()
    if not kept and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(
            f"model.path={path} is not in {cache}, and HF_HUB_OFFLINE is set: unset it, or give the folder of a model"
        )


def _check_data(config: Config) -> None:
    data, missing = config.data, []
    if Path(data.train).suffix in SUFFIXES and not os.path.isfile(data.train):
        missing.append(data.train)
    for name in config.eval.benchmarks:
        if name != "train" and not name.startswith("countdown"):
            try:
                find_benchmark(name, data.eval_dir)
            except UserError:
                missing.append(f"{data.eval_dir or '.'}/{name}.jsonl")
    if missing:
        script = Path(f"recipes/{config.run.name}/prepare_data.py")
        written = f"{script} writes them, " if (PACKAGE_DIR.parent / script).is_file() else ""
        raise UserError(f"{', '.join(missing)} missing: {written}or set data.train, data.eval_dir and eval.benchmarks")


def check_resources(plan: Plan, machines: Sequence[Amounts], where: str = "this machine") -> None:
    """Raises UserError with what is needed, what was found, what is short and what to try."""
    needed = plan.total
    found = {kind: sum(machine.get(kind, 0) for machine in machines) for kind in ("GPU", "CPU")}
    short = {kind: needed[kind] - found[kind] for kind in ("GPU", "CPU") if needed[kind] > found[kind]}
    if short:
        shortfall = " and ".join(f"{amount} {kind}{'s' * (amount > 1)}" for kind, amount in short.items())
        kinds = [kind for kind in needed if kind in short]
        remedies = ["set rollout.num_workers and trainer.num_workers so that they fit"] if found[kinds[0]] > 1 else []
        remedies.append("set cluster.address to a Ray cluster that has them")
        if plan.total["GPU"]:
            remedies.append("or try the recipe without GPUs: cluster=cpu model=tiny")
        raise UserError(
            f"this run needs {_amounts(needed, kinds)} ({plan.words}) and {where} has {_amounts(found, kinds)}, "
            f"{shortfall} short: {', '.join(remedies)}"
        )
    if (homeless := _without_a_place(plan.bundles, machines)) is not None:
        sizes = "; ".join(_amounts(machine, ["GPU", "CPU"]) for machine in machines)
        raise UserError(
            f"this run needs {_amounts(homeless, ['GPU', 'CPU'])} together on one machine ({plan.words}), and {where} "
            f"has no room left for that on its {len(machines)} machines ({sizes}): lower rollout.tensor_parallel or "
            "cluster.cpus_per_worker"
        )


def _amounts(amounts: Amounts, kinds: Sequence[str]) -> str:
    return " and ".join(f"{amounts.get(kind, 0)} {kind}{'s' * (amounts.get(kind, 0) != 1)}" for kind in kinds)


def _without_a_place(bundles: Sequence[Amounts], machines: Sequence[Amounts]) -> Amounts | None:
    """The first bundle that first-fit, largest first, finds no machine for."""
    left = [dict(machine) for machine in machines]
    for bundle in sorted(bundles, key=lambda b: (b["GPU"], b["CPU"]), reverse=True):
        home = next((m for m in left if all(m.get(kind, 0) >= amount for kind, amount in bundle.items())), None)
        if home is None:
            return bundle
        for kind, amount in bundle.items():
            home[kind] = home.get(kind, 0) - amount
    return None
