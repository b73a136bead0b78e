"""The one thread of a process that owns all connections, and the crossing to it.

User code never runs on it and drivers never run elsewhere, so leases, heartbeats and
acknowledgements go on while user code blocks its own loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from threading import Lock, Thread
from typing import Any, TypeVar

from qtasks.engine.mailbox import Mailbox
from qtasks.engine.reply import LoopReply, Reply, ThreadReply

logger = logging.getLogger("qtasks")
T = TypeVar("T")
_Call = tuple[Callable[..., object], tuple[Any, ...]]


class IOThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pid = os.getpid()
        self._calls: Mailbox[_Call] = Mailbox(self.loop, _call_all)
        self._spawned: set[asyncio.Task[None]] = set()
        Thread(target=self.loop.run_forever, name="qtasks-io", daemon=True).start()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Call `function(*args)` on the I/O loop soon. It must not raise."""
        self._calls.post((function, args))

    async def ask(self, function: Callable[..., object], *args: Any) -> Any:
        """Call `function(*args, reply)` on the I/O loop and await the reply, from any loop."""
        reply: LoopReply[Any] = LoopReply()
        self.post(function, *args, reply)
        return await reply.future

    def ask_blocking(
        self, function: Callable[..., object], *args: Any, timeout: float | None = None
    ) -> Any:
        """Call `function(*args, reply)` on the I/O loop and block for the reply.

        Raises `RuntimeError` inside a running event loop, which it would block.
        """
        refuse_running_loop()
        reply: ThreadReply[Any] = ThreadReply()
        self.post(function, *args, reply)
        return reply.result(timeout)

    async def run(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run a coroutine function on the I/O loop and await its end, from any loop."""
        result: T = await self.ask(self._answer, call, args)
        return result

    def run_blocking(self, call: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run a coroutine function on the I/O loop and block until its end."""
        result: T = self.ask_blocking(self._answer, call, args)
        return result

    def spawn(self, call: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run a coroutine function on the I/O loop; nobody waits for it, a failure is logged."""
        self.post(self._answer, call, args, _Logged())

    def _answer(
        self, call: Callable[..., Coroutine[Any, Any, T]], args: tuple[Any, ...], reply: Reply[T]
    ) -> None:
        task = self.loop.create_task(answer(call(*args), reply))
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)


class _Logged(Reply[None]):
    """To the log, where it is a failure."""

    def set(self, value: None) -> None:
        """Have nothing to say."""

    def fail(self, error: BaseException) -> None:
        logger.error("in the background: %s", error, exc_info=error)


async def answer(call: Coroutine[Any, Any, T], reply: Reply[T]) -> None:
    """Await `call` and hand its result, or whatever it raises, to `reply`."""
    try:
        reply.set(await call)
    except asyncio.CancelledError:
        reply.fail(RuntimeError("the engine was stopped meanwhile"))
        raise
    except Exception as error:  # noqa: BLE001  # raised at the asker
        reply.fail(error)


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


_lock = Lock()
_current: IOThread | None = None


def io_thread() -> IOThread:
    """Return this process's I/O thread; a forked child gets its own."""
    global _current
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = IOThread()
        return _current


def _renew_lock_in_child() -> None:
    # Another thread may have held the lock at the fork, and does not exist in the child.
    global _lock
    _lock = Lock()


os.register_at_fork(after_in_child=_renew_lock_in_child)
