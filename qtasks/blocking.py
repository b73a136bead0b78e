"""The blocking face: `from qtasks import QueueTasks`. Thin: each call blocks on a reply."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from qtasks.app import MAX_PAYLOAD, App, default_app
from qtasks.bridge.reply import block_on
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.declare.handle import BlockingTask
from qtasks.declare.routers import Router, SyncRouter
from qtasks.declare.tasks import SyncCall
from qtasks_core import Broker, Plugin, Storage
from qtasks_core.separate import record_of


class QueueTasks(App):
    """An app for blocking code. Inside a running event loop its calls raise `RuntimeError`.

        app = QueueTasks("shop", "redis://localhost")

        @app.task()
        def send(address: str) -> None: ...

        with app:  # connected here
            send.add_task("ann@example.com")

    `app.run_forever()` turns the process into a worker.

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
        own = SyncRouter()
        own.included_by(self)
        self.task = own.task
        """Declare a task of this app: `SyncRouter.task`."""

    def include_router(self, router: Router) -> None:
        """Bring a router's tasks into this app. Raises `ConfigurationError` for a taken name."""
        router.included_by(self)

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Connect broker and storage; nested starts count.

        Raises `Unavailable` after `timeout` seconds.
        """
        block_on(self.connect, timeout)

    def stop(self) -> None:
        """Disconnect with the last of nested stops."""
        block_on(self.disconnect)

    def __enter__(self) -> QueueTasks:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_tasks(self, calls: Iterable[SyncCall[Any]]) -> list[BlockingTask[Any]]:
        """Enqueue calls of any tasks, in few round trips; return a handle for each.

            tasks = app.add_tasks([send.call(address) for address in addresses])

        The tasks are enqueued then, and not finished. Raises `Unavailable` or `Refused` when the
        broker has not confirmed all of them: some may be enqueued.
        """
        calls = list(calls)
        messages = [call.message(self) for call in calls]
        block_on(self.submit_all, messages)
        return [
            BlockingTask(self, record_of(message), call.definition.decode_result)
            for call, message in zip(calls, messages, strict=True)
        ]

    def get_task(self, uuid: str | UUID) -> BlockingTask[Any] | None:
        """Return a handle with the newest record of a task, None where there is none.

            task = app.get_task(uuid)
            print(task and task.status)

        Raises `Unavailable` when the storage stays out of reach for 10 seconds.
        """
        record = block_on(self.get, uuid)
        return None if record is None else BlockingTask(self, record, self.decoder_of(record))

    def cancel(self, uuid: str | UUID) -> bool:
        """Cancel a task, queued or running; False: it had finished by itself before.

        Raises `UnknownTask`, and `Unavailable` when its servers stay out of reach for 10 seconds.
        """
        return block_on(self.cancel_task, uuid)


class SyncResult:
    """Waits for a task of which only the uuid is known; `app`: the default app."""

    def __init__(self, uuid: str | UUID, app: App | None = None) -> None:
        self.uuid = str(uuid)
        self._app = app or default_app()

    def wait_result(self, timeout: float | None = None) -> BlockingTask[Any]:
        """Return the finished task. Raises `TaskTimeout` after `timeout` seconds."""
        record = block_on(self._app.wait, self.uuid, timeout)
        return BlockingTask(self._app, record, self._app.decoder_of(record))
