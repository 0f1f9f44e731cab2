"""What the prompt explorer of a page needs, packed: columns, deflated, base64, decoded by the browser when asked for.

Owns which of the kept responses go into a page, so that a page stays within bounds, and the form of the data that
explorer.js reads.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsrl.metrics import Record, each_line
from dpsrl.plots import number
from dpsrl.report.history import MAX_COUNT, History
from dpsrl.responses import cut

MAX_BYTES = 12_000_000  # of responses in a page, before they are deflated to about a quarter
MAX_PROMPT_BYTES = 3_000_000  # of the prompts' texts, which are searched
BLOCK_BYTES = 250_000  # of responses decoded at a time
MAX_CHARS = 8000  # of a response; a run cuts them shorter itself
NO_CHANCE = 65_535  # a prediction that is not there; others count 1 / 10,000
BINARY = (("prompt", "<u4"), ("step", "<u4"), ("version", "<u4"), ("solved", "<u2"), ("rollouts", "<u2"),
          ("predicted", "<u2"), ("admitted", "<u1"))  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """The lines of responses.jsonl that go into a page, cut; how many there are in all, and could not be read."""

    lines: list[Record]
    num_lines: int
    num_unreadable: int


def read_kept(path: Path, max_bytes: int = MAX_BYTES) -> Kept:
    """Where all is too much, whole prompts are left out, the same ones each time. Empty where there is no file."""
    sizes: dict[str, int] = {}
    lines: list[Record] = []
    num_lines = num_unreadable = total = 0
    for line in shortened(path):
        if line is None:
            num_unreadable += 1
            continue
        size = num_chars(line)
        num_lines, total = num_lines + 1, total + size
        sizes[line["prompt_id"]] = sizes.get(line["prompt_id"], 0) + size
        if total <= max_bytes:
            lines.append(line)
    if total > max_bytes:
        chosen = prompts_within(sizes, max_bytes)
        lines = [line for line in shortened(path) if line is not None and line["prompt_id"] in chosen]
    return Kept(lines, num_lines, num_unreadable)


def prompts_within(sizes: dict[str, int], max_bytes: int) -> set[str]:
    """Prompts that fit together, drawn by a hash of their ids."""
    chosen, total = set(), 0
    for prompt_id in sorted(sizes, key=lambda name: (zlib.crc32(name.encode(errors="replace")), name)):
        if total + sizes[prompt_id] <= max_bytes:
            chosen.add(prompt_id)
            total += sizes[prompt_id]
    return chosen


def shortened(path: Path) -> Iterator[Record | None]:
    """Each line with its texts cut and its responses as lists; None for a line that is none of a group's responses."""
    for line in each_line(path) if path.exists() else ():
        try:
            yield None if line is None else as_kept(line)
        except (KeyError, TypeError, ValueError, AttributeError):
            yield None


def as_kept(line: Record) -> Record:
    """KeyError, TypeError, ValueError or AttributeError where it is none."""
    prompt_id, prompt, answer = line["prompt_id"], line["prompt"], line["answer"]
    if not all(isinstance(text, str) for text in (prompt_id, prompt, answer)) or not 0 <= line["step"] <= MAX_COUNT:
        raise ValueError
    responses = [as_list(response) for response in line["responses"]]
    return {"prompt_id": prompt_id, "step": line["step"], "prompt": prompt, "answer": answer, "responses": responses}


def as_list(response: dict[str, Any]) -> list[Any]:
    """[text, reward, correct, num_tokens, finish_reason, num_left_out]."""
    text, num_left_out = cut(response["text"], MAX_CHARS)
    before = number(response.get("num_left_out"), 0.0)
    correct = response["correct"]
    return [
        text,
        number(response["reward"]),
        bool(correct) if correct is not None else None,
        number(response["num_tokens"]),
        str(response["finish_reason"])[:40],
        int(before) + num_left_out,
    ]


def num_chars(line: Record) -> int:
    return 100 + sum(60 + len(response[0]) for response in line["responses"])


# --- the packed form ----------------------------------------------------------------------------------


def pack(history: History, kept: Kept, name: str) -> str:
    """The data of one run as <script> elements that hold no script: `name`-groups, `name`-prompts, `name`-block0 ..."""
    place_of = {prompt_id: place for place, prompt_id in enumerate(history.prompt_ids)}
    lines = [line for line in kept.lines if line["prompt_id"] in place_of]
    blocks, where = in_blocks(lines)
    texts = {place_of[line["prompt_id"]]: (line["prompt"], line["answer"]) for line in lines}
    max_chars = max(80, MAX_PROMPT_BYTES // max(1, 2 * len(texts)))
    prompts = {
        "ids": history.prompt_ids,
        "texts": [[place, *(cut(text, max_chars)[0] for text in pair)] for place, pair in texts.items()],
        "kept": [[place_of[line["prompt_id"]], line["step"], *at] for line, at in zip(lines, where, strict=True)],
    }
    parts = {"groups": columns(history), "prompts": as_json(prompts)}
    parts |= {f"block{index}": as_json(block) for index, block in enumerate(blocks)}
    elements = []
    for part, raw in parts.items():
        data = base64.b64encode(zlib.compress(raw, 6)).decode()
        count = f' data-count="{len(history)}"' if part == "groups" else ""
        elements.append(f'<script type="application/octet-stream" id="{name}-{part}"{count}>{data}</script>')
    return "\n".join(elements)


def columns(history: History) -> bytes:
    """One column after the other, as BINARY lists them."""
    chance_G = np.where(np.isfinite(history.predicted_G), history.predicted_G, 0.0)
    predicted_G = np.where(np.isfinite(history.predicted_G), np.rint(chance_G * 10_000), NO_CHANCE)
    most = np.iinfo(np.uint16).max
    values = (
        history.prompt_G, history.step_G, history.version_G, np.minimum(history.num_solved_G, most),
        np.minimum(history.num_rollouts_G, most), predicted_G, history.admitted_G,
    )  # fmt: skip
    return b"".join(column.astype(kind).tobytes() for column, (_, kind) in zip(values, BINARY, strict=True))


def in_blocks(lines: Sequence[Record]) -> tuple[list[list[Any]], list[tuple[int, int]]]:
    """The responses of all lines in blocks, and for each line its block and place."""
    blocks: list[list[Any]] = []
    where, size = [], BLOCK_BYTES
    for line in lines:
        if size >= BLOCK_BYTES:
            blocks.append([])
            size = 0
        where.append((len(blocks) - 1, len(blocks[-1])))
        blocks[-1].append(line["responses"])
        size += num_chars(line)
    return blocks, where


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def kept_sentence(history: History, kept: Kept) -> str:
    """What the explorer has texts of, and what it lacks."""
    if not kept.num_lines:
        return "This run kept no responses (log.responses), so that prompts can be searched by id alone."
    known = {line["prompt_id"] for line in kept.lines}
    left_out = kept.num_lines - len(kept.lines)
    sentence = (
        f"The run kept the responses of {kept.num_lines:,} of its {len(history):,} groups (log.responses per step); "
        f"texts of {len(known):,} of {len(history.prompt_ids):,} prompts can be searched, the others by id."
    )
    return sentence + (f" {left_out:,} of those groups are left out to keep this page small." if left_out else "")
