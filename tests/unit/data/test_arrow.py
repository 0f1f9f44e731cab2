"""Arrow and Parquet files give the prompts and the report that the same rows give as JSON lines."""

import json
import os

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from dpsrl.config import PACKAGE_DIR
from dpsrl.data.arrow import ArrowRows
from dpsrl.data.build import load_tokenizer
from dpsrl.data.datasets import load_rows
from dpsrl.data.prompts import PromptSet
from dpsrl.rewards.answers import is_scorable
from dpsrl.types import UserError

DIRTY = [
    {"problem": "One?", "answer": "1"},
    {"problem": None, "answer": "1"},
    {"problem": "  \t", "answer": "1"},
    {"problem": "Two?", "answer": None},
    {"problem": "Two?", "answer": " "},
    {"problem": "Two  is\n what?", "answer": "2"},
    {"problem": "One?", "answer": "7"},  # asked before, answered otherwise
    {"problem": "Two is what?", "answer": "2"},
    {"problem": "x" * 300, "answer": "3"},  # too long
    {"problem": "é" * 41, "answer": "4"},  # long in bytes
    {"problem": "No response can match this?", "answer": "..."},
    {"problem": "Last?", "answer": "\\frac{1}{2}"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(PACKAGE_DIR / "assets/tiny"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dpsrl"


def write(path, rows, batch_rows=3):
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=batch_rows)
    else:
        new = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch_rows)
    return str(path)


def prompts_of(source, tokenizer, **keys):
    rows, report = load_rows(source, **keys)
    report.name = "rows"
    return PromptSet(rows, report, tokenizer, "{problem}", 80, is_scorable)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.stream.arrow"])
def test_every_source_gives_the_same_prompts_and_report(tmp_path, tokenizer, name):
    expected = prompts_of(write(tmp_path / "a.jsonl", DIRTY), tokenizer)
    got = prompts_of(write(tmp_path / name, DIRTY), tokenizer)
    assert [p.text for p in expected] == ["One?", "Two  is\n what?", "Last?"]
    assert got.ids.tolist() == expected.ids.tolist() and got.ids.dtype == np.uint64
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.index, mine.id, mine.text, mine.answer) == (theirs.index, theirs.id, theirs.text, theirs.answer)
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
    assert got.report.sentences() == expected.report.sentences()
    assert got.content_hash == expected.content_hash
    assert isinstance(got._rows, ArrowRows)


@pytest.mark.parametrize(
    "answers", [[1, 2, None], [0.5, float("nan"), 2.0], [["1", "one"], [], None], [True, False, None]]
)
def test_answers_of_other_types(tmp_path, answers):
    rows = [{"problem": f"p{i}?", "answer": answer} for i, answer in enumerate(answers)]
    items = [load_rows(write(tmp_path / name, [*rows, {"problem": "q?", "answer": answers[0]}]))
             if answers[0] is not True else None for name in ("a.jsonl", "a.parquet")]  # fmt: skip
    if answers[0] is True:
        with pytest.raises(UserError, match="neither text nor a number"):
            load_rows(write(tmp_path / "a.parquet", rows))
        return
    (expected, report), (got, own_report) = items
    assert [(row.problem, row.answer, row.number) for row in got] == [
        (row.problem, row.answer, row.number) for row in expected
    ]
    assert own_report.dropped == report.dropped


def test_the_copy_is_made_once_and_anew_when_the_file_changes(tmp_path, cache):
    source = write(tmp_path / "a.parquet", DIRTY[:1])
    assert len(load_rows(source)[0]) == 1
    (copy,) = cache.iterdir()
    made = copy.stat().st_mtime_ns
    load_rows(source)
    assert copy.stat().st_mtime_ns == made
    write(tmp_path / "a.parquet", [DIRTY[0], DIRTY[-1]])
    os.utime(source, ns=(1, 1))
    assert len(load_rows(source)[0]) == 2 and len(list(cache.iterdir())) == 2


def test_a_file_that_is_no_arrow_and_a_missing_column(tmp_path):
    (tmp_path / "bad.arrow").write_text("nonsense" * 10)
    with pytest.raises(UserError, match="is not an Arrow file"):
        load_rows(str(tmp_path / "bad.arrow"))
    source = write(tmp_path / "a.parquet", [{"question": "One?", "answer": "1"}])
    with pytest.raises(UserError, match="data.prompt_key=problem is not a column of .* which has answer"):
        load_rows(source)
    assert len(load_rows(source, prompt_key="question")[0]) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder with room"):
        load_rows(write(tmp_path / "a.parquet", DIRTY[:1]))
