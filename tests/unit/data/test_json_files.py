"""JSON lines under any damage: what was in one line stays in it, in bounded memory, and a moving file is refused."""

import json
import os
import resource
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpsrl.data import json_files
from dpsrl.data.datasets import Row, load_rows
from dpsrl.data.files import MAX_ROW_BYTES
from dpsrl.data.json_files import json_lines
from dpsrl.types import UserError

LINE = b'{"problem": "%s?", "answer": "2"}'


def slow_reader(content: bytes) -> dict[int, dict]:
    """Line number -> object, by splitting the whole content: what the reader must find."""
    found = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        try:
            item = json.loads(line.decode("utf-8", "strict"))
        except (UnicodeDecodeError, json.JSONDecodeError, ValueError, RecursionError):
            continue
        if isinstance(item, dict):
            found[number] = item
    return found


def objects(path) -> dict[int, dict]:
    return {number: item for number, item in json_lines(path) if isinstance(item, dict)}


JUNK = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\0" * 9, b"\r", b"\r\n", b"\n", b"\n\n", b"[" * 2000, b"9" * 5000,
                     b"NaN", b"-Infinity", b'"', b"}\n{", "\u2028\u0085é".encode(), b"\x0b\x0c\x1c"]),
)  # fmt: skip


@pytest.mark.process
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=JUNK, where=st.floats(0, 1), num_lines=st.integers(1, 6), ends=st.booleans())
def test_inserted_bytes_change_no_other_line(tmp_path, junk, where, num_lines, ends):
    lines = [LINE % f"Wie groß ist {i}".encode() for i in range(num_lines)]
    content = b"\n".join(lines) + b"\n" * ends
    place = round(where * len(content))
    path = tmp_path / "a.jsonl"
    path.write_bytes(content[:place] + junk + content[place:])
    found = objects(path)
    assert found == slow_reader(path.read_bytes()) and found == objects(path)
    hit = content[:place].count(b"\n")  # the line that the bytes went into, from 0
    shift = junk.count(b"\n")
    for i, line in enumerate(lines):
        if i != hit:
            assert found[i + 1 + shift * (i > hit)] == json.loads(line)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_rows_or_one_sentence(tmp_path, content):
    for suffix in (".jsonl", ".json"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        try:
            load_rows(str(path))
        except UserError as error:
            assert "\n" not in str(error)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 40), max_size=6), cr=st.booleans(), ends=st.booleans())
def test_the_limit_of_a_line_is_exact_and_costs_no_neighbour(tmp_path, sizes, cr, ends):
    end = b"\r\n" if cr else b"\n"
    lines = [b'{"problem": "%s"}' % (b"x" * size) for size in sizes]
    path = tmp_path / "a.jsonl"
    path.write_bytes(end.join(lines) + end * (ends and bool(lines)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "MAX_ROW_BYTES", 30)
        patch.setattr(json_files, "PIECE_BYTES", 7)
        read = dict(json_lines(path))
    has_end = [ends or i < len(lines) - 1 for i in range(len(lines))]
    expected = {i: json.loads(line) if len(line) + (cr and ended) <= 30 else "larger than 4 MiB"
                for i, (line, ended) in enumerate(zip(lines, has_end), 1)}  # fmt: skip
    assert read == expected


def test_a_large_row_is_dropped_by_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([LINE % b"1", LINE % (b"x" * 10_000_000), LINE % b"3"]))
    rows, report = load_rows(str(path))
    assert rows == [Row("1?", "2", 1), Row("3?", "2", 3)] and report.dropped == {"larger than 4 MiB": [2]}
    (tmp_path / "a.json").write_text(json.dumps([{"problem": "x" * MAX_ROW_BYTES, "answer": "1"}, json.loads(LINE)]))
    rows, report = load_rows(str(tmp_path / "a.json"))
    assert rows == [Row("%s?", "2", 2)] and report.dropped == {"larger than 4 MiB": [1]}


@pytest.mark.process
@pytest.mark.slow
def test_gigabytes_without_a_newline_fit_into_little_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE % b"1" + b"\n")
    with path.open("r+b") as file:
        file.truncate(3 << 29)  # what a crashed disk leaves: one endless line of zeros
    code = (
        "import sys, resource\n"
        "from dpsrl.data.datasets import load_rows\n"
        "rows, report = load_rows(sys.argv[1])\n"
        "print(len(rows), report.dropped)"
    )
    limit = 1 << 30
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert done.stdout == "1 {'larger than 4 MiB': [2]}\n", done.stderr
    path.rename(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a.json has 1.5 GiB.*write one object a line into a .jsonl file"):
        load_rows(str(tmp_path / "a.json"))


def test_a_mark_and_blank_lines_alone_are_an_empty_file(tmp_path):
    for name, content in (("a.jsonl", b"\xef\xbb\xbf"), ("b.jsonl", b"\xef\xbb\xbf\r\n \t\r\n\n"), ("c.json", b" \n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is empty"):
            load_rows(str(tmp_path / name))


def test_marks_in_joined_files_and_a_cut_last_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE % b"1" + b"\r\n\xef\xbb\xbf" + LINE % b"2" + b"\n" + (LINE % b"3")[:20])
    rows, report = load_rows(str(path))
    assert [row.problem for row in rows] == ["1?", "2?"] and report.dropped == {"not JSON": [3]}


def test_a_number_of_thousands_of_digits_in_a_list_costs_its_row_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        f'[{{"problem": "1?", "answer": {"9" * 5000}}}, {{"problem": "2?", "answer": 7, "key": {"9" * 5000}}}]'
    )
    rows, report = load_rows(str(path))
    assert rows == [Row("2?", "7", 2)] and report.dropped == {"without an answer": [1]}


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"PAR1", "it is a Parquet file: name it .parquet"),
        (b"\x1f\x8b\x08", "it is compressed by gzip: unpack it"),
        ('{"problem": "1?", "answer": "2"}'.encode("utf-16"), "it is UTF-16 text: write it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "fetch the file with git lfs pull"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".arrow"])
def test_another_format_behind_the_suffix_is_named(tmp_path, suffix, head, words):
    (tmp_path / f"a{suffix}").write_bytes(head)
    with pytest.raises(UserError, match=words) as error:
        load_rows(str(tmp_path / f"a{suffix}"))
    assert "\n" not in str(error.value)


def test_a_mapping_that_nothing_could_carry_is_dropped(tmp_path):
    deep = b'{"problem": "1?", "answer": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}"
    fine = b'{"problem": "2?", "answer": {"a": [[1, null, true, {"b": 0.5}]]}}'
    nan = b'{"problem": "3?", "answer": {"a": [NaN]}}'  # which no log of answers could hold
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([deep, fine, nan]))
    rows, report = load_rows(str(tmp_path / "a.jsonl"))
    assert [row.number for row in rows] == [2]
    assert report.dropped == {"with an answer that maps to what JSON cannot hold": [1, 3]}


def test_column_names_are_shown_in_one_line_and_not_all_of_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({f"a\n\ud800 {i}": i}) + "\n" for i in range(500)))
    with pytest.raises(UserError, match=r"data.prompt_key=problem is not a column .*, \.\.\.: set") as error:
        load_rows(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000 and str(error.value).encode()


# ---- a file that does not keep still ----


def many_lines(path, num=200_000):
    path.write_bytes(b"".join(LINE % str(i).encode() + b"\n" for i in range(num)))
    return str(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.open("ab").write(LINE % b"new"),
        lambda path: os.truncate(path, 1000),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"2"', b'"3"')),
        lambda path: path.with_name("new").write_bytes(b"") or os.replace(path.with_name("new"), path),
        lambda path: path.unlink(),
    ],
    ids=["grows", "shrinks", "is rewritten", "is exchanged", "is removed"],
)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / "a.jsonl"
    many_lines(path, 2000)
    rows = json_lines(path)
    for _ in range(10):
        next(rows)
    change(path)
    with pytest.raises(UserError, match="a.jsonl changed while it was read: start again"):
        list(rows)


def test_a_file_that_grows_as_fast_as_it_is_read_has_an_end(tmp_path):
    path = tmp_path / "a.jsonl"
    many_lines(path, 1000)
    seen = 0
    with pytest.raises(UserError, match="changed while it was read"), path.open("ab") as more:
        for _ in json_lines(path):
            seen += 1
            assert seen <= 1000
            more.write((LINE % b"new" + b"\n") * 2)
            more.flush()
    assert seen == 1000


@pytest.mark.process
def test_a_writer_beside_the_reader_gives_all_of_the_rows_or_a_sentence(tmp_path):
    path = tmp_path / "a.jsonl"
    num_before = 3000
    many_lines(path, num_before)
    stop = threading.Event()

    def write():
        with path.open("ab", buffering=0) as file:
            for i in range(2000):
                file.write(LINE % str(num_before + i).encode() + b"\n")
                if stop.wait(0.0005):
                    return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            try:
                rows, _ = load_rows(str(path))
            except UserError as error:
                assert "changed while it was read" in str(error)
            else:
                assert [row.problem for row in rows] == [f"{i}?" for i in range(len(rows))] and len(rows) >= num_before
    finally:
        stop.set()
        writer.join()


def test_what_cannot_be_opened_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")  # whose open would wait for ever
    for name in ("folder.jsonl", "pipe.jsonl", "x" * 300 + ".jsonl", "\0.jsonl"):
        with pytest.raises(UserError, match="does not exist or is no file"):
            load_rows(f"{tmp_path}/{name}")
    path = tmp_path / "locked.jsonl"
    many_lines(path, 1)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UserError, match="cannot be read .Permission denied"):
        load_rows(str(path))
