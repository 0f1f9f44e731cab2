"""What the explorer's data holds, read back without a browser, and what goes in where all would be too much."""

import base64
import json
import re
import zlib

import numpy as np
import pytest

from dpsrl.report.explorer import BINARY, kept_sentence, pack, read_kept
from dpsrl.report.history import read_history
from tests.made_run import kept_line, make_run, write_lines

NASTY = "</script><script>alert(1)</script>\0\ud800" + "é漢\U0001f600"


def unpacked(data):
    """name -> bytes of each element, and the number of groups."""
    found = re.findall(
        r'<script type="application/octet-stream" id="r0-(\w+)"(?: data-count="(\d+)")?>([^<]*)</script>', data
    )
    assert data.count("<script") == len(found)
    return {n: zlib.decompress(base64.b64decode(text)) for n, _, text in found}, int(found[0][1])


def columns_of(raw, count):
    columns, at = {}, 0
    for name, kind in BINARY:
        columns[name] = np.frombuffer(raw, kind, count, at)
        at += columns[name].nbytes
    assert at == len(raw)
    return columns


def test_groups_prompts_and_responses_come_back(tmp_path):
    run_dir = make_run(tmp_path / "run", num_steps=10)
    history, kept = read_history(run_dir / "groups.jsonl"), read_kept(run_dir / "responses.jsonl")
    parts, count = unpacked(pack(history, kept, "r0"))
    columns, prompts = columns_of(parts["groups"], count), json.loads(parts["prompts"])
    lines = [json.loads(line) for line in (run_dir / "groups.jsonl").read_text().splitlines()]
    assert count == len(lines)
    for column, name in (("step", "step"), ("version", "policy_version"), ("solved", "num_solved")):
        assert columns[column].tolist() == [line[name] for line in lines]
    assert [prompts["ids"][place] for place in columns["prompt"]] == [line["prompt_id"] for line in lines]
    assert columns["predicted"] / 10_000 == pytest.approx([line["predicted"] for line in lines], abs=5.1e-5)
    responses = [json.loads(line) for line in (run_dir / "responses.jsonl").read_text().splitlines()]
    assert len(prompts["kept"]) == len(responses)
    for (place, step, block, index), line in zip(prompts["kept"], responses):
        assert (prompts["ids"][place], step) == (line["prompt_id"], line["step"])
        shown = json.loads(parts[f"block{block}"])[index]
        assert [(r[0], r[1], r[2]) for r in shown] == [
            (r["text"], r["reward"], r["correct"]) for r in line["responses"]
        ]
    assert {prompts["ids"][p]: text for p, text, _ in prompts["texts"]} == {
        r["prompt_id"]: r["prompt"] for r in responses
    }


def test_hostile_texts_are_packed_whole_or_cut(tmp_path):
    run_dir = make_run(tmp_path / "run", num_steps=1)
    line = kept_line(1, 0, 4, 3)
    line["prompt_id"] = json.loads((run_dir / "groups.jsonl").read_text().splitlines()[0])["prompt_id"]
    line["prompt"] = line["answer"] = line["responses"][0]["text"] = NASTY
    line["responses"][1]["text"] = "x" * 1_000_000
    line["responses"][2] |= {"reward": float("nan"), "correct": None, "num_tokens": 10**400, "finish_reason": NASTY}
    write_lines(run_dir / "responses.jsonl", [line])
    kept = read_kept(run_dir / "responses.jsonl")
    data = pack(read_history(run_dir / "groups.jsonl"), kept, "r0")
    parts, _ = unpacked(data)
    (responses,) = json.loads(parts["block0"])
    assert responses[0][0] == NASTY and json.loads(parts["prompts"])["texts"][0][1:] == [NASTY, NASTY]
    assert len(responses[1][0]) < 9000 and responses[1][5] == 1_000_000 - 8000
    assert responses[2][1:4] == [None, None, None]
    assert data.isascii()


@pytest.mark.parametrize(
    "change",
    [{"prompt_id": 3}, {"prompt": None}, {"responses": None}, {"responses": ["x"]}, {"step": -1}, {"responses": [{}]},
     {"responses": [{"text": 3, "reward": 1, "correct": True, "num_tokens": 1, "finish_reason": "stop"}]}],
)  # fmt: skip
def test_lines_that_hold_no_responses_are_counted(tmp_path, change):
    write_lines(tmp_path / "responses.jsonl", [kept_line(1, 0, 4, 3), kept_line(1, 1, 4, 3) | change])
    kept = read_kept(tmp_path / "responses.jsonl")
    assert (len(kept.lines), kept.num_lines, kept.num_unreadable) == (1, 1, 1)


def test_what_is_too_much_is_left_out_prompt_by_prompt_and_said(tmp_path):
    run_dir = make_run(tmp_path / "run", num_steps=60, kept=5)
    history, path = read_history(run_dir / "groups.jsonl"), run_dir / "responses.jsonl"
    whole, part = read_kept(path), read_kept(path, max_bytes=60_000)
    assert len(whole.lines) == whole.num_lines == part.num_lines == 300 and 0 < len(part.lines) < 300
    by_prompt = {line["prompt_id"] for line in part.lines}
    assert part.lines == [line for line in whole.lines if line["prompt_id"] in by_prompt]
    assert len(json.dumps(part.lines)) < 70_000 and part == read_kept(path, max_bytes=60_000)
    assert f"{300 - len(part.lines)} of those groups are left out" in kept_sentence(history, part)
    assert "left out" not in kept_sentence(history, whole)
    assert "kept no responses" in kept_sentence(history, read_kept(tmp_path / "none.jsonl"))
