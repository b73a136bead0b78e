"""Answers of the I/O thread: to a future of any loop, or to a thread that blocks."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from threading import Event
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from qtasks.engine.mailbox import Mailbox

T = TypeVar("T")
_Answer = tuple["asyncio.Future[Any]", Any, BaseException | None]


class Reply(ABC, Generic[T]):
    """Where the answer to one question goes; whichever of `set` and `fail` comes first counts."""

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
        if not self._answered.wait(timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # T may be None


_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox[_Answer]] = WeakKeyDictionary()


# A child's loop makes its own: the lock of an inherited one may be held for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mailboxes.clear)


def _answers_of(loop: asyncio.AbstractEventLoop) -> Mailbox[_Answer]:
    mailbox = _mailboxes.get(loop)
    if mailbox is None:
        mailbox = _mailboxes[loop] = Mailbox(loop, _resolve)
    return mailbox


def _resolve(answers: list[_Answer]) -> None:
    for future, value, error in answers:
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
