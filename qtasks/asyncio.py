"""The async face: `from qtasks.asyncio import QueueTasks`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from qtasks.app import MAX_PAYLOAD, App, default_app
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.declare.handle import Task
from qtasks.declare.routers import AsyncRouter, Router
from qtasks.declare.tasks import AsyncCall
from qtasks.execution.requires import NOTHING, Requires
from qtasks_core import Broker, Plugin, Storage
from qtasks_core.records import record_of

__all__ = ["AsyncResult", "QueueTasks"]


class QueueTasks(App):
    """An app for async code.

        app = QueueTasks("shop", "redis://localhost")

        @app.task()
        async def send(address: str) -> None: ...

        async with app:  # connected here
            await send.add_task("ann@example.com")

    `async with app.worker():` runs a worker on your loop. `app.run_forever()` makes the whole
    process a worker.

    `name`: apps with different names share nothing.
    `broker` and `storage`: a URL or an object. A broker's URL without a storage uses the same
    server for both. Without arguments, the app reads `QTASKS_NAME`, `QTASKS_BROKER_URL` and
    `QTASKS_STORAGE_URL`. If they are not set either, it uses an embedded SQLite file.
    `max_payload`: most bytes of the encoded arguments of a call, and of a result.
    `plugins` run around each task that the app's workers run; the first is the outermost.
    `requires`: what the broker and the storage must guarantee, or the app does not start.

    Raises `ConfigurationError`.
    """

    def __init__(
        self,
        name: str | None = None,
        broker: Broker | str | None = None,
        storage: Storage | str | None = None,
        *,
        max_payload: int = MAX_PAYLOAD,
        plugins: Iterable[Plugin] = (),
        requires: Requires = NOTHING,
    ) -> None:
        super().__init__(
            name, broker, storage, max_payload=max_payload, plugins=plugins, requires=requires
        )
        own = AsyncRouter()
        own.included_by(self)
        self.task = own.task
        """The decorator that declares a task of this app: see `AsyncRouter.task`."""

    def include_router(self, router: Router) -> None:
        """Add the tasks of a router to this app.

        Raises `ConfigurationError` if two functions have the same task name.
        """
        router.included_by(self)

    async def start(self, timeout: float = START_TIMEOUT) -> None:
        """Connect the broker and the storage. Starts may be nested: only the last `stop` closes.

        Raises `Unavailable` if they do not answer within `timeout` seconds.
        """
        await self.connect(timeout)

    async def stop(self) -> None:
        """Disconnect, once `stop` was called as often as `start`."""
        await self.disconnect()

    async def __aenter__(self) -> QueueTasks:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def add_tasks(
        self, calls: Iterable[AsyncCall[Any]], *, transaction: object | None = None
    ) -> list[Task[Any]]:
        """Enqueue calls of any tasks in few round trips, and return a handle for each.

            tasks = await app.add_tasks([send.call(address) for address in addresses])

        The returned tasks are enqueued, not finished. Raises `Unavailable` or `Refused` if the
        broker has not confirmed all of them: then some may be enqueued. `transaction` is that of
        `AsyncTask.add_task`: all tasks are enqueued at its commit, or none.
        """
        calls = list(calls)
        messages = [call.message(self) for call in calls]
        if transaction is None:
            await self.submit_all(messages)
            records = [record_of(message) for message in messages]
        else:
            records = await self.submit_within(messages, transaction)
        return [
            Task(self, record, call.definition.decode_result)
            for call, record in zip(calls, records, strict=True)
        ]

    async def get_task(self, uuid: str | UUID) -> Task[Any] | None:
        """Return a handle with the newest record of a task, or None if it has no record.

            task = await app.get_task(uuid)
            print(task and task.status)

        Raises `Unavailable` if the storage does not answer for 10 seconds.
        """
        record = await self.get(uuid)
        return None if record is None else Task(self, record, self.decoder_of(record))

    async def cancel(self, uuid: str | UUID) -> bool:
        """Cancel a queued or running task. Return False if it has already finished by itself.

            await app.cancel(task.uuid)

        Raises `UnknownTask` if it has no record, `Unavailable` if the servers do not answer for 10
        seconds, and `Refused` if the storage does not accept the record.
        """
        return await self.cancel_task(uuid)


class AsyncResult:
    """Waits for a task when you only know its uuid.

        finished = await AsyncResult(uuid, app).wait_result(timeout=30)

    Without `app` it uses the default app of the process.
    """

    def __init__(self, uuid: str | UUID, app: App | None = None) -> None:
        self.uuid = str(uuid)
        self._app = app or default_app()

    async def wait_result(self, timeout: float | None = None) -> Task[Any]:
        """Wait for the task and return a handle with its final record.

        Raises `TaskTimeout` after `timeout` seconds; None waits for ever. Raises `UnknownTask` if
        the uuid is not valid.
        """
        record = await self._app.wait(self.uuid, timeout)
        return Task(self._app, record, self._app.decoder_of(record))
