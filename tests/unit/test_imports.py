"""Imports point down only: what is light stays light, each module in an interpreter that has loaded none of dpsrl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dpsrl

pytestmark = pytest.mark.process
ROOT = Path(dpsrl.__file__).parent
HEAVY = ("ray", "vllm", "deepspeed")
# The upper layers, which exist to drive these; everything else, however new, is held to the rule.
UPPER = {
    "rollout", "trainer", "weight_sync", "cluster", "pools", "weights", "groups", "early", "crew", "launch",
    "train", "evaluate",
}  # fmt: skip
WITH_TORCH = {"algo.losses", "policy", "engine_weights", "trainer_state", "sampler", "trl"}
DOCTOR = ("doctor", "findings", "installed", "machine")
NO_CONFIG = ("selection", "controller", "algo.advantages", "algo.packing")
# One interpreter loads what a module may load in any case, and gives each module a copy of itself.
CODE = """
import importlib, json, os, sys
for allowed in sys.argv[1].split():
    importlib.import_module(allowed)
loaded = {}
for name in sys.argv[2:]:
    read, write = os.pipe()
    if os.fork() == 0:
        importlib.import_module(name)
        os.write(write, " ".join({module.split(".")[0] for module in sys.modules}).encode())
        os._exit(0)
    os.close(write)
    with open(read) as names:
        loaded[name] = names.read().split()
    assert os.wait()[1] == 0, name
print(json.dumps(loaded))
"""


def modules():
    """Every module of the package below the upper layers, as `selection.hmm`."""
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name.split(".")[0] not in UPPER | {"assets", "configs"}:
            yield name


def loaded_by(names, allowed=""):
    """Top-level names in sys.modules after importing each module alone, after those that are allowed."""
    paths = [f"dpsrl.{name}".rstrip(".") for name in names]
    command = [sys.executable, "-c", CODE, allowed, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return {name: set(loaded) for name, loaded in zip(names, json.loads(done.stdout).values(), strict=True)}


@pytest.fixture(scope="module")
def loaded():
    others = [name for name in modules() if name not in WITH_TORCH and name not in NO_CONFIG]
    return (
        loaded_by(NO_CONFIG, "numpy")
        | loaded_by(others, "numpy hydra omegaconf rich.console pyarrow")
        | loaded_by(sorted(WITH_TORCH), "torch omegaconf")
    )


@pytest.mark.parametrize("name", list(modules()))
def test_a_low_module_loads_nothing_heavy(loaded, name):
    unwanted = set(HEAVY) if name in WITH_TORCH else {*HEAVY, "torch", "transformers"}
    assert loaded[name] & unwanted == set()


@pytest.mark.parametrize("name", NO_CONFIG)
def test_the_maths_needs_no_configuration(loaded, name):
    assert loaded[name] & {"hydra", "omegaconf"} == set()


def test_the_driver_loads_torch_no_sooner_than_its_trainers():
    for name, names in loaded_by(("train", "evaluate"), "numpy hydra omegaconf rich.console pyarrow").items():
        assert not names & {"torch", "vllm", "deepspeed", "transformers"}, name


def test_selection_needs_numpy_alone(loaded):
    """So that it can be used inside other trainers."""
    assert loaded["selection"] & {"hydra", "omegaconf", "rich", "matplotlib", "scipy", "pyarrow"} == set()


def test_the_doctor_needs_nothing():
    light = {name for names in loaded_by(DOCTOR).values() for name in names}
    assert light - {"dpsrl", "__main__"} <= set(sys.stdlib_module_names) | {"sitecustomize", "_distutils_hack"}


def test_every_excused_module_exists():
    assert all((ROOT / f"{name}.py").exists() for name in UPPER)
    assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in WITH_TORCH)
