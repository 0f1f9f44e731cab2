"""Arrow and Parquet files that are damaged, odd or do not keep still: a sentence or the other rows, never a crash."""

import datetime
import os
import random
import subprocess
import sys
import threading

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from dpsrl.data.datasets import load_rows
from dpsrl.data.store import write_rows
from dpsrl.types import UserError

pytestmark = pytest.mark.process

FEW = [{"problem": "One?", "answer": "1"}, {"problem": None, "answer": "1"}, {"problem": "Two?", "answer": "2"},
       {"problem": "Three?", "answer": None}, {"problem": "Four?", "answer": "4"}]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dpsrl"


def write(path, data, batch_rows=3):
    """Writes columns or a list of rows in the format of the name."""
    table = pyarrow.table(data) if isinstance(data, dict) else pyarrow.Table.from_pylist(data)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=batch_rows)
    else:
        new = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch_rows)
    return str(path)


# ---- columns that are not what they should be ----

TEXTS, ANSWERS = ["One?", None, "Three?", "  "], ["1", "2", None, "4"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    ],
    ids=str,
)
def test_text_in_every_encoding_gives_the_same_rows(tmp_path, suffix, kind):
    problems, answers = (pyarrow.array(values, kind) for values in (TEXTS, ANSWERS))
    rows, report = load_rows(write(tmp_path / f"a.{suffix}", {"problem": problems, "answer": answers}))
    assert [(row.problem, row.answer, row.number) for row in rows] == [("One?", "1", 1)]
    assert report.dropped == {"without a problem text": [2, 4], "without an answer": [3]}
    assert list(rows.batches()) == [(["One?"], ["1"])]


NUMBERS = pyarrow.array([1, 2])
NO_PROBLEM, NO_TYPE = "without a problem text", "with an answer that is neither text nor a number"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("problems", "answers", "reason"),
    [
        (pyarrow.nulls(2), NUMBERS, NO_PROBLEM),
        (NUMBERS, NUMBERS, NO_PROBLEM),  # whole numbers will do as an answer only
        (pyarrow.array([["a"], ["b"]]), NUMBERS, NO_PROBLEM),
        (pyarrow.array([b"a", b"b"]), NUMBERS, NO_PROBLEM),
        (["a", "b"], pyarrow.nulls(2), "without an answer"),
        (["a", "b"], pyarrow.array([True, False]), NO_TYPE),
        (["a", "b"], pyarrow.array([b"1", b"2"]), NO_TYPE),
        (["a", "b"], pyarrow.array([["1"], ["2"]]).cast(pyarrow.list_(pyarrow.binary())), NO_TYPE),
        (["a", "b"], pyarrow.array([datetime.date(2000, 1, 1)] * 2), NO_TYPE),
        (["a", "b"], pyarrow.array([2**62, -(2**62)], pyarrow.timestamp("ms")), NO_TYPE),
        (["a", "b"], pyarrow.array([{"at": datetime.date(2000, 1, 1)}] * 2), "with an answer that maps to what JSON"),
        (["a", "b"], pyarrow.array([float("nan"), float("inf")]), "without an answer"),
    ],
)  # fmt: skip
def test_columns_of_other_types_are_dropped_row_by_row(tmp_path, suffix, problems, answers, reason):
    with pytest.raises(UserError, match=f"no usable row: a.{suffix}: 2 rows, 2 {reason}.*rows 1, 2"):
        load_rows(write(tmp_path / f"a.{suffix}", {"problem": problems, "answer": answers}))


def test_nested_and_encoded_answers(tmp_path):
    encoded = pyarrow.array(["1", "one", "2"]).dictionary_encode()
    answers = {
        "list.arrow": (pyarrow.ListArray.from_arrays([0, 2, 3], encoded), [["1", "one"], ["2"]]),
        "fixed.arrow": (pyarrow.array([["1", "one"], ["2", None]], pyarrow.list_(pyarrow.string(), 2)),
                        [["1", "one"], ["2"]]),
        "ends.arrow": (pyarrow.compute.run_end_encode(pyarrow.array(["7", "7"])), ["7", "7"]),
        "map.parquet": (pyarrow.array([{"numbers": [1, 2], "target": 3}, {"numbers": [4], "target": 4}]),
                        [{"numbers": [1, 2], "target": 3}, {"numbers": [4], "target": 4}]),
    }  # fmt: skip
    for name, (column, expected) in answers.items():
        rows, _ = load_rows(write(tmp_path / name, {"problem": ["a?", "b?"], "answer": column}))
        assert [row.answer for row in rows] == expected and next(rows.batches()) == (["a?", "b?"], expected)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_bytes_that_are_no_text_cost_their_row_alone(tmp_path, suffix):
    texts = [f"{i}?".encode() for i in range(1000)]
    texts[500], texts[7] = b"half \xe2\x82", b"\xff"
    column = pyarrow.array(texts).view(pyarrow.string())
    for problems, answers in ((column, [str(i) for i in range(1000)]), ([f"{i}?" for i in range(1000)], column)):
        rows, report = load_rows(write(tmp_path / f"a.{suffix}", {"problem": problems, "answer": answers}))
        assert len(rows) == 998 and report.dropped == {"not UTF-8": [8, 501]}
        assert rows[498].number == 500 and sum(len(problems) for problems, _ in rows.batches()) == 998


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_large_rows_are_dropped_whatever_they_hold(tmp_path, suffix):
    large = "x" * 5_000_000
    for answers in ([large, "2", "3"], [[large], ["2"], ["3"]], [{"a": large}, {"a": "2"}, {"a": "3"}]):
        source = write(tmp_path / f"a.{suffix}", {"problem": ["a", "b", large], "answer": answers})
        rows, report = load_rows(source)
        assert [(row.problem, row.answer) for row in rows] == [("b", answers[1])]
        assert report.dropped == {"larger than 4 MiB": [1, 3]} and list(rows.batches()) == [(["b"], [answers[1]])]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"], ["1"]], names=["problem", "problem", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has 2 columns of the name problem: rename them"):
        load_rows(str(tmp_path / "a.parquet"))


def test_an_empty_file_and_one_column_for_both(tmp_path):
    for suffix in ("parquet", "arrow"):
        source = write(tmp_path / f"a.{suffix}", {"problem": pyarrow.array([], pyarrow.string()), "answer": []})
        with pytest.raises(UserError, match=f"a.{suffix} is empty"):
            load_rows(source)
    source = write(tmp_path / "b.parquet", {"problem": ["a"], "other": [1]})
    assert load_rows(source, answer_key="problem")[0][0].answer == "a"


# ---- damaged files ----


def files(folder):
    rows = [{"problem": f"{i}? é" * 4, "answer": [str(i), "x"]} for i in range(300)]
    for name in ("a.parquet", "a.arrow", "a.stream.arrow"):
        yield folder / name, write(folder / name, rows, 50)


def test_a_cut_file_is_one_sentence_wherever_it_is_cut(tmp_path):
    for path, source in files(tmp_path):
        good = path.read_bytes()
        batch_ends = [i for i in range(8, len(good), 8) if good[i : i + 4] == b"\xff\xff\xff\xff"]
        for size in [0, 1, 7, len(good) // 2, len(good) - 1, *(batch_ends if "stream" in path.name else [])]:
            path.write_bytes(good[:size])
            with pytest.raises(UserError, match="is not a|is not an|cannot be read after row") as error:
                load_rows(source)
            assert "\n" not in str(error.value) and "whole" in str(error.value)


def test_a_damaged_file_gives_rows_or_a_sentence(tmp_path, cache):
    rng = random.Random(0)
    for path, source in files(tmp_path):
        good = path.read_bytes()
        for _ in range(40):
            content = bytearray(good)
            for _ in range(rng.choice([1, 1, 5])):
                content[rng.randrange(len(good))] = rng.choice([0, 255, rng.randrange(256)])
            path.write_bytes(content)
            try:
                rows, _ = load_rows(source)
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert len(list(rows)) == sum(len(problems) for problems, _ in rows.batches())
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_another_format_behind_the_suffix(tmp_path, name):
    other = {"a.parquet": "a.arrow", "a.arrow": "a.parquet"}[name]
    os.rename(write(tmp_path / other, FEW), tmp_path / name)
    kind = "Parquet" if name == "a.arrow" else "Arrow"
    with pytest.raises(UserError, match=f"is not an? .*it is an? {kind} file: name it {other[1:]}"):
        load_rows(str(tmp_path / name))


# ---- files that change under a run ----

READ_AFTER_CUT = """
import os, sys
from pathlib import Path
from dpsrl.data.datasets import load_rows
from dpsrl.types import UserError

def read(rows):
    for way in (lambda: rows[len(rows) - 1], lambda: list(rows.batches())):
        try:
            print(len(way() and rows))
        except UserError as error:
            print(error)

for source in sys.argv[2:]:
    rows, _ = load_rows(source)
    for copy in Path(sys.argv[1]).iterdir():
        os.truncate(copy, 1000)
    read(rows)
    rows, _ = load_rows(source)
    os.truncate(source, 1000)
    read(rows)
"""


def test_a_file_cut_under_the_run_does_not_kill_it(tmp_path, cache):
    """In a process of its own, which a mapped file would end by SIGBUS."""
    rows = [{"problem": f"{i}?", "answer": "1"} for i in range(20_000)]
    sources = [write(tmp_path / name, rows, 1000) for name in ("a.parquet", "a.arrow", "a.stream.arrow")]
    command = [sys.executable, "-c", READ_AFTER_CUT, str(cache), *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr)
    cut = "the copy of {} in the cache {} was cut or overwritten: start again, and it is made anew"
    expected = [[cut.format(source, cache)] * 2 + ["20000"] * 2 for source in sources]  # a new copy needs no source
    assert done.stdout.splitlines() == sum(expected, [])


def damage(content, how):
    middle = len(content) // 2
    changed = bytes([content[middle] ^ 1])
    return {"cut": content[:middle], "empty": b"", "flipped": content[:middle] + changed + content[middle + 1 :],
            "zeros": bytes(len(content)), "other": b"PAR1" * 100}[how]  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "zeros", "other"])
def test_a_damaged_copy_is_made_anew(tmp_path, cache, how):
    source = write(tmp_path / "a.parquet", FEW)
    rows, report = load_rows(source)
    expected = list(rows)
    (copy,) = cache.iterdir()
    good = copy.read_bytes()
    copy.write_bytes(damage(good, how))
    again, own_report = load_rows(source)
    assert list(again) == expected and own_report == report and copy.read_bytes() == good
    assert list(cache.iterdir()) == [copy]


def test_a_file_of_the_same_size_and_time_is_read_anew(tmp_path):
    path = tmp_path / "a.arrow"
    status = os.stat(write(path, [{"problem": "1?", "answer": "1"}]))
    assert load_rows(str(path))[0][0].answer == "1"
    write(path, [{"problem": "1?", "answer": "2"}])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(path).st_size == status.st_size
    assert load_rows(str(path))[0][0].answer == "2"


def test_runs_that_start_together_share_one_copy(tmp_path, cache):
    """Eight readers, of which some find a damaged copy and some a copy that another has just replaced."""
    source = write(tmp_path / "a.parquet", [{"problem": f"{i}?", "answer": str(i)} for i in range(5000)], 500)
    results = []

    def read():
        for _ in range(3):
            rows, _ = load_rows(source)
            results.append([row.answer for row in rows] == [str(i) for i in range(5000)])
            for copy in cache.glob("*.rows"):
                spoiled = copy.with_suffix(f".{threading.get_ident()}")
                spoiled.write_bytes(copy.read_bytes()[:-100])
                os.replace(spoiled, copy)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 24 and len(list(cache.iterdir())) == 1


def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.parquet"
    source = write(path, FEW)

    def write_meanwhile(copy, schema, batches):
        stored = write_rows(copy, schema, batches)
        write(path, FEW[:3])
        return stored

    monkeypatch.setattr("dpsrl.data.arrow.write_rows", write_meanwhile)
    with pytest.raises(UserError, match="a.parquet changed while it was read"):
        load_rows(source)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert load_rows(source)[1].num_rows == 3


def test_a_copy_that_outlives_its_removal(tmp_path, cache):
    rows, _ = load_rows(write(tmp_path / "a.parquet", FEW))
    for copy in cache.iterdir():
        copy.unlink()
    (tmp_path / "a.parquet").unlink()
    assert rows[0].problem == "One?"
