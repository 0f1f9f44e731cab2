"""One checkpoint: a folder that is whole or does not count, and that proves on reading to be what was written.

Its manifest is written last. It holds the size and SHA-256 of every file, and ends with the SHA-256 of itself, so that
a flipped byte is found wherever it lies. A checkpoint holds a Hugging Face folder (`model/`) that `dpsrl.evaluate`,
vLLM and transformers load as it is, and folders of arrays and plain values. Nothing is ever unpickled. Which
checkpoints a run has, and which of them stay, is in `run_folder.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dpsrl.types import UserError

MANIFEST = "manifest.json"
SEAL = ',\n "sha256": "{}"\n}}\n'  # the last lines of a manifest: the hash of all bytes above them


class BrokenCheckpoint(UserError):
    """What was read is not what was written."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; one sentence."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    serial: int  # counts the checkpoints saved in a run folder; after going back to an earlier one, steps do not
    score: float | None  # of the evaluation at this step; higher is better
    about: dict[str, Any]  # configuration, versions, hash of the data set
    files: dict[str, tuple[int, str]]  # path below the folder -> bytes, SHA-256

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


# --- writing -------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, parts: Mapping[str, Callable[[Path], None]], step: int, serial: int, score: float | None,
    about: dict[str, Any], tick: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Fills the new `folder`; on return all of it is on the disk, manifest included, but not the folder's own name.

    tick: called after each file that is done, however long all of them take.
    """
    assert parts, "a checkpoint of nothing"
    for name, write in parts.items():
        (folder / name).mkdir(parents=True)
        try:
            write(folder / name)
        except Exception as error:
            raise CheckpointError(f"writing {name}/ failed: {reason(error)}") from error
        if not any(path.is_file() for path in (folder / name).rglob("*")):
            raise CheckpointError(
                f"nothing was written into {name}/; if another node writes it, both must share this folder"
            )
    sizes = files_below(folder)
    names = sorted(sizes, key=sizes.__getitem__, reverse=True)  # the longest work first
    jobs = [(action, folder / name) for name in names for action in (sync, sha256)]
    with ThreadPoolExecutor() as pool:
        done = []
        for result in pool.map(lambda job: job[0](job[1]), jobs):
            done.append(result)
            tick()
    digests = done[1::2]
    files = {name: (sizes[name], digest) for name, digest in sorted(zip(names, digests, strict=True))}
    with (folder / MANIFEST).open("wb") as file:
        file.write(sealed(Manifest(step, serial, score, about, files)))
        file.flush()
        os.fsync(file.fileno())
    for below, _, _ in os.walk(folder, topdown=False):
        sync(Path(below))


def sealed(manifest: Manifest) -> bytes:
    body = json.dumps(vars(manifest), indent=1).removesuffix("\n}").encode()
    return body + SEAL.format(hashlib.sha256(body).hexdigest()).encode()


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder, and need not
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """An exception in a few words: the last line of what may be another process's whole traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    if isinstance(error, CheckpointError | UserError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}"


# --- reading -------------------------------------------------------------------------------------------


def verify(folder: Path) -> Manifest:
    """The manifest, after every file was found to be what it says; BrokenCheckpoint on the first that is not."""
    manifest = read_manifest(folder)
    try:
        found = files_below(folder)
        found.pop(MANIFEST, None)
        for name, size in found.items():
            if name not in manifest.files:
                raise broken(folder, f"{name} does not belong to it")
            if size != manifest.files[name][0]:
                raise broken(folder, f"{name} has {size:,} bytes where {manifest.files[name][0]:,} were written")
        for name in manifest.files:
            if name not in found:
                raise broken(folder, f"{name} is missing")
        names = sorted(found, key=found.__getitem__, reverse=True)
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(lambda name: sha256(folder / name), names))
    except OSError as error:
        raise broken(folder, f"it cannot be read: {reason(error)}") from error
    for name, digest in zip(names, digests, strict=True):
        if digest != manifest.files[name][1]:
            raise broken(folder, f"{name} has SHA-256 {digest} where {manifest.files[name][1]} was written")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, proved by its own hash; the files are not looked at."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        missing = f"{MANIFEST} is missing" if folder.is_dir() else "there is no such folder"
        raise broken(folder, missing) from None
    except OSError as error:
        raise broken(folder, f"{MANIFEST} cannot be read ({reason(error)})") from error
    body = raw[: -len(SEAL.format("0" * 64))]
    expected = hashlib.sha256(body).hexdigest()
    if raw != body + SEAL.format(expected).encode():
        raise broken(folder, f"{MANIFEST} ({len(raw):,} bytes) does not end with its own SHA-256, {expected}")
    try:
        fields = json.loads(raw)
        del fields["sha256"]
        fields["files"] = {name: (size, digest) for name, (size, digest) in fields["files"].items()}
        manifest = Manifest(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(folder, f"{MANIFEST} is whole, but of another version of dpsrl ({reason(error)})") from error
    named = re.match(r"step_(\d+)(\.|$)", folder.name)
    if named and int(named[1]) != manifest.step:
        raise broken(folder, f"it was saved at step {manifest.step} and has been renamed")
    return manifest


def open_checkpoint(path: Path) -> Checkpoint:
    """The whole checkpoint that a person named; UserError with what else is there."""
    if not (path / MANIFEST).exists() and (path / "checkpoints").is_dir():
        raise UserError(f"{path} is a run folder and not a checkpoint: name one of {path / 'checkpoints'}/step_N")
    try:
        return Checkpoint(path, verify(path))
    except BrokenCheckpoint as error:
        beside = (other.parent for other in path.parent.glob(f"step_*/{MANIFEST}"))
        others = sorted(str(other) for other in beside if other.suffix == "" and other != path)
        remedy = f"choose another one: {', '.join(others)}" if others else "there is no other one beside it"
        raise UserError(f"{error}; {remedy}") from error


def files_below(folder: Path) -> dict[str, int]:
    """Path below `folder` -> bytes. Links and devices are refused: what they lead to would not be this checkpoint's."""
    sizes, pending = {}, [folder]
    while pending:
        for entry in os.scandir(pending.pop()):
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                sizes[str(Path(entry.path).relative_to(folder))] = entry.stat().st_size
            else:
                raise OSError(errno.EINVAL, "not a plain file", entry.path)
    return sizes


def broken(folder: Path, what: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"checkpoint {folder} is broken: {what}")


# --- arrays and plain values ---------------------------------------------------------------------------


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Each array to `<name>.npy`, plain values to `plain.json`; nothing is pickled, or zipped, which is far slower."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            with (folder / f"{name}.npy").open("wb") as file:
                # Not the file itself: numpy would write it by C's stdio and not see the disk fill up at its end.
                np.save(SimpleNamespace(write=file.write), value, allow_pickle=False)
    plain = {name: value for name, value in state.items() if not isinstance(value, np.ndarray)}
    (folder / "plain.json").write_text(json.dumps(plain, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote; BrokenCheckpoint where it cannot be read."""
    path = folder / "plain.json"
    try:
        state = dict(json.loads(path.read_bytes()))
        for path in sorted(folder.glob("*.npy")):
            with path.open("rb") as file:
                state[path.stem] = np.lib.format.read_array(file, allow_pickle=False)
                if file.read(1):
                    raise ValueError("more bytes than its header says")
    except Exception as error:  # numpy's parser of headers lets through whatever Python's tokenizer raises
        raise broken(folder, f"{path.name} cannot be read ({reason(error)})") from error
    return state


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
