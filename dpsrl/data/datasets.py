"""Rows of a data set from a local file, the Hugging Face hub or a function, and a report of what was wrong with others.

A row that is not usable is dropped with its number and the reason, and never shifts or retypes its neighbours; too many
of them, and the data set is refused. Knows nothing of tokens.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpsrl.data.files import MAX_ROW_BYTES, TOO_LARGE, first_line, likely_kind
from dpsrl.data.json_files import json_lines, json_list
from dpsrl.data.own import own_rows
from dpsrl.machine import answers
from dpsrl.own import is_own
from dpsrl.types import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
SHOWN_ROWS = 5
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(?::[\w.-]+)?")  # owner/name or owner/name:configuration
FILE_SUFFIX = re.compile(r"\.(?:csv|tsv|txt|xlsx?|ya?ml|pkl|gz|bz2|xz|zip|zst|jsonl?|parquet)$", re.I)
SHOWN_COLUMNS = 20
MAX_LEVELS = 32  # of lists and mappings inside an answer
MAX_INT_BITS = 14_000
NO_ANSWER_TYPE = "with an answer that is neither text nor a number"


@dataclass(frozen=True, slots=True)
class Row:
    """One usable item: `Row("What is 1+1?", "2", 17)`."""

    problem: str
    answer: Any  # str, list of accepted str, or the mapping that a reward function of one's own expects
    number: int  # of the row in its source, from 1


@dataclass
class LoadReport:
    """What was read and what was dropped, by reason, with row numbers."""

    name: str
    num_rows: int = 0
    num_faults: int = 0  # rows dropped for what they are, not for a setting of the run
    num_dropped: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, list[int]] = field(default_factory=dict)  # the first row numbers of each reason
    remarks: list[str] = field(default_factory=list)

    def drop(self, reason: str, number: int, *, is_fault: bool = True) -> None:
        """`is_fault`: the row is unusable by itself, whatever the settings."""
        self.num_faults += is_fault
        self.num_dropped[reason] = self.num_dropped.get(reason, 0) + 1
        numbers = self.dropped.setdefault(reason, [])
        if len(numbers) <= SHOWN_ROWS:
            numbers.append(number)

    @property
    def num_kept(self) -> int:
        return self.num_rows - sum(self.num_dropped.values())

    def refuse_above(self, max_bad_share: float) -> None:
        """UserError where more of the rows than that are unusable by a fault of theirs."""
        if self.num_rows and self.num_faults / self.num_rows > max_bad_share:
            raise UserError(
                f"{self._read()}: {self.num_faults:,} cannot be used, a larger share than data.max_bad_share="
                f"{max_bad_share:g}: mend the data or raise data.max_bad_share"
            )

    def _read(self) -> str:
        faults = [f"{self.num_dropped[reason]:,} {reason} ({_rows(n)})" for reason, n in self.dropped.items()]
        return ", ".join([f"{self.name}: {_count(self.num_rows, 'row')}", *faults])

    def sentences(self) -> list[str]:
        """`math.jsonl: 74 rows, 2 without an answer (rows 8, 10); 72 prompts kept`, then the remarks."""
        remarks = self.remarks[:SHOWN_ROWS]
        if len(self.remarks) > SHOWN_ROWS:
            remarks.append(f"{self.name}: {len(self.remarks) - SHOWN_ROWS:,} more remarks like these")
        return [f"{self._read()}; {_count(self.num_kept, 'prompt')} kept", *remarks]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _rows(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN_ROWS])) + (", ..." if len(numbers) > SHOWN_ROWS else "")
    return f"row{'s' * (len(numbers) > 1)} {shown}"


def load_rows(
    source: str,
    *,
    prompt_key: str = "problem",
    answer_key: str = "answer",
    split: str = "train",
    max_bad_share: float = 1.0,
) -> tuple[Sequence[Row], LoadReport]:
    """Usable rows of a .jsonl, .json, .parquet or .arrow file, of a Hugging Face data set, or of a function.

    Those of Parquet and Arrow files stay on disk. A Hugging Face data set is `owner/name` or
    `owner/name:configuration`, and `split` is its split; a function is `my_module:function`. UserError where the
    source is missing, empty, of another kind, changes while it is read, has no usable row or a larger share of unusable
    ones than `max_bad_share`.
    """
    path = Path(source)
    if path.suffix in (".parquet", ".arrow") and os.path.isfile(path):
        from dpsrl.data.arrow import ArrowRows

        stored = ArrowRows(path, prompt_key, answer_key)
        rows: Sequence[Row] = stored
        columns, report = stored.columns, stored.report
    else:
        report = LoadReport(path.name if path.suffix in SUFFIXES else source)
        rows, columns = _rows_in_memory(source, split, prompt_key, answer_key, report)
    for name, column in (("data.prompt_key", prompt_key), ("data.answer_key", answer_key)):
        if columns and column not in columns:
            raise UserError(
                f"{name}={column} is not a column of {source}, which has {_column_names(columns)}: set {name}"
            )
    if report.num_rows == 0:
        raise UserError(f"{source} is empty: give a data set with at least one row")
    if not rows:
        raise UserError(f"{source} has no usable row: {report.sentences()[0]}{likely_kind(path)}")
    report.refuse_above(max_bad_share)
    return rows, report


def _column_names(columns: set[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in sorted(columns)[:SHOWN_COLUMNS]]
    return ", ".join(name[:60] for name in shown) + ", ..." * (len(columns) > SHOWN_COLUMNS)


def _rows_in_memory(
    source: str, split: str, prompt_key: str, answer_key: str, report: LoadReport
) -> tuple[list[Row], set[str]]:
    """(usable rows, names of columns: the two, where they occur, and some of the others)."""
    rows, columns = [], set()
    for number, item in _items(source, split, prompt_key, answer_key):
        report.num_rows += 1
        if isinstance(item, str):
            report.drop(item, number)
            continue
        columns |= {prompt_key, answer_key} & item.keys()
        if len(columns) <= SHOWN_COLUMNS:
            columns |= item.keys()
        row = row_of(item.get(prompt_key), item.get(answer_key), number)
        if isinstance(row, str):
            report.drop(row, number)
        else:
            rows.append(row)
    return rows, columns


def row_of(problem: Any, answer: Any, number: int) -> Row | str:
    """The row, or the reason to drop it."""
    if not isinstance(problem, str) or not problem.strip():
        return "without a problem text"
    answers = answer if isinstance(answer, list) else [answer]
    texts = [text for text in [problem, *answers] if isinstance(text, str)]
    if any(_has_lone_surrogate(text) for text in texts):
        return "not Unicode text"
    if 4 * sum(map(len, texts)) > MAX_ROW_BYTES and sum(len(text.encode()) for text in texts) > MAX_ROW_BYTES:
        return TOO_LARGE
    if isinstance(answer, dict):
        return (
            Row(problem, answer, number) if _is_plain(answer) else "with an answer that maps to what JSON cannot hold"
        )
    if _is_missing(answer):
        return "without an answer"
    if any(isinstance(item, bool) or not isinstance(item, str | int | float | None) for item in answers):
        return NO_ANSWER_TYPE
    if any(map(_is_huge, answers)):
        return "with a number of thousands of digits"
    texts = [str(item) for item in answers if not _is_missing(item)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        return "with an empty answer"
    return Row(problem, texts if isinstance(answer, list) else texts[0], number)


def _is_plain(value: Any, levels: int = MAX_LEVELS) -> bool:
    """Whether JSON holds it, without nesting that would exhaust the stack of whoever copies it."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        named = not isinstance(value, dict) or all(isinstance(key, str) for key in value)
        return named and levels > 0 and all(_is_plain(item, levels - 1) for item in items)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str) or isinstance(value, int) and not _is_huge(value)


def _is_huge(value: Any) -> bool:
    """Python refuses to write a number of more than 4,300 digits, some 14,000 bits."""
    return isinstance(value, int) and value.bit_length() > MAX_INT_BITS


def _is_missing(value: Any) -> bool:
    return value is None or isinstance(value, float) and not math.isfinite(value)


def _has_lone_surrogate(text: str) -> bool:
    """JSON can spell half of a surrogate pair; no tokenizer takes it."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def _items(source: str, split: str, prompt_key: str, answer_key: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(row number from 1, the row's columns or the reason why it could not be read)."""
    if is_own(source):
        yield from enumerate(own_rows(source, prompt_key, answer_key), 1)
        return
    path = Path(source)
    if path.suffix not in SUFFIXES:
        if os.path.exists(path) or FILE_SUFFIX.search(source) or not HUB_NAME.fullmatch(source):
            kinds = ", ".join(SUFFIXES)
            raise UserError(
                f"{source} is no data set: give a {kinds} file, a Hugging Face owner/name or my_module:function"
            )
        yield from enumerate(_hub_rows(source, split), 1)
    elif not os.path.isfile(path):
        raise UserError(f"{source} does not exist or is no file: give the path of a data file")
    elif path.suffix == ".jsonl":
        yield from json_lines(path)
    else:
        yield from enumerate(json_list(path), 1)


def _hub_rows(source: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"{source} needs the package datasets: install it, or give a local file") from error
    name, _, configuration = source.partition(":")
    if not answers(datasets.config.HF_ENDPOINT):
        datasets.config.HF_HUB_OFFLINE = True  # straight to its cache, instead of five retries over 23 s
    try:
        yield from datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError, ImportError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{source} (split {split}) could not be read from the Hugging Face hub ({first_line(error)}): "
            "check the name, go online, or give a local file"
        ) from error


def find_benchmark(name: str, eval_dir: str) -> str:
    """The file of a benchmark in `eval_dir`, or `name` itself where it is a Hugging Face name or a function."""
    if HUB_NAME.fullmatch(name) or is_own(name):
        return name
    for suffix in SUFFIXES:
        path = Path(eval_dir) / f"{name}{suffix}"
        if path.is_file():
            return str(path)
    folder = Path(eval_dir or ".")
    known = sorted({path.stem for path in folder.glob("*") if path.suffix in SUFFIXES})
    has = f"which has {', '.join(known)}" if known else "which has no data file"
    raise UserError(
        f"benchmark {name} is not in data.eval_dir={eval_dir or '.'}, {has}: set data.eval_dir or eval.benchmarks"
    )
