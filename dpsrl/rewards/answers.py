r"""The text side of the math reward: which answer a response gives, and the form to compare answers in.

Owns box finding, the cleaning of LaTeX and of units, and the splitting of lists and tuples. Strings and
regular expressions over capped lengths; knows nothing of sympy or of what a value is.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

MAX_ANSWER_CHARS = 1000  # of one answer, and of a response without a box and without "answer is"
MAX_RESPONSE_CHARS = 1 << 20  # what stands further from the end of a response is not read
MAX_TAIL_CHARS = 4096  # how far back "answer is" is looked for
MAX_BOXES = 16  # how many unclosed boxes are passed over
MAX_DEPTH = 32  # brackets in brackets: parsing time grows with a power of it
MAX_COMMAS = 64  # of an answer, where the reference has no more either

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=[^\s{])")
# Boxes joined by no more than this are one answer: "\boxed{2} and y = \boxed{3}".
_JOINED = re.compile(r"[\s$]*(?:,|;|,?\s*(?:and|or)\b)[\s$]*(?:[A-Za-z]\s*=[\s$]*)?", re.ASCII)
_STATED = re.compile(r"(?i)\banswer(?:\s+is|\s*[:=])[\s:*]*")
_LEAD_IN = re.compile(r"^.*(?:\b(?:is|are|equals|hence|thus|therefore|so)\b|[A-Za-z*]:)[\s,:*]*", re.I | re.S)
_MATH_FIRST = re.compile(r"(\$[^$]+\$|\\\(.+?\\\))(?!\s*(?:[,;]\s*(?:and|or)?|and|or)\s*[$\\\d-])")


def final_answers(response: str) -> list[str]:
    r"""What the response gives as its answer: readings of one statement, tried in turn; [] without any.

    The last closed \boxed{...}, wherever it stands (boxes joined by a comma, "and" or "or" are one
    answer, so that naming two is not two tries). Without a box: what follows the last "answer is" or
    "answer:"; failing that the whole response if it is short enough to be an answer. A long response that
    does neither, such as one cut off while thinking, has no answer.
    """
    response = response[-MAX_RESPONSE_CHARS:]
    boxed = _boxed(response)
    if boxed is not None:
        return [boxed] if len(boxed) <= MAX_ANSWER_CHARS else []
    tail = response[-MAX_TAIL_CHARS:]
    if "\\boxed" in tail:  # cut off inside it
        return []
    stated = list(_STATED.finditer(tail))
    if stated:
        statement = tail[stated[-1].end() :].split("\n\n", 1)[0]
    else:
        statement = response if len(response) <= MAX_ANSWER_CHARS else ""
    statement = statement.split("I hope", 1)[0].strip(" \t\r\n*")[:MAX_ANSWER_CHARS]
    if not statement:
        return []
    value = _LEAD_IN.sub("", statement)
    formula = _MATH_FIRST.match(value)  # "$5$, because ..." but not "$5$ or $6$"
    return [statement, formula.group(1) if formula else value]


def _boxed(response: str) -> str | None:
    """Content of the last closed box, or of the last run of joined boxes, with commas; None without."""
    contents: list[str] = []
    start = len(response)
    for _ in range(MAX_BOXES):
        position = max(response.rfind("\\boxed", 0, start), response.rfind("\\fbox", 0, start))
        if position < 0:
            break
        box = _read_box(response, position)
        if box is not None:
            content, end = box
            if contents and (start - end > 40 or not _JOINED.fullmatch(response, end, start)):
                break
            if content not in contents:
                contents.insert(0, content)
        elif contents:
            break
        start = position
    return ", ".join(contents) if contents else None


def _read_box(text: str, position: int) -> tuple[str, int] | None:
    r"""(content, end) of the box that opens at `position`; None if it is empty, unclosed or too long."""
    opened = _BOX.match(text, position)
    if opened is None:
        return None
    start = opened.end()
    if text[start] != "{":  # \boxed 5
        word = re.compile(r"[^\s$]+").match(text, start)
        return (word.group()[:MAX_ANSWER_CHARS].rstrip(".,"), word.end()) if word else None
    depth = 0
    for end in range(start, min(len(text), start + MAX_ANSWER_CHARS + 2)):
        if text[end] in "{}" and text[end - 1] != "\\":
            depth += 1 if text[end] == "{" else -1
            if depth == 0:
                content = text[start + 1 : end].strip()
                return (content, end + 1) if content else None
    return None


def accepted_answers(answer: Any) -> list[str]:
    r"""The accepted spellings of a reference answer, itself or each item of a list, out of their \boxed{}."""
    if isinstance(answer, np.ndarray):  # what pandas makes of a list
        answer = list(answer.flat)
    listed = answer if isinstance(answer, list | tuple) else [answer]
    texts = [str(item).strip() for item in listed if isinstance(item, str | int | float | np.integer | np.floating)]
    return [boxed if (boxed := _boxed(text)) is not None else text for text in texts]


def is_scorable(answer: Any) -> bool:
    """Whether some response could be right: an accepted spelling has a letter or digit and is not too long.

    No more is asked: an answer that is not mathematics is still compared as text.
    """
    if isinstance(answer, str) and answer.isalnum() and len(answer) <= MAX_ANSWER_CHARS:
        return True  # nothing to tidy: most answers of a large data set are whole numbers
    spellings = accepted_answers(answer)
    return any(len(text) <= MAX_ANSWER_CHARS and re.search(r"\w", tidy(text)) for text in spellings)


# ---- tidying ----

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "°": r"^\circ ", "π": r"\pi ", "∞": r"\infty "}
    | {"≤": r"\le ", "≥": r"\ge ", "√": r"\sqrt ", "∪": r"\cup ", "\u00a0": " "}
    | {"\n": " ", "\t": " ", "\r": " "}
)
_TIDY = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\{,\}|,\\!", ","),  # thousands: 1{,}000 and 1,\!000
        (r"\\\$|\$|(?<!\\)\\[()\[\]]", " "),  # dollars, and what only switches to mathematics
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"(?<!\\)\\[,!;:]|\\(?:displaystyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\ |~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:text(?:bf|it|rm|normal|sf|tt)|mbox|hbox|mathrm|mathbf|mathit|mathsf)\s*(?=\{)", r"\\text"),
        (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge"),
        (r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+", ", "),
        (r"\^\s*\{?\s*\\circ\s*\}?(?:\s*(?:\\text\{\s*)?[CF]\}?(?![a-zA-Z]))?|\\degree(?![a-zA-Z])", ""),
        (r"(?<=\d)\^\{\s*(?:\\prime\s*)+\}\s*$", ""),  # arc seconds
        (r"(?<![\w.])(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\times 10^{\2}"),
        (r"^[\s=:*]*(?:\\approx|\\sim)?\s*|[\s.,;:*]+$", ""),
    ]
]
_UNIT = re.compile(r"(?<=[\w})])(?:\s*\\text\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?)+$")
_WORDS = re.compile(r"\(?\s*\\text\s*\{(?!\s*-?\d)[^{}]*\}\s*\)?|[A-Z]{3,}")
_CLOCK = re.compile(r"\d[^a-z]*(?:text\s*\{)?\s*[ap]\.?\s*m\b")


def tidy(text: str) -> str:
    """The same answer without what only typesets it: delimiters, spacing, sizes, degrees, synonyms."""
    text = re.sub(r"\s+", " ", text.translate(_CHARACTERS))  # the patterns take long over long blanks
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


def without_unit(text: str) -> str:
    r"""A tidy answer without the \text{...} that closes it, where a value with a digit stands before it."""
    bare = _UNIT.sub("", text).rstrip(" .,")
    return bare if re.search(r"\d", bare) else text


def without_percent(text: str) -> str:
    r"""A tidy answer without the one percent sign that closes it; an answer with more of them stays as it is."""
    return re.sub(r"\s*\\?%$", "", text) if text.count("%") == 1 else text


def depth(text: str) -> int:
    """How deep brackets and braces of any kind stand in one another; closed or not."""
    deepest = level = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        deepest = max(deepest, level)
    return deepest


def canonical(text: str) -> str:
    """The key that equal spellings of a tidy answer share: no text command, space or braces for one sign.

    A space between digits stays: "1 1/2" is not "11/2".
    """
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\s*\d)", "", text)
    return re.sub(r"\{(\w)\}", r"\1", text)


def is_text(text: str) -> bool:
    r"""Whether a tidy answer is words and no mathematics: "\text{(E)}", "LQSX", "8:34 \text{ p.m.}"."""
    return _WORDS.fullmatch(text) is not None or _CLOCK.search(text) is not None


def text_key(text: str) -> str:
    r"""The key that equal text answers share, caseless: "\text{(E)}" -> "e", "two  Lines" -> "twolines"."""
    return re.sub(r"[^\w:,]", "", canonical(text)).casefold()


def split_list(text: str) -> list[str]:
    """Items between the commas and semicolons that stand outside all brackets; [text] without any."""
    items, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character in ",;" and depth <= 0:
            items.append(text[start:position])
            start = position + 1
    return [item.strip() for item in [*items, text[start:]] if item.strip()]


def brackets(text: str) -> tuple[str, str, str] | None:
    r"""(opening, inside, closing) of a tidy answer that one pair of ( [ or \{ encloses; None for others."""
    found = re.fullmatch(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", text)
    if found is None:
        return None
    depth = 0
    for character in found.group(2):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:  # (0,1) \cup (2,3)
            return None
    return found.group(1), found.group(2).rstrip("\\"), found.group(3)
