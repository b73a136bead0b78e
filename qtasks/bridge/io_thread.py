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
from typing import Any, Generic, TypeVar

from qtasks.bridge.entry_queue import EntryQueue
from qtasks.bridge.reply import LoopReply, Reply, ThreadReply
from qtasks_core.errors import ConfigurationError

T = TypeVar("T")
_Call = tuple[Callable[..., object], tuple[Any, ...]]
_Undo = Callable[[], Coroutine[Any, Any, None]]
_END_TIMEOUT = 2.0
"""Seconds that an exiting process gives what still runs on the I/O thread."""


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

    async def ask(self, function: Callable[..., object], *args: Any) -> Any:
        """Call `function(*args, reply)` on the I/O loop and await the reply, from any loop."""
        reply: LoopReply[Any] = LoopReply()
        self.post(function, *args, reply)
        return await reply.future

    def ask_blocking(self, function: Callable[..., object], *args: Any) -> Any:
        """Call `function(*args, reply)` on the I/O loop and block for the reply.

        Raises `RuntimeError` inside a running event loop, which it would block.
        """
        refuse_running_loop()
        reply: ThreadReply[Any] = ThreadReply()
        self.post(function, *args, reply)
        return reply.result(None)

    async def run(
        self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any, undo: _Undo | None = None
    ) -> T:
        """Run a coroutine function on the I/O loop and await its end, from any loop.

        An asker who is cancelled leaves it running; with `undo` it is cancelled too, or undone if
        it had ended just then.
        """
        reply: LoopReply[T] = LoopReply()
        errand = _Errand(self.spawn, partial(call, *args), reply, undo)
        self.post(errand.begin)
        try:
            return await reply.future
        except asyncio.CancelledError:
            self.post(errand.abandon)
            raise

    def run_blocking(
        self,
        call: Callable[..., Coroutine[Any, Any, T]],
        *args: Any,
        undo: _Undo | None = None,
        timeout: float | None = None,
    ) -> T:
        """Run a coroutine function on the I/O loop and block until its end.

        Raises `TimeoutError` after `timeout` seconds. An asker who is interrupted, or whose time
        is up, leaves it as one of `run` does.
        """
        refuse_running_loop()
        reply: ThreadReply[T] = ThreadReply()
        errand = _Errand(self.spawn, partial(call, *args), reply, undo)
        self.post(errand.begin)
        try:
            return reply.result(timeout)
        except BaseException:
            # Nothing happens to what has ended with the error that is raised here.
            self.post(errand.abandon)
            raise

    def spawn(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task on the I/O loop, from there."""
        task = self.loop.create_task(call)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    def end(self) -> None:
        """Cancel what runs here and end the thread; what takes too long is left."""
        self.post(lambda: self.spawn(self._end()))
        self._thread.join(2 * _END_TIMEOUT)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=_END_TIMEOUT)
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


class _Errand(Generic[T]):
    """A coroutine on the I/O loop whose asker may leave before its end."""

    def __init__(
        self,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        call: Callable[[], Coroutine[Any, Any, T]],
        reply: Reply[T],
        undo: _Undo | None,
    ) -> None:
        self._spawn = spawn
        self._call = call
        self._reply = reply
        self._undo = undo
        self._task: asyncio.Task[None] | None = None
        self._succeeded = False

    def begin(self) -> None:
        self._task = self._spawn(self._run())

    async def _run(self) -> None:
        try:
            result = await self._call()
        except asyncio.CancelledError:
            self._reply.fail(RuntimeError("the engine was stopped meanwhile"))
            raise
        except Exception as error:  # noqa: BLE001  # raised at the asker
            self._reply.fail(error)
        else:
            self._succeeded = True
            self._reply.set(result)

    def abandon(self) -> None:
        if self._undo is None or self._task is None:
            return
        if self._succeeded:
            self._spawn(self._undo())
        else:
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


def refuse_running_loop() -> None:
    """Raise `RuntimeError` when this thread runs an event loop that a blocking call would stop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        "a blocking call inside a running event loop would stop the loop; "
        "use AsyncRouter and qtasks.asyncio.QueueTasks there"
    )


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
    return _current or _begin()


def running_io_thread() -> IOThread | None:
    """Return this process's I/O thread if it has one."""
    return _current


def _begin() -> IOThread:
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
        _current.end()


# As early as this, so that it comes after all that uses the thread at exit.
atexit.register(end_at_exit)


def _begin_anew_in_child() -> None:
    # Another thread may have held the lock at the fork, and does not exist in the child.
    global _current, _lock
    _lock = Lock()
    if _current is not None:
        _current.leave_to_parent()
        _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew_in_child)
