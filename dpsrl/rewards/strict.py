r"""math-verify, loaded from its own source with two changes. Its public modules stay as they are.

It answers "wrong" to any exception, those among them that say that memory, the stack or the range of numbers
ran out: here these pass through, so that such a response is missing. And what stands inside \text{...} keeps
its letters alone: it becomes a sympy name, and sympy writes names into code that it compiles to sum a series.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from types import CodeType
from typing import Any

_EXHAUSTED = "(MemoryError, RecursionError, OverflowError)"
_LET_THROUGH = f"try:\n    pass\nexcept {_EXHAUSTED}:\n    raise\n"
_TEXT = re.compile(r"(\\[A-Za-z]*(?:text|mbox)[A-Za-z]*\s*\{)([^}]*)")  # the grammar ends it at the first brace
_NO_NAME = re.compile(r"[^\w\s,'+^/-]")  # no brackets, dots, colons: nothing that calls, looks up or assigns


class _LetThrough(ast.NodeTransformer):
    """Puts a handler that raises again before each one that takes any Exception."""

    def visit_Try(self, node: ast.Try) -> ast.Try:
        self.generic_visit(node)
        if any(isinstance(handler.type, ast.Name) and handler.type.id == "Exception" for handler in node.handlers):
            let_through: Any = ast.parse(_LET_THROUGH).body[0]
            node.handlers[:0] = let_through.handlers
        return node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # never from, or into, a .pyc file
        tree = _LetThrough().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


def _load(name: str) -> Any:
    """A second copy of math_verify.<name>, under a name of its own."""
    original: Any = find_spec(f"math_verify.{name}")
    path, own_name = original.origin, f"math_verify._strict_{name}"
    spec: Any = spec_from_file_location(own_name, path, loader=_Loader(own_name, path))
    module = sys.modules[own_name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_parser, _grader = _load("parser"), _load("grader")
_latex2sympy = _parser.latex2sympy
LatexExtractionConfig, parse, verify = _parser.LatexExtractionConfig, _parser.parse, _grader.verify


def names_only(latex: str) -> str:
    r"""The same LaTeX with nothing but letters, digits and , ' + ^ / - inside any \text{...}."""
    return _TEXT.sub(lambda found: found.group(1) + _NO_NAME.sub("", found.group(2)), latex)


def _latex2sympy_of_names(latex: str, **options: Any) -> Any:
    return _latex2sympy(names_only(latex), **options)


# The last place where it is text: what math-verify removes before this ($, quotes) can no longer join.
_parser.latex2sympy = _latex2sympy_of_names
