"""The asynchronous face: `from qtasks.asyncio import QueueTasks`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from qtasks.app import MAX_PAYLOAD, App, default_app
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.declare.calls import AsyncCall
from qtasks.declare.handle import Task
from qtasks.declare.routers import AsyncRouter, Router
from qtasks_core import Broker, Plugin, Storage

__all__ = ["AsyncResult", "QueueTasks"]


class QueueTasks(App):
    """An app for async code. Use it as `async with app:`, `async with app.worker():` or
    `app.run_forever()`; the arguments are those of `App`.
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
        """Connect both parts; nested starts count. Raises `Unavailable` after `timeout` seconds."""
        await self.start_async(timeout)

    async def stop(self) -> None:
        """Disconnect with the last of nested stops."""
        await self.stop_async()

    async def __aenter__(self) -> QueueTasks:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def add_tasks(self, calls: Iterable[AsyncCall[Any]]) -> list[Task[Any]]:
        """Enqueue calls of any tasks, in few round trips; return a `new` handle for each."""
        calls = list(calls)
        records = await self.submit_all([call.message(self) for call in calls])
        return [
            Task(self, record, call.definition.decode_result)
            for call, record in zip(calls, records, strict=True)
        ]

    async def get_task(self, uuid: str | UUID) -> Task[Any] | None:
        """Return a handle with the newest record of a task, None where there is none."""
        record = await self.get(uuid)
        return None if record is None else Task(self, record, self.decoder_of(record))

    async def cancel(self, uuid: str | UUID) -> bool:
        """Cancel a task, queued or running; False: it had ended by itself before.

        Raises `UnknownTask`.
        """
        return await self.cancel_task(uuid)


class AsyncResult:
    """Waits for a task of which only the uuid is known."""

    def __init__(self, uuid: str | UUID, app: App | None = None) -> None:
        self.uuid = str(uuid)
        self._app = app or default_app()

    async def wait_result(self, timeout: float | None = None) -> Task[Any]:
        """Return the finished task. Raises `TaskTimeout` after `timeout` seconds."""
        record = await self._app.wait(self.uuid, timeout)
        return Task(self._app, record, self._app.decoder_of(record))
