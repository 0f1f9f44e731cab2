"""What a run of a study is made from: its arguments, the configuration they resolve to, and the code.

`job.json` beside a run's folder says so from its start. A folder of something else is refused, not mixed in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpsrl.config import PACKAGE_DIR, load_config
from dpsrl.metrics import write_summary
from dpsrl.study.plan import Job
from dpsrl.study.stored import Damaged, read_object
from dpsrl.types import UserError

CODE = ("dpsrl", "configs")
ORIGIN = {"arguments", "commits", "configuration"}
REMEDY = "remove it to have it made again, or name another folder by out="


@dataclass(frozen=True)
class Setup:
    """What a method's arguments come to in a setting, whatever the seed. `configuration` is a hash of all of it."""

    configuration: str
    batch: int
    group_size: int
    steps: int


def setups_of(jobs: Sequence[Job]) -> dict[tuple[str, str], Setup]:
    """By setting and method. UserError where a run would be refused; of runs that differ in their seed one is asked."""
    return {place: setup_of(job) for place, job in {(job.setting, job.method): job for job in jobs}.items()}


def setup_of(job: Job) -> Setup:
    config = load_config(job.arguments)
    text = json.dumps(given(asdict(config) | {"seed": None}), sort_keys=True).replace(str(PACKAGE_DIR), "")
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Setup(digest, config.train.batch, config.rollout.num_rollouts, config.train.steps)


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is None, which stands for "as if there were no such key": one that is new changes no older run."""
    return {k: given(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}


def job_file(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.job.json")


def claim(run_dir: Path, job: Job, setup: Setup, commit: str | None) -> None:
    """Writes what the run is made from, before it starts or goes on; `commits` are all that had a part in it."""
    before = read_origin(run_dir) or {}
    commits = list(dict.fromkeys([*before.get("commits", []), *[commit] * (commit is not None)]))
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    write_summary(job_file(run_dir), {"arguments": job.arguments, "commits": commits} | asdict(setup))


def read_origin(run_dir: Path) -> dict[str, Any] | None:
    """What the run in the folder, finished or not, was made from; None where there is no run.

    UserError for a run without a word on that.
    """
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return None
    for path in (run_dir / "record.json", job_file(run_dir)):
        with suppress(Damaged):
            if path.is_file() and (origin := read_object(path, REMEDY)).keys() >= ORIGIN:
                return origin
    raise UserError(f"{run_dir} holds a run, but {job_file(run_dir)} does not say of what: {REMEDY}")


def check_origin(run_dir: Path, job: Job, setup: Setup | None = None) -> None:
    """UserError where the folder's run has other arguments, or comes to another configuration than `setup`."""
    origin = read_origin(run_dir)
    if origin is None:
        return
    if changed := sorted(set(origin["arguments"]) ^ set(job.arguments)):
        raise UserError(f"{run_dir} was made with other settings ({', '.join(changed)}): {REMEDY}")
    if setup and origin["configuration"] != setup.configuration:
        raise UserError(
            f"{run_dir} was made with these arguments when they meant another configuration, "
            f"{origin['configuration']} and not {setup.configuration}: {REMEDY}"
        )


def code_version() -> str | None:
    """The last commit that changed code or plans, with a + where they have changed since; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE_DIR.parent), *arguments, "--", *CODE]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("log", "-1", "--format=%h") if shutil.which("git") else ""
    return commit + "+" * bool(git("status", "--porcelain")) if commit else None
