"""Rows on disk in a form of our own: small Arrow record batches, each with a checksum, read one at a time.

A mapped Arrow file would be faster by microseconds, but a file that is cut under its map ends the process by SIGBUS,
and Arrow follows whatever offsets a damaged one holds. Here a batch is read into memory and proved before it is used.

Layout: batches, schema, index (int64 rows of start, bytes, number of rows, checksum), tail.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.ipc

from dpsrl.data.files import MAX_ROW_BYTES

BATCH_ROWS, BATCH_BYTES = 1 << 8, 1 << 15  # what is read for the sake of one row
SCAN_BYTES = 1 << 23  # what is read at a time to read them all
LEFT_OVER_AFTER_S = 86_400.0  # a partial file that old belongs to a run that was killed
_MAGIC = b"dpsrl rows 1"
_TAIL = struct.Struct("<QQI12s")  # bytes of the schema, bytes of the index, checksum of both, magic


class Damaged(Exception):
    """The file is not there, or not as it was written."""


def write_rows(path: Path, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> StoredRows:
    """Writes the file whole or not at all, and opens it, whatever others do with the path at the same time.

    A row of more than MAX_ROW_BYTES is left out and known by its place. OSError where the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob("*.partial"):
        with suppress(OSError):  # another run may have removed it
            if time.time() - stale.stat().st_mtime > LEFT_OVER_AFTER_S:
                stale.unlink()
    descriptor, partial = tempfile.mkstemp(".partial", path.stem, path.parent)
    try:
        with open(descriptor, "wb", buffering=1 << 20) as file:
            _write(file, schema, batches)
        stored = StoredRows(Path(partial))
        os.replace(partial, path)
        return stored
    except BaseException:
        os.unlink(partial)
        raise


def _write(file: BinaryIO, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> None:
    index = []
    for batch in batches:
        for piece in _pieces(batch):
            too_large = piece.num_rows == 1 and piece.nbytes > MAX_ROW_BYTES
            message = b"" if too_large else piece.serialize()
            index.append((file.tell(), len(message), piece.num_rows, zlib.crc32(message)))
            file.write(message)
    ends = schema.serialize().to_pybytes(), np.array(index, dtype="<i8").tobytes()
    file.write(b"".join(ends))
    file.write(_TAIL.pack(len(ends[0]), len(ends[1]), zlib.crc32(b"".join(ends)), _MAGIC))


def _pieces(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """Halved until it is small or a single row."""
    if batch.num_rows > BATCH_ROWS or batch.num_rows > 1 and batch.nbytes > BATCH_BYTES:
        half = batch.num_rows // 2
        yield from _pieces(batch.slice(0, half))
        yield from _pieces(batch.slice(half))
    elif batch.num_rows:
        yield batch


class StoredRows:
    """What `write_rows` wrote. Holds the file open: exchanging or removing it does not matter any more.

    Every way to a row raises Damaged where its bytes are not those that were written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Damaged(path) from error
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        num_schema, num_index, checksum, magic = _TAIL.unpack(self._read(size - _TAIL.size, _TAIL.size))
        start = size - _TAIL.size - num_schema - num_index
        if magic != _MAGIC or start < 0 or num_index % 32:
            raise Damaged(path)
        ends = self._read(start, num_schema + num_index)
        if zlib.crc32(ends) != checksum:
            raise Damaged(path)
        self.schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(ends[:num_schema]))
        self._index = np.frombuffer(ends[num_schema:], dtype="<i8").reshape(-1, 4)
        self._ends = np.cumsum(self._index[:, 2])  # after the last row of each batch
        self._latest: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def batches(self) -> Iterator[tuple[int, pyarrow.RecordBatch | None]]:
        """(place of its first row, many batches as one), in order; None for a single row that was too large."""
        i = 0
        while i < len(self._index):
            start, num_bytes = self._index[i, :2].tolist()
            place, first = int(self._ends[i] - self._index[i, 2]), i
            within = start + max(SCAN_BYTES, num_bytes)
            while i < len(self._index) and self._index[i, 1] and self._index[i, :2].sum() <= within:
                i += 1
            if i == first:  # a batch of no bytes
                yield place, None
                i += 1
                continue
            content = memoryview(self._read(start, int(self._index[i - 1, :2].sum()) - start))
            yield place, pyarrow.concat_batches([self._batch(k, content, start) for k in range(first, i)])

    def values(self, place: int) -> tuple[Any, ...]:
        """The row's values, one of each column. It must not be one that was too large."""
        i = int(np.searchsorted(self._ends, place, side="right"))
        if self._latest[0] != i:  # neighbours are often asked for one after another
            start, num_bytes = self._index[i, :2].tolist()
            self._latest = i, self._batch(i, memoryview(self._read(start, num_bytes)), start)
        batch = self._latest[1]
        return tuple(column[place - int(self._ends[i]) + len(batch)].as_py() for column in batch.columns)

    def _batch(self, i: int, content: memoryview, at: int) -> pyarrow.RecordBatch:
        """Batch i out of `content`, which was read from `at`."""
        start, num_bytes, _, checksum = self._index[i].tolist()
        message = content[start - at : start - at + num_bytes]
        if zlib.crc32(message) != checksum:
            raise Damaged
        return pyarrow.ipc.read_record_batch(pyarrow.py_buffer(message), self.schema)

    def _read(self, start: int, num_bytes: int) -> bytes:
        try:
            content = os.pread(self._file, num_bytes, start)
        except OSError as error:  # also of a negative start, in a file shorter than its tail
            raise Damaged from error
        if len(content) != num_bytes:
            raise Damaged
        return content
