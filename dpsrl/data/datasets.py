"""Rows of a data set from a local file or the Hugging Face hub, and a report of what was wrong with the others.

One strict reader of our own for JSON lines: a row that is not usable is dropped with its number and the
reason, and never shifts or retypes its neighbours. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpsrl.types import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One usable item: `Row("What is 1+1?", "2", 17)`."""

    problem: str
    answer: Any  # str, list of accepted str, or what a reward function of one's own expects
    number: int  # of the row in its source, from 1


@dataclass
class LoadReport:
    """What was read and what was dropped, by reason, with row numbers."""

    name: str
    num_rows: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def drop(self, reason: str, number: int) -> None:
        self.dropped.setdefault(reason, []).append(number)

    @property
    def num_kept(self) -> int:
        return self.num_rows - sum(map(len, self.dropped.values()))

    def sentences(self) -> list[str]:
        """`math.jsonl: 7,474 rows, 2 without an answer (rows 887, 1010); 7,472 prompts kept`, then the remarks."""
        faults = [f"{len(numbers):,} {reason} ({_rows(numbers)})" for reason, numbers in self.dropped.items()]
        return [f"{', '.join([f'{self.name}: {self.num_rows:,} rows', *faults])}; {self.num_kept:,} prompts kept", *self.remarks]


def _rows(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN_ROWS])) + (", ..." if len(numbers) > SHOWN_ROWS else "")
    return f"row{'s' * (len(numbers) > 1)} {shown}"


def load_rows(
    source: str, *, prompt_key: str = "problem", answer_key: str = "answer", split: str = "train"
) -> tuple[list[Row], LoadReport]:
    """Usable rows of a .jsonl, .json or .parquet file, or of a Hugging Face data set (`owner/name`).

    UserError where the source is missing, empty, of another kind, or has no usable row.
    """
    path = Path(source)
    report = LoadReport(path.name if path.suffix in SUFFIXES else source)
    rows, columns = [], set()
    for number, item in _items(source, split, report):
        report.num_rows += 1
        if isinstance(item, str):
            report.drop(item, number)
            continue
        columns |= item.keys()
        row = _row(item, number, prompt_key, answer_key)
        if isinstance(row, str):
            report.drop(row, number)
        else:
            rows.append(row)
    if report.num_rows == 0:
        raise UserError(f"{source} is empty: give a data set with at least one row")
    for name, column in (("data.prompt_key", prompt_key), ("data.answer_key", answer_key)):
        if columns and column not in columns:
            raise UserError(f"{name}={column} is not a column of {source}, which has {', '.join(sorted(columns))}: set {name}")
    if not rows:
        raise UserError(f"{source} has no usable row: {report.sentences()[0]}")
    return rows, report


def _row(item: dict[str, Any], number: int, prompt_key: str, answer_key: str) -> Row | str:
    """The row, or the reason to drop it."""
    problem, answer = item.get(prompt_key), item.get(answer_key)
    if not isinstance(problem, str) or not problem.strip():
        return "without a problem text"
    if answer is None:
        return "without an answer"
    if isinstance(answer, bool | int | float):
        answer = str(answer)
    if isinstance(answer, str) and not answer.strip():
        return "with an empty answer"
    if isinstance(answer, list):
        answer = [str(accepted) for accepted in answer if accepted is not None and str(accepted).strip()]
        if not answer:
            return "with an empty answer"
    return Row(problem, answer, number)


def _items(source: str, split: str, report: LoadReport) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(row number from 1, the row's columns or the reason why it could not be read)."""
    path = Path(source)
    if path.suffix not in SUFFIXES:
        if path.exists() or source.count("/") != 1 or source.startswith((".", "/")):
            raise UserError(f"{source} is no data set: give a {', '.join(SUFFIXES)} file or a Hugging Face name (owner/name)")
        yield from enumerate(_hub_rows(source, split), 1)
    elif not path.is_file():
        raise UserError(f"{source} does not exist: give the path of a data file")
    elif path.suffix == ".jsonl":
        yield from _json_lines(path)
    else:
        yield from enumerate(_json_list(path) if path.suffix == ".json" else _parquet_rows(path), 1)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield number, "not UTF-8"
                continue
            except (json.JSONDecodeError, RecursionError):
                yield number, "not JSON"
                continue
            yield number, item if isinstance(item, dict) else "not a JSON object"


def _json_list(path: Path) -> list[dict[str, Any] | str]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): mend it, or give one object per line in a .jsonl file") from error
    if not isinstance(items, list):
        raise UserError(f"{path} holds no list of objects: give a list, or one object per line in a .jsonl file")
    return [item if isinstance(item, dict) else "not a JSON object" for item in items]


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file ({error}): give a whole one") from error
    for batch in file.iter_batches():
        yield from batch.to_pylist()


def _hub_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{name} could not be read from the Hugging Face hub ({first}): go online, or give a local file") from error


def find_benchmark(name: str, eval_dir: str) -> str:
    """The file of a benchmark in `eval_dir`, or `name` itself where it is a Hugging Face name."""
    if "/" in name:
        return name
    for suffix in SUFFIXES:
        path = Path(eval_dir) / f"{name}{suffix}"
        if path.is_file():
            return str(path)
    folder = Path(eval_dir or ".")
    known = sorted({path.stem for path in folder.glob("*") if path.suffix in SUFFIXES}) if folder.is_dir() else []
    has = f"which has {', '.join(known)}" if known else "which has no data file"
    raise UserError(f"benchmark {name} is not in data.eval_dir={eval_dir or '.'}, {has}: set data.eval_dir or eval.benchmarks")
