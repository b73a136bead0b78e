"""Translates the driver's errors: temporary, lasting, or a reason for new connections."""

from __future__ import annotations

import re
from typing import Final, Literal, NoReturn

from qtasks_core.errors import ConfigurationError, Unavailable

Meaning = Literal["wrong", "elsewhere", "outage"]
"""`wrong`: a retry does not help. `elsewhere`: resolve the host name again. `outage`: it passes."""

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
"""Meanings by the error code with which the server starts an error. All other codes pass.

NOSCRIPT is not an error: the script is sent again.
"""
ADVICE: Final = {
    "MISCONF": "see the server's log: it cannot write to its disk",
    "NOREPLICAS": "start the replicas that min-replicas-to-write asks for",
    "OOM": "raise maxmemory, or keep records for a shorter time (retention)",
    "READONLY": "the URL leads to a replica: name the primary, or the Sentinels that know it",
}
"""What to do about an error that passes, by its code. Waiting does not help with these."""
_WRONG_TEXTS: Final = (
    "acl failure", "db index", "invalid db index", "select is not allowed", "syntax error",
    "this instance has cluster support disabled",
    "the user executing the script can't", "this redis command is not allowed from",
    "unknown command", "unknown redis command", "unknown subcommand", "wrong number of arg",
)  # fmt: skip
"""Starts of lasting errors whose code is ERR, in lower case."""
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
"""Classes of the driver that cut the error code from the text, and that code."""
_BEFORE_THE_CODE: Final = re.compile(
    r"(?:ERR )?(?:Error running script \(call to \S+\): )?(?:@?user_script: ?\d+: )*-?"
)
"""The prefix of an error from a script. Servers before Redis 7 wrap it in another error."""


class Elsewhere(Unavailable):
    """The server is alive, but we must now use another one."""


class Broken(Unavailable):
    """The driver failed and left its connections in an unknown state."""


def meaning_of(error: Exception) -> Meaning:
    """Return the meaning of a driver error. The text counts only if the server wrote it."""
    code, text = _code_and_text(error)
    meaning = MEANINGS.get(code)
    if meaning is not None:
        return meaning
    return "wrong" if text.lower().startswith(_WRONG_TEXTS) else "outage"


def _code_and_text(error: Exception) -> tuple[str, str]:
    """Return the code with which the server starts its error, and its text. Else empty texts."""
    from redis.exceptions import ResponseError

    for kind in type(error).__mro__:
        if kind.__name__ in _CODES_CUT:
            return _CODES_CUT[kind.__name__], str(error)
    if not isinstance(error, ResponseError):
        return "", ""
    text = _BEFORE_THE_CODE.sub("", str(error), count=1)
    return text.partition(" ")[0], text


def raise_ours(error: Exception, where: str) -> NoReturn:
    """Raise `Unavailable` or `ConfigurationError` for an error that a call of the driver raised.

    Two kinds of errors are raised unchanged. After `NoScriptError` the caller sends the script.
    Errors that only a wrong argument can cause show a bug of this package: a retry would not help,
    and a translation would hide the bug.
    """
    from redis import exceptions

    if isinstance(
        error, (exceptions.NoScriptError, exceptions.DataError, UnicodeEncodeError, MemoryError)
    ):
        raise error
    if not isinstance(error, (exceptions.RedisError, OSError)):
        raise Broken(f"{where}: the driver fails: {type(error).__name__}: {error}") from error
    meaning = meaning_of(error)
    code, text = _code_and_text(error)
    if isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError)):
        raise ConfigurationError(
            f"{where} refuses the user or password: {error} (check both in the URL)"
        ) from None
    if isinstance(error, exceptions.NoPermissionError):
        raise ConfigurationError(
            f"{where}: the user's rights do not suffice: {error} (docs/rights.md lists them)"
        ) from None
    if "db index" in text.lower():
        raise ConfigurationError(
            f"{where}: {error} (name another database in the URL, or raise `databases` in the "
            "server's configuration)"
        ) from None
    if meaning == "wrong":
        raise ConfigurationError(f"{where}: {error}") from None
    todo = f" ({ADVICE[code]})" if code in ADVICE else ""
    if meaning == "elsewhere":
        told = f"{type(error).__name__}: {error}"
        raise Elsewhere(f"{where} cannot work now: {told}{todo}") from error
    if isinstance(error, exceptions.ResponseError):
        raise Unavailable(f"{where} cannot work now: {error}{todo}") from error
    raise Unavailable(f"{where}: {str(error) or 'no answer in time'}") from error
