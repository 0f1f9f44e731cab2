"""The math reward against hand-made pairs: (response, reference) that mean the same, and that do not."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from dpsrl.rewards.answers import accepted_answers, final_answers, is_scorable
from dpsrl.rewards.math import score
from dpsrl.types import Score

SAME = [
    # numbers
    ("144", "144.0"), ("25", "025"), ("9.60", "9.6"), ("−5", "-5"), ("1,000", "1000"), (r"1{,}000", "1000"),
    ("1000", r"1,\!000"), (r"306956.63", r"\$306,\!956.63"), ("0.333333", r"\frac13"), ("3.5", r"3\frac12"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"), ("1/2", r"\frac12"), ("0.5", r"\frac{1}{2}"),
    (r"\frac{-1}{3}", "-1/3"),
    # scientific notation
    ("4.5e33", r"4.5 \times 10^{33}"), (r"4.5\cdot 10^{33}", "4.5e33"), ("17000", "1.70e4"),
    ("1e-5", r"10^{-5}"),
    # expressions
    ("(x+1)^2", "x^2+2x+1"), (r"2\sqrt2", r"\sqrt{8}"), (r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}"),
    (r"\left[P^{2/5}\right]^{5}", "P^2"),
    # names on one side
    ("5", "x=5"), ("x = 5", "5"), ("2x", "f(x)=2x"), ("n^2-n-1", r"$m_{\max }=n^{2}-n-1$"), ("9", "AB=9"),
    # percent, money, units, degrees
    ("10", r"10\%"), (r"10\%", "10"), ("0.1", r"10\%"), (r"10\%", "0.1"), ("62.5", "62.5%"), ("18", r"\$18"),
    (r"\$18.00", "18"), ("5", r"5\text{ cm}"), (r"5\,\mathrm{cm}", "5"), ("5 cm", r"5\text{ cm}"),
    ("2400", r"2400 \mbox{ cm}^2"), ("15000", "15000 \\text{ kcal m}^{-2} \\text{yr}^{-1}\n"),
    ("73°", r"73^\circ"), (r"73\text{ degrees}", r"73^{\circ}"), ("1950", "1950^\\circ C\n"),
    ("0.003", r"0.003^{\prime \prime}"), ("(6,235)", r"(6,235^\circ)"),
    # either side of an approximation
    (r"\frac{2}{3}", r"\$\dfrac23 \approx \$0.67"), ("0.67", r"\$\dfrac23 \approx \$0.67"),
    (r"56\%", r"0.56 = 56\%"), (r"\frac23 \approx 0.667", r"\frac23"), (r"\frac{47}{20}\approx 2.35", "2.35"),
    # tuples, intervals, sets, lists
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"(-\infty, 0)\cup\{1\}", r"$(-\infty, 0) \cup\{1\}$."),
    ("x<-5", r"(-\infty,-5)"), (r"[2,\infty)", r"x \geqslant 2"), (r"\{1,2\}", "2,1"), ("5, 1", "1,5"),
    (r"\pm 2", "2,-2"), ("4,2,3", r"2, 3, \text{ and } 4"), (r"-12 \text{ or } -2", r"-2 \text{ or } -12"),
    ("69,84", "$69$,$84$"), ("(4,5,7),(1,8,19),(2,7,13)", "$(1,8,19), (2,7,13), (4,5,7)$"),
    ("x, 2-x", "$f(x)=x$,$f(x)=2-x$"), ("1,2,5", r"1, 2 \text{ and } 5"),
    (r"\begin{pmatrix}0.5\\2\end{pmatrix}", r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}"),
    # bases
    ("12", "12_5"), ("12_{5}", "12_5"), ("A5", r"\text{A5}_{11}"), ("10_{10}", "10"),
    # text
    ("A", r"\text{(A)}"), ("(A)", r"\text{(A)}"), (r"\textbf{(A)}", r"\text{(A)}"), ("H", r"(\text{H})"),
    ("E, H", r"\text{H, E}"), ("friday", r"\text{Friday}"), ("Two lines", r"\text{two lines}"),
    ("8:34 pm", r"8\!:\!34 \text{ p.m.}"), ("MR = SRMC", "MR=SRMC\n"), ("m", "m\n"),
    # several accepted spellings
    ("0.02", ["0.01\n", "0.02\n"]), ("6630", ["6630.65\n", "6630\n"]),
    (r"\arcsin(10/13)", [r"\arcsin{\frac{1}{1.3}}", r"\arcsin{\frac{10}{13}}"]),
]  # fmt: skip

DIFFERENT = [
    ("", "0"), ("-5", "5"), ("1.0001", "1"), ("0.33", r"\frac13"), (r"\frac12", "2"), ("1 1/2", "11/2"),
    (r"\frac123", "4"), ("999999999999", "1000000000000"), ("0.0000001", "0"), ("10^{-19}", "10^{-18}"),
    ("2.26e-10", "8.2e-19"), ("0.1", "10"), ("100", "1"), ("5x", "5"), ("x", "y"), ("y=5", "x=5"),
    ("x>5", "x<5"),
    ("[0,1)", "(0,1)"), ("(0,1)", "[0,1]"), ("(2,1)", "(1,2)"), ("(1,2,3)", "(1,2)"), ("5,6", "5"),
    ("5", "5,6"),
    ("5 or 6", "5"), (r"\pm 5", "5"), ("x=3,5", "5"), (r"\{1,2,3\}", r"\{1,2\}"), ("135,108", "108,135,2"),
    (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("12_6", "12_5"), ("10_2", "10"), (r"5 \approx 6", "6"), ("1=2=3", "2"),
    ("B", r"\text{(A)}"), ("Monday", r"\text{Friday}"), ("ABCD", r"\text{CBAD}"), ("LXQS", "LQSX"),
    (r"\text{A, B}", r"\text{A, B, E}"), ("Kickball, Softball", r"\text{Softball, Kickball}"),
    ("8:34 a.m.", r"8\!:\!34 \text{ p.m.}"), ("0.03", ["0.01\n", "0.02\n"]),
]  # fmt: skip


@pytest.mark.parametrize("style", ["{}", "Therefore \\boxed{{{}}}."])
@pytest.mark.parametrize(("given", "answer"), SAME)
def test_right(given, answer, style):
    assert score(style.format(given), answer) == Score(1.0, True)


@pytest.mark.parametrize("style", ["{}", "Therefore \\boxed{{{}}}."])
@pytest.mark.parametrize(("given", "answer"), DIFFERENT)
def test_wrong(given, answer, style):
    assert score(style.format(given), answer) == Score(0.0, False)


@pytest.mark.parametrize("answer", [answer for _, answer in SAME])
def test_the_reference_itself_is_right(answer):
    spellings = answer if isinstance(answer, list) else [answer]
    for spelling in spellings:
        assert score(spelling, answer).correct
        assert score(f"so \\boxed{{{spelling}}}.", answer).correct


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"\boxed{2}, no, wait. \boxed{3}", "3", True),
        (r"\boxed{2}, no, wait. \boxed{3}", "2", False),
        (r"It is \boxed{2} or \boxed{3}.", "3", False),  # two boxes joined are one answer, not two tries
        (r"It is \boxed{2} and \boxed{3}.", "2,3", True),
        (r"$x=\boxed{2}$, $y=\boxed{3}$", "(2,3)", True),
        (r"\boxed{3}, so again \boxed{3}", "3", True),
        (r"\text{The answer is \boxed{5}}", "5", True),
        (r"\boxed{\boxed{5}}", "5", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\fbox{5} apples", "5", True),
        (r"\boxed 5.", "5", True),
        (r"\boxed{5", "5", False),  # cut off: it may have become 512
        (r"\boxed{4} and then \boxed{5", "4", True),
        (r"\boxed{}", "5", False),
        (r"<think>\boxed{3}</think> The answer is \boxed{5}", "5", True),
        (r"The answer is 7. \boxed{5}", "5", True),
        ("The answer is $5$.", "5", True),
        ("Final Answer: The final answer is $5$. I hope it is correct.", "5", True),
        ("**Answer:** 5", "5", True),
        (r"The answer is $5$, because $7 > 3$.", "5", True),
        (r"The answer is $5$ or $6$.", "5", False),
        ("The values are $1$ and $2$.", "1,2", True),
        ("So x = 5.", "5", True),
        ("thinking " * 1000 + "the answer is 5", "5", True),
        ("thinking " * 1000 + "so 5", "5", False),  # cut off while thinking: no answer was given
    ],
)
def test_which_part_of_a_response_is_judged(response, answer, correct):
    assert score(response, answer).correct is correct


@pytest.mark.parametrize(
    "response",
    ["", "\x00\ud800", "\\boxed" * 100_000, "\\boxed{" * 100_000, "{" * 100_000, "\\boxed{" + "(" * 90 + "}",
     r"\boxed{\frac{1}{0}}", r"\boxed{}}}{{\end{pmatrix}", "$" * 5000, "\\boxed{" + "9" * 5000 + "}"],
)  # fmt: skip
def test_broken_responses_are_wrong_and_raise_nothing(response):
    assert score(response, "5") == Score(0.0, False)


def test_a_megabyte_is_scored():  # for hours, if any step were quadratic in the response
    assert score("x" * 500_000 + r"\boxed{5}" + "{" * 500_000, "5").correct
    assert not score("{ \\boxed{" * 100_000, "5").correct


def test_works_off_the_main_thread_without_signals():
    results = []
    thread = threading.Thread(target=lambda: results.append(score(r"\boxed{2\sqrt2}", r"\sqrt{8}").correct))
    thread.start()
    thread.join()
    assert results == [True]


def test_final_answers_lists_readings_of_one_statement():
    assert final_answers(r"a \boxed{x} b") == ["x"]
    assert final_answers("The sum is 12.") == ["The sum is 12.", "12."]
    assert final_answers("x" * 2000) == []


def test_accepted_answers():
    assert accepted_answers(" 5\n") == ["5"]
    assert accepted_answers(["a\n", 2]) == ["a", "2"]
    assert accepted_answers(r"so \boxed{7}") == ["7"]
    assert accepted_answers(None) == []


@pytest.mark.parametrize("answer", ["5", r"\text{(A)}", ["", "2"], 0, r"\infty", "$221,$8$", "42" * 400])
def test_scorable(answer):
    assert is_scorable(answer)


@pytest.mark.parametrize("answer", [None, "", " \n", "$$", "?", [], [""], {"a": 1}, "1" * 2000])
def test_not_scorable(answer):
    assert not is_scorable(answer)


@pytest.mark.parametrize("kind", [int, float, np.int64, np.int32, np.float64, np.float32])
def test_a_number_as_the_reference(kind):
    for answer in (kind(5), [kind(7), kind(5)], np.array([7, 5], dtype=kind)):
        assert is_scorable(answer) and score(r"\boxed{5}", answer).correct and not score(r"\boxed{6}", answer).correct
    assert accepted_answers(np.float32(0.1)) == ["0.1"]


def test_the_text_side_does_not_import_sympy():
    code = "import sys, dpsrl.rewards, dpsrl.rewards.answers; print('sympy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
