"""Rows of an Arrow or Parquet file that stay on disk, and are read one by one when they are asked for.

The file is copied once into the user's cache (store.py), since compressed pages cannot be addressed and a file of the
user's may be cut or written to under a run. What is kept in memory is the places of the usable rows, 8 bytes each.
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

from dpsrl.data.datasets import NO_ANSWER_TYPE, LoadReport, Row, row_of
from dpsrl.data.files import TOO_LARGE, first_line, held_still, likely_kind
from dpsrl.data.store import Damaged, StoredRows, write_rows
from dpsrl.types import UserError

READ_ROWS, READ_BYTES = 1 << 16, 1 << 26  # of a Parquet file at a time
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowRows(Sequence[Row]):
    """The usable rows of a file, in its order; what is not usable is in `report`.

    `columns` are those of the file. Without the two that are asked for there are no rows.
    """

    def __init__(self, path: Path, prompt_key: str, answer_key: str) -> None:
        self.path, self._keys = path, (prompt_key, answer_key)
        self.report = LoadReport(path.name)
        self._places = np.zeros(0, dtype=np.int64)
        with held_still(path):
            source, names = _open(path)
            self.columns = set(names)
            if self.columns >= set(self._keys):
                self._fill(source)

    def _fill(self, source: _Source) -> None:
        """From the copy in the cache, which is made where there is none or not a whole one."""
        copy = copy_path(self.path, self._keys)
        try:
            self._read_copy(StoredRows(copy))
        except Damaged:
            try:
                self._read_copy(make_copy(self.path, source, self._keys, copy))
            except Damaged as error:
                raise UserError(_copy_damaged(self.path)) from error

    def _read_copy(self, store: StoredRows) -> None:
        self._store = store
        self._columns = [store.schema.get_field_index(key) for key in self._keys]
        self._places, self.report = self._judged()

    def __len__(self) -> int:
        return self._places.size

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        place = int(self._places[index])
        try:
            values = self._store.values(place)
        except Damaged as error:
            raise UserError(_copy_damaged(self.path)) from error
        problem, answer = (values[column] for column in self._columns)
        row: Any = row_of(problem, answer, place + 1)  # a Row: those that are none have no place
        return row

    def batches(self) -> Iterator[tuple[list[str], list[Any]]]:
        """Every problem and answer, batch by batch."""
        try:
            for start, batch in self._store.batches():
                if batch is None:
                    continue
                mine = self._places[slice(*np.searchsorted(self._places, [start, start + len(batch)]))] - start
                if mine.size < len(batch):
                    batch = batch.take(pyarrow.array(mine))
                problems, answers = (batch.column(column).to_pylist() for column in self._columns)
                if not _is_text(batch.column(self._columns[1]).type):
                    rows: list[Any] = [row_of("a problem", answer, 0) for answer in answers]
                    answers = [row.answer for row in rows]
                yield problems, answers
        except Damaged as error:
            raise UserError(_copy_damaged(self.path)) from error

    def _judged(self) -> tuple[np.ndarray, LoadReport]:
        """(places of the usable rows, the report of the others); every byte of the copy is proved on the way."""
        report = LoadReport(self.path.name, len(self._store))
        kept = []
        for start, batch in self._store.batches():
            if batch is None:
                report.drop(TOO_LARGE, start + 1)
                continue
            problems, answers = (batch.column(column) for column in self._columns)
            good = np.ones(len(batch), dtype=bool)
            for place in np.flatnonzero(_suspect(problems) | _suspect(answers, whole_numbers=True)).tolist():
                why = _fault(problems[place], answers[place], start + place + 1)
                if why:
                    good[place] = False
                    report.drop(why, start + place + 1)
            kept.append(start + np.flatnonzero(good))
        return (np.concatenate(kept) if kept else self._places), report


def _copy_damaged(path: Path) -> str:
    return f"the copy of {path} in the cache {_cache()} was cut or overwritten: start again, and it is made anew"


def _suspect(column: pyarrow.Array, *, whole_numbers: bool = False) -> np.ndarray:
    """Where a value must be looked at: seldom in text, nor in `whole_numbers` if they will do, else everywhere."""
    if whole_numbers and pyarrow.types.is_integer(column.type):
        suspect = column.is_null()
    elif _is_text(column.type):
        try:
            trimmed = pyarrow.compute.utf8_trim_whitespace(column)
        except pyarrow.ArrowInvalid:  # some of it is not UTF-8
            return np.ones(len(column), dtype=bool)
        suspect = pyarrow.compute.fill_null(pyarrow.compute.equal(pyarrow.compute.binary_length(trimmed), 0), True)
    else:
        return np.ones(len(column), dtype=bool)
    return suspect.to_numpy(zero_copy_only=False)


def _fault(problem: pyarrow.Scalar, answer: pyarrow.Scalar, number: int) -> str:
    try:
        text = problem.as_py() if _is_text(problem.type) else None
        row = row_of(text, "unknown", number)
        if not isinstance(row, str):
            row = row_of(text, answer.as_py(), number)
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, OverflowError):  # a date beyond Python's
        return NO_ANSWER_TYPE
    return row if isinstance(row, str) else ""


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


# ---- the user's file ----


class _Parquet:
    def __init__(self, path: Path) -> None:
        self.file = pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
        self.schema = self.file.schema_arrow

    def batches(self, keys: list[str]) -> Iterator[pyarrow.RecordBatch]:
        """As many rows at a time as are READ_BYTES, by the mean of their row group."""
        for i in range(self.file.num_row_groups):
            group = self.file.metadata.row_group(i)
            mean_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
            num_rows = max(1, min(READ_ROWS, READ_BYTES // mean_bytes))
            yield from self.file.iter_batches(num_rows, row_groups=[i], columns=keys)


class _ArrowFile:
    def __init__(self, path: Path) -> None:
        self.reader = pyarrow.ipc.open_file(pyarrow.OSFile(str(path)))  # read, never mapped
        self.schema = self.reader.schema

    def batches(self, keys: list[str]) -> Iterator[pyarrow.RecordBatch]:
        return (self.reader.get_batch(i).select(keys) for i in range(self.reader.num_record_batches))


class _ArrowStream:
    """What `datasets` writes. One without an end mark may have lost batches without a trace, so it is refused."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(STREAM_END)))
            has_end = file.read() == STREAM_END
        self.reader = pyarrow.ipc.open_stream(pyarrow.OSFile(str(path)))
        if not has_end:
            raise pyarrow.ArrowInvalid("its end is missing")
        self.schema = self.reader.schema

    def batches(self, keys: list[str]) -> Iterator[pyarrow.RecordBatch]:
        return (batch.select(keys) for batch in self.reader)


_Source = _Parquet | _ArrowFile | _ArrowStream


def _open(path: Path) -> tuple[_Source, list[str]]:
    """The file and the names of its columns."""
    kind = "a Parquet file" if path.suffix == ".parquet" else "an Arrow file"
    try:
        if path.suffix == ".parquet":
            source: _Source = _Parquet(path)
        else:
            with path.open("rb") as file:
                is_file = file.read(6) == b"ARROW1"
            source = _ArrowFile(path) if is_file else _ArrowStream(path)
        return source, source.schema.names
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        hint = likely_kind(path) or ": give a whole one"
        raise UserError(f"{path} is not {kind} ({first_line(error)}){hint}") from error


def _proved(path: Path, source: _Source, keys: list[str], schema: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    """The columns in the types of `schema`, nothing in them out of bounds. UserError where the file is damaged."""
    num_rows = 0
    try:
        for batch in source.batches(keys):
            columns = [_plain(batch.column(key), schema.field(key).type) for key in keys]
            yield pyarrow.RecordBatch.from_arrays(columns, schema=schema)
            num_rows += len(batch)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read after row {num_rows:,} ({first_line(error)}): give a whole file"
        ) from error


def _plain(column: pyarrow.Array, kind: pyarrow.DataType) -> pyarrow.Array:
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):  # text is judged row by row
            raise
    if column.type == kind:
        return column
    if pyarrow.types.is_run_end_encoded(column.type):
        column = pyarrow.compute.run_end_decode(column)
    return column.cast(kind)


def _plain_type(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type of the same values that needs nothing beside its batch: no dictionary, no extension."""
    types = pyarrow.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain_type(kind.value_type)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if types.is_string_view(kind):
        return pyarrow.string()
    if types.is_large_list(kind):
        return pyarrow.large_list(_plain_type(kind.value_type))
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return pyarrow.list_(_plain_type(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([(item.name, _plain_type(item.type)) for item in kind])
    return kind


# ---- its copy ----


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpsrl"


def copy_path(path: Path, keys: Sequence[str]) -> Path:
    """Another one whenever the file has changed; the time of the last change of status cannot be set back."""
    status = path.stat()
    of_file = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    identity = hashlib.sha256(repr((str(path.absolute()), of_file, *keys)).encode("utf-8", "surrogateescape"))
    return _cache() / f"{identity.hexdigest()[:32]}.rows"


def make_copy(path: Path, source: _Source, prompt_and_answer: Sequence[str], copy: Path) -> StoredRows:
    keys = list(dict.fromkeys(prompt_and_answer))
    for key in keys:
        if source.schema.names.count(key) > 1:
            raise UserError(f"{path} has {source.schema.names.count(key)} columns of the name {key}: rename them")
    schema = pyarrow.schema([(key, _plain_type(source.schema.field(key).type)) for key in keys])
    try:
        return write_rows(copy, schema, _proved(path, source, keys, schema))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} could not be copied into the cache {copy.parent} ({first_line(error)}): set XDG_CACHE_HOME to a "
            "folder with room"
        ) from error
