"""PromptSet: the prompts of a run, with ids that stay, tokenized when one is asked for.

Owns the way from a row to a prompt: instruction, chat template, length limit, duplicates. Knows neither files
nor models; the tokenizer is given to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from dpsrl.data.datasets import LoadReport, Row
from dpsrl.types import Prompt, UserError

BOUNDARY_TOKENS = 16  # what a text can add by keeping apart template letters that otherwise share a token


class PromptSet:
    """A sequence of `Prompt`. Texts are kept, tokens are not.

    Rows with the text of an earlier one, prompts longer than `max_prompt_tokens`, and rows whose answer
    `is_scorable` refuses are dropped and counted in `report`. UserError when nothing is left. `instruction`
    is the user message, with {problem} in it.
    """

    def __init__(
        self,
        rows: list[Row],
        report: LoadReport,
        tokenizer: Any,
        instruction: str,
        max_prompt_tokens: int,
        is_scorable: Callable[[Any], bool] | None = None,
    ) -> None:
        self.tokenizer, self.instruction, self.report = tokenizer, instruction, report
        self._num_template_tokens = len(self._tokens(Row("", "", 0)))
        self._rows = []
        distinct = _distinct(rows, report)
        for row in distinct:
            if is_scorable is not None and not is_scorable(row.answer):
                report.drop("with an answer that no response can match", row.number)
            elif self._is_longer(row, max_prompt_tokens):
                report.drop(f"longer than {max_prompt_tokens:,} tokens", row.number)
            else:
                self._rows.append(row)
        if not self._rows:
            shortest = min(len(self._tokens(row)) for row in distinct)
            raise UserError(
                f"{report.name}: every prompt is longer than model.max_prompt_tokens={max_prompt_tokens} "
                f"(the shortest has {shortest:,} tokens): raise it"
                if shortest > max_prompt_tokens
                else f"no row can be used: {report.sentences()[0]}"
            )
        self.ids = [prompt_id(row.problem) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        index = range(len(self._rows))[index]  # from the end too, as in a list
        row = self._rows[index]
        token_ids = np.array(self._tokens(row), dtype=np.int32)
        return Prompt(index, self.ids[index], token_ids, row.problem, row.answer)

    @property
    def content_hash(self) -> str:
        """sha256 of ids and answers, the same in any order of the rows."""
        answers = [json.dumps(row.answer, sort_keys=True) for row in self._rows]
        pairs = sorted(zip(self.ids, answers, strict=True))
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

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

    def _is_longer(self, row: Row, limit: int) -> bool:
        """A byte makes at most one token, so that a short text needs no tokenizing."""
        if self._num_template_tokens + BOUNDARY_TOKENS + len(row.problem.encode()) <= limit:
            return False
        return len(self._tokens(row)) > limit


def prompt_id(problem: str) -> str:
    """16 hex digits that depend on the text alone, white space folded."""
    return hashlib.sha256(" ".join(problem.split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _distinct(rows: list[Row], report: LoadReport) -> list[Row]:
    """The first row of each text. The same text with another answer is remarked on: one of them is wrong."""
    first: dict[str, Row] = {}
    for row in rows:
        earlier = first.setdefault(prompt_id(row.problem), row)
        if earlier is row:
            continue
        report.drop("duplicate", row.number)
        if earlier.answer != row.answer:
            report.remarks.append(
                f"{report.name}: rows {earlier.number} and {row.number} ask the same and answer "
                f"{earlier.answer!r} and {row.answer!r}; the first is kept"
            )
    return list(first.values())
