"""The blocking face: `from qtasks import QueueTasks`. Each call blocks until its reply arrives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from qtasks.app import MAX_PAYLOAD, App, default_app
from qtasks.bridge.crossing import block_on
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.declare.handle import BlockingTask
from qtasks.declare.routers import Router, SyncRouter
from qtasks.declare.tasks import SyncCall
from qtasks.execution.requires import NOTHING, Requires
from qtasks_core import Broker, Plugin, Storage
from qtasks_core.records import record_of


class QueueTasks(App):
    """An app for blocking code. Its calls raise `RuntimeError` inside a running event loop.

        app = QueueTasks("shop", "redis://localhost")

        @app.task()
        def send(address: str) -> None: ...

        with app:  # connected here
            send.add_task("ann@example.com")

    `app.run_forever()` makes the process a worker.

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
        own = SyncRouter()
        own.included_by(self)
        self.task = own.task
        """The decorator that declares a task of this app: see `SyncRouter.task`."""

    def include_router(self, router: Router) -> None:
        """Add the tasks of a router to this app.

        Raises `ConfigurationError` if two functions have the same task name.
        """
        router.included_by(self)

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Connect the broker and the storage. Starts may be nested: only the last `stop` closes.

        Raises `Unavailable` if they do not answer within `timeout` seconds.
        """
        block_on(self.connect, timeout)

    def stop(self) -> None:
        """Disconnect, once `stop` was called as often as `start`."""
        block_on(self.disconnect)

    def __enter__(self) -> QueueTasks:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_tasks(self, calls: Iterable[SyncCall[Any]]) -> list[BlockingTask[Any]]:
        """Enqueue calls of any tasks in few round trips, and return a handle for each.

            tasks = app.add_tasks([send.call(address) for address in addresses])

        The returned tasks are enqueued, not finished. Raises `Unavailable` or `Refused` if the
        broker has not confirmed all of them: then some may be enqueued.
        """
        calls = list(calls)
        messages = [call.message(self) for call in calls]
        block_on(self.submit_all, messages)
        return [
            BlockingTask(self, record_of(message), call.definition.decode_result)
            for call, message in zip(calls, messages, strict=True)
        ]

    def get_task(self, uuid: str | UUID) -> BlockingTask[Any] | None:
        """Return a handle with the newest record of a task, or None if it has no record.

            task = app.get_task(uuid)
            print(task and task.status)

        Raises `Unavailable` if the storage does not answer for 10 seconds.
        """
        record = block_on(self.get, uuid)
        return None if record is None else BlockingTask(self, record, self.decoder_of(record))

    def cancel(self, uuid: str | UUID) -> bool:
        """Cancel a queued or running task. Return False if it has already finished by itself.

            app.cancel(task.uuid)

        Raises `UnknownTask` if it has no record, `Unavailable` if the servers do not answer for 10
        seconds, and `Refused` if the storage does not accept the record.
        """
        return block_on(self.cancel_task, uuid)


class SyncResult:
    """Waits for a task when you only know its uuid.

        finished = SyncResult(uuid, app).wait_result(timeout=30)

    Without `app` it uses the default app of the process.
    """

    def __init__(self, uuid: str | UUID, app: App | None = None) -> None:
        self.uuid = str(uuid)
        self._app = app or default_app()

    def wait_result(self, timeout: float | None = None) -> BlockingTask[Any]:
        """Wait for the task and return a handle with its final record.

        Raises `TaskTimeout` after `timeout` seconds; None waits for ever. Raises `UnknownTask` if
        the uuid is not valid.
        """
        record = block_on(self._app.wait, self.uuid, timeout)
        return BlockingTask(self._app, record, self._app.decoder_of(record))
