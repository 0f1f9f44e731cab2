"""Copies of the metrics beside `metrics.jsonl`, as `log.to` names them: Weights & Biases, TensorBoard.

Owns the processes that write them (`sink_process.py`). A service that is down, a full disk or a library that hangs ends
the copy with one sentence, and never the training: all that can happen here to the driver is to wait for `FINISH_S`
at its end.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpsrl.guard import Followed
from dpsrl.metrics import Record, plain_record
from dpsrl.types import UserError

PROCESS = Path(__file__).with_name("sink_process.py")
SILENT_S = 120.0  # without an answer; wandb itself gives up on its service after 90
FINISH_S = 30.0  # to send what is left at the end of the run
KILL_S = 5.0


def check_sinks(names: Iterable[str]) -> None:
    """UserError for one whose package, of the same name, is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"log.to=[{name}] needs {name}, which is not installed: pip install {name}, or leave it out"
            )


def wandb_id(run_dir: Path) -> str:
    """The run's id at Weights & Biases, the same after a resume."""
    file = run_dir / "wandb_id.txt"
    if not (file.exists() and file.read_text().strip()):  # a full disk leaves an empty one
        file.write_text(uuid.uuid4().hex)
    return file.read_text()


class Sink:
    """Takes records without waiting; a thread hands them on to the process, one at a time.

    options: what `sink_process.py` needs to begin. `say` gets the one sentence if the copy ends before the run.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], say: Callable[[str], None], *, process: Path = PROCESS,
        silent_s: float = SILENT_S, finish_s: float | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.name, self._say, self._clock = name, say, clock
        self._silent_s, self._finish_s = silent_s, finish_s or FINISH_S
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._error, self._over = "", False
        # -P: beside the file lie modules of our own that are named like Python's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(process), str(self._finish_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, start_new_session=True,  # Ctrl-C ends the run, which then closes this
        )  # fmt: skip
        self._processes = Followed()
        self._processes.add([self._process.pid])
        self._put({**options, "sink": name})
        self._thread = threading.Thread(target=self._feed, name=name, daemon=True)
        self._thread.start()

    def _put(self, values: Mapping[str, Any]) -> None:
        if self._lines.unfinished_tasks == 0:
            self._silent_since = self._clock()
        self._lines.put(json.dumps(plain_record(values)) + "\n")

    def _feed(self) -> None:
        process = self._process
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None  # both are pipes
        try:
            while (line := self._lines.get()) is not None:
                stdin.write(line)
                stdin.flush()
                if (answer := stdout.readline()) != "taken\n":
                    self._error = answer
                    break
                self._silent_since = self._clock()
                self._lines.task_done()
            stdin.close()
            self._error = self._error or stdout.read()
        except BrokenPipeError:
            self._error = stdout.read()
        if process.wait() and not self._error:
            self._error = f"its process ended with code {process.returncode}"

    def __call__(self, record: Record) -> None:
        if self._over:
            return
        if self._lines.unfinished_tasks and self._clock() - self._silent_since > self._silent_s:
            self._end(f"has taken nothing for {self._silent_s:.0f} s")
        elif not self._thread.is_alive():
            self._end(f"stopped ({self._error.removeprefix('error ').strip()})")
        else:
            self._put(record)

    def close(self) -> None:
        """Sends what is left; gives up after the deadline."""
        if self._over:
            return
        self._lines.put(None)
        try:
            self._thread.join(self._finish_s)
        finally:  # a second Ctrl-C too
            finished = not self._thread.is_alive()
            self._kill()
        if not finished:
            self._end(f"did not finish within {self._finish_s:.0f} s")
        elif self._error:
            self._end(f"stopped ({self._error.removeprefix('error ').strip()})")

    def _end(self, why: str) -> None:
        self._over = True
        self._kill()
        self._say(f"warning: {self.name} {why}: its copy is not complete, metrics.jsonl is")

    def _kill(self) -> None:
        """Ends the process and what it has started."""
        self._processes.end()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a disk that hangs holds even what was killed
            self._process.wait(KILL_S)
        self._thread.join(KILL_S)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_sinks(
    names: Iterable[str], run_dir: Path, project: str, config: Mapping[str, Any], last_step: int,
    say: Callable[[str], None],
) -> list[Sink]:  # fmt: skip
    """One for each name. last_step: what a resumed run goes on from; the curves go on with the step after it."""
    sinks = []
    for name in dict.fromkeys(names):
        options = {"folder": str(run_dir), "config": dict(config), "first_step": last_step + 1}
        if name == "wandb":
            options |= {"project": project, "name": run_dir.name, "id": wandb_id(run_dir)}
        sinks.append(Sink(name, options, say))
    return sinks
