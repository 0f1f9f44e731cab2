"""One scoring process: loads the reward function, then answers each item with one message, in order.

Owns its own end of the pipe and its limits. Keeps no deadline: it may be stuck in any item, and
the parent kills it; should the parent be unable to, the limit on processor time ends it. Started by
`dpsrl.rewards.scorer` as a fresh interpreter, never forked and not through `multiprocessing`, so that it
imports neither the parent's main module nor torch.
"""

from __future__ import annotations

import math
import numbers
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.own import check_call, is_own, load_own, printable, told
from dpsrl.types import Score, UserError

BUILT_IN = {"math": "dpsrl.rewards.math:score", "countdown": "dpsrl.rewards.countdown:score"}
# The first call of a built-in function is slow (parsers, caches): made before the first deadline runs.
WARM_UP = {"math": (r"\boxed{(x+1)^2}", "x^2+2x+1")}
MEMORY_BYTES = 2 << 30  # address space beyond what the process has once its function is loaded
# An item that took this long has its memory looked at: over this share of the limit, some allocation of its
# may have failed where nobody said so, and what the function returned is not to be trusted.
SLOW_S, MAX_SHARE = 0.1, 0.75

# Messages to the parent, tuples that start with one of these.
READY, FAILED, TAKEN, SCORED, CRASH, INVALID = "ready", "failed", "taken", "scored", "crash", "invalid"
EXHAUSTED = "exhausted"  # out of memory: the last message of its process

RewardFunction = Callable[[str, Any], Any]


def load_function(name: str) -> RewardFunction:
    """The reward function called "math", "countdown" or "my_module:function"; the working directory counts.

    Raises UserError where there is none of that name, or it does not take (response, answer).
    """
    if name not in BUILT_IN and not is_own(name):
        raise UserError(f"reward.fn={name} must be one of {', '.join(BUILT_IN)} or my_module:function.")
    function = load_own(BUILT_IN.get(name, name), f"reward.fn={name}")
    check_call(function, f"reward.fn={name}", 2, "def score(response: str, answer) -> float")
    return function


def as_score(result: Any) -> Score | None:
    """What a reward function returned as a Score; None unless it is a Score, a bool or a finite number.

    A plain number is correct from 1.0 on.
    """
    if isinstance(result, Score):
        reward, correct = result.reward, result.correct
    elif isinstance(result, bool | np.bool_):
        reward, correct = float(result), bool(result)
    else:
        reward, correct = result, None
    if not isinstance(reward, numbers.Real):
        return None
    try:
        reward = float(reward)
    except OverflowError:
        return None
    if not math.isfinite(reward):
        return None
    return Score(reward, reward >= 1.0 if correct is None else bool(correct))


def judge(function: RewardFunction, response: str, answer: Any) -> tuple[Any, ...]:
    """The message for one item: (SCORED, reward, correct), or CRASH, EXHAUSTED or INVALID with a reason."""
    try:
        result = function(response, answer)
    except MemoryError:
        return EXHAUSTED, "it ran out of memory"
    # The one place where any error is an outcome: a person's function failed on this item, and only on it.
    except (Exception, SystemExit) as error:
        return CRASH, told(error)
    score = as_score(result)
    if score is None:
        return INVALID, f"it returned {printable(repr(result))}, not a Score, a bool or a finite number"
    return SCORED, score.reward, score.correct


def main() -> None:
    """Serve until the parent closes the pipe. Arguments: reward function, descriptor of the pipe, deadline in s."""
    name, descriptor, deadline_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(2, 1)  # what a reward function prints must not mix with the parent's output
    connection = Connection(descriptor)
    try:
        function = load_function(name)
    except UserError as error:
        connection.send((FAILED, str(error)))
        return
    if name in WARM_UP:
        function(*WARM_UP[name])
    if name in BUILT_IN:
        forbid_side_effects()
    _limit_memory()
    base_bytes = _resident_bytes()
    connection.send((READY,))
    while _resident_bytes() - base_bytes < MEMORY_BYTES // 2:  # else a fresh process takes the next chunk
        try:
            items = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send((TAKEN,))
        begun, limited = time.monotonic(), -math.inf
        for response, answer in items:
            if begun - limited > SLOW_S:
                _limit_processor_time(deadline_s)
                limited = begun
            message = judge(function, response, answer)
            before, begun = begun, time.monotonic()
            if begun - before > SLOW_S and _peak_bytes() - base_bytes > MAX_SHARE * MEMORY_BYTES:
                message = EXHAUSTED, "it came close to the memory limit"
            connection.send(message)
            if message[0] == EXHAUSTED:  # what else it broke is unknown: start afresh
                os._exit(1)


# Audit events (prefixes) of what no built-in reward does; a file opened for writing is another.
_SIDE_EFFECTS = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.remove", "os.rename",
    "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "subprocess.", "shutil.", "socket.",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def forbid_side_effects() -> None:
    """From here on this process ends at any attempt to start one, open a socket or change a file; for good.

    A second lock: a built-in reward evaluates nothing as code, so that no response comes this far.
    """
    sys.dont_write_bytecode = True  # of modules imported late

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if writes or event.startswith(_SIDE_EFFECTS):
            os.write(2, f"a reward attempted {event}: its process ends.\n".encode())
            os._exit(1)

    sys.addaudithook(hook)


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    """The most that this process ever had in memory."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10


def _limit_processor_time(seconds: float) -> None:
    """All cores for that long, a second more: only what the parent failed to end gets so far."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(time.process_time() + min(seconds, 1e6) * (os.cpu_count() or 1)) + 2
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
