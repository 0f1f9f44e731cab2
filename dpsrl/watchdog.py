"""Watchdog: the time this process was awake for, and an end to a run whose driver itself hangs.

Deadlines on other processes are counted in `awake_s`, so that neither a jump of the clock nor a pause of this process
(SIGSTOP, a suspended laptop) makes others look silent.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_S = 0.5
MAX_TICK_S = 2.0  # what one tick counts for at most
EXIT_CODE = 3


class Watchdog:
    """A thread that ticks. After `limit_s` awake without a `beat` it calls `on_stall`, writes this process's stacks to
    stderr, and ends the process with exit code 3: the main thread cannot be asked to.
    """

    def __init__(self, limit_s: float, on_stall: Callable[[], None]) -> None:
        self.limit_s, self.on_stall = limit_s, on_stall
        self.awake_s = 0.0
        self._last_beat_s = 0.0
        self._paused = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def beat(self) -> None:
        """The main thread is alive."""
        self._last_beat_s = self.awake_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For work that has deadlines of its own."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.beat()

    def _tick(self) -> None:
        last = time.monotonic()
        while not self._end.wait(TICK_S):
            now = time.monotonic()
            self.awake_s += min(now - last, MAX_TICK_S)
            last = now
            if self._paused == 0 and self.awake_s - self._last_beat_s > self.limit_s:
                self._stop_everything()

    def _stop_everything(self) -> None:
        print(f"the driver made no progress for {self.limit_s:.0f} s; its stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        try:
            self.on_stall()
        finally:
            os._exit(EXIT_CODE)
