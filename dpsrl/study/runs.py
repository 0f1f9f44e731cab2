"""Makes the runs of a study that are missing, one or a few at a time, and keeps their folders small.

A run is finished when its `record.json` is there, which is written last; others go on from their last checkpoint. One
that fails is told of and does not end the others.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpsrl.config import load_config
from dpsrl.metrics import Record, write_summary
from dpsrl.study.plan import Job, Plan
from dpsrl.study.record import record_of
from dpsrl.sweep import PLAIN, Runs, is_finished, log_of, run_one
from dpsrl.types import UserError

HOUR_S = 3600.0


def read_record(folder: Path, job: Job) -> Record | None:
    """What was kept of a finished run, None where there is none; UserError where it was made with other settings."""
    path = folder / job.name / "record.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    if record["arguments"] != job.arguments:
        changed = sorted(set(record["arguments"]) ^ set(job.arguments))
        raise UserError(
            f"{path.parent} was made with other settings ({', '.join(changed)}): remove it to have it made again, or "
            "name another folder by out="
        )
    return record


def make_runs(plan: Plan, folder: Path, console: Console, done: Container[str] = (), lanes: int = 1) -> dict[str, str]:
    """By name, why runs are not finished. done: names of jobs that need no run; lanes: how many are under way at once,
    each on cores of its own.
    """
    missing = [job for job in plan.jobs if read_record(folder, job) is None and job.name not in done]
    console.print(f"{plan.name}: {len(plan.jobs)} runs, {len(missing)} to be made, in {folder}", **PLAIN)
    check(missing)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Runs() as runs, Progress(*columns, console=console, speed_estimate_period=6 * HOUR_S) as progress:
        bar = progress.add_task("runs", total=len(missing))

        def one(place: int, job: Job) -> str:
            progress.update(bar, description=job.name)
            busy_share = busy_share_here()
            state = make_run(runs, job, folder, console, f"[{place}/{len(missing)}] {job.name}")
            if state == "finished":
                keep(folder / job.name, job, busy_share)
            progress.advance(bar)
            return state

        with ThreadPoolExecutor(lanes, initializer=take_cores, initargs=(split_cores(lanes),)) as pool:
            started = [pool.submit(one, place, job) for place, job in enumerate(missing, 1)]
            try:
                states = {job.name: future.result() for job, future in zip(missing, started, strict=True)}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return {name: state for name, state in states.items() if state != "finished"}


def split_cores(lanes: int) -> SimpleQueue[set[int]]:
    """The cores of each lane. UserError where there are not enough."""
    cores = sorted(os.sched_getaffinity(0))
    if lanes > len(cores):
        raise UserError(f"lanes={lanes} is more than the {len(cores)} cores of this machine")
    split: SimpleQueue[set[int]] = SimpleQueue()
    for lane in range(lanes):
        split.put(set(cores[lane::lanes]))
    return split


def take_cores(split: SimpleQueue[set[int]]) -> None:
    """Binds this thread, and all that it starts, to cores of its own."""
    os.sched_setaffinity(0, split.get())


def busy_share_here() -> float:
    """How busy this thread's cores are, over one second."""
    percent = psutil.cpu_percent(interval=1.0, percpu=True)
    cores = os.sched_getaffinity(0)
    return sum(percent[core] for core in cores) / len(cores) / 100


def check(jobs: list[Job]) -> None:
    """UserError where a run would be refused; of runs that differ in their seed alone, one is asked."""
    for job in {(job.setting, job.method): job for job in jobs}.values():
        load_config(job.arguments)


def make_run(runs: Runs, job: Job, folder: Path, console: Console, label: str) -> str:
    run_dir = folder / job.name
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    return run_one(runs, [sys.executable, "-m", job.program, *job.arguments], run_dir, console, label)


def keep(run_dir: Path, job: Job, busy_share: float) -> None:
    """Writes the record, then removes what it makes needless.

    busy_share: of its cores, what others used just before the run: its seconds are worth little where that is much.
    """
    assert is_finished(run_dir)
    record = {
        "setting": job.setting, "method": job.method, "seed": job.seed, "arguments": job.arguments,
        "num_cores": len(os.sched_getaffinity(0)), "busy_share": round(busy_share, 3),
    } | record_of(run_dir)  # fmt: skip
    write_summary(run_dir / "record.json", record)
    for name in ("checkpoints", "logs"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for path in (run_dir / "report.html", run_dir / "responses.jsonl", log_of(run_dir)):
        path.unlink(missing_ok=True)
