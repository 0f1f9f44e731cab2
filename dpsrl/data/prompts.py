"""PromptSet: the prompts of a run, with ids that stay, tokenized when one is asked for.

Owns the way from a row to a prompt: instruction, chat template, length limit, duplicates. Knows neither files
nor models; the tokenizer is given to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dpsrl.data.datasets import LoadReport, Row
from dpsrl.types import Prompt, UserError

BATCH_ROWS = 1 << 14
MAX_COMPARED = 10_000  # duplicates whose answers are looked at
SHOWN_CHARS = 80  # of an answer in a remark
BOUNDARY_TOKENS = 16  # what a text can add by keeping apart template letters that otherwise share a token


class PromptSet:
    """A sequence of `Prompt`. Rows stay where they are, tokens are not kept; `ids` is uint64 (N,).

    Rows with the text of an earlier one, prompts longer than `max_prompt_tokens`, and rows whose answer
    `is_scorable` refuses are dropped and counted in `report`. UserError when nothing is left, or more of the rows are
    unusable than `max_bad_share`, too long ones aside. `instruction` is the user message, with {problem} in it.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        report: LoadReport,
        tokenizer: Any,
        instruction: str,
        max_prompt_tokens: int,
        is_scorable: Callable[[Any], bool] | None = None,
        *,
        max_bad_share: float = 1.0,
    ) -> None:
        self.tokenizer, self.instruction, self.report = tokenizer, instruction, report
        self._num_template_tokens = len(self._tokens(Row("", "", 0)))
        self._rows = rows
        ids_N, long_N, scorable_N = self._scan(max_prompt_tokens, is_scorable)
        kept_N = _distinct(ids_N, rows, report)
        for place in np.flatnonzero(kept_N & ~scorable_N).tolist():
            report.drop("with an answer that no response can match", rows[place].number)
        kept_N &= scorable_N
        report.refuse_above(max_bad_share)
        may_be_long = np.flatnonzero(kept_N & long_N).tolist()
        too_long = [place for place in may_be_long if len(self._tokens(rows[place])) > max_prompt_tokens]
        for place in too_long:
            report.drop(f"longer than {max_prompt_tokens:,} tokens", rows[place].number, is_fault=False)
        kept_N[too_long] = False
        self._places = np.flatnonzero(kept_N)
        if not self._places.size:
            shortest = min((len(self._tokens(rows[place])) for place in too_long), default=0)
            raise UserError(
                f"{report.name}: every prompt is longer than model.max_prompt_tokens={max_prompt_tokens} "
                f"(the shortest has {shortest:,} tokens): raise it"
                if shortest > max_prompt_tokens
                else f"no row can be used: {report.sentences()[0]}"
            )
        self.ids = ids_N[self._places]

    def __len__(self) -> int:
        return self._places.size

    def __getitem__(self, index: int) -> Prompt:
        index = range(len(self))[index]  # from the end too, as in a list
        row = self._rows[int(self._places[index])]
        token_ids = np.array(self._tokens(row), dtype=np.int32)
        return Prompt(index, id_text(self.ids[index]), token_ids, row.problem, row.answer)

    def _scan(
        self, max_prompt_tokens: int, is_scorable: Callable[[Any], bool] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(id of each row, whether its prompt may be too long, whether its answer can be matched).

        A byte makes at most one token, so that most prompts need no tokenizing.
        """
        room = max_prompt_tokens - self._num_template_tokens - BOUNDARY_TOKENS
        ids, long, scorable = [], [], []
        for problems, answers in _batches(self._rows):
            digests = b"".join(map(prompt_digest, problems))
            ids.append(np.frombuffer(digests, dtype=">u8").astype(np.uint64))
            long.append(np.fromiter((_num_bytes(text, room) > room for text in problems), bool, len(problems)))
            judged = map(is_scorable, answers) if is_scorable else [True] * len(answers)
            scorable.append(np.fromiter(judged, bool, len(answers)))
        return np.concatenate(ids), np.concatenate(long), np.concatenate(scorable)

    @cached_property
    def content_hash(self) -> str:
        """sha256 of every prompt's text and answer, the same in any order of the rows.

        Costs a pass over the rows when it is first asked for, about as long as their ids took (1 to 4 s per million),
        and no memory: the rows' digests are added up. It finds mistakes, not data that was made to collide.
        """
        kept_N = np.zeros(len(self._rows), dtype=bool)
        kept_N[self._places] = True
        total, start = np.zeros(4, dtype=np.uint64), 0
        for problems, answers in _batches(self._rows):
            kept = np.flatnonzero(kept_N[start : start + len(problems)]).tolist()
            digests = b"".join([_row_digest(problems[place], answers[place]) for place in kept])
            total += np.frombuffer(digests, dtype="<u8").reshape(-1, 4).sum(axis=0, dtype=np.uint64)
            start += len(problems)
        return hashlib.sha256(f"{len(self)} ".encode() + total.astype("<u8").tobytes()).hexdigest()

    def _tokens(self, row: Row) -> list[int]:
        """Not str.format: problems and instructions are full of braces."""
        quiet = {"verbose": False}  # else it warns of long prompts, which are dropped here
        message = {"role": "user", "content": self.instruction.replace("{problem}", row.problem)}
        if self.tokenizer.chat_template is None:
            return self.tokenizer(message["content"], **quiet)["input_ids"]
        encoded = self.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_dict=True, tokenizer_kwargs=quiet
        )
        return encoded["input_ids"]


def difference(saved_ids: np.ndarray, ids: np.ndarray) -> tuple[int, int]:
    """(how many of `ids` are new, how many of `saved_ids` are gone): ids of two runs' prompts, in any order."""
    saved, now = np.unique(saved_ids), np.unique(ids)
    num_common = np.intersect1d(saved, now, assume_unique=True).size
    return now.size - num_common, saved.size - num_common


def _batches(rows: Sequence[Row]) -> Iterator[tuple[list[str], list[Any]]]:
    """(problems, answers), some thousand rows at a time."""
    if hasattr(rows, "batches"):
        yield from rows.batches()
        return
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        yield [row.problem for row in batch], [row.answer for row in batch]


def _row_digest(problem: str, answer: Any) -> bytes:
    """32 bytes of the exact problem and answer."""
    kind, text = ("text", answer) if isinstance(answer, str) else ("json", json.dumps(answer, sort_keys=True))
    return hashlib.sha256(f"{len(problem)} {problem}{kind}{text}".encode("utf-8", "surrogatepass")).digest()


def prompt_digest(problem: str) -> bytes:
    """8 bytes that depend on the text alone, white space folded."""
    return hashlib.sha256(" ".join(problem.split()).encode("utf-8", "surrogatepass")).digest()[:8]


def prompt_id(problem: str) -> str:
    """A prompt's id in files and logs, 16 hex digits."""
    return prompt_digest(problem).hex()


def id_text(prompt_id: int) -> str:
    return f"{int(prompt_id):016x}"


def _num_bytes(text: str, room: int) -> int:
    """Exact where it matters: a character has at most 4 bytes."""
    return 0 if 4 * len(text) <= room else len(text.encode())


def _shown(answer: Any) -> str:
    text = repr(answer)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _distinct(ids_N: np.ndarray, rows: Sequence[Row], report: LoadReport) -> np.ndarray:
    """Whether a row is the first of its text. The same text with another answer is remarked on: one must be wrong."""
    order = np.argsort(ids_N, kind="stable")
    begins = np.ones(ids_N.size, dtype=bool)  # in order of ids, of which the first row stands first
    ordered = ids_N[order]
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    distinct_N = np.ones(ids_N.size, dtype=bool)
    again = np.flatnonzero(~begins)
    if again.size:
        starts = np.flatnonzero(begins)
        first = order[starts[np.searchsorted(starts, again) - 1]]
        repeated = order[again]
        distinct_N[repeated] = False
        for count, i in enumerate(np.argsort(repeated).tolist()):
            row = rows[int(repeated[i])]
            report.drop("duplicate", row.number)
            if count < MAX_COMPARED and (earlier := rows[int(first[i])]).answer != row.answer:
                report.remarks.append(
                    f"{report.name}: rows {earlier.number} and {row.number} ask the same and answer "
                    f"{_shown(earlier.answer)} and {_shown(row.answer)}; the first is kept"
                )
    return distinct_N
