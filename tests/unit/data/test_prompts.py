"""Ids that stay, prompts that are dropped, and tokens that are the chat template's."""

import numpy as np
import pytest

from dpsrl.config import PACKAGE_DIR
from dpsrl.data import prompts as prompts_module
from dpsrl.data.build import load_tokenizer
from dpsrl.data.datasets import LoadReport, Row
from dpsrl.data.prompts import PromptSet, difference, prompt_id
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


def test_the_content_hash_tells_every_change_and_no_order(tokenizer, monkeypatch):
    texts = [f"{i}+1?" for i in range(50)]
    answers = [str(i) if i % 3 else [str(i), "x"] for i in range(50)]
    content_hash = build(tokenizer, texts, answers).content_hash
    assert build(tokenizer, texts[::-1], answers[::-1]).content_hash == content_hash
    monkeypatch.setattr(prompts_module, "BATCH_ROWS", 7)
    assert build(tokenizer, texts, answers).content_hash == content_hash
    others = [
        (texts[:-1], answers[:-1]),
        ([*texts, "new?"], [*answers, "1"]),
        (["0 + 1?", *texts[1:]], answers),
        (["0+1? ", *texts[1:]], answers),  # the same id, and another text
        (texts, [["0"], *answers[1:]]),
        (texts, [*answers[:1], '"1"', *answers[2:]]),
        (texts, [answers[1], answers[0], *answers[2:]]),  # exchanged among themselves
        (texts, ['["0", "x"]', *answers[1:]]),  # text that reads like the list
    ]
    hashes = [build(tokenizer, *other).content_hash for other in others]
    assert len({content_hash, *hashes}) == 1 + len(others)
    dropped = build(tokenizer, [*texts, texts[0], "x" * 500], [*answers, answers[0], "1"], limit=200)
    assert dropped.content_hash == content_hash  # what is dropped is not hashed


def test_difference_counts_new_and_gone(tokenizer):
    saved, now = (build(tokenizer, texts).ids for texts in (["a?", "b?", "c?"], ["d?", "b?", "e?", "a?", "f?"]))
    assert difference(saved, now) == (3, 1) and difference(now, saved) == (1, 3)
    assert difference(saved, saved[::-1]) == (0, 0)
    assert difference(saved[:0], now) == (5, 0) and difference(np.r_[saved, saved], saved[:0]) == (0, 3)


def test_duplicates_and_hopeless_answers_count_as_bad_and_long_prompts_do_not(tokenizer):
    def prompts(max_bad_share, rows=("a?", "a?", "b?", "c?" * 200, "d?" * 200)):
        made = [Row(text, "$$" if text == "b?" else "1", number) for number, text in enumerate(rows, 1)]
        report = LoadReport("rows", len(made))
        return PromptSet(made, report, tokenizer, "{problem}", 100, lambda answer: answer != "$$",
                         max_bad_share=max_bad_share)  # fmt: skip

    assert len(prompts(0.4)) == 1
    with pytest.raises(UserError) as error:
        prompts(0.3)
    assert str(error.value) == (
        "rows: 5 rows, 1 duplicate (row 2), 1 with an answer that no response can match (row 3): 2 cannot be used, a "
        "larger share than data.max_bad_share=0.3: mend the data or raise data.max_bad_share"
    )


def test_a_remark_does_not_show_a_whole_book(tokenizer):
    prompts = build(tokenizer, ["a?", "a?"], ["1" * 100_000, "\n" * 100_000])
    assert max(map(len, prompts.report.sentences())) < 400
