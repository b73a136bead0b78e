"""The one thread of a process that owns all connections, and the crossing to it.

User code never runs on it and drivers never run elsewhere, so leases, heartbeats and
acknowledgements go on while user code blocks its own loop.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401  # for drivers: too late once the main thread ended
import os
import selectors
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from threading import Lock, Thread
from typing import Any, TypeVar

from qtasks.bridge.reply import EntryQueue, Reply
from qtasks_core.errors import ConfigurationError

T = TypeVar("T")
_Call = tuple[Callable[..., object], tuple[Any, ...]]
_Undo = Callable[[], Coroutine[Any, Any, None]]
_STOP_TIMEOUT = 2.0
"""Seconds that an exiting process gives to the coroutines that still run on the I/O thread."""


class IOThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop, self._selector = _new_loop()
        self.held: set[object] = set()
        """What is started here: not collected before it is stopped, not even in a forked child."""
        self._calls: EntryQueue[_Call] = EntryQueue(self.loop, _call_all)
        self._spawned: set[asyncio.Task[None]] = set()
        self._thread = Thread(target=self.loop.run_forever, name="qtasks-io", daemon=True)
        self._thread.start()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Call `function(*args)` on the I/O loop soon. It must not raise."""
        self._calls.post((function, args))

    def ask(
        self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any, undo: _Undo | None = None
    ) -> Reply[T]:
        """Run a coroutine function on the I/O loop; reply with what it returns or raises.

        It goes on when nobody waits for it any more. With `undo` it is cancelled then, or undone
        if it had succeeded just before.
        """
        errand = _Errand(self, partial(call, *args), undo)
        self.post(errand.begin)
        return errand

    async def run(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Do what `ask` does, as a coroutine: one that may become a task of the caller's loop."""
        return await self.ask(call, *args)

    def spawn(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task on the I/O loop, from there."""
        task = self.loop.create_task(call)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    def stop(self) -> None:
        """Cancel what runs here and stop the thread; what takes too long is left."""
        self.post(lambda: self.spawn(self._stop()))
        self._thread.join(2 * _STOP_TIMEOUT)

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=_STOP_TIMEOUT)
        self.loop.stop()

    def leave_to_parent(self) -> None:
        """Let go of all connections, in a forked child, without a word to their servers.

        Else a server would not see when the parent has closed one, and what the child does to
        the selector they share would deafen the parent.
        """
        connections = list(self._selector.get_map().values())
        _keep_for_ever([self, connections, asyncio.all_tasks(self.loop)])
        nothing = os.open(os.devnull, os.O_RDWR)
        for key in connections:
            os.dup2(nothing, key.fd, inheritable=False)
        os.close(nothing)
        self._selector.__init__()  # type: ignore[misc]  # a new, empty one under the same loop


class _Errand(Reply[T]):
    """A coroutine on the I/O loop, and the reply to the one who asked for it."""

    def __init__(
        self,
        thread: IOThread,
        call: Callable[[], Coroutine[Any, Any, T]],
        undo: _Undo | None,
    ) -> None:
        super().__init__()
        self._thread = thread
        self._call = call
        self._undo = undo
        self._task: asyncio.Task[None] | None = None
        self._succeeded = False

    def begin(self) -> None:
        self._task = self._thread.spawn(self._run())

    async def _run(self) -> None:
        try:
            result = await self._call()
        except asyncio.CancelledError:
            self.fail(RuntimeError("the engine was stopped meanwhile"))
            raise
        except Exception as error:  # noqa: BLE001  # raised at the caller
            self.fail(error)
        else:
            self._succeeded = True
            self.set(result)

    def leave(self) -> None:
        if self._undo is not None:
            self._thread.post(self._abandon, self._undo)

    def _abandon(self, undo: _Undo) -> None:
        if self._succeeded:
            self._thread.spawn(undo())
        elif self._task is not None:
            self._task.cancel()


def _new_loop() -> tuple[asyncio.AbstractEventLoop, selectors.BaseSelector]:
    # A selector of our own, whatever loop the host has installed: see `leave_to_parent`.
    selector = selectors.DefaultSelector()
    return asyncio.SelectorEventLoop(selector), selector


def _keep_for_ever(things: list[object]) -> None:
    """Keep what has no thread here, even from the collection at exit, which would end its tasks."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(things))


def _call_all(calls: list[_Call]) -> None:
    for function, args in calls:
        function(*args)


def _refuse_greenlets() -> None:
    """Raise `ConfigurationError` where threads are greenlets: the I/O thread would be one too.

    It and the callers that block for it would then share one real thread.
    """
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_module_patched("threading"):
        library = "gevent"
    elif eventlet is not None and eventlet.is_monkey_patched("thread"):
        library = "eventlet"
    else:
        return
    raise ConfigurationError(
        f"{library} has replaced the threads of this process by greenlets, and QTasks needs a real "
        "one; with gunicorn take the worker class gthread (-k gthread --threads 8) instead"
    )


_refuse_greenlets()
_lock = Lock()
_current: IOThread | None = None


def io_thread() -> IOThread:
    """Return this process's I/O thread; a forked child gets its own."""
    return _current or _start()


def running_io_thread() -> IOThread | None:
    """Return this process's I/O thread if it has one."""
    return _current


def _start() -> IOThread:
    global _current
    _refuse_greenlets()  # which may have come after this module was imported
    with _lock:
        if _current is None:
            _current = IOThread()
        return _current


def end_at_exit() -> None:
    """End what still runs on the I/O thread of a process that comes to its end."""
    # An app that nobody has stopped would else be collected task by task, with complaints.
    if _current is not None:
        _current.stop()


# As early as this, so that it comes after all that uses the thread at exit.
atexit.register(end_at_exit)


def _renew_in_child() -> None:
    # Another thread may have held the lock at the fork, and does not exist in the child.
    global _current, _lock
    _lock = Lock()
    if _current is not None:
        _current.leave_to_parent()
        _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_in_child)
