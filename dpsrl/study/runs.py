"""Makes the runs of a study that are missing, one or a few at a time, and keeps their folders small.

A run is finished when its `record.json` is there, which is written last; others go on from their last checkpoint. One
that fails is told of and does not end the others. What passes for a finished run and is damaged is made again.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpsrl.metrics import Record, write_summary
from dpsrl.run_folder import RunFolder
from dpsrl.study.origin import REMEDY, check_origin, claim, code_version, job_file, setups_of
from dpsrl.study.plan import Job, Plan
from dpsrl.study.record import is_whole, record_of
from dpsrl.study.stored import Damaged, read_object
from dpsrl.sweep import PLAIN, Runs, is_finished, log_of, run_one
from dpsrl.types import UserError

HOUR_S = 3600.0


def record_file(folder: Path, job: Job) -> Path:
    return folder / job.name / "record.json"


def read_record(folder: Path, job: Job) -> Record | None:
    """What was kept of a finished run, None where there is nothing, or what there is is damaged."""
    path = record_file(folder, job)
    with suppress(Damaged):
        if path.is_file() and is_whole(record := read_object(path, REMEDY)):
            return record
    return None


def make_runs(
    plan: Plan, folder: Path, console: Console, done: Mapping[str, Record] | None = None, lanes: int = 1
) -> dict[str, str]:
    """By name, why runs are not finished. done: by name, records of runs that need not be made, unless they are of
    another configuration; lanes: how many are under way at once, each on cores of its own.

    UserError, before any is started, where a run would be refused, or a folder has one that is not this plan's.
    """
    setups, commit = setups_of(plan.jobs), code_version()
    for job in plan.jobs:
        check_origin(folder / job.name, job, setups[job.setting, job.method])
    taken = {
        job.name
        for job in plan.jobs
        if done and job.name in done
        and done[job.name]["configuration"] == setups[job.setting, job.method].configuration
    }  # fmt: skip
    missing = [job for job in plan.jobs if read_record(folder, job) is None and job.name not in taken]
    console.print(f"{plan.name}: {len(plan.jobs)} runs, {len(missing)} to be made, in {folder}", **PLAIN)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Runs() as runs, Progress(*columns, console=console, speed_estimate_period=6 * HOUR_S) as progress:
        bar = progress.add_task("runs", total=len(missing))

        def one(place: int, job: Job) -> str:
            if runs.num_stops:
                return "not started"
            progress.update(bar, description=job.name)
            run_dir, label = folder / job.name, f"[{place}/{len(missing)}] {job.name}"
            try:
                busy_share = busy_share_here()
                if said := remove_damaged(record_file(folder, job), setups[job.setting, job.method].steps):
                    console.print(f"{label}: {said}", **PLAIN)
                claim(run_dir, job, setups[job.setting, job.method], commit)
                entry = (sys.executable, "-m", job.program)
                state = run_one(runs, entry, job.arguments, run_dir, console, label)
                if state == "finished":
                    keep(run_dir, job, busy_share)
            except Exception as error:  # of one run: the others go on
                state = f"failed: {type(error).__name__}: {error}"
                console.print(f"{label}: {state}", **PLAIN)
            progress.advance(bar, state != "stopped")
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


def remove_damaged(record: Path, steps: int) -> str:
    """Removes what passes for a missing run's end and is none; a sentence where there was any."""
    run_dir, summary = record.parent, RunFolder(record.parent).summary
    if record.exists():  # its checkpoints are gone, and with them what the record had of them
        shutil.rmtree(run_dir)
        return f"{record} is cut short or broken: the run is made again"
    if is_finished(run_dir) and num_steps(summary) != steps:
        summary.unlink()
        return f"{summary} is not that of a run of {steps} steps: the run goes on, or begins anew"
    return ""


def num_steps(summary: Path) -> int | None:
    with suppress(Damaged):
        return read_object(summary, REMEDY).get("steps")
    return None


def keep(run_dir: Path, job: Job, busy_share: float) -> None:
    """Writes the record, then removes what it makes needless. UserError where the run lacks steps or evaluations.

    busy_share: of its cores, what others used just before the run: its seconds are worth little where that is much.
    """
    assert is_finished(run_dir)
    origin = read_object(job_file(run_dir), REMEDY)
    if (made := num_steps(RunFolder(run_dir).summary)) != origin["steps"]:
        raise UserError(f"{run_dir} has {made} of {origin['steps']} steps in its summary.json: {REMEDY}")
    record = {
        "setting": job.setting, "method": job.method, "seed": job.seed, **origin,
        "num_cores": len(os.sched_getaffinity(0)), "busy_share": round(busy_share, 3),
    } | record_of(run_dir, origin["batch"] * origin["group_size"])  # fmt: skip
    if not is_whole(record):
        raise UserError(f"{run_dir}/metrics.jsonl lacks evaluations, or steps: {REMEDY}")
    write_summary(run_dir / "record.json", record)
    for name in ("checkpoints", "logs"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for path in (run_dir / "report.html", run_dir / "responses.jsonl", log_of(run_dir)):
        path.unlink(missing_ok=True)
