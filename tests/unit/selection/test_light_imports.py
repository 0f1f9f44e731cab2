"""The maths can be used without the machinery: checked in a fresh interpreter."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "ray", "vllm", "deepspeed", "hydra", "omegaconf", "transformers"]


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("dpsrl.selection", []),
        ("dpsrl.controller", []),
        ("dpsrl.algo.advantages", []),
        ("dpsrl.algo.packing", []),
        ("dpsrl.algo.losses", ["torch"]),
    ],
)
def test_imports_nothing_heavy(module, allowed):
    script = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert [name for name in HEAVY if name in loaded and name not in allowed] == []
