"""The names that apps, queues and tasks may have, and the text of uuids, addresses and keys.

All backends have the same alphabet, so no backend has to escape or refuse a name. Names are checked
where they enter: by the engine, and on the wire, where another program may have written them.
"""

from __future__ import annotations

import re
from functools import lru_cache

from qtasks_core.errors import ConfigurationError
from qtasks_core.schemas import LONGEST_ID

LONGEST_TASK_NAME = 200
"""Characters."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_UNFIT = re.compile("[\0\ud800-\udfff]")
"""NUL, which some servers cannot store, and lone surrogates, which UTF-8 cannot encode."""


@lru_cache(1024)
def is_name(text: str) -> bool:
    """Say whether an app or a queue may have this name.

    It has 1 to 100 of the characters A-Z, a-z, 0-9, `_`, `.` and `-`. It must not start with `.` or
    `-`.
    """
    return _NAME.fullmatch(text) is not None


def checked_name(text: str, of: str) -> str:
    """Return the name of an app or a queue.

    `of` says in the error what the name is for. Raises `ConfigurationError`.
    """
    if not is_name(text):
        raise ConfigurationError(
            f"{text[:120]!r} cannot be the name of {of}: "
            "write 1 to 100 of A-Z a-z 0-9 _ . -, and do not start with . or -"
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


def is_text(text: str) -> bool:
    """Say whether every server can store this text: it has no NUL and no lone surrogate."""
    return _UNFIT.search(text) is None


def is_id(text: str) -> bool:
    """Say whether this text may be a uuid, an address, a key or an owner.

    An inbox has an address. A value has a key. A claim has a key and an owner. All have 1 to 200
    characters of any script, without NUL and lone surrogates.
    """
    return 0 < len(text) <= LONGEST_ID and is_text(text)


def checked_id(text: str, of: str) -> str:
    """Return a uuid, an address, a key or an owner.

    `of` says in the error what the text is for. Raises `ConfigurationError`.
    """
    if not isinstance(text, str) or not is_id(text):
        raise ConfigurationError(
            f"{ascii(text)[:120]} cannot be {of}: 1 to {LONGEST_ID} characters of any script, "
            "without NUL and lone surrogates"
        )
    return text
