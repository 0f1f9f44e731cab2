"""Scores responses in processes that can be killed: a reward function may hang, crash or eat memory.

Owns the worker processes and the deadline of each item. Knows nothing of what a reward means. A response
whose reward could not be had is None, missing: never 0, which would say that the answer is wrong.
"""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dpsrl.rewards.worker import BUILT_IN, CRASH, FAILED, INVALID, READY, SCORED, load_function
from dpsrl.types import Score, UserError

START_DEADLINE_S = 120.0  # imports on a cold, crowded machine
MAX_START_FAILURES = 3  # in a row, of all workers together
MAX_CHUNK = 64  # items in one message: cheap rewards would else spend their time on messages
TIMEOUT = "timeout"

logger = logging.getLogger(__name__)


class Scorer:
    """A pool of `num_workers` processes around one reward function; a context manager.

    fn: "math", "countdown", or "my_module:function" of (response, answer) that returns a Score, a bool or a
    number (correct from 1.0 on); deadline_s: wall clock for one response. `missing` counts the responses that
    got no score, by reason: "timeout", "crash" (the function raised or its process died), "invalid" (it
    returned no finite number). May be used from several threads, one at a time.
    """

    def __init__(self, fn: str, num_workers: int = 1, deadline_s: float = 5.0) -> None:
        if num_workers < 1:
            raise UserError(f"reward.num_workers={num_workers} must be at least 1.")
        if not deadline_s > 0:
            raise UserError(f"reward.deadline_s={deadline_s} must be above 0.")
        check_function(fn)
        self.fn, self.deadline_s = fn, deadline_s
        self.missing = {TIMEOUT: 0, CRASH: 0, INVALID: 0}
        self._num_start_failures = 0
        self._lock = threading.Lock()
        self._workers = [_Worker(fn, deadline_s) for _ in range(num_workers)]

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. May be called twice."""
        with self._lock:
            for worker in self._workers:
                worker.kill()
            self._workers = []

    def score(self, items: Sequence[tuple[str, Any]]) -> list[Score | None]:
        """One Score or None for each (response, answer), in order; None: missing. UserError after close."""
        with self._lock:
            if not self._workers:
                raise UserError("this Scorer is closed; make a new one.")
            results: list[Score | None] = [None] * len(items)
            todo = deque(range(len(items)))
            try:
                while todo or any(worker.pending for worker in self._workers):
                    self._hand_out(items, todo)
                    self._collect(results, todo)
            finally:  # after an interrupt, late replies must not be taken for those of the next call
                for worker in self._workers:
                    if worker.pending:
                        self._replace(worker)
            return results

    def _hand_out(self, items: Sequence[tuple[str, Any]], todo: deque[int]) -> None:
        """Give each idle worker a chunk: large while much is left, down to one item at the end."""
        for worker in list(self._workers):
            if not todo or not worker.ready or worker.pending:
                continue
            if worker.connection.poll():  # nothing is due: it died while idle, and no item is to blame
                self._replace(worker)
                continue
            size = max(1, min(MAX_CHUNK, len(todo) // (2 * len(self._workers))))
            worker.pending = deque(todo.popleft() for _ in range(min(size, len(todo))))
            worker.clock = time.monotonic()
            try:
                worker.connection.send([items[index] for index in worker.pending])
            except BlockingIOError:
                self._lose(worker, TIMEOUT, "the process did not take the message", todo)
            except OSError as error:
                self._lose(worker, CRASH, f"the process could not be reached ({error})", todo)

    def _collect(self, results: list[Score | None], todo: deque[int]) -> None:
        """Wait for the next replies or the next deadline, and deal with both. Replies come first."""
        active = [worker for worker in self._workers if worker.pending or not worker.ready]
        first = min((worker.clock + self._limit_s(worker) for worker in active), default=0.0)
        wait([worker.connection for worker in active], max(0.0, first - time.monotonic()))
        for worker in active:
            try:
                while worker.connection.poll():
                    self._take(worker, worker.connection.recv(), results)
            except (EOFError, OSError):
                self._lose(worker, CRASH, f"its process ended (exit code {worker.kill()})", todo)
                continue
            busy = worker.pending or not worker.ready
            if busy and time.monotonic() > worker.clock + self._limit_s(worker):
                self._lose(worker, TIMEOUT, f"it took over {self._limit_s(worker):g} s", todo)

    def _limit_s(self, worker: _Worker) -> float:
        return self.deadline_s if worker.ready else START_DEADLINE_S

    def _take(self, worker: _Worker, message: tuple[Any, ...], results: list[Score | None]) -> None:
        """One message: the worker has started, or its current item is done and the next one's clock runs."""
        kind, *content = message
        worker.clock = time.monotonic()
        if kind == FAILED:
            raise UserError(content[0])
        if kind == READY:
            worker.ready, self._num_start_failures = True, 0
            return
        index = worker.pending.popleft()
        if kind == SCORED:
            results[index] = Score(*content)
        else:
            self._count_missing(kind, content[0])

    def _lose(self, worker: _Worker, reason: str, why: str, todo: deque[int]) -> None:
        """Replace a worker that overran or died. Its current item is missing; those not begun go back."""
        if worker.ready:
            if worker.pending:
                worker.pending.popleft()
                self._count_missing(reason, why)
            todo.extendleft(reversed(worker.pending))
            worker.pending.clear()
        else:
            self._num_start_failures += 1
            if self._num_start_failures >= MAX_START_FAILURES:
                raise UserError(
                    f"no scoring process for reward.fn={self.fn} could start ({why}, "
                    f"{self._num_start_failures} times in a row); see what they wrote above, check memory."
                )
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self.fn, self.deadline_s)

    def _count_missing(self, reason: str, why: str) -> None:
        if not self.missing[reason]:
            logger.warning("reward %s is missing for a response: %s. Counted from here on.", self.fn, why)
        self.missing[reason] += 1


def check_function(fn: str) -> None:
    """UserError unless `fn` can be loaded. The built-in ones are not imported here: math brings sympy."""
    if fn not in BUILT_IN:
        load_function(fn)
    elif fn == "math" and find_spec("math_verify") is None:
        raise UserError("reward.fn=math needs math-verify, which is not installed; pip install math-verify.")


class _Worker:
    """A process with the parent's ends of its two pipes.

    `pending`: indices it was given and has not answered, the current one first; `clock`: when that one, or
    the process itself, was begun (monotonic seconds).
    """

    def __init__(self, fn: str, deadline_s: float) -> None:
        self.ready = False
        self.pending: deque[int] = deque()
        self.clock = time.monotonic()
        self.connection, remote = mp.Pipe()
        _limit_blocking(self.connection, deadline_s)
        with remote:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from dpsrl.rewards.worker import main; main()", fn,
                 str(remote.fileno())],
                stdin=subprocess.PIPE,  # never written to; it closes when this process dies
                pass_fds=[remote.fileno()],
                env=_worker_env(),
                start_new_session=True,  # out of reach of Ctrl-C, and killed with all it started
            )  # fmt: skip

    def kill(self) -> int:
        """End the process and all it started; its exit code. May be called twice."""
        if self.process.returncode is None:  # not yet waited for, so its id is still its own
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdin.close()
        self.connection.close()
        return self.process.wait()


def _worker_env() -> dict[str, str]:
    """This process's environment and module search path; one thread for numpy's linear algebra."""
    root = str(Path(__file__).resolve().parents[2])
    path = list(dict.fromkeys(os.path.abspath(entry) for entry in [*sys.path, root]))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path)}


def _limit_blocking(connection: Connection, seconds: float) -> None:
    """A send that a stopped worker does not take fails after that long, instead of blocking for ever."""
    microseconds = max(1, round(seconds * 1e6))
    timeval = struct.pack("ll", microseconds // 1_000_000, microseconds % 1_000_000)
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
