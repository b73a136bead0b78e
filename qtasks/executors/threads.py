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

from qtasks.engine.reply import LoopReply

R = TypeVar("R")

_NAME = "qtasks-task"
_REST = 5.0
"""Seconds a thread waits for more work before it ends."""


async def in_thread(call: Callable[[], R]) -> R:
    """Return what `call` returns in a thread. Cancelled, it ends at once and the call goes on."""
    reply: LoopReply[R] = LoopReply()
    with _lock:
        thread = _idle.pop() if _idle else None
    if thread is None:
        thread = _Thread()
        thread.start()
    thread.work.put((call, reply))
    return await reply.future


def busy_threads() -> list[threading.Thread]:
    """Return the threads in which something runs."""
    with _lock:
        return [t for t in threading.enumerate() if isinstance(t, _Thread) and t not in _idle]


class _Thread(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name=_NAME, daemon=True)
        self.work: SimpleQueue[tuple[Callable[[], Any], LoopReply[Any]]] = SimpleQueue()

    def run(self) -> None:
        while (given := self._next()) is not None:
            answer = _answered(*given)
            with _lock:
                _idle.append(self)
            answer()
            del given, answer  # what they hold is not to live until there is more work

    def _next(self) -> tuple[Callable[[], Any], LoopReply[Any]] | None:
        try:
            return self.work.get(timeout=_REST)
        except Empty:
            with _lock:
                if self in _idle:
                    _idle.remove(self)
                    return None
        # Somebody has just taken it.
        return self.work.get()


def _answered(call: Callable[[], Any], reply: LoopReply[Any]) -> Callable[[], None]:
    """Do the work; return what tells of it."""
    try:
        return partial(reply.set, call())
    except BaseException as error:  # noqa: BLE001  # raised where it is awaited
        return partial(reply.fail, error)


_idle: list[_Thread] = []
"""The last to rest is the first to work again, so that the others come to their end."""
_lock = threading.Lock()


def _begin_anew_in_child() -> None:
    # None of the threads is there, and one may have held the lock at the fork.
    global _lock
    _lock = threading.Lock()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew_in_child)
