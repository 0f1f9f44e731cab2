"""The run folder: what lies where, which checkpoints there are and which of them stay, and whose folder it is.

`checkpoints/step_N` is whole. Beside it may lie, after a run was killed, `step_N.tmp` (unfinished), `step_N.old`
(whole, but its successor was about to take its place) and `step_N.removed` (being removed). The next save puts them in
order.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpsrl.checkpoint import (
    BrokenCheckpoint,
    Checkpoint,
    CheckpointError,
    files_below,
    read_manifest,
    reason,
    sync,
    verify,
    write_checkpoint,
)
from dpsrl.types import UserError

_held: set[int] = set()  # descriptors of this process's locks


class RunFolder:
    """Paths of one run. `create` refuses a folder that already holds something."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.groups = path / "groups.jsonl"
        self.responses = path / "responses.jsonl"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.lock_file = path / "lock"

    # --- whose folder it is ----------------------------------------------------------------------------

    def check_free(self, resume: bool = False) -> None:
        """UserError for a folder that holds something; with `resume`, only if that is no run."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"run.dir={self.path} is not a folder: choose another name")
        if not any(entry != self.lock_file for entry in self.path.iterdir()):
            return
        if not resume:
            raise UserError(f"run.dir={self.path} is occupied: choose another folder or remove this one")
        if not self.config.exists() and not self.has_saved():
            raise UserError(
                f"run.dir={self.path} is occupied, but not by a run that could be resumed: "
                "choose another folder or remove this one"
            )

    def create(self, resume: bool = False) -> None:
        self.check_free(resume)
        self.logs.mkdir(parents=True, exist_ok=resume)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder until the end of the block or of this process, however it ends; UserError if another does.

        The kernel keeps the lock with the open file, so that none is left behind by a process that was killed. The file
        stays: were it removed, two processes could hold locks on two files of its name.
        """
        descriptor = self._lock()
        _held.add(descriptor)
        try:
            yield
        finally:
            if descriptor in _held:  # else this is a forked child
                _held.remove(descriptor)
                os.close(descriptor)

    def _lock(self) -> int:
        descriptor = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)  # Python's are closed on exec
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            return descriptor
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise UserError(
                    f"run.dir={self.path} is in use by another run ({self._holder()}): wait for its end, stop it, or "
                    "choose another folder"
                ) from None
            raise UserError(
                f"run.dir={self.path} cannot be locked ({reason(error)}): make it writable or choose another folder"
            ) from error

    def _holder(self) -> str:
        try:
            holder = json.loads(self.lock_file.read_text())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has the lock and has not yet written who it is
            return "which has only just started"

    # --- checkpoints -----------------------------------------------------------------------------------

    def save_checkpoint(
        self, step: int, parts: Mapping[str, Callable[[Path], None]], about: dict[str, Any], keep: int,
        score: float | None = None, say: Callable[[str], None] = print, tick: Callable[[], None] = lambda: None,
    ) -> Path:  # fmt: skip
        """The finished folder `checkpoints/step_N`, for whose sub-folder `name` `parts[name]` was called.

        Only when it is whole and on the disk are others removed: the `keep` saved last stay, and the one with the
        highest score; `say` is told of one that cannot be. tick: called after each file that is done. CheckpointError
        if it cannot be written; the others are then untouched. A score that is no finite number counts as none.
        """
        about = json.loads(json.dumps(about))  # what cannot be said in JSON is a mistake of ours, found before writing
        score = float(score) if score is not None and math.isfinite(score) else None
        folder = self.checkpoints / f"step_{step}"
        unfinished = folder.with_suffix(".tmp")
        try:
            self._tidy()
            serial = 1 + max((checkpoint.manifest.serial for checkpoint in self._finished()), default=0)
            write_checkpoint(unfinished, parts, step, serial, score, about, tick)
            self._put_in_place(unfinished, folder)
        except BaseException as error:
            written = _num_bytes(unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            raise CheckpointError(self._why_not(folder, error, written)) from error
        try:
            self._remove_older(keep, folder)
        except OSError as error:
            say(f"warning: a checkpoint older than {folder} cannot be removed: {reason(error)}")
        return folder

    def has_saved(self) -> bool:
        """Whether a checkpoint was ever finished here, whatever has become of it."""
        return any(suffix in ("", ".old") for _, _, suffix in self._folders())

    def newest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The one saved last that is whole to the last byte, and a sentence for each one that was passed over."""
        sentences, unreadable, readable = [], [], []
        for path, step, suffix in self._folders():
            if suffix == ".tmp":
                sentences.append(f"checkpoint {path} was never finished")
            elif suffix in ("", ".old"):
                try:
                    readable.append((read_manifest(path).serial, path))
                except BrokenCheckpoint as error:
                    unreadable.append((step, str(error)))
        newest = None
        for _, path in sorted(readable, reverse=True):
            try:
                newest = Checkpoint(path, verify(path))
                break
            except BrokenCheckpoint as error:
                sentences.append(str(error))
        sentences += [sentence for step, sentence in unreadable if newest is None or step >= newest.step]
        return newest, sentences

    def best_checkpoint(self) -> Checkpoint | None:
        """The whole one with the highest score, the later of two equal ones; None where none has a score."""
        for checkpoint in sorted(self._finished(), key=_rank, reverse=True):
            if checkpoint.manifest.score is not None:
                with suppress(BrokenCheckpoint):
                    return Checkpoint(checkpoint.path, verify(checkpoint.path))
        return None

    def list_checkpoints(self) -> list[Path]:
        """Finished checkpoints in the order in which they were saved; only their manifests are checked."""
        return [checkpoint.path for checkpoint in self._finished()]

    def _finished(self) -> list[Checkpoint]:
        found = []
        for path, _, suffix in self._folders():
            if suffix == "":
                with suppress(BrokenCheckpoint):
                    found.append(Checkpoint(path, read_manifest(path)))
        return sorted(found, key=lambda checkpoint: checkpoint.manifest.serial)

    def _folders(self) -> list[tuple[Path, int, str]]:
        """Path, step and suffix of all that lies among the checkpoints under one of our names."""
        if not self.checkpoints.is_dir():
            return []
        named = ((path, re.fullmatch(r"step_(\d+)(\.\w+)?", path.name)) for path in sorted(self.checkpoints.iterdir()))
        return [(path, int(match[1]), match[2] or "") for path, match in named if match]

    # --- moving and removing ---------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Puts in order what a killed run left."""
        for path, _, suffix in self._folders():
            if suffix == ".tmp" or suffix.startswith(".removed"):
                shutil.rmtree(path, ignore_errors=True)  # what will not go now is tried again at the next save
            elif suffix == ".old":
                if path.with_suffix("").exists():
                    self._remove(path)
                else:
                    path.rename(path.with_suffix(""))

    def _put_in_place(self, unfinished: Path, folder: Path) -> None:
        """Gives a finished folder its name. One that has the name is whole under another until this one is."""
        old = folder.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
            sync(self.checkpoints)
        try:
            unfinished.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        for parent in (self.checkpoints, self.path, self.path.parent):
            if os.access(parent, os.R_OK):  # where the run folder lies may be closed to us
                sync(parent)
        if old.exists():
            self._remove(old)

    def _remove_older(self, keep: int, newest: Path) -> None:
        """Those whose manifest is broken do not count, and go too."""
        finished = self._finished()
        if not finished or finished[-1].path != newest:
            raise CheckpointError(f"checkpoint {newest} was written, but cannot be read back: check its disk")
        stay = {checkpoint.path for checkpoint in finished[-keep:]}
        best = max(finished, key=_rank)
        if best.manifest.score is not None:
            stay.add(best.path)
        for path, _, suffix in self._folders():
            if suffix == "" and path not in stay:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """It loses its name before its first file, so that what is left of it never looks like a checkpoint."""
        names = (path.with_suffix(f".removed{i or ''}") for i in itertools.count())
        doomed = next(name for name in names if not name.exists())
        path.rename(doomed)
        sync(self.checkpoints)
        shutil.rmtree(doomed, ignore_errors=True)

    def _why_not(self, folder: Path, error: Exception, written: int) -> str:
        """Why the checkpoint could not be written, `written` bytes of which had been."""
        before = [checkpoint.manifest.num_bytes for checkpoint in self._finished()]
        known = f"the one before it has {before[-1]:,}" if before else f"{written:,} had been written"
        needed = max([written, *before[-1:]])
        place = next(path for path in (self.checkpoints, *self.checkpoints.parents) if path.exists())
        free = shutil.disk_usage(place).free
        cause = error.__cause__ or error
        code = cause.errno if isinstance(cause, OSError) else None
        if code in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = "make the folder writable"
        elif code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or free < needed:
            remedy = "free some space or raise the limit"
        else:
            remedy = "mend this"
        return (
            f"checkpoint {folder} could not be written: {reason(error)}; {free:,} bytes are free on its disk, "
            f"{known}; earlier checkpoints are untouched: {remedy}, then resume"
        )


@contextmanager
def readable() -> Iterator[None]:
    """UserError for a file or folder that cannot be read inside."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"what the run needs cannot be read: {reason(error)}; give another path, or make it readable"
        ) from error


def unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"run.dir={path} cannot be written to ({reason(error)}): make it writable, or free some space, then resume"
    )


def _rank(checkpoint: Checkpoint) -> tuple[float, int]:
    score = checkpoint.manifest.score
    return -math.inf if score is None else score, checkpoint.manifest.serial


def _num_bytes(folder: Path) -> int:
    try:
        return sum(files_below(folder).values())
    except OSError:
        return 0


def _close_in_child() -> None:
    """A forked child shares the open file, and would hold the lock on when its parent is gone."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
