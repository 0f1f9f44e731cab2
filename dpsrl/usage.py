"""How busy this machine is: GPUs, cores, memory. Looked at by a thread, so that nothing waits for the answer."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import dataclass

import psutil

LOOK_EVERY_S = 3.0
ANSWER_WITHIN_S = 5.0  # a driver that hangs must not pile up processes
GIB = 2**30
NVIDIA_SMI = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Machine:
    """Shares are 0 to 1, memory is in GiB. Of each GPU: share busy, memory used, memory it has."""

    cpu: float
    memory: tuple[float, float]  # used, there is
    gpus: tuple[tuple[float, float, float], ...] = ()


def read_gpus(listing: str) -> tuple[tuple[float, float, float], ...]:
    """What nvidia-smi's lines say; a GPU that does not know all of it (a part of one, say) is left out."""
    gpus = []
    for line in listing.splitlines():
        try:
            percent, used_mib, total_mib = map(float, line.split(","))
        except ValueError:
            continue
        gpus.append((percent / 100, used_mib / 1024, total_mib / 1024))
    return tuple(gpus)


def ask_gpus() -> tuple[tuple[float, float, float], ...]:
    """Of the GPUs that this process may use; none where there is no answer in time."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return ()
    command = NVIDIA_SMI + (["-i", visible] if visible else [])
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return read_gpus(answer.stdout) if answer.returncode == 0 else ()


class Usage:
    """Owns the thread; `machine` is its latest answer, None until there is one."""

    def __init__(self) -> None:
        self.machine: Machine | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="usage", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        psutil.cpu_percent()  # the first call only begins to count
        wait_s = 1.0
        while not self._end.wait(wait_s):
            memory = psutil.virtual_memory()
            used = ((memory.total - memory.available) / GIB, memory.total / GIB)
            self.machine = Machine(psutil.cpu_percent() / 100, used, ask_gpus())
            wait_s = LOOK_EVERY_S

    def stop(self) -> None:
        """Does not wait for the thread, which may be waiting itself."""
        self._end.set()
