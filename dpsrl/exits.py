"""What an entry ends with: 2 after one sentence on a user's mistake, 130 after Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dpsrl.types import UserError


def code_of(
    program: str, action: Callable[[], int | None], mistakes: tuple[type[Exception], ...] = (UserError,)
) -> int:
    """What `action` returns, 0 for None; 2 after the sentence of one of `mistakes`; 130 after Ctrl-C."""
    try:
        return action() or 0
    except mistakes as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; everything that was started has ended", file=sys.stderr)
        return 130
