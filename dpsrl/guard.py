"""Nothing of a run outlives it: a small process that ends all others once the driver is gone, however that ended.

Ray ends its own processes when a driver is killed, but not all of them, and none that is stopped. The guard follows
what the driver names and all that this starts, by parent: names and environments of processes are rewritten by Ray.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress

LOOK_EVERY_S = 1.0
GRACE_S = 2.0  # for Ray to end its processes by itself
SWEEPS = 50
ENDS_WITHIN_S = 15.0


class Guard:
    """The driver's end; a context manager. Leaving it ends everything that is followed. Linux; elsewhere it is idle.

    folder: a private one for files that are to be gone with the run.
    """

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="dpsrl-")
        self._pids: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, self.folder],
            stdin=subprocess.PIPE,  # closes when this process dies
            start_new_session=True,  # out of reach of Ctrl-C
        )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._tell(self._pids)

    def _tell(self, pids: Iterable[int]) -> None:
        with suppress(BrokenPipeError):  # `check` begins another one
            self._stdin.write(" ".join(map(str, pids)).encode() + b"\n")
            self._stdin.flush()

    def follow(self, pids: Iterable[int]) -> None:
        self._pids |= set(pids)
        self._tell(pids)
        self.check()

    def check(self) -> None:
        """Puts another one in the place of a guard that was killed."""
        if self._process.poll() is not None:
            with suppress(BrokenPipeError):
                self._stdin.close()
            self._begin()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error: object) -> None:
        self.check()
        self._stdin.close()
        try:
            self._process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:  # it is stopped; its work is done from here
            self._process.kill()
            self._process.wait()
            followed = Followed()
            followed.add(self._pids)
            followed.end()
            shutil.rmtree(self.folder, ignore_errors=True)


def parents() -> dict[int, tuple[int, str]]:
    """Of every process on this machine its parent and the time it was started, in the kernel's ticks."""
    found = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != b"Z":
                found[int(name)] = int(fields[1]), fields[19].decode()
    return found


def children(pid: int) -> set[int]:
    return {child for child, (parent, _) in parents().items() if parent == pid}


class Followed:
    """Processes by id, with the time each was started, so that a number given anew is not taken for the old one."""

    def __init__(self) -> None:
        self.started: dict[int, str] = {}

    def add(self, pids: Iterable[int]) -> None:
        known = parents()
        self.started |= {pid: known[pid][1] for pid in pids if pid in known}

    def look(self) -> list[int]:
        """Takes in what the followed ones have started; those that are alive."""
        known = parents()
        self.started = {pid: at for pid, at in self.started.items() if pid in known and known[pid][1] == at}
        grown = True
        while grown:
            more = {pid: at for pid, (parent, at) in known.items() if parent in self.started}
            grown = not more.keys() <= self.started.keys()
            self.started |= more
        return list(self.started)

    def end(self) -> None:
        for _ in range(SWEEPS):
            if not (alive := self.look()):
                return
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)


def main() -> None:
    """Lines of process ids on stdin, until its other end is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    followed = Followed()
    while True:
        if select.select([0], [], [], LOOK_EVERY_S)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                break
            followed.add(map(int, data.split()))
        followed.look()
    end = time.monotonic() + GRACE_S
    while followed.look() and time.monotonic() < end:
        time.sleep(0.1)
    followed.end()
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
