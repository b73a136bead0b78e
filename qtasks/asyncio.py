"""The asynchronous face: `from qtasks.asyncio import QueueTasks`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from qtasks.app import MAX_PAYLOAD, App, default_app
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.declare.handle import Task
from qtasks.declare.routers import AsyncRouter, Router
from qtasks.declare.tasks import AsyncCall
from qtasks_core import Broker, Plugin, Storage
from qtasks_core.separate import record_of

__all__ = ["AsyncResult", "QueueTasks"]


class QueueTasks(App):
    """An app for async code.

        app = QueueTasks("shop", "redis://localhost")

        @app.task()
        async def send(address: str) -> None: ...

        async with app:  # connected here
            await send.add_task("ann@example.com")

    `async with app.worker():` runs a worker in this process, `app.run_forever()` turns the process
    into one.

    `name`: apps of different names share nothing. `broker` and `storage`: a URL or an object; a
    broker's URL without a storage uses the same server for both. What is left out is read from
    `QTASKS_NAME`, `QTASKS_BROKER_URL` and `QTASKS_STORAGE_URL`, else it is an embedded SQLite file.
    `max_payload`: how many bytes arguments, and a result, may take. `plugins` are put around each
    task that the app's workers run, the first outermost. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        name: str | None = None,
        broker: Broker | str | None = None,
        storage: Storage | str | None = None,
        *,
        max_payload: int = MAX_PAYLOAD,
        plugins: Iterable[Plugin] = (),
    ) -> None:
        super().__init__(name, broker, storage, max_payload=max_payload, plugins=plugins)
        own = AsyncRouter()
        own.included_by(self)
        self.task = own.task
        """Declare a task of this app: `AsyncRouter.task`."""

    def include_router(self, router: Router) -> None:
        """Bring a router's tasks into this app. Raises `ConfigurationError` for a taken name."""
        router.included_by(self)

    async def start(self, timeout: float = START_TIMEOUT) -> None:
        """Connect broker and storage; nested starts count.

        Raises `Unavailable` after `timeout` seconds.
        """
        await self.connect(timeout)

    async def stop(self) -> None:
        """Disconnect with the last of nested stops."""
        await self.disconnect()

    async def __aenter__(self) -> QueueTasks:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def add_tasks(self, calls: Iterable[AsyncCall[Any]]) -> list[Task[Any]]:
        """Enqueue calls of any tasks, in few round trips; return a handle for each.

            tasks = await app.add_tasks([send.call(address) for address in addresses])

        The tasks are enqueued then, and not finished. Raises `Unavailable` or `Refused` when the
        broker has not confirmed all of them: some may be enqueued.
        """
        calls = list(calls)
        messages = [call.message(self) for call in calls]
        await self.submit_all(messages)
        return [
            Task(self, record_of(message), call.definition.decode_result)
            for call, message in zip(calls, messages, strict=True)
        ]

    async def get_task(self, uuid: str | UUID) -> Task[Any] | None:
        """Return a handle with the newest record of a task, None where there is none.

            task = await app.get_task(uuid)
            print(task and task.status)

        Raises `Unavailable` when the storage stays out of reach for 10 seconds.
        """
        record = await self.get(uuid)
        return None if record is None else Task(self, record, self.decoder_of(record))

    async def cancel(self, uuid: str | UUID) -> bool:
        """Cancel a task, queued or running; False: it had finished by itself before.

        Raises `UnknownTask`, and `Unavailable` when its servers stay out of reach for 10 seconds.
        """
        return await self.cancel_task(uuid)


class AsyncResult:
    """Waits for a task of which only the uuid is known; `app`: the default app."""

    def __init__(self, uuid: str | UUID, app: App | None = None) -> None:
        self.uuid = str(uuid)
        self._app = app or default_app()

    async def wait_result(self, timeout: float | None = None) -> Task[Any]:
        """Return the finished task. Raises `TaskTimeout` after `timeout` seconds."""
        record = await self._app.wait(self.uuid, timeout)
        return Task(self._app, record, self._app.decoder_of(record))
