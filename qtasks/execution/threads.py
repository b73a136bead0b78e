"""Daemon threads for plain functions. One that blocks delays neither the loop nor the exit.

The threads of a standard library pool are joined at exit, and a function that never returns would
occupy one of them for good.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from qtasks.bridge.crossing import Reply

R = TypeVar("R")

_NAME = "qtasks-task"
REST = 5.0
"""Seconds that a thread waits for more work before it ends."""


async def in_thread(call: Callable[[], R]) -> R:
    """Call in a thread. If this is cancelled, it ends at once and the call keeps running."""
    reply: Reply[R] = Reply()
    _threads.do(call, reply)
    return await reply


def busy_threads() -> int:
    """Return how many threads have work."""
    return _threads.busy


class _Threads:
    """As many threads as there are calls at once. They take their work from one queue."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], Reply[Any]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._all = 0
        self._free = 0
        """How many wait for work and have none assigned."""

    @property
    def busy(self) -> int:
        return self._all - self._free

    def do(self, call: Callable[[], Any], reply: Reply[Any]) -> None:
        """Have a thread make a call and answer."""
        with self._lock:
            is_free = self._free > 0
            if is_free:
                self._free -= 1
            else:
                self._all += 1
        self._work.put((call, reply))
        if not is_free:
            threading.Thread(target=self._run, name=_NAME, daemon=True).start()

    def _run(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Make the next call; False when there was none for a while."""
        try:
            call, reply = self._work.get(timeout=REST)
        except Empty:
            with self._lock:
                if self._free:
                    self._free -= 1
                    self._all -= 1
                    return False
            return True  # work is on its way for every thread that waits
        answer = _answer(call, reply)
        with self._lock:
            self._free += 1
        answer()
        return True


def _answer(call: Callable[[], Any], reply: Reply[Any]) -> Callable[[], None]:
    """Make the call; return a function that passes its result on."""
    try:
        return partial(reply.set, call())
    except BaseException as error:  # noqa: BLE001  # raised where it is awaited
        return partial(reply.fail, error)


_threads = _Threads()


def _renew_in_child() -> None:
    # The child has none of the threads, and one of them may have held the lock at the fork.
    global _threads
    _threads = _Threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_in_child)
