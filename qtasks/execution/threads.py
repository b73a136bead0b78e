"""Daemon threads that are kept for a while: what blocks in one holds up neither loop nor exit.

A pool of the standard library is joined at exit, and a function that never returns keeps one of
its places for good.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from qtasks.bridge.reply import Reply

R = TypeVar("R")

_NAME = "qtasks-task"
_REST = 5.0
"""Seconds a thread waits for more work before it ends."""


async def in_thread(call: Callable[[], R]) -> R:
    """Return what `call` returns in a thread. Cancelled, it raises at once and the call goes on."""
    reply: Reply[R] = Reply()
    _threads.do(call, reply)
    return await reply


def busy_threads() -> int:
    """Return in how many threads something runs."""
    return _threads.busy


class _Threads:
    """As many as there are calls at once, which take their work from one queue."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], Reply[Any]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._all = 0
        self._free = 0
        """How many wait for work that nobody has put there yet."""

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
        """Do what is next; False: there was nothing for long."""
        try:
            call, reply = self._work.get(timeout=_REST)
        except Empty:
            with self._lock:
                if self._free:
                    self._free -= 1
                    self._all -= 1
                    return False
            return True  # there is work to come for each that waits
        answer = _answer(call, reply)
        with self._lock:
            self._free += 1
        answer()
        return True


def _answer(call: Callable[[], Any], reply: Reply[Any]) -> Callable[[], None]:
    """Make the call; return what tells of it."""
    try:
        return partial(reply.set, call())
    except BaseException as error:  # noqa: BLE001  # raised where it is awaited
        return partial(reply.fail, error)


_threads = _Threads()


def _begin_anew_in_child() -> None:
    # None of the threads is there, and one may have held the lock at the fork.
    global _threads
    _threads = _Threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew_in_child)
