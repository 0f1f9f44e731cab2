"""Scores responses in processes that can be killed: a reward function may hang, crash or eat memory.

Owns the worker processes and the deadline of each item. Knows nothing of what a reward means. A response
whose reward could not be had is None, missing: never 0, which would say that the answer is wrong.

An item's deadline runs while a process has it in hand, from the message before. A process that died or was
stopped may have been the item's doing or not: the item is tried once more, on another process, within what is
left of its deadline. A chunk that a process does not acknowledge within TAKE_S has not begun, and goes to
another process too. So an item costs at most its deadline and TAKE_S, beside the start of processes.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing as mp
import os
import select
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

from dpsrl.rewards.worker import BUILT_IN, CRASH, EXHAUSTED, FAILED, INVALID, READY, SCORED, TAKEN, load_function
from dpsrl.types import Score, UserError

START_DEADLINE_S = 120.0  # imports on a cold, crowded machine
MAX_START_FAILURES = 3  # in a row, of all workers together
MAX_CHUNK = 64  # items in one message: cheap rewards would else spend their time on messages
MAX_CHUNK_CHARS = 1 << 18  # of responses in one message, a longer one alone
TAKE_S = 2.0  # to acknowledge a chunk, and to take any part of it from the pipe
WATCH_S = 0.25  # how often a silent process is looked at: one that was stopped never answers
KILL_S = 10.0  # for the kernel to end a killed process
TIMEOUT = "timeout"

logger = logging.getLogger(__name__)


class Scorer:
    """A pool of `num_workers` processes around one reward function; a context manager.

    fn: "math", "countdown", or "my_module:function" of (response, answer) that returns a Score, a bool or a
    number (correct from 1.0 on); deadline_s: wall clock for one response. `missing` counts the responses that
    got no score, by reason: "timeout" (over the deadline), "crash" (the function raised, ran out of memory, or
    its process died twice), "invalid" (it returned no finite number); `why` has a few words on the first of each.
    `num_replaced` counts processes that were ended or found dead, `slowest_s` is the longest that processes had one
    item in hand. May be used from several threads, one at a time.
    """

    def __init__(self, fn: str, num_workers: int = 1, deadline_s: float = 5.0) -> None:
        if num_workers < 1:
            raise UserError(f"reward.num_workers={num_workers} must be at least 1.")
        if not deadline_s > 0:
            raise UserError(f"reward.deadline_s={deadline_s} must be above 0.")
        check_function(fn)
        self.fn, self.deadline_s = fn, deadline_s
        self.missing = {TIMEOUT: 0, CRASH: 0, INVALID: 0}
        self.why: dict[str, str] = {}
        self.num_replaced = 0
        self.slowest_s = 0.0
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

    def pids(self) -> list[int]:
        """Process ids of the workers, those still starting included; [] after close."""
        return [worker.process.pid for worker in list(self._workers)]

    def score(self, items: Sequence[tuple[str, Any]]) -> list[Score | None]:
        """One Score or None for each (response, answer), in order; None: missing. UserError after close."""
        with self._lock:
            if not self._workers:
                raise UserError("this Scorer is closed; make a new one.")
            batch = _Batch(items)
            try:
                while batch.todo or any(worker.pending for worker in self._workers):
                    self._hand_out(batch)
                    self._collect(batch)
            finally:  # after an interrupt, late replies must not be taken for those of the next call
                for worker in self._workers:
                    if worker.pending:
                        self._replace(worker)
            return batch.results

    def _hand_out(self, batch: _Batch) -> None:
        """Give each idle worker a chunk: large while much is left, down to one item at the end."""
        for worker in list(self._workers):
            if not batch.todo or not worker.ready or worker.pending:
                continue
            if worker.has_message() or worker.is_stopped():  # it died, or was stopped, while idle
                self._replace(worker)
                continue
            worker.pending = batch.chunk(min(MAX_CHUNK, len(batch.todo) // (2 * len(self._workers))))
            worker.taken, worker.clock = False, time.monotonic()
            try:
                worker.connection.send([batch.items[index] for index in worker.pending])
            except OSError as error:
                self._lose(worker, CRASH, f"its process did not take it ({error})", batch)

    def _collect(self, batch: _Batch) -> None:
        """Wait for the next replies or the next deadline, and deal with both. Replies come first."""
        active = [worker for worker in self._workers if worker.pending or not worker.ready]
        first = min((worker.clock + self._limit_s(worker, batch) for worker in active), default=0.0)
        wait([worker.connection for worker in active], max(0.0, min(WATCH_S, first - time.monotonic())))
        for worker in active:
            try:
                while worker.has_message():
                    self._take(worker, worker.connection.recv(), batch)
            except (EOFError, OSError):
                code = worker.kill()
                reason = TIMEOUT if code == -signal.SIGXCPU else CRASH
                self._lose(worker, reason, f"its process ended (exit code {code})", batch, again=reason == CRASH)
                continue
            if worker.ready and not worker.pending:
                continue
            limit_s, waited_s = self._limit_s(worker, batch), time.monotonic() - worker.clock
            if waited_s > limit_s:
                self._lose(worker, TIMEOUT, f"it took over {limit_s:g} s", batch, again=not worker.taken)
            elif waited_s > WATCH_S and worker.is_stopped():
                self._lose(worker, TIMEOUT, "its process was stopped", batch)

    def _limit_s(self, worker: _Worker, batch: _Batch) -> float:
        if not worker.ready:
            return START_DEADLINE_S
        left_s = batch.left_s.get(worker.pending[0])
        if worker.taken:
            return self.deadline_s if left_s is None else left_s
        return TAKE_S if left_s is None else min(TAKE_S, left_s)

    def _take(self, worker: _Worker, message: tuple[Any, ...], batch: _Batch) -> None:
        """One message: the worker has started, has a chunk in hand, or its current item is done."""
        kind, *content = message
        now = time.monotonic()
        waited_s, worker.clock = now - worker.clock, now
        if kind == FAILED:
            raise UserError(content[0])
        if kind == READY:
            worker.ready, self._num_start_failures = True, 0
            return
        index = worker.pending[0]
        if kind == TAKEN:
            worker.taken = True
            if index in batch.left_s:
                batch.left_s[index] -= waited_s
            return
        worker.pending.popleft()
        if waited_s > self.slowest_s or batch.left_s:
            self._count_time(index, waited_s, batch)
        if kind == SCORED:
            batch.results[index] = Score(*content)
        elif kind == EXHAUSTED:
            self._count_missing(CRASH, content[0])
            batch.give_back(worker.pending)
            raise EOFError  # its process ends itself now
        else:
            self._count_missing(kind, content[0])

    def _lose(self, worker: _Worker, reason: str, why: str, batch: _Batch, again: bool = True) -> None:
        """Replace a worker that overran, died or was stopped. Its current item is missing, unless it may be
        tried again; the other items have not begun and go back."""
        if not worker.ready:
            self._num_start_failures += 1
            if self._num_start_failures >= MAX_START_FAILURES:
                raise UserError(
                    f"no scoring process for reward.fn={self.fn} could start ({why}, "
                    f"{self._num_start_failures} times in a row); see what they wrote above, check memory."
                )
        elif worker.pending:
            index, spent_s = worker.pending[0], time.monotonic() - worker.clock
            left_s = self.deadline_s - (spent_s if worker.taken else 0.0)
            if again and left_s > 0 and index not in batch.left_s:
                batch.left_s[index] = left_s
            else:
                worker.pending.popleft()
                self._count_time(index, spent_s, batch)
                self._count_missing(reason, why)
            batch.give_back(worker.pending)
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self.num_replaced += 1
        self._workers[self._workers.index(worker)] = _Worker(self.fn, self.deadline_s)

    def _count_time(self, index: int, seconds: float, batch: _Batch) -> None:
        before = self.deadline_s - batch.left_s[index] if index in batch.left_s else 0.0
        self.slowest_s = max(self.slowest_s, before + seconds)

    def _count_missing(self, reason: str, why: str) -> None:
        if not self.missing[reason]:
            self.why[reason] = why
            logger.warning("reward %s is missing for a response: %s. Counted from here on.", self.fn, why)
        self.missing[reason] += 1


class _Batch:
    """The items of one call, by index: what is to do, what came of it.

    `left_s`: seconds left of the deadline of those whose process was lost once; not a second time.
    """

    def __init__(self, items: Sequence[tuple[str, Any]]) -> None:
        self.items = items
        self.results: list[Score | None] = [None] * len(items)
        self.todo = deque(range(len(items)))
        self.left_s: dict[int, float] = {}

    def chunk(self, size: int) -> deque[int]:
        """The next items, `size` at most and one at least."""
        taken, num_chars = deque([self.todo.popleft()]), 0
        while self.todo and len(taken) < size:
            num_chars += len(self.items[taken[-1]][0])
            if num_chars + len(self.items[self.todo[0]][0]) > MAX_CHUNK_CHARS:
                break
            taken.append(self.todo.popleft())
        return taken

    def give_back(self, pending: deque[int]) -> None:
        self.todo.extendleft(reversed(pending))
        pending.clear()


def check_function(fn: str) -> None:
    """UserError unless `fn` can be loaded. The built-in ones are not imported here: math brings sympy."""
    if fn not in BUILT_IN:
        load_function(fn)
    elif fn == "math" and find_spec("math_verify") is None:
        raise UserError("reward.fn=math needs math-verify, which is not installed; pip install math-verify.")


def try_function(fn: str, answer: Any, deadline_s: float) -> list[str]:
    """Scores the first prompt's answer and a wrong one with a function of a user's own; a remark if one failed.

    UserError where it returns what is no reward, or fails on both.
    """
    if fn in BUILT_IN:
        return []
    right = answer[0] if isinstance(answer, list) else answer
    with Scorer(fn, deadline_s=deadline_s) as scorer:
        scores = scorer.score([(str(right), answer), ("I do not know.", answer)])
    if INVALID in scorer.why:
        raise UserError(
            f"reward.fn={fn} was tried on the first prompt, and {scorer.why[INVALID]}; have it return one of these."
        )
    if scores == [None, None]:
        raise UserError(
            f"reward.fn={fn} was tried on the first prompt, with its answer and with a wrong one, and failed on both: "
            f"{' and '.join(scorer.why.values())}; mend it."
        )
    return [
        f"warning: reward.fn={fn} was tried on the first prompt, and {why}; the rewards of such responses will be "
        "missing, which is not 0"
        for why in scorer.why.values()
    ]


class _Worker:
    """A process with the parent's ends of its two pipes.

    `pending`: indices it was given and has not answered, the current one first; `taken`: whether it has said
    that it has them; `clock`: when the process, the chunk or the current item was begun (monotonic seconds).
    """

    def __init__(self, fn: str, deadline_s: float) -> None:
        self.ready = self.taken = False
        self.pending: deque[int] = deque()
        self.clock = time.monotonic()
        self.connection, remote = mp.Pipe()
        _limit_blocking(self.connection, TAKE_S)
        self._poll = select.poll()
        self._poll.register(self.connection, select.POLLIN)
        lifeline, kept = os.pipe()
        self._kept = os.fdopen(kept, "wb")  # never written to; it closes when this process dies
        with remote, os.fdopen(lifeline, "rb"):
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from dpsrl.rewards.worker import main; main()", fn,
                 str(remote.fileno()), str(deadline_s)],
                stdin=lifeline,
                pass_fds=[remote.fileno()],
                env=_worker_env(),
                start_new_session=True,  # out of reach of Ctrl-C, and killed with all it started
            )  # fmt: skip
            _kill_when_closed(lifeline, self.process.pid)

    def has_message(self) -> bool:
        """Whether its pipe has something, an end included; Connection.poll takes ten times as long to say so."""
        return bool(self._poll.poll(0))

    def is_stopped(self) -> bool:
        """Whether someone has stopped it (SIGSTOP): the kernel says so at once, no pipe ever does."""
        try:
            with open(f"/proc/{self.process.pid}/stat", "rb") as file:
                state = file.read().rpartition(b")")[2].split()[0]
        except OSError:  # gone, and its pipe says that
            return False
        return state == b"T"

    def kill(self) -> int | None:
        """End the process and all it started; its exit code. May be called twice."""
        if self.process.returncode is None:  # not yet waited for, so its id is still its own
            os.killpg(self.process.pid, signal.SIGKILL)
        self._kept.close()
        self.connection.close()
        try:
            return self.process.wait(KILL_S)
        except subprocess.TimeoutExpired:  # in the kernel's hands, such as on a dead network disk
            logger.warning("scoring process %d was killed %g s ago and is still there.", self.process.pid, KILL_S)
            return None


def _worker_env() -> dict[str, str]:
    """This process's environment and module search path; one thread for numpy's linear algebra."""
    root = str(Path(__file__).resolve().parents[2])
    path = list(dict.fromkeys(os.path.abspath(entry) for entry in [*sys.path, root]))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path)}


def _kill_when_closed(lifeline: int, group: int) -> None:
    """The kernel kills that process group once the other end of the pipe is gone, whatever the processes are
    stuck in, also while they are stopped or still starting.

    Not PR_SET_PDEATHSIG, which fires when the thread that started the process ends, and not a thread there,
    which waits for the interpreter's lock while one multiplication of huge integers holds it.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -group)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _limit_blocking(connection: Connection, seconds: float) -> None:
    """A send that a stopped worker does not take, or half a message from it, fails after that long."""
    timeval = struct.pack("ll", int(seconds), round(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
