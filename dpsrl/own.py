"""Parts of a user's own, named `my_module:name`: a reward, a data set, a selection method, a loss, a world.

Owns how they are found, whose arguments they take, and the sentence on what is wrong with them. What a part has to
return is checked where it is used.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from dpsrl.types import UserError

_WORD = r"[^\W\d]\w*"
_PATH = re.compile(rf"{_WORD}(\.{_WORD})*:{_WORD}")


def is_own(name: object) -> bool:
    """Whether it is written as `my_module:name`."""
    return isinstance(name, str) and _PATH.fullmatch(name) is not None


def has_own(config: object) -> bool:
    """Whether any of its values is so written."""
    if isinstance(config, (list, tuple)):
        return any(map(has_own, config))
    return any(map(has_own, vars(config).values())) if is_dataclass(config) else is_own(config)


def load_own(name: str, label: str) -> Any:
    """What `name` names in its module, which may lie in the working directory. label: what an error calls it.

    UserError where there is no such module, it fails on import, or has nothing of that name.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{label}: {module_name} needs {error.name}, which is not installed.") from error
        raise UserError(
            f"{label}: there is no module {error.name} in {os.getcwd()} or among installed packages; "
            "check the name, or start in its folder."
        ) from error
    except (Exception, SystemExit) as error:  # whatever a person's module does
        raise UserError(f"{label}: {module_name} failed on import with {told(error)}; mend it.") from error
    if attribute not in vars(module):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"did you mean '{near[0]}'" if near else "check the name"
        place = vars(module).get("__file__", "a part of Python")
        raise UserError(f"{label}: there is no {attribute} in {module_name} ({place}); {hint}.")
    return vars(module)[attribute]


def check_call(function: Any, label: str, num_arguments: int, expected: str) -> None:
    """UserError unless `function` takes that many arguments by place. expected: how it is to be written."""
    if not callable(function):
        raise UserError(f"{label} is {type(function).__name__}, which cannot be called; write it as {expected}.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C tell no signature
        return
    try:
        signature.bind(*range(num_arguments))
    except TypeError as error:
        raise UserError(f"{label} takes {signature} ({error}); write it as {expected}.") from error


def told(error: BaseException) -> str:
    """An error of a person's code in one printable line, with the last line of code that is not a library's."""
    text = printable(f"{type(error).__name__}: {error}")
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [(file, line) for file, line in places if "site-packages" not in file and not file.startswith("<")]
    return f"{text} ({Path(places[-1][0]).name}, line {places[-1][1]})" if places else text


def printable(text: str) -> str:
    return " ".join(text[:300].split()).encode("ascii", "backslashreplace").decode()
