"""Rows on disk come back as they were written, or not at all."""

import os
import random

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpsrl.data import store
from dpsrl.data.store import Damaged, StoredRows, write_rows

pytestmark = pytest.mark.process

SCHEMA = pyarrow.schema([("problem", pyarrow.string()), ("answer", pyarrow.list_(pyarrow.string()))])


def rows_of(num, size=10):
    return [
        {"problem": f"q{i} " + "é" * (i % size), "answer": [str(i)] * (i % 3) if i % 5 else None} for i in range(num)
    ]


def write(path, rows, batch_rows=100):
    batches = pyarrow.Table.from_pylist(rows, SCHEMA).to_batches(max_chunksize=batch_rows)
    write_rows(path, SCHEMA, batches)
    return path


def read(path):
    """Every row, by both ways."""
    stored = StoredRows(path)
    by_batch, by_place = [], []
    for place, batch in stored.batches():
        assert place == len(by_batch)
        by_batch += batch.to_pylist()
    for place in range(len(stored)):
        by_place.append(dict(zip(stored.schema.names, stored.values(place))))
    assert by_batch == by_place
    return by_batch


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num=st.integers(0, 700), size=st.integers(1, 400), batch_rows=st.integers(1, 800))
def test_rows_come_back_whatever_their_batches(tmp_path, num, size, batch_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SCAN_BYTES", 5000)
        rows = rows_of(num, size)
        assert read(write(tmp_path / "a.rows", rows, batch_rows)) == rows


def test_what_is_read_for_one_row_is_small_whatever_the_sizes(tmp_path):
    sizes = [1] * 999 + [500_000] + [1] * 1000
    rows = [{"problem": "x" * size, "answer": None} for size in sizes]
    stored = StoredRows(write(tmp_path / "a.rows", rows, 2000))
    num_bytes, num_rows = stored._index[:, 1], stored._index[:, 2]
    small = num_bytes[num_rows > 1]
    assert small.max() < 2 * store.BATCH_BYTES and num_rows.max() <= store.BATCH_ROWS
    assert stored.values(999)[0] == "x" * 500_000 and stored.values(1000)[0] == "x"


def test_a_row_too_large_is_left_out_and_keeps_its_place(tmp_path):
    rows = rows_of(9)
    rows[4]["problem"] = "x" * 5_000_000
    path = write(tmp_path / "a.rows", rows)
    assert path.stat().st_size < 100_000
    stored = StoredRows(path)
    got = [(place, batch and batch.to_pylist()) for place, batch in stored.batches()]
    assert got == [(0, rows[:4]), (4, None), (5, rows[5:])]
    assert stored.values(8)[0] == rows[8]["problem"] and len(stored) == 9


def test_every_changed_byte_and_every_cut_is_found(tmp_path):
    rows = rows_of(60)
    path = write(tmp_path / "a.rows", rows, 20)
    good = path.read_bytes()
    rng = random.Random(0)
    damaged = [good[:n] for n in range(0, len(good), 37)]
    for _ in range(300):
        place = rng.randrange(len(good))
        damaged.append(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1 :])
    damaged += [good + b"\0", b"\0" * len(good), good[1:], b""]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(Damaged):
            read(path)
    path.write_bytes(good)
    assert read(path) == rows
    with pytest.raises(Damaged):
        StoredRows(tmp_path / "none.rows")


def test_damage_is_found_while_the_file_is_open(tmp_path):
    path = write(tmp_path / "a.rows", rows_of(2000))
    stored = StoredRows(path)
    assert stored.values(1999) == ("q1999 " + "é" * 9, ["1999"])
    os.truncate(path, 2000)
    with pytest.raises(Damaged):
        stored.values(1000)
    write(path, rows_of(5))  # another file under the name
    with pytest.raises(Damaged):
        stored.values(1000)


def test_a_writer_that_fails_leaves_nothing_and_old_parts_are_swept(tmp_path):
    def batches():
        yield from pyarrow.Table.from_pylist(rows_of(5), SCHEMA).to_batches()
        raise OSError("no space")

    stale, fresh = tmp_path / "old.partial", tmp_path / "new.partial"
    stale.touch()
    fresh.touch()
    os.utime(stale, (1, 1))
    with pytest.raises(OSError, match="no space"):
        write_rows(tmp_path / "a.rows", SCHEMA, batches())
    assert list(tmp_path.iterdir()) == [fresh]
