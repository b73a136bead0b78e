"""Which names apps, queues and tasks may have, and which text may be a uuid, an address or a key.

One alphabet for all backends, so that no backend has to escape or refuse a name. It is checked
where names enter: by the engine, and on the wire, where another program may have written one.
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
"""NUL, which some servers cannot keep, and lone surrogates, which UTF-8 cannot encode."""


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


def is_text(text: str) -> bool:
    """Say whether every server can keep this text: it has no NUL and no lone surrogate."""
    return _UNFIT.search(text) is None


def is_id(text: str) -> bool:
    """Say whether this may be a uuid, the address of an inbox, or the key or owner of a value or
    a claim.

    1 to 200 characters of any script, without NUL and lone surrogates.
    """
    return 0 < len(text) <= LONGEST_ID and is_text(text)


def checked_id(text: str, of: str) -> str:
    """Return a uuid, an address, a key or an owner. Raises `ConfigurationError`; `of` names it."""
    if not isinstance(text, str) or not is_id(text):
        raise ConfigurationError(
            f"{ascii(text)[:120]} cannot be {of}: 1 to {LONGEST_ID} characters of any script, "
            "without NUL and lone surrogates"
        )
    return text
