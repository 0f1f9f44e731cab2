"""responses.jsonl: which groups are kept, how texts are cut, and what resuming and a full disk do."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dpsrl.responses import ResponseLog, cut
from dpsrl.types import Group, Prompt, Rollout, Score


class Prompts:
    """Stands for a PromptSet: prompt 7 asks "ask 7", and its answer is no text."""

    def __getitem__(self, index):
        return Prompt(index, f"id{index}", np.zeros(1, np.int32), f"ask {index}", {"target": index})


def group(index, num_solved, num_rollouts=4):
    rollouts = [Rollout(np.arange(3), np.zeros(3), "stop", [(2, 3)]) for _ in range(num_rollouts)]
    scores = [Score(float(i < num_solved), i < num_solved) for i in range(num_rollouts)]
    return Group(index, f"id{index}", np.zeros(1, np.int32), rollouts, scores)


def offer(log, step, index, num_solved, text="why"):
    g = group(index, num_solved)
    log.offer(step, g, (g.num_solved, g.num_scored), [text] * 4)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_what_was_asked_and_answered(tmp_path):
    log = ResponseLog(tmp_path / "responses.jsonl", 8, seed=0)
    g = group(7, 1, num_rollouts=2)
    g.scores[1] = None
    log.offer(3, g, (1, 1), ["a</script>\0", "b"])
    log.write(3, Prompts())
    common = {"num_tokens": 3, "finish_reason": "stop"}
    assert lines_of(tmp_path / "responses.jsonl") == [
        {
            "step": 3, "prompt_id": "id7", "prompt": "ask 7", "answer": '{"target": 7}', "policy_version": 2,
            "responses": [
                {"text": "a</script>\0", "reward": 1.0, "correct": True, **common},
                {"text": "b", "reward": None, "correct": None, **common},
            ],
        }
    ]  # fmt: skip


def test_the_choice_is_the_same_in_any_order_and_spread_over_outcomes(tmp_path):
    groups = [(index, 4 if index < 40 else 0 if index < 60 else 2) for index in range(62)]
    chosen = []
    for order in range(3):
        random.Random(order).shuffle(groups)
        log = ResponseLog(tmp_path / f"{order}.jsonl", 8, seed=5)
        for index, num_solved in groups:
            offer(log, 1, index, num_solved)
        log.write(1, Prompts())
        chosen.append([int(line["prompt_id"][2:]) for line in lines_of(tmp_path / f"{order}.jsonl")])
    assert chosen[0] == chosen[1] == chosen[2] == sorted(chosen[0])
    solved, unsolved, mixed = (sum(low <= i < high for i in chosen[0]) for low, high in ((0, 40), (40, 60), (60, 62)))
    assert (mixed, unsolved, solved) == (2, 3, 3)


def test_steps_and_seeds_keep_different_groups_and_all_are_as_likely(tmp_path):
    counts = np.zeros(20)
    for seed in range(200):
        log = ResponseLog(tmp_path / "responses.jsonl", 5, seed)
        for index in range(20):
            offer(log, 1, index, 2)
        log.write(1, Prompts())
        counts[[int(line["prompt_id"][2:]) for line in lines_of(tmp_path / "responses.jsonl")]] += 1
    assert counts.sum() == 1000 and abs(counts - 50).max() < 4.5 * np.sqrt(200 * 0.25 * 0.75)


@pytest.mark.parametrize("num_groups", [0, 1, 3])
def test_no_more_than_asked_for(tmp_path, num_groups):
    path = tmp_path / "responses.jsonl"
    log = ResponseLog(path, num_groups, seed=0)
    for step in (1, 2):
        for index in range(10):
            offer(log, step, index, index % 5)
        log.write(step, Prompts())
    assert path.exists() == (num_groups > 0)
    assert [line["step"] for line in lines_of(path)] == [1] * num_groups + [2] * num_groups if num_groups else True


def test_a_resumed_run_holds_each_step_once(tmp_path):
    path = tmp_path / "responses.jsonl"
    for last_step, steps in ((-1, (1, 2, 3)), (1, (2, 3))):
        log = ResponseLog(path, 2, seed=0, last_step=last_step)
        for step in steps:
            offer(log, step, step, 2, text=f"from {last_step}")
            log.write(step, Prompts())
        log.close()
    texts = [(line["step"], line["responses"][0]["text"]) for line in lines_of(path)]
    assert texts == [(1, "from -1"), (2, "from 1"), (3, "from 1")]
    ResponseLog(path, 0, seed=0, last_step=2).close()
    assert [line["step"] for line in lines_of(path)] == [1, 2]


def test_a_long_text_loses_its_middle_and_says_so(tmp_path):
    text = "".join(f"{n:06d}" for n in range(200_000))
    shown, num_left_out = cut(text)
    head, mark, tail = shown.split("\n")
    assert text.startswith(head) and text.endswith(tail) and len(head) + len(tail) == 4000
    assert num_left_out == len(text) - 4000 and mark == f"[... {num_left_out:,} characters left out ...]"
    assert cut("x" * 4000) == ("x" * 4000, 0)
    log = ResponseLog(tmp_path / "responses.jsonl", 1, seed=0)
    offer(log, 1, 1, 2, text=text)
    log.write(1, Prompts())
    (line,) = lines_of(tmp_path / "responses.jsonl")
    assert line["responses"][0]["text"] == shown and line["responses"][0]["num_left_out"] == num_left_out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_lines_and_is_said_once(tmp_path):
    said = []
    log = ResponseLog(tmp_path / "responses.jsonl", 2, seed=0, say=said.append)
    log._file._file = open("/dev/full", "ab", buffering=0)
    for step in (1, 2):
        offer(log, step, 1, 2)
        log.write(step, Prompts())
    assert len(said) == 1 and "cannot be written (No space left on device)" in said[0]
