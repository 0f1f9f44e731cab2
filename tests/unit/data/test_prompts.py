"""Ids that stay, prompts that are dropped, and tokens that are the chat template's."""

import numpy as np
import pytest

from dpsrl.config import PACKAGE_DIR
from dpsrl.data.build import load_tokenizer
from dpsrl.data.datasets import LoadReport, Row
from dpsrl.data.prompts import PromptSet, prompt_id
from dpsrl.types import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(PACKAGE_DIR / "assets/tiny"))


def build(tokenizer, texts, answers=None, limit=100, instruction="{problem}", is_scorable=None):
    answers = answers or ["0"] * len(texts)
    rows = [Row(text, answer, number) for number, (text, answer) in enumerate(zip(texts, answers), 1)]
    return PromptSet(rows, LoadReport("rows", len(rows)), tokenizer, instruction, limit, is_scorable)


def test_a_prompt_is_the_instruction_under_the_chat_template(tokenizer):
    prompts = build(tokenizer, ["Is {x} < 2?"], instruction="Q: {problem} in \\boxed{}.")
    prompt = prompts[0]
    text = tokenizer.decode(prompt.token_ids)
    assert "Q: Is {x} < 2? in \\boxed{}." in text and prompt.text == "Is {x} < 2?"
    message = [{"role": "user", "content": "Q: Is {x} < 2? in \\boxed{}."}]
    assert text == tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert prompt.token_ids.dtype == np.int32


def test_ids_depend_on_the_text_alone(tokenizer):
    texts = ["b?", "a?", "c\n  d?"]
    forward, backward = build(tokenizer, texts), build(tokenizer, texts[::-1])
    assert forward.ids.tolist() == backward.ids[::-1].tolist() and len(set(forward.ids.tolist())) == 3
    assert forward.content_hash == backward.content_hash
    assert prompt_id("c d?") == forward[2].id == prompt_id(" c\td? ") == f"{forward.ids[2]:016x}"
    assert build(tokenizer, texts, ["0", "1", "0"]).content_hash != forward.content_hash


def test_duplicates_are_dropped_and_conflicts_remarked_on(tokenizer):
    prompts = build(tokenizer, ["a?", "b?", "a ?", "a?", "b?"], ["1", "2", "9", "1", "3"])
    assert [prompt.text for prompt in (prompts[0], prompts[1], prompts[2])] == ["a?", "b?", "a ?"]
    assert prompts.report.dropped == {"duplicate": [4, 5]}
    assert "rows 2 and 5" in prompts.report.sentences()[1]


def test_the_limit_is_exact(tokenizer):
    texts = ["a" * 10, "a" * 11, "é" * 5, "é" * 6]  # a byte-level tokenizer: é has two tokens
    length = len(build(tokenizer, ["a" * 10])[0].token_ids)
    prompts = build(tokenizer, texts, limit=length)
    assert [prompts[index].text for index in range(len(prompts))] == ["a" * 10, "é" * 5]
    assert prompts.report.dropped == {f"longer than {length} tokens": [2, 4]}
    with pytest.raises(UserError, match="every prompt is longer than model.max_prompt_tokens=3"):
        build(tokenizer, texts, limit=3)


def test_only_texts_that_may_be_too_long_are_tokenized(tokenizer):
    class Counting:
        chat_template = tokenizer.chat_template
        num_calls = 0

        def apply_chat_template(self, *args, **kwargs):
            self.num_calls += 1
            return tokenizer.apply_chat_template(*args, **kwargs)

    counting = Counting()
    prompts = build(counting, ["a" * length for length in range(1, 200)], limit=10_000)
    assert (len(prompts), counting.num_calls) == (199, 1)  # the template alone
    assert prompts[-1].index == 198 and counting.num_calls == 2


def test_without_a_chat_template_the_text_is_the_prompt(tokenizer):
    class Plain:
        chat_template = None
        __call__ = staticmethod(tokenizer)

    assert build(Plain(), ["a?"])[0].token_ids.tolist() == tokenizer("a?")["input_ids"]


def test_answers_that_cannot_be_scored_are_dropped(tokenizer):
    prompts = build(tokenizer, ["a?", "b?"], ["$$", "3"], is_scorable=lambda answer: answer != "$$")
    assert [prompt.text for prompt in prompts] == ["b?"]
    assert prompts.report.dropped == {"with an answer that no response can match": [1]}
    with pytest.raises(UserError, match="no row can be used: rows: 1 row, 1 with an answer that no response"):
        build(tokenizer, ["a?"], is_scorable=lambda answer: False)


def test_mappings_and_lists_are_answers_too(tokenizer):
    answers = [{"numbers": [3, 5], "target": 15}, ["4", "four"]]
    prompts = build(tokenizer, ["a?", "b?"], answers)
    assert [prompt.answer for prompt in prompts] == answers
    reordered = [{"target": 15, "numbers": [3, 5]}, ["4", "four"]]
    assert build(tokenizer, ["a?", "b?"], reordered).content_hash == prompts.content_hash
