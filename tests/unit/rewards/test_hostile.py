"""Rewards under attack: a hostile answer costs its deadline and nothing else, and is never right."""

import logging
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dpsrl.rewards import Scorer
from dpsrl.rewards.math import score
from dpsrl.rewards.strict import names_only
from dpsrl.rewards.worker import MEMORY_BYTES
from tests.unit.rewards.hostile import _TOUCH, BOMBS, CANARY, REFERENCES, generated, hand_written

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[3]

HONEST = [
    (r"so \boxed{\frac12}", "0.5", True),
    (r"so \boxed{0.51}", r"\frac12", False),
    (r"The answer is $5$.", "5", True),
    ("thinking " * 20_000 + r"\boxed{1{,}000}", "1000", True),
    ("thinking " * 20_000, "1000", False),
    (r"\boxed{2\sqrt2}", r"\sqrt{8}", True),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
    (r"\boxed{(x+1)^2}", "x^2+2x", False),
    (r"\boxed{(3,\frac{\pi}{2})}", r"(3,\pi/2)", True),
    (r"\boxed{-12 \text{ or } -2}", r"-2 \text{ or } -12", True),
    (r"\boxed{\text{(B)}}", r"\text{(A)}", False),
    (r"\boxed{10\%}", "0.1", True),
]


class Memory:
    """The most that one process of a Scorer had in memory, looked at fifty times a second."""

    def __init__(self, scorer):
        self.scorer, self.peak_bytes, self.done = scorer, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        while not self.done.wait(0.02):
            for pid in self.scorer.pids():
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                except OSError:
                    continue
                self.peak_bytes = max(self.peak_bytes, pages * os.sysconf("SC_PAGESIZE"))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc_info):
        self.done.set()
        self.thread.join()


def attack(hostile, seed, deadline_s, num_workers, folder):
    """Scores honest answers alone, then in batches with the hostile ones; all that must hold, held."""
    hint = f"seed {seed}"
    hostile = random.Random(seed).sample(hostile, len(hostile))
    honest = [(response, answer) for response, answer, _ in HONEST]
    with Scorer("math", num_workers, deadline_s) as scorer, Memory(scorer) as memory:
        alone = scorer.score(honest)
        assert [got.correct for got in alone] == [correct for *_, correct in HONEST]
        for begin in range(0, len(hostile), 50):
            some = hostile[begin : begin + 50]
            items = [(one.response, one.answer) for one in some]
            places = sorted(random.Random(seed).sample(range(len(items)), len(honest)), reverse=True)
            for place, item in zip(places, reversed(honest), strict=True):
                items.insert(place, item)
            inserted = {place + number for number, place in enumerate(reversed(places))}
            missing_before, begun = sum(scorer.missing.values()), time.monotonic()
            scores = scorer.score(items)
            # One process at a time, even so: each hostile answer its deadline, and a start of a process.
            assert time.monotonic() - begun < len(some) * (deadline_s + 2) + 60, hint
            assert [scores[place] for place in sorted(inserted)] == alone, hint
            rest = [score for place, score in enumerate(scores) if place not in inserted]
            assert sum(scorer.missing.values()) - missing_before == rest.count(None), hint
            for one, got in zip(some, rest, strict=True):
                assert got is None or not got.correct, (hint, one.family, one.response[:200], one.answer)
                if one.family in BOMBS:
                    assert got is None, (hint, one.family, one.response[:200], one.answer)
        assert scorer.slowest_s < deadline_s + 2, hint
        assert scorer.missing["invalid"] == 0
        assert len(scorer.pids()) == num_workers
    assert 0 < memory.peak_bytes < MEMORY_BYTES + (1 << 29)
    assert list(folder.iterdir()) == [], hint


def test_two_hundred_hostile_answers_among_honest_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed = random.randrange(2**32)
    hostile = hand_written() + generated(seed, 100)
    assert len(hostile) >= 200
    attack(hostile, seed, deadline_s=1.0, num_workers=4, folder=tmp_path)


@pytest.mark.slow
def test_many_more_hostile_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed = random.randrange(2**32)
    attack(generated(seed, 1000), seed, deadline_s=2.0, num_workers=2, folder=tmp_path)


def test_the_generator_is_its_seed():
    assert generated(7, 50) == generated(7, 50) != generated(8, 50)
    assert {one.family for one in generated(7, 1000)} >= {"towers", "noise", "bytes", "injection"}


def test_hostile_text_is_no_countdown_answer():
    answer = {"numbers": [3, 5, 7], "target": 15}
    items = [(one.response, answer) for one in hand_written() + generated(random.randrange(2**32), 100)]
    with Scorer("countdown", num_workers=2, deadline_s=5.0) as scorer:
        scores = scorer.score([("3+5+7", answer), *items, ("3+5+7", answer)])
    assert scores[0].correct and scores[-1].correct
    assert not any(got.correct for got in scores[1:-1])  # none is missing: this checker has bounds for all


# ---- nothing is evaluated as code ----


def in_a_process(code, folder):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_payload_does_what_it_says(tmp_path):
    in_a_process(_TOUCH, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CANARY]


def test_no_text_of_a_response_is_in_any_code_that_is_compiled(tmp_path):
    run = in_a_process(
        """
import random, sys
from dpsrl.rewards.math import score
from tests.unit.rewards.hostile import REFERENCES, generated, hand_written
compiled = []
sys.addaudithook(lambda event, args: compiled.append(str(args[0])) if event == "compile" else None)
answers = hand_written() + generated(random.randrange(2**32), 500)
for one in answers:
    if one.family == "injection":
        for reference in REFERENCES:
            score(one.response, reference)
assert score(r"\\boxed{\\sum_{n=0}^{\\infty} \\frac{2^n}{n!}}", "1+x^2") is not None
print(len(compiled), [code for code in compiled if "canary" in code or "touch" in code])
""",
        tmp_path,
    )
    num_compiled, found = run.stdout.split(maxsplit=1)
    assert int(num_compiled) > 0 and found.strip() == "[]", run.stderr  # the hook sees code, and none of it is theirs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("latex", "names"),
    [
        (r"5\text{ cm}", r"5\text{ cm}"),
        (r"\text{exit[7]}", r"\text{exit7}"),
        (r"\mbox{a.b(c)}+\textbf {x:=1}", r"\mbox{abc}+\textbf {x1}"),
        (r"\text{a\}b[0]}", r"\text{a}b[0]}"),  # what an escaped brace would have carried on is text no more
        (r"\text{a{exit()}", r"\text{aexit}"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_text_in_latex_is_a_name_and_nothing_else(latex, names):
    assert names_only(latex) == names


@pytest.mark.parametrize(
    "attempt",
    ["import os; os.system('touch x')", "open('x', 'w')", "import subprocess; subprocess.Popen(['touch', 'x'])",
     "import os; os.open('x', os.O_CREAT)", "import socket; socket.socket()", "import os; os.fork()"],
)  # fmt: skip
def test_a_built_in_reward_that_attempts_a_side_effect_ends_its_process(attempt, tmp_path):
    code = f"from dpsrl.rewards.worker import forbid_side_effects; forbid_side_effects()\n{attempt}\nprint('alive')"
    run = in_a_process(code, tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert "its process ends" in run.stderr
    assert list(tmp_path.iterdir()) == []


# ---- what runs out is missing, not wrong ----


def test_a_stack_that_ran_out_is_an_error_not_a_wrong_answer():
    with pytest.raises(RecursionError):
        score(r"\boxed{" + "-" * 600 + "5}", "6")


def test_memory_that_ran_out_is_missing(caplog):
    with caplog.at_level(logging.WARNING), Scorer("math", deadline_s=60.0) as scorer:
        item = (r"\boxed{\operatorname{zeros}(20000,20000)}", "271")
        assert scorer.score([(r"\boxed{5}", "5"), item, (r"\boxed{5}", "5")])[1] is None
        assert scorer.missing == {"timeout": 0, "crash": 1, "invalid": 0}
        assert scorer.num_replaced == 1  # not tried twice: the process said what it was
    assert "it ran out of memory" in caplog.text


@pytest.mark.slow
def test_no_clock_of_math_verify_decides_before_the_deadline():
    """Its own limits, five seconds to parse and five to compare, would make a hang a wrong answer."""
    with Scorer("math", num_workers=2, deadline_s=12.0) as scorer:
        slow_to_parse = r"\boxed{" + "(" * 32 + "x" + ")" * 32 + "}"
        assert all(scored.correct for scored in scorer.score([(r"\boxed{5}", "5")] * 2))  # its processes are up
        started = time.monotonic()
        (parsed,) = scorer.score([(slow_to_parse, "5")])
        assert parsed is None or time.monotonic() - started < 5.0  # a fast machine is through by then
        assert scorer.score([(r"\boxed{9^{9^{9^{9}}}}", "5")]) == [None]
        assert scorer.missing["timeout"] + scorer.missing["crash"] in (1, 2)  # the tower may run out of memory first


# ---- bounds ----


def test_bounds_leave_long_honest_answers_their_verdict():
    items = ",".join(str(number) for number in range(60))
    assert score("x" * (1 << 19) + rf"\boxed{{{items}}}" + "\n" * (1 << 19), items).correct
    assert score(rf"\boxed{{{','.join(reversed(items.split(',')))}}}", items).correct
    assert score(r"\boxed{" + "(" * 12 + "5" + ")" * 12 + "}", "5.0").correct
    many = ",".join(str(number) for number in range(100))  # more commas than most may have: the reference has them
    assert score(rf"\boxed{{{','.join(reversed(many.split(',')))}}}", many).correct
    deep = "(" * 40 + "x" + ")" * 40
    assert score(rf"\boxed{{{deep}}}", deep).correct


def test_beyond_the_bounds_a_response_is_wrong():
    assert not score(r"\boxed{5}" + "x" * (1 << 20), "5").correct
    assert not score(r"\boxed{" + "(" * 40 + "5" + ")" * 40 + "}", "5.0").correct
    assert not score(rf"\boxed{{{'5,' * 70}5}}", "5").correct


@pytest.mark.parametrize("trick", [r"27\%1", r"271\%\%", r"\%271\%", r"2\%7\%1\%"])
def test_percent_signs_are_not_to_be_strewn(trick):
    assert not score(rf"\boxed{{{trick}}}", REFERENCES[0]).correct
    assert score(r"\boxed{271\%}", REFERENCES[0]).correct


def test_long_blanks_take_no_time():  # for minutes, where a pattern was cubic in them
    begun = time.process_time()
    assert not score(r"\boxed{1" + " " * 990 + "1}", "12").correct
    assert time.process_time() - begun < 5
