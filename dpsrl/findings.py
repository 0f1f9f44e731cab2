"""What the doctor finds, in words, and code tried where it may raise, crash or hang. The standard library alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, WARNING, MISSING = "ok", "warning", "missing"
FACTS = "dpsrl-facts "
# Leaves without the end of the interpreter, which some libraries do not survive.
REPORT = f"""
import json, os, sys
def report(facts):
    print("\\n{FACTS}" + json.dumps(facts), flush=True)
    os._exit(0)
"""
MAX_WORDS = 160
_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Finding:
    """One row: `Finding("machine", "disk of runs", WARNING, "3.1 GiB free in runs", "make room, or set run.dir")`."""

    area: str  # machine, gpu, packages, recipes
    name: str
    status: str  # OK, WARNING or MISSING
    found: str
    fix: str = ""  # what to do, a sentence or a command; empty where there is nothing to do
    fatal: bool = False  # the recipe asked for cannot run with it


@dataclass(frozen=True)
class Tried:
    """What came of code tried: what it reported, or in words why it did not."""

    facts: Any
    fault: str
    is_late: bool = False  # its time was over: perhaps it is only slow


def attempt(code: str, deadline_s: float, *arguments: str) -> Tried:
    """Runs `code`, which ends with a call of `report(facts)`, in a process of its own, and ends all that it started."""
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", REPORT + code, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env=dict(os.environ, PYTHONFAULTHANDLER="", PYTHONWARNINGS="ignore", PYTHONUNBUFFERED="1"),
        )  # fmt: skip
    except OSError as error:
        return Tried(None, f"no process could be started ({error.strerror})")
    _running.add(process)
    try:
        out, err = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return Tried(None, f"did not come to an end within {deadline_s:.0f} s", is_late=True)
    finally:
        _end(process)
    for line in reversed(out.decode(errors="replace").splitlines()):
        if line.startswith(FACTS):
            return Tried(json.loads(line[len(FACTS) :]), "")
    if process.returncode < 0:
        return Tried(None, f"died of {signal.Signals(-process.returncode).name}")
    lines = err.decode(errors="replace").split("\n")
    words = next((line.strip() for line in reversed(lines) if line.strip()), "ended the interpreter")
    return Tried(None, words if len(words) <= MAX_WORDS else words[: MAX_WORDS - 4] + " ...")


def end_attempts() -> None:
    """Ends the code under way: it has sessions of its own, which Ctrl-C does not reach."""
    for process in list(_running):
        _end(process)


def _end(process: subprocess.Popen) -> None:
    _running.discard(process)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it is gone, and left nobody
    try:
        process.communicate(timeout=5)
    except (subprocess.TimeoutExpired, ValueError):
        pass  # unkillable, or read to the end already


def read_text(path: str) -> str:
    """What a file of the kernel's says; nothing where there is none."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def gib(num_bytes: float) -> str:
    size = num_bytes / 2**30
    return f"{size:.1f} GiB" if size >= 1 else f"{num_bytes / 2**20:.0f} MiB"
