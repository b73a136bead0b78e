"""The crossing between threads: the I/O thread, the entry queue into a loop, and the reply.

The I/O thread holds all connections of a process and runs the calls that use them. User code never
runs on this thread, and drivers run only on this thread. So leases, heartbeats and acknowledgements
keep working while user code blocks its event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401  # fails once the main thread ended
import os
import selectors
import sys
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from threading import TIMEOUT_MAX, Event, Lock, Thread
from typing import Any, Generic, ParamSpec, TypeVar

from qtasks_core.errors import ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
_Waiting = asyncio.Future[None]
_Call = tuple[Callable[..., object], tuple[Any, ...]]
_Undo = Callable[[], Coroutine[Any, Any, None]]
_STOP_TIMEOUT = 2.0
"""Seconds that coroutines on the I/O thread have to finish when the process exits."""


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


def copy_of(error: E) -> E:
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
_queues_lock = Lock()


def _answers_of(loop: asyncio.AbstractEventLoop) -> EntryQueue[_Waiting]:
    queue = _entry_queues.get(loop)
    return queue if queue is not None else _open_queue(loop)


def _open_queue(loop: asyncio.AbstractEventLoop) -> EntryQueue[_Waiting]:
    """Make the entry queue of a new loop, and drop the queues of closed loops."""
    with _queues_lock:
        for old in [known for known in _entry_queues if known.is_closed()]:
            del _entry_queues[old]
        return _entry_queues.setdefault(loop, EntryQueue(loop, _wake_all))


def _wake_all(waiting: list[_Waiting]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)


class IOThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop, self._selector = _new_loop()
        self.held: set[object] = set()
        """Keeps started clients from garbage collection, also in a forked child."""
        self._calls: EntryQueue[_Call] = EntryQueue(self.loop, _call_all)
        self._spawned: set[asyncio.Task[None]] = set()
        self._thread = Thread(target=self.loop.run_forever, name="qtasks-io", daemon=True)
        self._thread.start()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Have the I/O loop call `function(*args)` soon. From any thread. It must not raise."""
        self._calls.post((function, args))

    def ask(
        self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any, undo: _Undo | None = None
    ) -> Reply[T]:
        """Run a coroutine function on the I/O loop. The reply gets its result or its error.

        If the caller stops waiting, the coroutine keeps running. With `undo` it is cancelled
        instead; if it has already succeeded, `undo` is run. From any thread.
        """
        errand = _Errand(self, partial(call, *args), undo)
        self.post(errand.begin)
        return errand

    async def run(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Do the same as `ask`, as a coroutine, which can be wrapped in a task."""
        return await self.ask(call, *args)

    def spawn(self, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task on the I/O loop. Only from the I/O thread."""
        task = self.loop.create_task(call)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    def stop(self) -> None:
        """Cancel all coroutines on this loop and stop the thread.

        Coroutines that have not finished after 2 seconds are abandoned.
        """
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
        """Drop all connections in a forked child, without sending anything to their servers.

        While the child holds a connection, a server does not see that the parent has closed it.
        Parent and child also share one epoll instance. If the child unregistered a socket, the
        parent would get no more events for it.
        """
        connections = list(self._selector.get_map().values())
        _keep_for_ever([self, connections, asyncio.all_tasks(self.loop)])
        nothing = os.open(os.devnull, os.O_RDWR)
        for key in connections:
            os.dup2(nothing, key.fd, inheritable=False)
        os.close(nothing)
        self._selector.__init__()  # type: ignore[misc]  # a new, empty one under the same loop


class _Errand(Reply[T]):
    """A coroutine on the I/O loop, and the reply for its caller."""

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
    # Always this loop, whichever loop the host uses: `leave_to_parent` changes its selector.
    selector = selectors.DefaultSelector()
    return asyncio.SelectorEventLoop(selector), selector


def _keep_for_ever(things: list[object]) -> None:
    """Keep objects of a thread that does not exist in this process, even at exit.

    Otherwise garbage collection would close their coroutines and run code in them.
    """
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(things))


def _call_all(calls: list[_Call]) -> None:
    for function, args in calls:
        function(*args)


def _refuse_greenlets() -> None:
    """Raise `ConfigurationError` if gevent or eventlet has replaced threads by greenlets.

    The I/O thread would then share one real thread with the callers that block on its replies.
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
    """Return the I/O thread of this process; start it if needed. A forked child gets a new one."""
    return _current or _start()


def running_io_thread() -> IOThread | None:
    """Return the I/O thread of this process, or None if it is not started."""
    return _current


def _start() -> IOThread:
    global _current
    _refuse_greenlets()  # they may have done so after this module was imported
    with _lock:
        if _current is None:
            _current = IOThread()
        return _current


def end_at_exit() -> None:
    """Stop the I/O thread when the process exits."""
    # Otherwise Python would warn about each pending task of an app that was not stopped.
    if _current is not None:
        _current.stop()


# Registered at import, so that it runs after the exit handlers that use the thread.
atexit.register(end_at_exit)


def _renew_in_child() -> None:
    # Another thread may have held a lock at the fork: one of these, or that of an entry queue. It
    # does not run in the child.
    global _current, _lock, _queues_lock
    _lock, _queues_lock = Lock(), Lock()
    _entry_queues.clear()
    if _current is not None:
        _current.leave_to_parent()
        _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_in_child)
