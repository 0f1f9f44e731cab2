"""Imports point down only: what is light stays light, each module in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

import dpsrl

ROOT = Path(dpsrl.__file__).parent
HEAVY = ("ray", "vllm", "deepspeed")
# The upper layers, which exist to drive these; everything else, however new, is held to the rule.
UPPER = {
    "rollout", "trainer", "weight_sync", "cluster", "pools", "weights", "groups", "early", "launch", "train",
    "evaluate",
}  # fmt: skip
WITH_TORCH = {"algo.losses", "policy", "engine_weights", "trainer_state", "sampler", "trl"}


def modules():
    """Every module of the package below the upper layers, as `selection.hmm`."""
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name.split(".")[0] not in UPPER | {"assets", "configs"}:
            yield name


def loaded_by(module):
    """Top-level names in sys.modules after importing `module` alone."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("name", list(modules()))
def test_a_low_module_loads_nothing_heavy(name):
    unwanted = set(HEAVY) if name in WITH_TORCH else {*HEAVY, "torch", "transformers"}
    assert loaded_by(f"dpsrl.{name}".rstrip(".")) & unwanted == set()


def test_selection_needs_numpy_alone():
    """So that it can be used inside other trainers."""
    assert loaded_by("dpsrl.selection") & {"hydra", "omegaconf", "rich", "matplotlib", "scipy", "pyarrow"} == set()


def test_every_excused_module_exists():
    assert all((ROOT / f"{name}.py").exists() for name in UPPER)
    assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in WITH_TORCH)
