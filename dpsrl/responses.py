"""responses.jsonl of a run: what was answered, for a few groups of every step.

Owns which groups are kept and how their texts are cut. Memory is bounded by what is kept, not by the batch.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpsrl.data.prompts import PromptSet
from dpsrl.metrics import Lines
from dpsrl.selection.hmm import PARTIAL, SOLVED, UNSOLVED
from dpsrl.types import Group

MAX_CHARS = 4000  # of a response, a prompt or an answer
UNSCORED = -1
OUTCOMES = (PARTIAL, UNSOLVED, SOLVED, UNSCORED)  # in turn, so that each is there as far as the step had it


class ResponseLog:
    """One line per kept group: step, prompt_id, prompt, answer, policy_version and its responses.

    num_groups: kept of each step, 0 for none. Which ones follows from the seed, the step and the groups, whatever the
    order they come back in, and they are spread evenly over the outcomes. last_step: as `Lines` has it.
    """

    def __init__(
        self, path: Path, num_groups: int, seed: int, last_step: int = -1, say: Callable[[str], None] = print
    ) -> None:
        self.num_groups, self.seed = num_groups, seed
        self._file = Lines(path, last_step, say) if num_groups or path.exists() else None
        self._kept: dict[int, list[tuple[int, int, dict[str, Any]]]] = {}  # by outcome: a heap, last in line on top

    def offer(self, step: int, group: Group, counts: tuple[int, int], texts: Sequence[str]) -> None:
        """Keeps the group for now if it is among the first of its outcome; counts: solved and scored."""
        heap = self._kept.setdefault(outcome_of(*counts), [])
        entry = (-place_in_line(self.seed, step, group.prompt_id), group.index)
        if len(heap) < self.num_groups:
            heapq.heappush(heap, (*entry, described(group, texts)))
        elif heap and entry > heap[0][:2]:
            heapq.heapreplace(heap, (*entry, described(group, texts)))

    def write(self, step: int, prompts: PromptSet) -> None:
        """The step's lines, in the order of its prompts; then nothing is kept any more."""
        lines = {outcome: sorted(heap, reverse=True) for outcome, heap in self._kept.items()}
        self._kept = {}
        chosen: list[tuple[int, dict[str, Any]]] = []
        while any(lines.values()) and len(chosen) < self.num_groups:
            for outcome in OUTCOMES:
                if lines.get(outcome) and len(chosen) < self.num_groups:
                    chosen.append(lines[outcome].pop(0)[1:])
        if self._file is None:  # then nothing was kept
            return
        for index, known in sorted(chosen, key=lambda pair: pair[0]):
            prompt = prompts[index]
            asked = {"prompt": cut(prompt.text)[0], "answer": cut(as_text(prompt.answer))[0]}
            self._file.write({"step": step, "prompt_id": prompt.id} | asked | known)

    def close(self) -> None:
        if self._file:
            self._file.close()


def described(group: Group, texts: Sequence[str]) -> dict[str, Any]:
    """`policy_version` and `responses` of a line. num_left_out: characters missing from the middle of a text."""
    responses = []
    for text, rollout, score in zip(texts, group.rollouts, group.scores, strict=True):
        shown, num_left_out = cut(text)
        response = {
            "text": shown,
            "reward": None if score is None else float(score.reward),
            "correct": None if score is None else bool(score.correct),
            "num_tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
        }
        responses.append(response | ({"num_left_out": num_left_out} if num_left_out else {}))
    return {"policy_version": group.policy_version, "responses": responses}


def cut(text: str, max_chars: int = MAX_CHARS) -> tuple[str, int]:
    """The text, without its middle where it is longer than `max_chars`, and how many characters that were.

    More of the beginning stays than of the end, where the answer is.
    """
    num_left_out = len(text) - max_chars
    if num_left_out <= 0:
        return text, 0
    head = max_chars * 5 // 8
    return f"{text[:head]}\n[... {num_left_out:,} characters left out ...]\n{text[head + num_left_out :]}", num_left_out


def as_text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, default=str)


def outcome_of(num_solved: int, num_scored: int) -> int:
    if num_scored == 0:
        return UNSCORED
    return SOLVED if num_solved == num_scored else PARTIAL if num_solved else UNSOLVED


def place_in_line(seed: int, step: int, prompt_id: str) -> int:
    text = f"{seed}/{step}/{prompt_id}".encode(errors="backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
