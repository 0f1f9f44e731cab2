r"""Answers written against the checker: over a hundred by hand, in families, and any number from a seed.

None is equal to its reference. `BOMBS` are the families whose value cannot be had in seconds or gigabytes:
their reward must be missing. Payloads of INJECTION try to create the file named in CANARY.
"""

import random
from dataclasses import dataclass

CANARY = "dpsrl_canary"
REFERENCES = ["271", "0.337", r"\frac{22}{7}", r"\sqrt{11}", "x^2+3x-17", r"(-\infty, 13)", r"\text{(C)}"]
# The last two are compared by shape or as text, before anything is evaluated.
VALUES = REFERENCES[:5]
MEGABYTE = 1_000_000
BOMBS = {"towers", "factorials", "combinatorics", "huge matrices"}


@dataclass(frozen=True)
class Hostile:
    family: str
    response: str
    answer: str


def boxed(text: str) -> str:
    return f"Therefore \\boxed{{{text}}}."


def nested(opening: str, inside: str, closing: str, depth: int) -> str:
    return opening * depth + inside + closing * depth


_SIGH = "\udcff\udcfe"  # what errors="surrogateescape" makes of two bytes that are not UTF-8
_TOUCH = f"__import__('os').system('touch {CANARY}')"
_BOXED: dict[str, list[str]] = {
    "towers": ["9^{9^{9^{9}}}", r"7 \cdot 10^{10^{11}} + 1", r"\frac{1}{9^{9^{9^{9}}}} + 3"],
    "factorials": ["(10^9)!", "((9!)!)!", "5!!!"],
    "combinatorics": [r"\binom{1000000000}{500000000}", r"\Gamma(10000000000)", "(x+y+z+w+v)^{300}"],
    "huge matrices": [r"\operatorname{ones}(100000,100000)", r"\operatorname{eye}(1000000)"],
    "sums and products": [
        r"\sum_{k=1}^{1000000000} \frac{1}{k}", r"\sum_{k=1}^{10^9} k^k", r"\prod_{k=1}^{10^8} k",
        r"\sum_{n=0}^{\infty} \frac{f(1)^n}{n!}+1", r"\sum_{n=0}^{\infty} \frac{2^n}{n!}+1",
    ],
    "small powers": ["1e-999999999", "0.1^{100000}", "10^{400}", "10^{-400}"],
    "nested fractions": [
        nested(r"\frac{1}{1+", "x", "}", 60), nested(r"\frac{", "1", "}{2}", 80), nested(r"\sqrt{2+", "x", "}", 100),
        r"\frac" * 200, r"\frac1" * 150,
    ],
    "digits": [
        "9" * 990, "9" * 990 + ".5", "1" * 4400, "0." + "3" * 900, "1," * 400 + "1", "1" + " " * 900 + "1",
        r"\frac{" + "7" * 400 + "}{" + "9" * 400 + "}",
    ],
    "brackets": [
        nested("(", "1", ")", 200), nested("[", "1", "]", 490), nested(r"\{", "1", r"\}", 150), "(" * 900, ")" * 900,
        "(" * 33 + "x", nested("{", "5", "}", 300), "|" * 500,
    ],
    "sets and intervals": [
        r"\{" + ",".join(map(str, range(250))) + r"\}", ",".join(["1"] * 450), nested(r"\{1,", "2", r"\}", 40),
        r"(-\infty, 13)" + r"\cup(14,15)" * 60, "(1,2]" * 150, r"\pm " * 200,
        r"\begin{pmatrix}" + r"\\".join(["&".join("1234567890")] * 30) + r"\end{pmatrix}",
        r"\begin{pmatrix}" * 40,
    ],
    "units and percents": [
        "271" + r"\%" * 200 + "1", r"%" * 500, r"2\%71", r"27\%1\%", r"100 \cdot 271\%\%", r"	ext{cm}" * 12,
        r"27\text{ 1}", r"2.7e1" + r"\text{cm}^2" * 80, r"\$" * 300 + "5", r"3\text{37}\%",
    ],
    "boxes": [
        r"\boxed{" * 80, r"\boxed{1}" * 70, r"}\boxed{" * 60, r"5}}}}}\boxed{", r"\fbox{" * 100 + "271",
        r"\boxed{\boxed{\boxed{8}}", "",
    ],
    "regular expressions": [
        " " * 950 + "x", r"\text{ " * 120, r"\text{and }" * 90, "x_" * 450, "A" * 400 + "=", r"\ " * 450,
        "1" + "^\\circ" * 140 + "!", "( " * 20 + r"\," * 300, r"\\" * 480, ", and " * 160,
    ],
    "bytes": ["\x00" * 500, f"27\x001{_SIGH}", _SIGH * 300, "\u202e172", "\ud83d" + "9", "٢٧", "Ⅷ", "8\u0301" * 400],
    "signs": ["-" * 300 + "5", "+" * 900 + "5", "1" + "!" * 30, "=" * 700, "5=" * 300 + "6", "<" * 400],
    "injection": [
        _TOUCH, f"eval({_TOUCH!r})", f"(lambda: {_TOUCH})()", f"f'{{{_TOUCH}}}'", rf"\text{{{_TOUCH}}}",
        rf"\sum_{{n=0}}^{{\infty}} \frac{{(\text{{[{_TOUCH}]}})^n}}{{n!}}+1",
        rf"\operatorname{{{_TOUCH}}}(1)", rf"\te$xt{{exec[{_TOUCH}]}}(1)",
        rf"x_{{{_TOUCH}}}", rf"parse_expr({_TOUCH!r})", rf"Symbol('x').subs('x', {_TOUCH!r})",
        rf"\variable{{{_TOUCH}}}", f"open('{CANARY}','w')", rf"(\sum_{{n=0}}^{{\infty}} \text{{{_TOUCH}}}^n/n!, 5)",
    ],
}  # fmt: skip
_WHOLE: dict[str, list[str]] = {
    "a megabyte": ["9" * MEGABYTE, r"\boxed" * 150_000, r"\boxed{9" * 120_000, "answer is " * 100_000],
    "injection": [_TOUCH, f"The answer is {_TOUCH}", f"```python\n{_TOUCH}\n```"],
    "bytes": ["\x00" * MEGABYTE, _SIGH * 1000 + r"\boxed{8}", "The answer is \udc80\udc81."],
}


def hand_written() -> list[Hostile]:
    """Each with one of the references in turn; the bombs against values, which have to be compared."""
    plain = [(family, boxed(text)) for family, texts in _BOXED.items() for text in texts]
    plain += [(family, text) for family, texts in _WHOLE.items() for text in texts]
    found = []
    for number, (family, response) in enumerate(plain):
        references = VALUES if family in BOMBS else REFERENCES
        found.append(Hostile(family, response, references[number % len(references)]))
    return found


def generated(seed: int, count: int) -> list[Hostile]:
    """As many from a generator of its own; the same for the same seed."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        family, make = rng.choice(_GENERATORS)
        found.append(Hostile(family, make(rng), rng.choice(VALUES if family in BOMBS else REFERENCES)))
    return found


def _tower(rng: random.Random) -> str:
    tower = str(rng.randint(12, 99))
    for _ in range(rng.randint(3, 6)):
        tower = f"{rng.randint(7, 99)}^{{{tower}}}"
    return boxed(
        rng.choice([tower, rf"{tower} + {rng.randint(2, 9)}", rf"\frac{{{rng.randint(2, 9)}}}{{7}} + {tower}"])
    )


def _factorial(rng: random.Random) -> str:
    return boxed(rng.choice([f"({rng.randint(8, 30)}!)!!", f"{rng.randint(10**9, 10**10)}!"]))


def _nested(rng: random.Random) -> str:
    opening, closing = rng.choice(
        [("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\frac{1}{2+", "}"), (r"\sqrt{", "}"), (r"\left(", r"\right)")]
    )
    depth = rng.randint(33, 900 // (len(opening) + len(closing)))
    return boxed(nested(opening, rng.choice("xyz57"), closing, depth - rng.choice([0, 0, 1])))


def _repeated(rng: random.Random) -> str:
    piece = rng.choice(
        [r"\text{", "}", r"\%", "^", "_", r"\boxed{", ", ", r"\circ", "!", " ", "$", r"\\", "=", "1e9", "e"]
    )
    other = rng.choice(["", "x", "7", r"\frac"])
    text = (piece + other) * rng.randint(1, 900 // len(piece + other))
    return rng.choice([boxed(text), text, f"The answer is {text}"])


def _noise(rng: random.Random) -> str:
    """Pieces of LaTeX, Python and broken text in any order, as a fuzzer would."""
    pieces = [
        r"\frac{", "}", "{", "(", ")", "^", "_", "9" * 40, r"\sqrt", r"\text{", r"\left", "&", r"\\",
        r"\begin{pmatrix}", r"\sum_{k=1}^{", r"\int", "\x00", "\udcff", "%", "!", ",", "<", "=", "x", "7", r"\infty",
        r"\cup", ".", "'", '"',
    ]  # fmt: skip
    text = "".join(rng.choice(pieces) for _ in range(rng.randint(5, 60)))
    return rng.choice([boxed(text), rf"\boxed{{{text}", text])


def _bytes(rng: random.Random) -> str:
    """Random bytes, read as UTF-8 with what is not UTF-8 escaped to lone surrogates."""
    text = rng.randbytes(rng.choice([20, 400, 100_000])).decode("utf-8", "surrogateescape")
    return rng.choice([text, boxed(text)])


def _injection(rng: random.Random) -> str:
    payload = rng.choice([_TOUCH, f"open('{CANARY}','w').close()", f"[].append(exec({_TOUCH!r}))", f"print({_TOUCH})"])
    wrapper = rng.choice(
        ["{}", r"\text{{{}}}", r"\mathrm{{{}}}(3)", r"\operatorname{{{}}}", r"f({})", r"\sin({})", r"x_{{{}}}", r"{}!",
         r"\sum_{{n=0}}^{{\infty}} \frac{{(\mbox{{{}}})^n}}{{n!}}+2", r'\te"xt{{{}}}', r"\lim_{{x \to {}}} x"]
    )  # fmt: skip
    return boxed(wrapper.format(payload))


def _large(rng: random.Random) -> str:
    filler = rng.choice(["so ", "{", "}", "\\boxed{", "$", "9", "\n", "answer: "])
    return filler * (MEGABYTE // len(filler)) + rng.choice(["", boxed("8"), "\\boxed{8"])


def _thousands_of_items(rng: random.Random) -> str:
    items = ",".join(str(rng.randint(0, 99)) for _ in range(rng.randint(100, 330)))
    return boxed(rng.choice([items, rf"\{{{items}\}}", f"({items})", f"[{items}]"]))


# The bombs rarely: one costs its whole deadline and a new process.
_GENERATORS = [("towers", _tower), ("factorials", _factorial)] + 4 * [
    ("brackets", _nested),
    ("regular expressions", _repeated),
    ("noise", _noise),
    ("bytes", _bytes),
    ("injection", _injection),
    ("a megabyte", _large),
    ("sets and intervals", _thousands_of_items),
]
