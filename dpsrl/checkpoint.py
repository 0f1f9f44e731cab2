"""The run folder: what lies where, and how a checkpoint is written so that it exists whole or not at all.

A checkpoint is written into `step_N.tmp`, its manifest of sizes and hashes last, then renamed. It holds a
Hugging Face folder (`model/`) that `dpsrl.evaluate`, vLLM and transformers load as it is, and the
controller's state (`controller/`, an array per file).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.types import UserError


class RunFolder:
    """Paths of one run. `create` refuses a folder that already holds something."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.groups = path / "groups.jsonl"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"

    def check_free(self) -> None:
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"run.dir={self.path} is occupied: choose another folder or remove this one")

    def create(self) -> None:
        self.check_free()
        self.logs.mkdir(parents=True)

    def save_checkpoint(self, step: int, write_model: Callable[[Path], None], state: dict[str, Any], keep: int) -> Path:
        """The finished folder `checkpoints/step_N`; older ones beyond `keep` are removed after it is whole."""
        folder = self.checkpoints / f"step_{step}"
        unfinished = folder.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_model(unfinished / "model")
        write_state(unfinished / "controller", state)
        files = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
        manifest = {
            "step": step,
            "files": {str(path.relative_to(unfinished)): [path.stat().st_size, sha256(path)] for path in files},
        }
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1))
        unfinished.rename(folder)
        for old in self.list_checkpoints()[:-keep]:
            shutil.rmtree(old)
        return folder

    def list_checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        folders = [
            path.parent for path in self.checkpoints.glob("step_*/manifest.json") if path.parent.suffix != ".tmp"
        ]
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Each array to `<name>.npy`, plain values to `plain.json`; nothing is pickled, or zipped, which is far slower."""
    folder.mkdir(parents=True)
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            np.save(folder / f"{name}.npy", value, allow_pickle=False)
    plain = {name: value for name, value in state.items() if not isinstance(value, np.ndarray)}
    (folder / "plain.json").write_text(json.dumps(plain, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
    return json.loads((folder / "plain.json").read_text()) | arrays


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_model_folder(path: str) -> None:
    """Raises UserError unless `path` is a Hugging Face name or a folder with config, tokenizer and weights."""
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            raise UserError(
                f"model.path={path} does not exist: give a model folder or a Hugging Face name (owner/name)"
            )
        return
    for pattern, what in (
        ("config.json", "config.json"),
        ("tokenizer*.json", "tokenizer"),
        ("*.safetensors", "weights (.safetensors)"),
    ):
        if not any(folder.glob(pattern)):
            raise UserError(f"model.path={path} has no {what}: give the folder of a complete model")
