"""Answers of the I/O thread: to a future of any loop, or to a thread that blocks."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from threading import TIMEOUT_MAX, Event, Lock
from typing import Any, Generic, TypeVar

from qtasks.bridge.entry_queue import EntryQueue

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
_Answer = tuple["asyncio.Future[Any]", Any, BaseException | None]


class Reply(ABC, Generic[T]):
    """Where the answer to one question goes; whichever of `set` and `fail` comes first counts."""

    durable = False
    """Asked with a submission whose end is waited for: its write is confirmed."""
    trouble = "no answer yet"
    """Why it is not."""
    wanted = True
    """False: whoever asked has left."""

    @abstractmethod
    def set(self, value: T) -> None:
        """Answer."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Answer with an error, raised at the asker."""


class LoopReply(Reply[T]):
    """To a future of the running loop; all answers of a moment wake that loop once."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = loop.create_future()
        self._answers = _answers_of(loop)

    def set(self, value: T) -> None:
        self._post((self.future, value, None))

    def fail(self, error: BaseException) -> None:
        self._post((self.future, None, error))

    def _post(self, answer: _Answer) -> None:
        try:
            self._answers.post(answer)
        except RuntimeError:
            # The asker's loop was closed; nobody is left to be told.
            return


class ThreadReply(Reply[T]):
    """To a thread that waits in `result`."""

    def __init__(self) -> None:
        self._answered = Event()
        self._value: T | None = None
        self._error: BaseException | None = None

    def set(self, value: T) -> None:
        if not self._answered.is_set():
            self._value = value
            self._answered.set()

    def fail(self, error: BaseException) -> None:
        if not self._answered.is_set():
            self._error = error
            self._answered.set()

    def result(self, timeout: float | None) -> T:
        """Block until there is an answer. Raises it, or `TimeoutError` after `timeout` seconds."""
        if not self._answered.wait(timeout if timeout is None else min(timeout, TIMEOUT_MAX)):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # T may be None


def anew(error: E) -> E:
    """Return the same error as another object: each asker raises one of its own.

    One that is raised in several places would gather the tracebacks of them all.
    """
    kind = type(error)
    fresh = kind.__new__(kind, *error.args)
    fresh.args = error.args
    fresh.__dict__.update(error.__dict__)
    fresh.__cause__ = error.__cause__
    fresh.__suppress_context__ = error.__suppress_context__
    return fresh.with_traceback(error.__traceback__)


_entry_queues: dict[asyncio.AbstractEventLoop, EntryQueue[_Answer]] = {}
_lock = Lock()


def _answers_of(loop: asyncio.AbstractEventLoop) -> EntryQueue[_Answer]:
    queue = _entry_queues.get(loop)
    return queue if queue is not None else _open_queue(loop)


def _open_queue(loop: asyncio.AbstractEventLoop) -> EntryQueue[_Answer]:
    """Make the entry queue of a new loop, and forget those of loops that were closed."""
    with _lock:
        for old in [known for known in _entry_queues if known.is_closed()]:
            del _entry_queues[old]
        return _entry_queues.setdefault(loop, EntryQueue(loop, _resolve))


def _begin_anew_in_child() -> None:
    # Another thread may have held a lock at the fork, that of an entry queue too: it is not there.
    global _lock
    _lock = Lock()
    _entry_queues.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew_in_child)


def _resolve(answers: list[_Answer]) -> None:
    for future, value, error in answers:
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
