"""What an entry ends with after a user's mistake: one sentence, and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dpsrl.types import UserError


def code_of(
    program: str, action: Callable[[], int | None], mistakes: tuple[type[Exception], ...] = (UserError,)
) -> int:
    """What `action` returns, 0 for None; 2 after the sentence of one of `mistakes`."""
    try:
        return action() or 0
    except mistakes as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
