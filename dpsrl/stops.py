"""SIGTERM: a scheduler is about to take this machine away, and the run is to save and end."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopRequests:
    """Notes SIGTERM while its context is open; once there are more than `patience`, each is a Ctrl-C."""

    def __init__(self, patience: int = 1) -> None:
        self.patience, self.num = patience, 0

    def __enter__(self) -> StopRequests:
        self._before = signal.getsignal(signal.SIGTERM)
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def listen(self) -> None:
        """Called again where a library has taken the signal over, as Ray does at its start."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.num += 1
        if self.num > self.patience:
            raise KeyboardInterrupt
