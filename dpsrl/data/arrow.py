"""Rows of an Arrow or Parquet file that stay on disk: memory-mapped, and read one by one when they are asked for.

A Parquet file is written once as Arrow into the user's cache, since its compressed pages cannot be addressed. What is
kept in memory is the places of the usable rows, 8 bytes each.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from dpsrl.data.datasets import LoadReport, Row, row_of
from dpsrl.types import UserError

BATCH_ROWS = 1 << 16


class ArrowRows(Sequence[Row]):
    """The usable rows of a file, in its order; what is not usable is in `report`."""

    def __init__(self, path: Path, prompt_key: str, answer_key: str, report: LoadReport) -> None:
        self.path = path if path.suffix == ".arrow" else arrow_copy(path, [prompt_key, answer_key])
        self._keys = (prompt_key, answer_key)
        with pyarrow.OSFile(str(self.path)) as file:  # read, not mapped: pages that were scanned would count as ours
            reader = _reader(file, self.path)
            columns = set(reader.schema.names)
            self.missing = [key for key in self._keys if key not in columns]
            self.columns = columns
            self._places = self._usable(reader, report) if not self.missing else np.zeros(0, dtype=np.int64)
        report.num_rows = report.num_rows or sum(len(batch) for batch in self._batches([]))
        table = _reader(pyarrow.memory_map(str(self.path)), self.path).read_all()
        self._problems, self._answers = (None, None) if self.missing else (table[key] for key in self._keys)

    def __len__(self) -> int:
        return self._places.size

    def __getitem__(self, index: int) -> Row:
        place = int(self._places[index])
        return row_of(self._problems[place].as_py(), self._answers[place].as_py(), place + 1)

    def batches(self) -> Iterator[tuple[list[str], list[Any]]]:
        """Every problem and answer, batch by batch."""
        start = 0
        for batch in self._batches(list(self._keys)):
            mine = self._places[slice(*np.searchsorted(self._places, [start, start + len(batch)]))] - start
            problems, answers = (batch.column(key).take(pyarrow.array(mine)).to_pylist() for key in self._keys)
            if not _is_text(batch.column(self._keys[1]).type):
                answers = [row_of("a problem", answer, 0).answer for answer in answers]
            yield problems, answers
            start += len(batch)

    def _batches(self, keys: list[str]) -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.OSFile(str(self.path)) as file:
            for batch in _reader(file, self.path):
                yield batch.select(keys) if keys else batch

    def _usable(self, reader: Any, report: LoadReport) -> np.ndarray:
        kept, start = [], 0
        for batch in reader:
            problems, answers = (batch.column(batch.schema.get_field_index(key)) for key in self._keys)
            suspect = np.flatnonzero(_may_be_unusable(problems) | _may_be_unusable(answers))
            good = np.ones(len(batch), dtype=bool)
            for place in suspect.tolist():
                row = row_of(problems[place].as_py(), answers[place].as_py(), start + place + 1)
                if isinstance(row, str):
                    good[place] = False
                    report.drop(row, start + place + 1)
            kept.append(start + np.flatnonzero(good))
            start += len(batch)
        report.num_rows = start
        return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)


def _may_be_unusable(column: pyarrow.Array) -> np.ndarray:
    """Where a value must be looked at: never for plain text and whole numbers, everywhere for other types."""
    kind = column.type
    if pyarrow.types.is_integer(kind):
        suspect = column.is_null()
    elif _is_text(kind):
        blank = pyarrow.compute.equal(pyarrow.compute.binary_length(pyarrow.compute.utf8_trim_whitespace(column)), 0)
        suspect = pyarrow.compute.fill_null(blank, True)
    else:
        return np.ones(len(column), dtype=bool)
    return suspect.to_numpy(zero_copy_only=False)


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _reader(source: Any, path: Path) -> Any:
    """Batches of an Arrow file of either format. UserError where it is neither."""
    try:
        reader = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        try:
            return pyarrow.ipc.open_stream(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not an Arrow file ({_first_line(error)}): give a whole one") from error
    return _FileBatches(reader)


class _FileBatches:
    """An Arrow file's reader with the interface of a stream's."""

    def __init__(self, reader: Any) -> None:
        self.reader, self.schema, self.read_all = reader, reader.schema, reader.read_all

    def __iter__(self) -> Iterator[pyarrow.RecordBatch]:
        return (self.reader.get_batch(i) for i in range(self.reader.num_record_batches))


def arrow_copy(path: Path, keys: list[str]) -> Path:
    """The file's columns as Arrow, in the user's cache; made anew when the file has changed."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file ({_first_line(error)}): give a whole one") from error
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpsrl"
    try:
        status = path.stat()
        keys = [key for key in keys if key in file.schema_arrow.names] or file.schema_arrow.names
        identity = f"{path.absolute()} {status.st_size} {status.st_mtime_ns} {keys}"
        copy = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.arrow"
        if not copy.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = copy.with_suffix(f".{os.getpid()}")
            schema = pyarrow.schema([file.schema_arrow.field(key) for key in keys])
            with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
                for batch in file.iter_batches(BATCH_ROWS, columns=keys):
                    writer.write_batch(batch.select(keys).cast(schema))
            os.replace(partial, copy)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} could not be kept as Arrow in the cache {folder} ({_first_line(error)}): give a whole file, or "
            "set XDG_CACHE_HOME to a folder with room"
        ) from error
    return copy


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
