"""`python -m dpsrl.train -m +recipe=NAME selection=dps,uniform seed=0,1 ...`: one run after another, then one page.

Each combination of the values that are separated by commas, or written as choice() or range(), is a run of
`dpsrl.train` in `<sweep>/<its values>`. A run that fails does not end the others. The same command with the same
`run.dir` goes on where the sweep was: finished runs are not repeated, others go on from their last checkpoint.
Owns that order and the processes; knows nothing of training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dpsrl.config import Config, as_read, load_config, parse_override, quoted, selector_of
from dpsrl.data.files import first_line
from dpsrl.exits import code_of
from dpsrl.files import write_text
from dpsrl.guard import Guard
from dpsrl.lane import Lane
from dpsrl.own import has_own, is_own
from dpsrl.report import Run, load_run, write_page
from dpsrl.run_folder import RunFolder, unwritable
from dpsrl.screen import duration
from dpsrl.types import UserError

FLAGS = ("-m", "--multirun")
ENTRY = (sys.executable, "-m", "dpsrl.train")
MAX_NAME_CHARS = 100
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}  # how lines are printed
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)  # what a run gets at the first, second and third request


@dataclass(frozen=True)
class Plan:
    """What a command line asks for: the folder, the arguments of all runs, and those of each by its folder's name."""

    folder: Path
    shared: list[str]
    runs: dict[str, list[str]]
    dry_run: bool = False

    def arguments(self, name: str) -> list[str]:
        return [*self.shared, *self.runs[name]]


def plan(arguments: list[str]) -> Plan:
    """UserError where nothing is swept, or any of the runs would be refused."""
    shared, swept, folder = [], [], ""
    for argument in map(as_read, arguments):
        override = parse_override(argument)
        name = override.key_or_group
        if name == "resume" or (name == "run.dir" and override.is_sweep_override()):
            raise UserError(
                f"{argument}: each run of a sweep has a folder of its own and is taken up there; leave it out"
            )
        if name == "run.dir":
            folder = str(override.value())
        elif not override.is_sweep_override():
            shared.append(argument)
        elif override.is_choice_sweep() or override.is_range_sweep():
            swept.append(values_of(argument, override))
        else:
            raise UserError(f"{argument} cannot be gone through: write {name}=a,b or {name}=range(0,3)")
    if not swept:
        raise UserError("-m has nothing to go through: separate the values of a key by commas, as seed=0,1")
    runs = {folder_name(values): list(values) for values in itertools.product(*swept)}
    configs = [load_config([*shared, *values]) for values in runs.values()]
    for config, values in zip(configs, runs.values(), strict=True):
        check_method(config, values)
    default = f"runs/{configs[0].run.name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    return Plan(Path(folder or default), shared, runs, configs[0].dry_run)


def values_of(argument: str, override: Any) -> list[str]:
    """One argument per value. UserError where hydra finds none."""
    key = argument.partition("=")[0]
    try:
        values = list(override.sweep_string_iterator())
    except (HydraException, ValueError) as error:
        raise UserError(f"{argument} cannot be gone through ({first_line(error)}): write {key}=a,b") from error
    if not values:
        raise UserError(f"{argument} has no value to go through: write {key}=a,b or {key}=range(0,3)")
    return [f"{key}={value}" for value in values]


def check_method(config: Config, values: Sequence[str]) -> None:
    """UserError, with the run's values, for options that its method does not take; one's own is tried by its run."""
    if is_own(config.selection.method):
        return
    try:
        selector_of(config, num_prompts=1)
    except UserError as error:
        raise UserError(f"the run of {' '.join(values)}: {error}") from error


def folder_name(values: Sequence[str]) -> str:
    """The values themselves, as far as a name can hold them; else with a hash, so that no two are alike."""
    whole = ",".join(value.lstrip("+") for value in values)
    name = re.sub(r"[^\w=.,+-]", "_", whole)[:MAX_NAME_CHARS]
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def check_same_sweep(asked: Plan) -> None:
    """UserError where the folder holds a sweep with other arguments; runs may be added to one."""
    path, shared = asked.folder / "sweep.json", sorted(asked.shared)
    if path.is_file():
        try:
            before = " ".join(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} is cut short or broken: if this is the same sweep, write {json.dumps(shared)} into it, "
                "else give another run.dir"
            ) from error
        if before != " ".join(shared):
            raise UserError(f"run.dir={asked.folder} holds a sweep of {before}: give the same, or another run.dir")
    elif asked.folder.is_dir() and any(entry.name != "lock" for entry in asked.folder.iterdir()):
        raise UserError(f"run.dir={asked.folder} is occupied, but not by a sweep: choose another folder")


class Runs:
    """Starts runs, each in a process group of its own, and passes requests to stop on to those under way.

    As a context it hears Ctrl-C and SIGTERM. `run` may be called by several threads.
    """

    def __init__(self) -> None:
        self.num_stops = 0
        self.processes: set[subprocess.Popen] = set()
        self._composing = threading.Lock()  # hydra's state belongs to the process
        self._lanes: dict[int, Lane] = {}  # by thread, so that each has the cores of its own

    def __enter__(self) -> Runs:
        self._before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for lane in self._lanes.values():
            lane.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame: object) -> None:
        self.num_stops += 1
        os.write(2, b"asked to stop: the run under way is to save and end; once more, and it ends at once\n")
        for process in list(self.processes):
            process.send_signal(STOPS[min(self.num_stops, len(STOPS)) - 1])

    def run(self, entry: Sequence[str], arguments: Sequence[str], folder: Path) -> int:
        """The exit code of a run in `folder`; what it prints goes to the log beside it.

        One of `dpsrl.train` gets engines and trainer from the one before in the same thread, where it can. With parts
        of the user's own it gets a process of its own, since modules keep what they hold.
        """
        whole, log = [*arguments, f"run.dir={quoted(str(folder))}", "resume=auto"], log_of(folder)
        log.touch()
        if tuple(entry) == ENTRY and not self._has_own(whole):
            lane = self._lane(log)
            with self._under_way(lane.process):
                return lane.run(whole, log)
        thread = threading.get_ident()
        if thread in self._lanes:
            self._lanes.pop(thread).close()  # what it keeps would take memory and time from this run
        with log.open("ab") as file:
            process = subprocess.Popen([*entry, *whole], stdout=file, stderr=subprocess.STDOUT, process_group=0)
        with self._under_way(process), Guard() as guard:
            guard.follow([process.pid])  # it may have no guard of its own, and is to end with this process
            return process.wait()

    def _has_own(self, arguments: Sequence[str]) -> bool:
        with self._composing:
            try:
                return has_own(load_config(list(arguments)))
            except UserError:  # which its own process tells
                return True

    def _lane(self, log: Path) -> Lane:
        """This thread's; a new one where that has ended."""
        thread = threading.get_ident()
        if thread not in self._lanes or self._lanes[thread].process.poll() is not None:
            self._lanes[thread] = Lane(log)
        return self._lanes[thread]

    @contextmanager
    def _under_way(self, process: subprocess.Popen) -> Iterator[None]:
        self.processes.add(process)
        if self.num_stops:  # it came while the process was being started
            process.send_signal(STOPS[0])
        try:
            yield
        finally:
            self.processes.remove(process)


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def sweep(asked: Plan, console: Console, entry: Sequence[str] = ENTRY) -> int:
    """Runs what is not finished yet, prints the table and writes the page. 0 if all runs are finished, else 1."""
    check_same_sweep(asked)
    with RunFolder(asked.folder).lock():
        write_text(asked.folder / "sweep.json", json.dumps(sorted(asked.shared)))
        states = {}
        with Runs() as runs:
            for place, name in enumerate(asked.runs, 1):
                arguments, label = asked.arguments(name), f"[{place}/{len(asked.runs)}] {name}"
                states[name] = run_one(runs, entry, arguments, asked.folder / name, console, label)
        conclude(asked, states, console)
    return 0 if all(state == "finished" for state in states.values()) else 1


def run_one(
    runs: Runs, entry: Sequence[str], arguments: Sequence[str], folder: Path, console: Console, label: str
) -> str:
    """How it ended: finished, stopped, not started, or the last line of a run that failed."""
    if is_finished(folder):
        console.print(f"{label}: finished before", **PLAIN)
        return "finished"
    if runs.num_stops:
        return "not started"
    log = log_of(folder)
    console.print(f"{label}: started, its output is {log}", **PLAIN)
    code = runs.run(entry, arguments, folder)
    if is_finished(folder):
        return "finished"
    if runs.num_stops or code == 0:  # somebody asked it to stop
        return "stopped"
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    console.print(f"{label}: failed with exit code {code}: {last}", **PLAIN)
    return f"failed: {last}"


def is_finished(folder: Path) -> bool:
    """The summary is the last that a run writes."""
    return (folder / "summary.json").is_file()


def conclude(asked: Plan, states: dict[str, str], console: Console) -> None:
    table = Table(Column("run", overflow="fold"), "accuracy", "mixed", "rollouts", "steps", "time", box=None)
    finished = {name: load_run(asked.folder / name) for name, state in states.items() if state == "finished"}
    for name, state in states.items():
        table.add_row(name, *(cells_of(finished[name]) if name in finished else (escape(state),)))
    console.print(table)
    if finished:
        page = write_page(list(finished.values()), asked.folder / "report.html")
        console.print(f"page  {page}", **PLAIN)
    if left := len(states) - len(finished):
        sentence = (
            f"{left} of {len(states)} runs are not finished: the same command with run.dir={asked.folder} goes on"
        )
        console.print(sentence, **PLAIN)


def cells_of(run: Run) -> tuple[str, ...]:
    first, last, share = (run.summary[name] for name in ("eval_first", "eval_last", "mixed_share"))
    accuracy = [f"{name} {first[name]:.3f} to {last[name]:.3f}" for name in first if name in last]
    return (
        ", ".join(accuracy), "" if share is None else f"{share:.1%}", f"{run.summary['num_rollouts']:,}",
        f"{run.summary['steps']:,}", duration(run.summary["wall_s"]),
    )  # fmt: skip


def main(arguments: list[str], entry: Sequence[str] = ENTRY) -> int:
    """1 where a run is not finished, 2 where none could be started. dry_run=true checks each and prints its plan."""

    def started() -> int:
        asked = plan([argument for argument in arguments if argument not in FLAGS])
        if asked.dry_run:
            checks = [[*entry, *asked.arguments(name)] for name in asked.runs]
            return max(subprocess.run(check, check=False).returncode for check in checks)
        try:
            return sweep(asked, Console(), entry)
        except OSError as error:
            raise unwritable(asked.folder, error) from error

    return code_of("dpsrl.sweep", started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
