"""The programs in the guide run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[2] / "docs/other_trainers.md").read_text()
PROGRAMS = [block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.S) if "GRPOTrainer" not in block]


@pytest.mark.parametrize("program", PROGRAMS, ids=["loader", "numpy"])
def test_a_program_of_the_guide(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
