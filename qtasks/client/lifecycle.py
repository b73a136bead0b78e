"""Starting and stopping the broker and storage of an app: nested starts, forks, exit."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from qtasks.bridge.crossing import IOThread, Reply, copy_of, io_thread, running_io_thread
from qtasks.client.client import Client
from qtasks.client.parts import built_parts
from qtasks.client.requirements import Requirements
from qtasks.client.retrying import retry
from qtasks_core import Broker, Guarantees, Storage
from qtasks_core.errors import Closed, ConfigurationError, QTasksError, Unavailable
from qtasks_core.urls import redact

logger = logging.getLogger("qtasks")
P = ParamSpec("P")
R = TypeVar("R")

START_TIMEOUT = 10.0
"""Seconds in which the broker and the storage have to answer when an app is started."""
_EXIT_TIMEOUT = 5.0
"""Seconds that an exiting process waits for its default app to disconnect."""


class Life:
    """The state of an app on one I/O thread. A forked child does not inherit it."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self.entered = 0
        """How many starts have no stop yet."""
        self.by_itself = False
        """Whether one of these starts was automatic, at the first use of the app."""
        self.changing = asyncio.Lock()
        self.failed: Exception | None = None
        """The error of the last start, if it failed."""


class Lifecycle:
    """A broker, a storage, and a client on the I/O thread while the app is started."""

    def __init__(self, name: str, broker: Broker | str, storage: Storage | str) -> None:
        self.name = name
        self._given = broker, storage
        self.broker, self.storage = built_parts(broker, storage)
        self._lives: WeakKeyDictionary[IOThread, Life] = WeakKeyDictionary()
        """The state on the I/O thread of each process. Only that thread writes it."""
        self._started_in: int | None = None
        self._closes_at_exit = False
        self.starts_itself = False
        """Whether it starts at its first use and closes at exit. Only the default app does."""
        self._was_stopped = False
        """Also True after a failed start. A successful start sets it to False."""

    @property
    def claims_routers(self) -> bool:
        """Whether a router's tasks may go to this app: True until it is stopped."""
        return self.starts_itself or not self._was_stopped

    @property
    def started(self) -> bool:
        """Whether the app is started in this process."""
        return self._started_in == os.getpid()

    def guarantees(self) -> tuple[Guarantees, Guarantees]:
        """The guarantees of the broker and the storage. Complete once the app is started."""
        return self.broker.guarantees, self.storage.guarantees

    def addresses(self) -> tuple[str, str]:
        """The URLs of broker and storage without passwords; for objects, a description."""
        broker, storage = self._given
        return _address(broker, self.broker), _address(storage, self.storage)

    def connect(self, timeout: float = START_TIMEOUT) -> Reply[None]:
        """Connect the broker and the storage. Nested calls are counted.

        Fails with `Unavailable` after `timeout` seconds. If the caller stops waiting, the start is
        undone.
        """
        return io_thread().ask(self._start, timeout, undo=self._stop)

    def disconnect(self) -> Reply[None]:
        """Disconnect, once it was called as often as `connect`."""
        return io_thread().ask(self._stop)

    @contextmanager
    def replaced(self, broker: Broker, storage: Storage, name: str) -> Iterator[None]:
        """Use another broker, another storage and another name while the block runs.

        The end of the block stops the app, however often it was started. Raises
        `ConfigurationError` if the app is started.
        """
        thread = io_thread()
        life = self._lives.get(thread)
        if life is not None and life.client is not None:
            raise ConfigurationError(
                f"the app {self.name!r} is started: its broker cannot be replaced now; "
                "stop it before the test, or start it inside"
            )
        before = self.name, self.broker, self.storage, self._given, self._was_stopped
        self.name, self.broker, self.storage, self._given = name, broker, storage, (broker, storage)
        try:
            yield
        finally:
            thread.ask(self._stop_for_good).result()
            self.name, self.broker, self.storage, self._given, self._was_stopped = before

    async def _stop_for_good(self) -> None:
        life = self._life()
        life.entered, life.failed = 1, None
        await self._stop()

    async def start_async(self, timeout: float = START_TIMEOUT) -> None:
        """Do the same as `connect`, as a coroutine, which can be wrapped in a task."""
        await self.connect(timeout)

    async def stop_async(self) -> None:
        """Do the same as `disconnect`, as a coroutine."""
        await self.disconnect()

    async def _start(self, timeout: float) -> None:
        life = self._life()
        deadline = asyncio.get_running_loop().time() + timeout
        async with life.changing:
            await self._open(life, deadline)
            life.entered += 1

    async def _start_by_itself(self) -> None:
        life = self._life()
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT
        async with life.changing:
            await self._open(life, deadline)
            if not life.by_itself:
                life.by_itself = True
                life.entered += 1
        if not self._closes_at_exit:
            self._closes_at_exit = True
            atexit.register(self._close_at_exit)

    def _life(self) -> Life:
        """Return the state of this app in this process. On the I/O thread."""
        return self._lives.setdefault(io_thread(), Life())

    async def _open(self, life: Life, deadline: float) -> None:
        if life.client is not None:
            return
        if life.failed is not None and asyncio.get_running_loop().time() > deadline:
            # A start before this one has failed, and this one has no time left for an attempt.
            raise copy_of(life.failed)
        if self._started_in not in (None, os.getpid()):
            self._rebuild()
        requirements = Requirements(self.broker, self.storage, self._required, self._compare)
        client = Client(self.name, self.broker, self.storage, self._written_to, requirements)
        self._started_in = os.getpid()
        try:
            await client.start(deadline)
            try:
                self._check()
            except ConfigurationError:
                await client.stop()
                raise
        except Exception as error:
            life.failed = error
            self._was_stopped = True
            raise
        life.client, life.failed = client, None
        self._was_stopped = False
        io_thread().held.add(client)

    def _check(self) -> None:
        """Refuse to start with a broker and a storage that do not fit, both started by now.

        Raises `ConfigurationError`.
        """

    def _required(self) -> bool:
        """Return whether the app or a task requires anything of the servers."""
        return False

    def _compare(self) -> dict[str, str]:
        """Return the tasks whose requirements are not met any more, each with an error text.

        Logs what has changed since the last call.
        """
        return {}

    def _rebuild(self) -> None:
        """Replace the broker and the storage that a parent process has started.

        Raises `Closed` if they were given as objects.
        """
        if not all(isinstance(given, str) for given in self._given):
            raise Closed(
                f"the app {self.name!r} was forked while it was started; give its parts as "
                "URLs, from which a child builds its own, or fork before the app is used"
            )
        self.broker, self.storage = built_parts(*self._given)

    async def _stop(self) -> None:
        life = self._life()
        async with life.changing:
            # The child of a fork between start and stop has nothing to stop.
            life.entered = max(0, life.entered - 1)
            if life.entered == 0 and life.client is not None:
                client, life.client, life.by_itself = life.client, None, False
                self._was_stopped = True
                io_thread().held.discard(client)
                await client.stop()
                self._started_in = None

    @property
    def client(self) -> Client:
        """The client of the started app. It lives on the I/O thread.

        Raises `Closed` if the app is not started.
        """
        client = self.client_on(io_thread())
        if client is None:
            raise not_started(self.name)
        return client

    def client_on(self, thread: IOThread) -> Client | None:
        """Return the client, or None if the app will start at its first use.

        Raises `Closed` if it is not started and does not start by itself.
        """
        life = self._lives.get(thread)
        if life is not None and life.client is not None:
            return life.client
        if not self.starts_itself:
            raise not_started(self.name)
        return None

    async def started_client(self, timeout: float | None = None) -> Client:
        """Return the client, on the I/O thread. Start the app if it starts at its first use.

        Raises `Unavailable` after `timeout` seconds; the start goes on. Raises `Closed` if the app
        is not started and does not start by itself.
        """
        if self.client_on(io_thread()) is None:
            try:
                async with asyncio.timeout(timeout):
                    await io_thread().ask(self._start_by_itself)
            except TimeoutError:
                raise self._still_starting(timeout) from None
        return self.client

    async def ready(self) -> tuple[IOThread, Client]:
        """Return the I/O thread and the client on it. Raises `Closed` if the app is not started."""
        thread = io_thread()
        client = self.client_on(thread)
        return thread, await thread.ask(self.started_client) if client is None else client

    def control(
        self,
        operation: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Reply[R]:
        """Run a function of `qtasks.control` with the app's client, on the I/O thread.

        The reply gets its result or its error, and `Unavailable` if the server does not answer
        for 10 seconds. Raises `Closed` if the app is not started.
        """
        thread = io_thread()
        self.client_on(thread)  # raises at once if the app is not started
        return thread.ask(self._control, lambda client: operation(client, *args, **kwargs))

    async def _control(self, operation: Callable[[Client], Coroutine[Any, Any, R]]) -> R:
        call = partial(operation, await self.started_client())
        return await retry(call, deadline=time.monotonic() + START_TIMEOUT)

    def _written_to(self) -> str | None:
        """Return a text with the broker of a default app: the code does not name it."""
        if not self.starts_itself:
            return None
        return f"this process's default app {self.name!r} uses the broker {self.addresses()[0]}"

    def _still_starting(self, timeout: float | None) -> Unavailable:
        return Unavailable(
            f"the app {self.name!r} has not reached its servers within {timeout} s; it goes on "
            "trying, and the log says what is wrong"
        )

    def _close_at_exit(self) -> None:
        thread = running_io_thread()  # None in a child process that has not used the app
        life = self._lives.get(thread) if thread is not None else None
        if thread is None or life is None or life.client is None:
            return
        # Daemon threads that still wait end with the process. They should not see an error.
        thread.post(life.client.forget_all)
        try:
            thread.ask(self._stop).result(_EXIT_TIMEOUT)
        except (QTasksError, TimeoutError, OSError) as error:
            logger.warning("the app %r was not closed at exit: %s", self.name, error or "too slow")


def _address(given: Broker | Storage | str, part: Broker | Storage) -> str:
    if isinstance(given, str):
        return redact(given)
    told = part.guarantees
    return f"{told.part} on {told.server}" if told.server else told.part


def not_started(name: str) -> Closed:
    """Return the error for using an app before its start or after its stop."""
    return Closed(
        f"the app {name!r} is not started; use it inside 'async with app:' "
        "(or 'with app:'), or in a task that its worker runs"
    )
