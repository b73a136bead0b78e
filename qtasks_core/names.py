"""Which names apps, queues and tasks may have.

One alphabet for all backends, so that no backend has to escape or refuse a name. It is checked
where names enter: by the engine, and on the wire, where another program may have written one.
"""

from __future__ import annotations

import re
from functools import lru_cache

from qtasks_core.errors import ConfigurationError

LONGEST_TASK_NAME = 200
"""Characters."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@lru_cache(1024)
def is_name(text: str) -> bool:
    """Say whether an app or a queue may have this name.

    1 to 100 of the characters A-Z, a-z, 0-9, `_`, `.` and `-`, of which the last two do not begin.
    """
    return _NAME.fullmatch(text) is not None


def checked_name(text: str, of: str) -> str:
    """Return the name of an app or a queue. Raises `ConfigurationError`; `of` says of what."""
    if not is_name(text):
        raise ConfigurationError(
            f"{text[:120]!r} cannot be the name of {of}: "
            "1 to 100 of A-Z a-z 0-9 _ . - that begin with none of the last two"
        )
    return text


def checked_task_name(text: str) -> str:
    """Return the name of a task: 1 to 200 printable characters. Raises `ConfigurationError`."""
    if not 0 < len(text) <= LONGEST_TASK_NAME or not text.isprintable():
        raise ConfigurationError(
            f"{text[:120]!r} cannot be the name of a task: give it name= with "
            f"1 to {LONGEST_TASK_NAME} printable characters"
        )
    return text
