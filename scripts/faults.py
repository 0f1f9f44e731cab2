"""Faults in real runs: every party killed or frozen in every phase, or at random for hundreds of steps.

    python scripts/faults.py matrix [REPEATS] [WORD ...]   party x phase x signal -> runs/faults.json; words narrow it
                                                           down (engine trainer save SIGSTOP); goes on where it was
    python scripts/faults.py soak [STEPS]                  random faults, beside a run without -> runs/soak.json
    python scripts/faults.py saves [KILLS]                 SIGKILL at random moments of saving -> runs/saves.json

A run is the quickstart's at a small size. Each cell of the matrix strikes once, in a step of its own of one long run
(the driver's cells end the process, and the run is taken up with resume=auto). A struck process is signalled some
milliseconds into the phase. The run must end with exit code 0, every rollout accounted for.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import psutil

PARTIES = ("engine", "reward", "trainer", "controller", "driver")
PHASES = ("select", "generate", "score", "train", "sync", "save", "evaluate")
SIGNALS = ("SIGKILL", "SIGSTOP")
STALL_S = 12.0
FREEZE_DRIVER_S = 20.0
SAVE_EVERY, EVAL_EVERY = 5, 50  # steps, of the soak
LIKE = 0.1  # accuracies of two runs on 64 prompts x 8, some three standard errors of their difference
MARK = "DPSRL_FAULTS"  # in the environment of all that a run starts
Strike = tuple[str, str, str, float]  # party, phase, signal, delay in s
SMALL = [
    "+recipe=quickstart", "data.countdown.num_train=128", "data.countdown.num_test=16", "train.batch=8",
    "rollout.num_rollouts=4", "eval.num_rollouts=2", "eval.every=1", "checkpoint.every=1", "reward.deadline_s=2",
    "resume=auto", f"run.stall_s={STALL_S}", "run.start_s=300", "run.max_restarts=1000",
]  # fmt: skip


# --- in the run's own process -----------------------------------------------------------------------------


class Strikes:
    """Signals a party when a phase begins, by a plan of strikes by step, each once."""

    def __init__(self, plan: dict[str, Strike], done_file: Path) -> None:
        self.plan, self.done_file = plan, done_file
        self.done = set(done_file.read_text().split()) if done_file.exists() else set()
        self.run: Any = None

    def begins(self, phase: str) -> None:
        """Not where the victim suffers from an earlier strike: the step is taken up again, and struck then."""
        step = str(self.run.driver.step + (phase != "save")) if self.run else ""  # a step is over when it is saved
        if step not in self.plan or step in self.done or self.plan[step][1] != phase:
            return
        party, _, name, delay_s = self.plan[step]
        if (victim := self._victim(party)) is None:
            return
        self.done.add(step)
        with self.done_file.open("a") as file:
            file.write(f"{step}\n")
        threading.Timer(delay_s, self._strike, (party, victim, name)).start()

    def _victim(self, party: str) -> int | None:
        pids = {**self.run.cluster.processes(), "driver": os.getpid()}
        for place, pid in enumerate(self.run.groups.scorer.pids()):
            pids[f"reward-{place}"] = pid
        for pid in (pid for known, pid in sorted(pids.items()) if known.startswith(party)):
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    return pid
        return None

    def _strike(self, party: str, victim: int, name: str) -> None:
        if party == "driver" and name == "SIGSTOP":  # nobody else would let it go on
            subprocess.Popen(["sh", "-c", f"sleep {FREEZE_DRIVER_S}; kill -CONT {victim}"], start_new_session=True)
        os.kill(victim, getattr(signal, name))


def worker(plan_file: str, arguments: list[str]) -> int:
    import dpsrl.train
    from dpsrl.evaluate import Benchmarks
    from dpsrl.pools import ControllerHandle, RolloutPool, TrainerPool
    from dpsrl.rewards import Scorer

    strikes = Strikes(json.loads(Path(plan_file).read_text()), Path(plan_file + ".done"))

    def before(cls: type, method: str, phase: str) -> None:
        original = getattr(cls, method)

        def struck(self: Any, *args: Any, **kwargs: Any) -> Any:
            strikes.begins(phase)
            return original(self, *args, **kwargs)

        setattr(cls, method, struck)

    launch = dpsrl.train.launch

    def watched_launch(*args: Any) -> Any:
        strikes.run = None
        strikes.run = launch(*args)
        return strikes.run

    dpsrl.train.launch = watched_launch
    before(ControllerHandle, "select", "select")
    before(RolloutPool, "finished", "generate")
    before(Scorer, "score", "score")
    before(TrainerPool, "begin", "train")
    before(TrainerPool, "send_weights", "sync")
    before(TrainerPool, "save_state", "save")
    before(Benchmarks, "evaluate", "evaluate")
    return dpsrl.train.main(arguments)


# --- outside ----------------------------------------------------------------------------------------------


def run_with(plan: dict[str, Strike], folder: Path, steps: int, extra: list[str]) -> dict[str, Any]:
    """Runs to the end, taken up again as often as a driver's strike ended it; what came of it."""
    plan_file = folder / "plan.json"
    plan_file.write_text(json.dumps(plan))
    command = [sys.executable, __file__, "worker", str(plan_file), *SMALL, f"run.dir={folder / 'run'}",
               f"train.steps={steps}", *extra]  # fmt: skip
    codes, output, env = [], "", os.environ | {MARK: str(folder)}
    expected_kills = sum(cell[0] == "driver" and cell[2] == "SIGKILL" for cell in plan.values())
    while not codes or (codes[-1] == -signal.SIGKILL and len(codes) <= expected_kills):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        codes.append(done.returncode)
        output += done.stdout + done.stderr
        (folder / "output.txt").write_text(output)
        print(f"ended with {done.returncode}", flush=True)
    summary_file = folder / "run/summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    struck_file = Path(f"{plan_file}.done")
    struck = set(struck_file.read_text().split()) if struck_file.exists() else set()
    return {"codes": codes, "summary": summary, "output": output, "struck": struck}


def strike(rng: random.Random, party: str, phase: str, name: str) -> Strike:
    """At a random moment within the first 50 ms of the phase, or as it begins."""
    return party, phase, name, rng.choice([0.0, rng.uniform(0, 0.05)])


def left_over(folder: Path) -> list[str]:
    """Processes that this run started, and memory files that anyone made since, after half a minute."""
    time.sleep(30)
    began = (folder / "plan.json").stat().st_mtime
    rest = [str(path) for path in Path("/dev/shm").iterdir() if path.stat().st_mtime >= began]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}\0".encode() in (process / "environ").read_bytes():
                rest.append((process / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return rest


def matrix(repeats: int, words: list[str]) -> int:
    named = [[word for word in kind if word in words] or kind for kind in (PARTIES, PHASES, SIGNALS)]
    parties, cells = named[0], list(product(*named[1:]))
    report_file = Path("runs/faults.json")
    report = json.loads(report_file.read_text()) if report_file.exists() else []
    done = {(row["party"], row["repeat"]) for row in report if ended_well(row) and len(row["cells"]) == len(cells)}
    for repeat, party in product(range(repeats), parties):
        if (party, repeat) in done:
            continue
        rng = random.Random(f"{party} {repeat}")  # another order and other moments in each repeat
        plan = {str(2 + i): strike(rng, party, *cell) for i, cell in enumerate(rng.sample(cells, len(cells)))}
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            result = run_with(plan, Path(folder), 3 + len(plan), [f"seed={repeat}"])
            rest = left_over(Path(folder))
            Path(f"runs/faults-{party}-{repeat}.txt").write_text(result["output"])
        row = {
            "party": party, "repeat": repeat, "cells": sorted(map(list, plan.values())), "codes": result["codes"],
            "holds": bool(result["summary"].get("rollouts", {}).get("holds")), "num_struck": len(result["struck"]),
            "left_over": rest, "num_restarts": result["summary"].get("num_restarts"), "s": time.monotonic() - started,
        }  # fmt: skip
        report = [old for old in report if (old["party"], old["repeat"]) != (party, repeat)] + [row]
        report_file.write_text(json.dumps(report, indent=1))
        print({key: value for key, value in row.items() if key != "cells"}, flush=True)
    good = all(map(ended_well, report))
    print(f"{sum(len(row['cells']) for row in report)} strikes:", "all ended well" if good else "FAILED")
    return 0 if good else 1


def ended_well(row: dict[str, Any]) -> bool:
    struck_all = row["num_struck"] == len(row["cells"])
    return row["codes"][-1] == 0 and row["holds"] and not row["left_over"] and struck_all


def saves(num_kills: int) -> int:
    """Kills the driver while it saves, again and again; each time the newest whole checkpoint must be gone on from.

    In the end the run must have selected and observed what one that was never killed does.
    """
    from dpsrl.run_folder import RunFolder

    rng, history = random.Random(0), []
    extra = ["eval.every=0", f"train.steps={3 * num_kills}"]  # a process saves three times at most
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints = folder / "run/checkpoints"
        for kill in range(num_kills):
            before, _ = RunFolder(folder / "run").newest_checkpoint()
            log, started = folder / "output.txt", time.time()
            with log.open("w") as file:
                run = subprocess.Popen(
                    [sys.executable, "-m", "dpsrl.train", *SMALL, *extra, f"run.dir={folder / 'run'}"],
                    stdout=file, stderr=file,
                )  # fmt: skip
                begun: set[str] = set()
                wanted = rng.randint(1, 3)
                while run.poll() is None and len(begun) < wanted:
                    begun |= being_written(checkpoints, started)
                    time.sleep(0.001)
                time.sleep(rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)]))
                left = [path.name for path in checkpoints.iterdir() if path.suffix] if checkpoints.exists() else []
                run.kill()
            said = f"going on after step {before.step}," if before else "whole checkpoint: starting at the first step"
            step = before.step if before else 0
            history.append({"kill": kill, "step": step, "unfinished": left, "code": run.wait()})
            print(history[-1], flush=True)
            if history[-1]["code"] != -signal.SIGKILL or (kill and said not in log.read_text()):
                print(log.read_text(), f"FAILED: {said!r} was not said, or the run ended by itself")
                return 1
        results = {}
        for place in ("run", "whole"):
            command = [sys.executable, "-m", "dpsrl.train", *SMALL, *extra, f"run.dir={folder / place}"]
            results[place] = subprocess.run(command, capture_output=True, text=True, check=False).returncode
        groups = [(folder / place / "groups.jsonl").read_text() for place in ("run", "whole")]
        summary = json.loads((folder / "run/summary.json").read_text())
    same_groups = sorted(groups[0].split("\n")) == sorted(groups[1].split("\n"))
    report = {"kills": history, "codes": results, "same_groups": same_groups, "rollouts": summary["rollouts"]}
    Path("runs/saves.json").write_text(json.dumps(report, indent=1))
    print(results, same_groups, summary["rollouts"])
    return 0 if set(results.values()) == {0} and same_groups and summary["rollouts"]["holds"] else 1


def being_written(checkpoints: Path, since: float) -> set[str]:
    """Names of checkpoints that are being written; not of one that an earlier kill left unfinished."""
    names = set()
    for path in checkpoints.glob("*.tmp"):
        with suppress(FileNotFoundError):  # finished in between
            if path.stat().st_mtime > since:
                names.add(path.name)
    return names


def soak(steps: int) -> int:
    rng, plan = random.Random(0), {}
    for step in range(2, steps):
        phases = [phase for phase in PHASES if step % {"save": SAVE_EVERY, "evaluate": EVAL_EVERY}.get(phase, 1) == 0]
        if rng.random() < 0.1:
            plan[str(step)] = strike(rng, rng.choice(PARTIES), rng.choice(phases), rng.choice(SIGNALS))
    with tempfile.TemporaryDirectory() as folder:
        memory: list[dict[str, float]] = []
        ended = threading.Event()
        sampler = threading.Thread(target=sample_memory, args=(memory, ended))
        sampler.start()
        every = [f"eval.every={EVAL_EVERY}", f"checkpoint.every={SAVE_EVERY}"]
        extra = [*every, "eval.num_rollouts=8", "data.countdown.num_test=64"]
        result = run_with(plan, Path(folder), steps, extra)
        ended.set()
        sampler.join()
        rest = left_over(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        quiet = run_with({}, Path(folder), steps, extra)
    accuracy = [r["summary"].get("eval_last", {}).get("countdown") for r in (result, quiet)]
    gib = {party: in_thirds([at.get(party, 0.0) for at in memory]) for party in {name for at in memory for name in at}}
    report = {
        "accuracy": accuracy[0], "accuracy_without_faults": accuracy[1],
        "steps": steps, "faults": len(result["struck"]), "codes": result["codes"], "summary": result["summary"],
        "left_over": rest, "gib_first_and_last_third": gib,
    }  # fmt: skip
    Path("runs/soak.json").write_text(json.dumps(report, indent=1))
    print({key: value for key, value in report.items() if key != "summary"}, report["summary"].get("rollouts"))
    good = result["codes"][-1] == 0 and report["summary"]["rollouts"]["holds"] and not rest
    bounded = all(last < 1.2 * first + 0.05 for first, last in gib.values())
    return 0 if good and bounded and None not in accuracy and abs(accuracy[0] - accuracy[1]) < LIKE else 1


def in_thirds(values: list[float]) -> tuple[float, float]:
    """The largest of the first and of the last third."""
    third = max(1, len(values) // 3)
    return max(values[:third]), max(values[-third:])


def sample_memory(memory: list[dict[str, float]], ended: threading.Event) -> None:
    """Of all below this process, every few seconds: the largest of each kind, in GiB of its proportional set size."""
    while not ended.wait(5):
        largest: dict[str, float] = {}
        for process in psutil.Process().children(recursive=True):
            try:
                kind, gib = kind_of(process.cmdline()), process.memory_full_info().pss / 2**30
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            largest[kind] = max(largest.get(kind, 0.0), gib)
        memory.append(largest)


def kind_of(command: list[str]) -> str:
    """`RolloutWorker`, `faults.py worker`, or else Ray's and its agents' together."""
    words = " ".join(command)
    if words.startswith("ray::"):
        return words.removeprefix("ray::").split(".")[0].split()[0]
    known = [name for name in ("faults.py worker", "dpsrl.rewards.worker", "raylet", "gcs_server") if name in words]
    return known[0] if known else "other"


if __name__ == "__main__":
    kind, *rest = sys.argv[1:] or [""]
    Path("runs").mkdir(exist_ok=True)
    if kind == "worker":
        sys.exit(worker(rest[0], rest[1:]))
    if kind == "matrix":
        numbers = [int(word) for word in rest if word.isdigit()]
        sys.exit(matrix(numbers[0] if numbers else 1, [word for word in rest if not word.isdigit()]))
    if kind == "soak":
        sys.exit(soak(int(rest[0]) if rest else 500))
    if kind == "saves":
        sys.exit(saves(int(rest[0]) if rest else 50))
    print(__doc__)
