"""What a record says of an exception: a line and the traceback, both fit to be stored."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from functools import reduce
from types import FrameType, TracebackType
from typing import Any

_MAX_TEXT = 64 * 1024
"""Characters of an error or traceback that a record keeps."""


class RemoteError(Exception):
    """An exception in another process, as it was told of there."""

    line = ""
    trace = ""
    retry_after: float | None = None
    """The seconds to wait for which it asked, as exceptions of some clients do."""

    def __str__(self) -> str:
        return self.line


def remote_error(kinds: Iterable[tuple[str, str]], line: str, trace: str) -> RemoteError:
    """Return a `RemoteError` that is of the first of these classes known in this process too.

    A class is a pair of its module and its qualified name. So it is told apart by `isinstance` as
    the exception itself would be; of that it has the text, and no attribute
    but `retry_after`.
    """
    error = next(filter(None, (_of_kind(*kind) for kind in kinds)), None) or RemoteError()
    error.line, error.trace = line, trace
    return error


def _of_kind(module: str, qualname: str) -> RemoteError | None:
    try:
        kind: Any = reduce(getattr, qualname.split("."), sys.modules[module])
        if not issubclass(kind, Exception):
            return None
        both = type(kind.__name__, (RemoteError, kind), {"__module__": module})
        error: RemoteError = kind.__new__(both)  # its `__init__` may want what is not known
    except (KeyError, AttributeError, TypeError):
        return None  # not imported here, or it cannot be made without arguments
    return error


def line_of(error: BaseException) -> str:
    """Return an exception's type and message, of which the latter may fail to come about."""
    if isinstance(error, RemoteError):
        return error.line
    try:
        message = str(error)
    except Exception:  # noqa: BLE001  # raised by the user's own `__str__`
        message = "(its message cannot be made)"
    return storable(f"{type(error).__name__}: {message}")


def trace_of(error: BaseException) -> str:
    """Return the traceback from the task's own function on, without what is around its call.

    Of what a plugin raised, from the plugin on.
    """
    if isinstance(error, RemoteError):
        return error.trace
    frames = _within_plugins(error.__traceback__)
    while frames is not None and frames.tb_next is not None and _is_engine(frames.tb_frame):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(error.with_traceback(frames)))
    return storable(text[-_MAX_TEXT:])


def storable(text: str) -> str:
    """Return text that can be stored: of bounded length, without lone surrogates."""
    return text[:_MAX_TEXT].encode(errors="backslashreplace").decode()


def _within_plugins(frames: TracebackType | None) -> TracebackType | None:
    """Return the frames from the last on that composes plugins; all where there is none."""
    found = at = frames
    while at is not None:
        if _module_of(at.tb_frame) == "qtasks.engine.plugged":
            found = at
        at = at.tb_next
    return found


def _is_engine(frame: FrameType) -> bool:
    return _module_of(frame).startswith("qtasks.")


def _module_of(frame: FrameType) -> str:
    module: str = frame.f_globals.get("__name__", "")
    return module
