"""The entry queue, which passes items to a loop in batches, and the reply to a call."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from threading import TIMEOUT_MAX, Event, Lock
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
_Waiting = asyncio.Future[None]


class EntryQueue(Generic[T]):
    """Passes items from any thread to an event loop.

    It is a list under a lock. All items that are posted before the loop wakes up cost one wake-up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[T]], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._lock = Lock()
        self._items: list[T] = []

    def post(self, item: T) -> None:
        """Add an item, from any thread. Raises `RuntimeError` when the loop is closed."""
        with self._lock:
            self._items.append(item)
            wake = len(self._items) == 1
        if wake:
            self._wake()

    def post_all(self, items: list[T]) -> None:
        """Add many items, from any thread. Raises `RuntimeError` when the loop is closed."""
        if not items:
            return
        with self._lock:
            wake = not self._items
            self._items += items
        if wake:
            self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            with self._lock:
                self._items.clear()
            raise

    def _drain(self) -> None:
        with self._lock:
            items, self._items = self._items, []
        self._deliver(items)


class Reply(Generic[T]):
    """One value or one error. The first call of `set` or `fail` counts; later calls do nothing.

    `await reply` in any event loop, or call `reply.result()` in a thread without a loop. At most
    one loop and one thread may wait at a time.
    """

    def __init__(self) -> None:
        self._answered = False
        self._value: T | None = None
        self._error: BaseException | None = None
        # A waiter first sets `_future` or `_event`, and then reads `_answered`. The answering
        # thread first sets `_answered`, and then reads these. So no answer is missed.
        self._future: _Waiting | None = None
        self._event: Event | None = None

    def set(self, value: T) -> None:
        """Answer with a value, from any thread."""
        if not self._answered:
            self._value = value
            self._answered = True
            self._wake()

    def fail(self, error: BaseException) -> None:
        """Answer with an error, from any thread. The waiter raises it."""
        if not self._answered:
            self._error = error
            self._answered = True
            self._wake()

    def leave(self) -> None:
        """Called when a wait is cancelled, is interrupted or times out.

        It runs on the thread that has waited. By default it does nothing.
        """

    def _wake(self) -> None:
        if self._event is not None:
            self._event.set()
        if self._future is not None:
            try:
                _answers_of(self._future.get_loop()).post(self._future)
            except RuntimeError:
                # The loop is closed, so no code waits there any more.
                return

    def __await__(self) -> Generator[Any, None, T]:
        if not self._answered:
            if self._future is None or self._future.cancelled():
                self._future = asyncio.get_running_loop().create_future()
            if not self._answered:
                try:
                    yield from self._future
                except asyncio.CancelledError:
                    self.leave()
                    raise
        try:
            return self._outcome()
        finally:
            del self  # breaks a reference cycle: reply, error, traceback, this frame

    def result(self, timeout: float | None = None) -> T:
        """Block this thread until there is an answer.

        Raises the error of the answer, and `TimeoutError` after `timeout` seconds.
        """
        if not self._answered:
            if self._event is None:
                self._event = Event()
            if not self._answered:
                try:
                    longest = None if timeout is None else min(timeout, TIMEOUT_MAX)
                    if not self._event.wait(longest):
                        raise TimeoutError
                except BaseException:
                    self.leave()
                    raise
        try:
            return self._outcome()
        finally:
            del self

    def _outcome(self) -> T:
        if self._error is None:
            return self._value  # type: ignore[return-value]  # T may be None
        try:
            raise self._error
        finally:
            del self


def block_on(operation: Callable[P, Reply[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `operation` and block until its reply has an answer.

    Inside a running event loop, which it would block, it raises `RuntimeError` and does not call
    `operation`.
    """
    refuse_running_loop()
    return operation(*args, **kwargs).result()


def refuse_running_loop() -> None:
    """Raise `RuntimeError` if this thread runs an event loop: a blocking call would block it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        "a blocking call inside a running event loop would stop the loop; "
        "use AsyncRouter and qtasks.asyncio.QueueTasks there"
    )


def anew(error: E) -> E:
    """Return a copy of an error, so that each caller raises a different object.

    If several callers raised one object, its traceback would contain the frames of all of them.
    """
    kind = type(error)
    fresh = kind.__new__(kind, *error.args)
    fresh.args = error.args
    fresh.__dict__.update(error.__dict__)
    fresh.__cause__ = error.__cause__
    fresh.__suppress_context__ = error.__suppress_context__
    return fresh.with_traceback(error.__traceback__)


_entry_queues: dict[asyncio.AbstractEventLoop, EntryQueue[_Waiting]] = {}
"""One entry queue per loop: answers that arrive together wake the loop once."""
_lock = Lock()


def _answers_of(loop: asyncio.AbstractEventLoop) -> EntryQueue[_Waiting]:
    queue = _entry_queues.get(loop)
    return queue if queue is not None else _open_queue(loop)


def _open_queue(loop: asyncio.AbstractEventLoop) -> EntryQueue[_Waiting]:
    """Make the entry queue of a new loop, and drop the queues of closed loops."""
    with _lock:
        for old in [known for known in _entry_queues if known.is_closed()]:
            del _entry_queues[old]
        return _entry_queues.setdefault(loop, EntryQueue(loop, _wake_all))


def _renew_in_child() -> None:
    # Another thread may have held a lock at the fork: this one, or that of an entry queue. It does
    # not run in the child.
    global _lock
    _lock = Lock()
    _entry_queues.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_in_child)


def _wake_all(waiting: list[_Waiting]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)
