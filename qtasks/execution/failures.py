"""Exceptions as text for records and logs: one line, and the traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from functools import reduce
from types import FrameType, TracebackType
from typing import Any

from qtasks.signals import Reject

_MAX_TEXT = 64 * 1024
"""Characters of an error or traceback that a record keeps."""
_MAX_LOGGED = 1000


class RemoteError(Exception):
    """An exception in another process, with the text that it has there."""

    line = ""
    trace = ""
    retry_after: float | None = None
    """The seconds to wait that the exception asks for. Exceptions of some clients have this."""

    def __str__(self) -> str:
        return self.line


def remote_error(kinds: Iterable[tuple[str, str]], line: str, trace: str) -> RemoteError:
    """Return a `RemoteError` that is also an instance of the exception's class.

    `kinds` are the class and its bases, each as the pair of its module and its qualified name; the
    first that this process has imported counts. So `isinstance` works as with the exception
    itself. It has the text of the exception, and of its attributes only `retry_after`.
    """
    error = next(filter(None, (_of_kind(*kind) for kind in kinds)), None) or RemoteError()
    error.line, error.trace = line, trace
    return error


def _of_kind(module: str, qualname: str) -> RemoteError | None:
    try:
        # `getattr` would run the `__getattr__` of a module, which may import.
        kind: Any = reduce(
            lambda where, name: vars(where)[name], qualname.split("."), sys.modules[module]
        )
        if not issubclass(kind, Exception):
            return None
        both = type(kind.__name__, (RemoteError, kind), {"__module__": module})
        error: RemoteError = kind.__new__(both)  # its `__init__` may have parameters
    except Exception:  # noqa: BLE001  # not imported here, or its class cannot be derived from
        return None
    return error


def line_of(error: BaseException) -> str:
    """Return the type and the message of an exception, even if its `__str__` raises."""
    if isinstance(error, RemoteError):
        return error.line
    try:
        message = str(error)
    except Exception:  # noqa: BLE001  # raised by the user's own `__str__`
        message = "(its message cannot be made)"
    return storable(f"{type(error).__name__}: {message}")


def logged(text: str) -> str:
    """Return an error for one line of the log: without line breaks, and not too long."""
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LOGGED else f"{text[:_MAX_LOGGED]}…"


def trace_of(error: BaseException) -> str:
    """Return the traceback without the frames of the engine around the function's call.

    If a plugin has raised the error, it starts with the plugin.
    """
    if isinstance(error, RemoteError):
        return error.trace
    try:
        frames = _within_plugins(error.__traceback__)
        while frames is not None and frames.tb_next is not None and _is_engine(frames.tb_frame):
            frames = frames.tb_next
        text = "".join(traceback.format_exception(error.with_traceback(frames)))
    except Exception as failure:  # noqa: BLE001  # an exception may have attributes of any type
        text = f"(its traceback cannot be made: {type(failure).__name__})"
    return storable(text[-_MAX_TEXT:])


def reason_of(reject: Reject) -> str:
    """Return why a task is not to be tried again, even if the reason given is no text."""
    try:
        return storable(str(reject.reason))
    except Exception:  # noqa: BLE001  # raised by its own `__str__`
        return "(its reason cannot be made)"


def storable(text: str) -> str:
    """Return text that every storage takes: of bounded length, without lone surrogates."""
    return text[:_MAX_TEXT].encode(errors="backslashreplace").decode()


def _within_plugins(frames: TracebackType | None) -> TracebackType | None:
    """Return the frames from the innermost plugin's call on; all frames if there is none."""
    found = at = frames
    while at is not None:
        if _module_of(at.tb_frame) == "qtasks.execution.chain":
            found = at
        at = at.tb_next
    return found


def _is_engine(frame: FrameType) -> bool:
    return _module_of(frame).startswith("qtasks.")


def _module_of(frame: FrameType) -> str:
    module: str = frame.f_globals.get("__name__", "")
    return module
