"""Which runs a study has: `configs/study/NAME.yaml` as a list of jobs, seeds outermost.

Settings, methods, variants, seeds and steps are data there. Stopped at any moment, the runs made so far are balanced:
every method has seed 0 before any has seed 1. Within a seed the order is drawn, the same each time, so that a machine
that gets slower by the hour is not slower for the same methods.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from dpsrl.config import config_dir
from dpsrl.selection.options import nearest
from dpsrl.types import UserError

TRAIN = "dpsrl.train"
REFILLS = "selection.admission=mixed"
KEYS = {"shared", "seeds", "reference", "ours", "judged", "publish", "methods", "programs", "settings", "ablations"}


@dataclass(frozen=True)
class Job:
    """One run: `Job("hard", "dps", 3, ["+recipe=quickstart", ...], "dpsrl.train")`."""

    setting: str
    method: str
    seed: int
    arguments: list[str]
    program: str

    @property
    def name(self) -> str:
        """Its folder below the study's."""
        return f"{self.setting}/{self.method}/seed_{self.seed}"


@dataclass(frozen=True)
class Variant:
    """of: the method that it changes; beside: the method or variant that it is compared with."""

    of: str
    beside: str


@dataclass(frozen=True)
class Plan:
    """A study. `methods_of`: the methods compared in each setting, in order; `ablations`: what varies -> name ->
    variant, all in `ablated`, a setting.

    reference: the method whose final accuracy the others are to reach; ours: the one that others are paired with;
    judged: those of which the paper's two main claims are asked.
    refilling: methods that also choose after the rollouts, by leaving out groups that are not mixed.
    publish: whether docs/ are written too.
    """

    name: str
    reference: str
    ours: str
    publish: bool
    methods_of: dict[str, list[str]]
    ablated: str
    ablations: dict[str, dict[str, Variant]]
    jobs: list[Job]
    judged: tuple[str, ...] = ()
    refilling: frozenset[str] = field(default_factory=frozenset)


def read_plan(name: str, only: dict[str, list[str]] | None = None, num_seeds: int | None = None) -> Plan:
    """UserError where the plan is unknown or has keys that are.

    only: "settings" and "methods" that runs are made of, where given; num_seeds: at most so many.
    """
    known = {path.stem: path for path in sorted((config_dir() / "study").glob("*.yaml"))}
    if name not in known:
        raise UserError(f"study={name} does not exist: choose one of {', '.join(known)}")
    path = known[name]
    raw: Any = OmegaConf.to_container(OmegaConf.load(path))
    if unknown := sorted(raw.keys() - KEYS):
        raise UserError(f"{path}: {unknown[0]!r} is unknown; {nearest(unknown[0], KEYS)}")
    settings = raw["settings"]
    methods_of = {
        setting: [method for method in raw["methods"] if method not in about.get("without", [])]
        for setting, about in settings.items()
    }
    ablated, ablations, ablated_jobs = read_ablations(raw)
    seeds = [*range(raw["seeds"])]
    compared = [(s, m, raw["methods"][m], seeds) for s, methods in methods_of.items() for m in methods]
    rows = [row for row in compared + ablated_jobs if is_wanted(row, only or {})]
    check_filters(only or {}, compared + ablated_jobs)
    if not rows:
        asked = " ".join(f"{key}={','.join(names)}" for key, names in (only or {}).items())
        raise UserError(f"{asked}: {path} has these, but no run of both; give other methods, or other settings")
    jobs = [
        Job(
            setting, method, seed,
            [*raw["shared"], *settings[setting]["with"], *overrides, f"seed={seed}"],
            raw.get("programs", {}).get(method, TRAIN),
        )
        for seed in seeds[:num_seeds]
        for setting, method, overrides, own_seeds in rows
        if seed in own_seeds
    ]  # fmt: skip
    judged = tuple(raw.get("judged", [raw["ours"]]))
    for method in (raw["reference"], raw["ours"], *judged):
        if method not in raw["methods"]:
            raise UserError(f"{path}: there is no method {method!r}; {nearest(method, raw['methods'])}")
    refilling = frozenset(method for method, overrides in raw["methods"].items() if REFILLS in overrides)
    return Plan(
        name, raw["reference"], raw["ours"], raw.get("publish", False), methods_of, ablated, ablations,
        sorted(jobs, key=drawn_place), judged, refilling,
    )  # fmt: skip


def drawn_place(job: Job) -> tuple[int, bytes]:
    """By a hash, so that it does not depend on which other jobs there are."""
    return job.seed, hashlib.sha256(job.name.encode()).digest()


def read_ablations(raw: dict[str, Any]) -> tuple[str, dict[str, dict[str, Variant]], list[tuple]]:
    """The setting, what varies -> name -> variant, and (setting, variant's name, overrides, seeds) of each."""
    about = raw.get("ablations")
    if not about:
        return "", {}, []
    setting, varied = about["setting"], about["varied"]
    ablations = {
        what: {name: Variant(v["of"], v.get("beside", v["of"])) for name, v in variants.items()}
        for what, variants in varied.items()
    }
    jobs = [
        (setting, name, [*raw["methods"][variant["of"]], *variant["with"]], [*range(about["seeds"][what])])
        for what, variants in varied.items()
        for name, variant in variants.items()
    ]
    return setting, ablations, jobs


def is_wanted(row: tuple, only: dict[str, list[str]]) -> bool:
    setting, method = row[:2]
    return setting in only.get("settings", [setting]) and method in only.get("methods", [method])


def check_filters(only: dict[str, list[str]], rows: list[tuple]) -> None:
    for place, key in enumerate(("settings", "methods")):
        known = {row[place] for row in rows}
        for name in only.get(key, []):
            if name not in known:
                raise UserError(f"{key}={name} is not in this study; {nearest(name, known)}")
