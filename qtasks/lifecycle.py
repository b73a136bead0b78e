"""An app's parts and its life: started and stopped, counted when nested, anew after a fork."""

from __future__ import annotations

import asyncio
import atexit

from qtasks.engine.client import Client
from qtasks.engine.io_thread import IOThread, io_thread, refuse_running_loop
from qtasks_core import Broker, Guarantees, Storage
from qtasks_core.errors import Closed

START_TIMEOUT = 10.0
"""Seconds in which the parts have to be reached when an app is entered."""


class Lifecycle:
    """A broker, a storage, and one client on the I/O thread while it is started."""

    def __init__(self, name: str, broker: Broker, storage: Storage) -> None:
        self.name = name
        self.broker = broker
        self.storage = storage
        self._entered = 0
        self._client: Client | None = None
        self._thread: IOThread | None = None
        self._changing = asyncio.Lock()
        self.starts_itself = False
        """Start at first use and close at exit: only the process's default app does."""

    def guarantees(self) -> tuple[Guarantees, Guarantees]:
        """What the broker and the storage promise; complete once the app is started."""
        return self.broker.guarantees, self.storage.guarantees

    async def start(self, timeout: float = START_TIMEOUT) -> None:
        """Connect both parts; nested starts count. Raises `Unavailable` after `timeout` seconds."""
        await self._io().run(self._start, timeout)

    async def stop(self) -> None:
        """Disconnect with the last of nested stops."""
        await self._io().run(self._stop)

    def start_blocking(self, timeout: float = START_TIMEOUT) -> None:
        """Connect both parts from a thread without a loop."""
        self._io().run_blocking(self._start, timeout)

    def stop_blocking(self) -> None:
        """Disconnect from a thread without a loop."""
        self._io().run_blocking(self._stop)

    def _io(self) -> IOThread:
        """Return the process's I/O thread; in a forked child all that was started is gone."""
        thread = io_thread()
        if thread is not self._thread:
            self._thread, self._client, self._entered = thread, None, 0
            self._changing = asyncio.Lock()
        return thread

    async def _start(self, timeout: float) -> None:
        async with self._changing:
            if self._client is None:
                client = Client(self.name, self.broker, self.storage)
                await client.start(asyncio.get_running_loop().time() + timeout)
                self._client = client
            self._entered += 1

    async def _stop(self) -> None:
        async with self._changing:
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
            atexit.register(self._close_at_exit)
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
            atexit.register(self._close_at_exit)
            thread, client = self._client_now()
        if client is None:
            raise self._not_started()
        return thread, client

    def _not_started(self) -> Closed:
        return Closed(
            f"the app {self.name!r} is not started; use it inside 'async with app:' "
            "(or 'with app:'), or in a task that its worker runs"
        )

    def _close_at_exit(self) -> None:
        thread, client = self._client_now()
        if client is not None:
            thread.run_blocking(self._stop)
