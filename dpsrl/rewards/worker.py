"""One scoring process: loads the reward function, then answers each item with one message, in order.

Owns its own end of the pipe, its memory limit and how it dies. Knows no deadline: it may be stuck in any
item, and the parent kills it. Started by `dpsrl.rewards.scorer` as a fresh interpreter, never forked and not
through `multiprocessing`, so that it imports neither the parent's main module nor torch.
"""

from __future__ import annotations

import fcntl
import importlib
import inspect
import math
import numbers
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.types import Score, UserError

BUILT_IN = {"math": "dpsrl.rewards.math:score", "countdown": "dpsrl.rewards.countdown:score"}
# The first call of a built-in function is slow (parsers, caches): made before the first deadline runs.
WARM_UP = {"math": (r"\boxed{x+1}", "1+x")}
MEMORY_BYTES = 2 << 30  # address space beyond what the process has once its function is loaded

# Messages to the parent, tuples that start with one of these.
READY, FAILED, SCORED, CRASH, INVALID = "ready", "failed", "scored", "crash", "invalid"

RewardFunction = Callable[[str, Any], Any]


def load_function(name: str) -> RewardFunction:
    """The reward function called "math", "countdown" or "my_module:function"; the working directory counts.

    Raises UserError where there is none of that name, or it does not take (response, answer).
    """
    module_name, colon, function_name = BUILT_IN.get(name, name).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise UserError(f"reward.fn={name} must be one of {', '.join(BUILT_IN)} or my_module:function.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"reward.fn={name} could not be imported ({_one_line(error)}); check the name and that module."
        ) from error
    function = vars(module).get(function_name)
    if not callable(function):
        raise UserError(f"reward.fn={name}: {module_name} has no function {function_name}; check the name.")
    if not _takes_two(function):
        raise UserError(f"reward.fn={name} must take two arguments, (response, answer); change the function.")
    return function


def _takes_two(function: RewardFunction) -> bool:
    try:
        inspect.signature(function).bind("", "")
    except TypeError:
        return False
    except ValueError:  # some functions written in C tell no signature
        return True
    return True


def as_score(result: Any) -> Score | None:
    """What a reward function returned as a Score; None unless it is a Score, a bool or a finite number.

    A plain number is correct from 1.0 on.
    """
    if isinstance(result, Score):
        reward, correct = result.reward, result.correct
    elif isinstance(result, bool | np.bool_):
        reward, correct = float(result), result
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
    """The message for one item: (SCORED, reward, correct), (CRASH, why) or (INVALID, why)."""
    try:
        result = function(response, answer)
    except MemoryError:  # what else it broke is unknown: start afresh
        os._exit(1)
    # The one place where any error is an outcome: a person's function failed on this item, and only on it.
    except Exception as error:
        return CRASH, _one_line(error)
    score = as_score(result)
    if score is None:
        return INVALID, f"it returned {_printable(repr(result))}, not a Score, a bool or a finite number"
    return SCORED, score.reward, score.correct


def _one_line(error: BaseException) -> str:
    return _printable(f"{type(error).__name__}: {error}")


def _printable(text: str) -> str:
    return " ".join(text[:300].split()).encode("ascii", "backslashreplace").decode()


def main() -> None:
    """Serve until the parent closes the pipe. Arguments: reward function, file descriptor of the pipe."""
    name, descriptor = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    os.dup2(2, 1)  # what a reward function prints must not mix with the parent's output
    connection = Connection(descriptor)
    try:
        function = load_function(name)
    except UserError as error:
        connection.send((FAILED, str(error)))
        return
    if name in WARM_UP:
        function(*WARM_UP[name])
    _limit_memory()
    connection.send((READY,))
    while True:
        try:
            items = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        for response, answer in items:
            connection.send(judge(function, response, answer))


def _die_with_parent() -> None:
    """The kernel ends this process once the parent's end of stdin is gone, whatever it is stuck in.

    Not PR_SET_PDEATHSIG, which fires when the thread that started the process ends, and not a thread of ours,
    which waits for the interpreter's lock while one multiplication of huge integers holds it.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
