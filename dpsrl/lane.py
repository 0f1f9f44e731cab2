"""`python -m dpsrl.lane`: runs of `dpsrl.train` one after another in one process, which keeps engines and trainer.

Started by whoever has many runs to make, through `Lane`. A line on stdin, `{"arguments": [...], "log": "..."}`, is a
run, what it prints goes to the log, and its exit code is the answer on stdout. The end of stdin is the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

COMMAND = (sys.executable, "-m", "dpsrl.lane")
ENDS_WITHIN_S = 60.0


class Lane:
    """The parent's end of one such process; not for two threads at once. It may be sent signals as a run may."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as errors:  # for what it says before its first run
            self.process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, process_group=0
            )

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """The exit code of the run, or of the process where that ended."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log.absolute())}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return int(answer) if answer else self.process.wait()

    def close(self) -> int:
        """Ends what was kept; the exit code of the process."""
        try:
            self.process.communicate(timeout=ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self.process.wait()


def main() -> int:
    from dpsrl import train
    from dpsrl.crew import Keeper
    from dpsrl.screen import output_to

    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with open(os.devnull) as nothing:  # for the processes of its runs, which inherit it
        os.dup2(nothing.fileno(), 0)
    with Keeper(keeps=True) as keeper:
        for line in jobs:
            job = json.loads(line)
            os.close(output_to(job["log"]))
            try:
                code = train.main(job["arguments"], keeper)
            except Exception:  # of one run, which a process of its own would end with in the same way
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            print(code, file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
