"""The driver's errors as ours: what passes, what does not, and what calls for new connections."""

from __future__ import annotations

import re
from typing import Final, Literal, NoReturn

from qtasks_core.errors import ConfigurationError, Unavailable

Meaning = Literal["wrong", "elsewhere", "outage"]
"""Time does not mend it; look the name up anew; it passes."""

MEANINGS: Final[dict[str, Meaning]] = {
    "CROSSSLOT": "wrong",
    "DENIED": "wrong",
    "NOAUTH": "wrong",
    "NOPERM": "wrong",
    "NOPROTO": "wrong",
    "WRONGPASS": "wrong",
    "WRONGTYPE": "wrong",
    "ASK": "elsewhere",
    "CLUSTERDOWN": "elsewhere",
    "LOADING": "elsewhere",
    "MASTERDOWN": "elsewhere",
    "MOVED": "elsewhere",
    "READONLY": "elsewhere",
    "UNBLOCKED": "elsewhere",
    "BUSY": "outage",
    "EXECABORT": "outage",
    "MISCONF": "outage",
    "NOREPLICAS": "outage",
    "OOM": "outage",
    "TRYAGAIN": "outage",
}
"""By the code word with which the server begins an error. One that is not here passes.

NOSCRIPT is not an error: the script is sent again.
"""
_WRONG_TEXTS: Final = (
    "acl failure", "db index", "invalid db index", "select is not allowed", "syntax error",
    "the user executing the script can't", "this redis command is not allowed from",
    "unknown command", "unknown redis command", "unknown subcommand", "wrong number of arg",
)  # fmt: skip
"""Begins of errors whose code word is ERR, in small letters, that time does not mend."""
_CODES_CUT: Final = {
    "AskError": "ASK",
    "AuthenticationError": "WRONGPASS",
    "AuthorizationError": "NOPERM",
    "BusyLoadingError": "LOADING",
    "ClusterCrossSlotError": "CROSSSLOT",
    "ClusterDownError": "CLUSTERDOWN",
    "ExecAbortError": "EXECABORT",
    "MasterDownError": "MASTERDOWN",
    "MovedError": "MOVED",
    "NoPermissionError": "NOPERM",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "TryAgainError": "TRYAGAIN",
}
"""The driver's classes from whose text it has cut the code word."""
_BEFORE_THE_CODE: Final = re.compile(
    r"(?:ERR )?(?:Error running script \(call to \S+\): )?(?:@?user_script: ?\d+: )*-?"
)
"""Before Redis 7 an error within a script is quoted by another one."""


class Elsewhere(Unavailable):
    """The server is there, and is not the one to talk to any more."""


class Broken(Unavailable):
    """The driver failed in a way that leaves the state of its connections open."""


def meaning_of(error: Exception) -> Meaning:
    """Return what an error of the driver means. By its text only if a server has written that."""
    from redis.exceptions import ResponseError

    for kind in type(error).__mro__:
        if kind.__name__ in _CODES_CUT:
            return MEANINGS[_CODES_CUT[kind.__name__]]
    if not isinstance(error, ResponseError):
        return "outage"
    text = _BEFORE_THE_CODE.sub("", str(error), count=1)
    meaning = MEANINGS.get(text.partition(" ")[0])
    if meaning is not None:
        return meaning
    return "wrong" if text.lower().startswith(_WRONG_TEXTS) else "outage"


def raise_ours(error: Exception, where: str) -> NoReturn:
    """Raise `Unavailable` or `ConfigurationError` for an error that a call of the driver raised.

    As they are go `NoScriptError`, for which the script is sent, and what only a wrong argument
    brings about: a retry would not help, and to hide it would hide a fault of this package.
    """
    from redis import exceptions

    if isinstance(
        error, (exceptions.NoScriptError, exceptions.DataError, UnicodeEncodeError, MemoryError)
    ):
        raise error
    if not isinstance(error, (exceptions.RedisError, OSError)):
        raise Broken(f"{where}: the driver fails: {type(error).__name__}: {error}") from error
    meaning = meaning_of(error)
    if isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError)):
        raise ConfigurationError(f"{where} refuses the user or password: {error}") from None
    if isinstance(error, exceptions.NoPermissionError):
        raise ConfigurationError(f"{where}: the user's rights do not suffice: {error}") from None
    if meaning == "wrong":
        raise ConfigurationError(f"{where}: {error}") from None
    if meaning == "elsewhere":
        told = f"{type(error).__name__}: {error}"
        raise Elsewhere(f"{where} cannot work now: {told}") from error
    if isinstance(error, exceptions.ResponseError):
        raise Unavailable(f"{where} cannot work now: {error}") from error
    raise Unavailable(f"{where}: {str(error) or 'no answer in time'}") from error
