"""Every kind of source, and every kind of dirt, with the row it is in."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from dpsrl.data.datasets import Row, find_benchmark, load_rows
from dpsrl.types import UserError

GOOD = [
    {"problem": "1+1?", "answer": "2"},
    {"problem": "2+2?", "answer": ["4", "four"]},
    {"problem": "3+4?", "answer": 7},
]
ROWS = [Row("1+1?", "2", 1), Row("2+2?", ["4", "four"], 2), Row("3+4?", "7", 3)]


def write_lines(path, items):
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in items]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_json_lines_json_and_parquet_give_the_same_rows(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    one_type = [{"problem": row.problem, "answer": list(row.answer)} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(one_type), tmp_path / "a.parquet")
    assert load_rows(lines)[0] == load_rows(str(tmp_path / "a.json"))[0] == ROWS
    parquet = load_rows(str(tmp_path / "a.parquet"))[0]
    expected = [("1+1?", ["2"]), ("2+2?", ["4", "four"]), ("3+4?", ["7"])]
    assert [(row.problem, row.answer) for row in parquet] == expected


DIRT = [
    (b'{"problem": "cut', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"problem": "long", "answer": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"\xff\xfe{}", "not UTF-8"),
    (b"[1, 2]", "not a JSON object"),
    ({"answer": "1"}, "without a problem text"),
    ({"problem": " ", "answer": "1"}, "without a problem text"),
    ({"problem": 3, "answer": "1"}, "without a problem text"),
    (b'{"problem": "half \\ud800", "answer": "1"}', "not Unicode text"),
    ({"problem": "a?", "answer": None}, "without an answer"),
    ({"problem": "b?"}, "without an answer"),
    (b'{"problem": "c?", "answer": NaN}', "without an answer"),
    ({"problem": "d?", "answer": " \n"}, "with an empty answer"),
    ({"problem": "e?", "answer": []}, "with an empty answer"),
    ({"problem": "f?", "answer": [None, ""]}, "with an empty answer"),
    ({"problem": "g?", "answer": True}, "with an answer that is neither text nor a number"),
    ({"problem": "h?", "answer": [["1"]]}, "with an answer that is neither text nor a number"),
    (b'{"problem": "i?", "answer": {"x": NaN}}', "with an answer that maps to what JSON cannot hold"),
]


def test_dirt_is_dropped_by_row_and_reason(tmp_path):
    items = [GOOD[0], b"", *(item for item, _ in DIRT), GOOD[1]]
    rows, report = load_rows(write_lines(tmp_path / "dirt.jsonl", items))
    assert rows == [ROWS[0], Row(ROWS[1].problem, ROWS[1].answer, len(items))]  # line numbers of the file
    expected = {}
    for number, (_, reason) in enumerate(DIRT, 3):
        expected.setdefault(reason, []).append(number)
    assert report.dropped == expected
    assert (report.num_rows, report.num_kept) == (len(items) - 1, 2)


def test_the_sentence_counts_by_reason_and_shows_the_first_rows(tmp_path):
    items = [GOOD[0], *[b"nonsense"] * 7, {"problem": "a?", "answer": None}]
    _, report = load_rows(write_lines(tmp_path / "dirt.jsonl", items))
    assert report.sentences() == [
        "dirt.jsonl: 9 rows, 7 not JSON (rows 2, 3, 4, 5, 6, ...), 1 without an answer (row 9); 1 prompt kept"
    ]
    report.remarks = [f"remark {number}" for number in range(1007)]
    assert len(report.sentences()) == 1 + 5 + 1 and "1,002 more" in report.sentences()[-1]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_too_many_bad_rows_are_refused_in_one_sentence(tmp_path, suffix):
    items = [*GOOD[:1] * 6, *[{"problem": None, "answer": "1"}] * 3, {"problem": "a?", "answer": None}]
    path = tmp_path / f"dirt.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    else:
        path.write_text(json.dumps(items) if suffix == "json" else "\n".join(map(json.dumps, items)))
    assert len(load_rows(str(path), max_bad_share=0.4)[0]) == 6  # exactly as many as may be
    with pytest.raises(UserError) as error:
        load_rows(str(path), max_bad_share=0.39)
    assert str(error.value) == (
        f"dirt.{suffix}: 10 rows, 3 without a problem text (rows 7, 8, 9), 1 without an answer (row 10): 4 cannot be "
        "used, a larger share than data.max_bad_share=0.39: mend the data or raise data.max_bad_share"
    )


def test_answers_keep_their_spelling(tmp_path):
    answers = ["007", "144.0", "9.6\n", 7, 0.1, -2, ["1", 2, None, "x"], {"numbers": [3, 5], "target": 15}]
    items = [{"problem": f"{number}?", "answer": answer} for number, answer in enumerate(answers)]
    rows, _ = load_rows(write_lines(tmp_path / "a.jsonl", items))
    kept = ["007", "144.0", "9.6\n", "7", "0.1", "-2", ["1", "2", "x"], {"numbers": [3, 5], "target": 15}]
    assert [row.answer for row in rows] == kept


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "1+1?", "answer": "2"}\r\n\r\n')
    assert load_rows(str(tmp_path / "a.jsonl"))[0] == [ROWS[0]]


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


@pytest.mark.parametrize("name", ["data/none.csv", "none.txt", "/tmp/none", "./none", "none", "a/b/c", ""])
def test_what_is_no_hub_name_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr("dpsrl.data.datasets._hub_rows", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="is no data set"):
        load_rows(name)


def test_hub_rows_go_through_the_same_reader(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return [*GOOD, {"problem": "a?", "answer": None}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("dpsrl.data.datasets.answers", lambda endpoint: True)
    rows, report = load_rows("owner/name.v1:main", split="test")
    assert rows == ROWS and asked == [("owner/name.v1", "main", "test")]
    assert report.sentences()[0].startswith("owner/name.v1:main: 4 rows, 1 without an answer (row 4)")


@pytest.mark.parametrize(
    "fault", [StopIteration(), RuntimeError("scripts are not supported\nany more"), OSError(5, "Input/output error")]
)
def test_whatever_the_hub_library_raises_is_one_sentence(monkeypatch, fault):
    def load_dataset(name, configuration, split):
        raise fault

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("dpsrl.data.datasets.answers", lambda endpoint: True)
    with pytest.raises(UserError, match="owner/name .split train. could not be read") as error:
        load_rows("owner/name")
    assert "\n" not in str(error.value)


def test_without_a_network_the_hub_is_one_sentence_at_once(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("dpsrl.data.datasets.answers", lambda endpoint: False)
    with pytest.raises(UserError, match=r"no-such-owner/no-such-set \(split train\) could not") as error:
        load_rows("no-such-owner/no-such-set")
    assert "\n" not in str(error.value) and "go online" in str(error.value)


def test_benchmarks_are_found_by_stem(tmp_path):
    write_lines(tmp_path / "aime24.jsonl", GOOD)
    assert find_benchmark("aime24", str(tmp_path)) == str(tmp_path / "aime24.jsonl")
    assert find_benchmark("owner/name", str(tmp_path)) == "owner/name"
    with pytest.raises(UserError, match="amc23 .* which has aime24"):
        find_benchmark("amc23", str(tmp_path))
