"""Every kind of source, and every kind of dirt, with the row it is in."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from dpsrl.data.datasets import Row, find_benchmark, load_rows
from dpsrl.types import UserError

GOOD = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": ["4", "four"]}, {"problem": "3+4?", "answer": 7}]
ROWS = [Row("1+1?", "2", 1), Row("2+2?", ["4", "four"], 2), Row("3+4?", "7", 3)]


def write_lines(path, items):
    path.write_bytes(b"\n".join(item if isinstance(item, bytes) else json.dumps(item).encode() for item in items))
    return str(path)


def test_json_lines_json_and_parquet_give_the_same_rows(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    same_type = [{"problem": g["problem"], "answer": g["answer"] if isinstance(g["answer"], list) else [str(g["answer"])]} for g in GOOD]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(same_type), tmp_path / "a.parquet")
    assert load_rows(lines)[0] == load_rows(str(tmp_path / "a.json"))[0] == ROWS
    parquet = load_rows(str(tmp_path / "a.parquet"))[0]
    assert [(row.problem, row.answer) for row in parquet] == [("1+1?", ["2"]), ("2+2?", ["4", "four"]), ("3+4?", ["7"])]


def test_dirt_is_dropped_by_row_and_reason(tmp_path):
    dirt = [
        b'{"problem": "cut', b"\xff\xfe{}", b"[1, 2]", {"answer": "1"}, {"problem": " ", "answer": "1"},
        {"problem": "a?", "answer": None}, {"problem": "b?"}, {"problem": "c?", "answer": " "}, {"problem": "d?", "answer": []},
        b"", b"[" * 100_000,
    ]  # fmt: skip
    rows, report = load_rows(write_lines(tmp_path / "dirt.jsonl", [GOOD[0], *dirt]))
    assert rows == [ROWS[0]]
    assert report.dropped == {
        "not JSON": [2, 12],
        "not UTF-8": [3],
        "not a JSON object": [4],
        "without a problem text": [5, 6],
        "without an answer": [7, 8],
        "with an empty answer": [9, 10],
    }
    (sentence,) = report.sentences()
    assert sentence.startswith("dirt.jsonl: 11 rows, 2 not JSON (rows 2, 12)") and sentence.endswith("1 prompts kept")
    assert report.num_kept == 1


def test_other_columns_are_named(tmp_path):
    source = write_lines(tmp_path / "q.jsonl", [{"question": "1+1?", "solution": "2"}])
    assert load_rows(source, prompt_key="question", answer_key="solution")[0] == [ROWS[0]]
    with pytest.raises(UserError, match="data.prompt_key=problem is not a column .* question, solution"):
        load_rows(source)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n\n", "is empty"),
        ("bad.jsonl", "nonsense\n", "no usable row"),
        ("bad.json", "{", "is not JSON"),
        ("object.json", "{}", "no list"),
        ("bad.parquet", "nonsense", "not a Parquet file"),
        ("data.csv", "a,b", "no data set"),
    ],
)
def test_an_unusable_source_is_one_sentence(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_benchmarks_are_found_by_stem(tmp_path):
    write_lines(tmp_path / "aime24.jsonl", GOOD)
    assert find_benchmark("aime24", str(tmp_path)) == str(tmp_path / "aime24.jsonl")
    assert find_benchmark("owner/name", str(tmp_path)) == "owner/name"
    with pytest.raises(UserError, match="amc23 .* which has aime24"):
        find_benchmark("amc23", str(tmp_path))
