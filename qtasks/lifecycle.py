"""An app's parts and its life: started and stopped, counted when nested, anew after a fork."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from qtasks.engine.backoff import repeat
from qtasks.engine.client import Client
from qtasks.engine.io_thread import IOThread, io_thread, refuse_running_loop
from qtasks.parts import built_parts
from qtasks_core import Broker, Guarantees, Storage
from qtasks_core.errors import Closed

P = ParamSpec("P")
R = TypeVar("R")

START_TIMEOUT = 10.0
"""Seconds in which the parts have to be reached when an app is entered."""


class _Entry:
    """One start of an app, while it is under way and after."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.counted = False


class Lifecycle:
    """A broker, a storage, and one client on the I/O thread while it is started."""

    def __init__(self, name: str, broker: Broker | str, storage: Storage | str) -> None:
        self.name = name
        self._given = broker, storage
        self.broker, self.storage = built_parts(broker, storage)
        self._entered = 0
        self._client: Client | None = None
        self._thread: IOThread | None = None
        self._changing = asyncio.Lock()
        self._inherited: list[object] = []
        self._closes_itself = False
        self.starts_itself = False
        """Start at first use and close at exit: only the process's default app does."""

    def guarantees(self) -> tuple[Guarantees, Guarantees]:
        """What the broker and the storage promise; complete once the app is started."""
        return self.broker.guarantees, self.storage.guarantees

    async def start(self, timeout: float = START_TIMEOUT) -> None:
        """Connect both parts; nested starts count. Raises `Unavailable` after `timeout` seconds."""
        thread, entry = self._io(), _Entry()
        try:
            await thread.run(self._start, timeout, entry)
        except asyncio.CancelledError:
            thread.spawn(self._give_up, entry)
            raise

    async def stop(self) -> None:
        """Disconnect with the last of nested stops."""
        await self._io().run(self._stop)

    def start_blocking(self, timeout: float = START_TIMEOUT) -> None:
        """Connect both parts from a thread without a loop."""
        thread, entry = self._io(), _Entry()
        try:
            thread.run_blocking(self._start, timeout, entry)
        except KeyboardInterrupt:
            thread.spawn(self._give_up, entry)
            raise

    def stop_blocking(self) -> None:
        """Disconnect from a thread without a loop."""
        self._io().run_blocking(self._stop)

    def _io(self) -> IOThread:
        """Return the process's I/O thread; in a forked child all that was started is gone."""
        thread = io_thread()
        if thread is not self._thread:
            with process_lock():
                if thread is not self._thread:
                    self._renew(thread)
        return thread

    def _renew(self, thread: IOThread) -> None:
        """Begin anew on this process's I/O thread. Raises `Closed` where that cannot be."""
        if self._client is not None:
            if not all(isinstance(given, str) for given in self._given):
                raise Closed(
                    f"the app {self.name!r} was forked while it was started; give its parts as "
                    "URLs, from which a child builds its own, or fork before the app is used"
                )
            # Kept for ever: even to close them would disturb the parent's connections.
            self._inherited += (self._client, self.broker, self.storage)
            self.broker, self.storage = built_parts(*self._given)
        self._client, self._entered, self._changing = None, 0, asyncio.Lock()
        self._thread = thread

    async def _start(self, timeout: float, entry: _Entry) -> None:
        entry.task = asyncio.current_task()
        async with self._changing:
            if self._client is None:
                client = Client(self.name, self.broker, self.storage)
                await client.start(asyncio.get_running_loop().time() + timeout)
                self._client = client
            self._entered += 1
            entry.counted = True

    async def _give_up(self, entry: _Entry) -> None:
        """Take back a start whose caller does not wait for it any more."""
        if entry.counted:
            await self._stop()
        elif entry.task is not None:
            entry.task.cancel()

    async def _stop(self) -> None:
        async with self._changing:
            if self._entered == 0:
                # A forked child leaves a block that its parent has entered.
                return
            self._entered -= 1
            if self._entered == 0 and self._client is not None:
                client, self._client = self._client, None
                await client.stop()

    @property
    def client(self) -> Client:
        """The engine's client while the app is started; it lives on the I/O thread."""
        client = self._client_now()[1]
        if client is None:
            raise self._not_started()
        return client

    def _client_now(self) -> tuple[IOThread, Client | None]:
        return self._io(), self._client

    async def ready(self) -> tuple[IOThread, Client]:
        """Return the I/O thread and the client on it. Raises `Closed` when nothing is started."""
        thread, client = self._client_now()
        if client is None and self.starts_itself:
            await self.start()
            self._close_with_process()
            thread, client = self._client_now()
        if client is None:
            raise self._not_started()
        return thread, client

    def ready_blocking(self) -> tuple[IOThread, Client]:
        """Do as `ready`, from a thread without a loop."""
        refuse_running_loop()
        thread, client = self._client_now()
        if client is None and self.starts_itself:
            self.start_blocking()
            self._close_with_process()
            thread, client = self._client_now()
        if client is None:
            raise self._not_started()
        return thread, client

    async def control(
        self,
        operation: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run a function of `qtasks.control` with the app's client, on the I/O thread.

        Raises what it raises, and `Unavailable` when its server stays out of reach.
        """
        thread, client = await self.ready()
        call = partial(operation, client, *args, **kwargs)
        result: R = await thread.run(repeat, call, time.monotonic() + START_TIMEOUT)
        return result

    def control_blocking(
        self,
        operation: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Do as `control`, from a thread without a loop."""
        thread, client = self.ready_blocking()
        call = partial(operation, client, *args, **kwargs)
        result: R = thread.run_blocking(repeat, call, time.monotonic() + START_TIMEOUT)
        return result

    def _not_started(self) -> Closed:
        return Closed(
            f"the app {self.name!r} is not started; use it inside 'async with app:' "
            "(or 'with app:'), or in a task that its worker runs"
        )

    def _close_with_process(self) -> None:
        with process_lock():
            if not self._closes_itself:
                # Before `atexit`, when threads that parts work in have been ended already.
                register = getattr(threading, "_register_atexit", atexit.register)
                register(self._close_at_exit)
                self._closes_itself = True

    def _close_at_exit(self) -> None:
        # Not in a child that was forked since: it has nothing to close.
        thread, client = self._thread, self._client
        if thread is not None and client is not None and thread.pid == os.getpid():
            thread.run_blocking(self._stop)


_lock = threading.RLock()


def process_lock() -> threading.RLock:
    """Return the lock over what this process has one of: its apps' threads, its default app."""
    return _lock


def _renew_lock_in_child() -> None:
    # Another thread may have held the lock at the fork, and does not exist in the child.
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock_in_child)
