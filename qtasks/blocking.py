"""The blocking face: `from qtasks import QueueTasks`. Thin: each call blocks on the crossing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

from qtasks.app import MAX_PAYLOAD, App, default_app
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.declare.calls import SyncCall
from qtasks.declare.handle import BlockingTask
from qtasks.declare.routers import Router, SyncRouter
from qtasks_core import Broker, Plugin, Storage


class QueueTasks(App):
    """An app for blocking code. Use it as `with app:` or `app.run_forever()`; the arguments are
    those of `App`. Inside a running event loop its calls raise and name the asynchronous face.
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
        """Connect both parts; nested starts count. Raises `Unavailable` after `timeout` seconds."""
        self.start_blocking(timeout)

    def stop(self) -> None:
        """Disconnect with the last of nested stops."""
        self.stop_blocking()

    def __enter__(self) -> QueueTasks:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_tasks(self, calls: Iterable[SyncCall[Any]]) -> list[BlockingTask[Any]]:
        """Enqueue calls of any tasks, in few round trips; return a `new` handle for each."""
        calls = list(calls)
        records = self.submit_all_blocking([call.message(self) for call in calls])
        return [
            BlockingTask(self, record, call.definition.decode_result)
            for call, record in zip(calls, records, strict=True)
        ]

    def get_task(self, uuid: str | UUID) -> BlockingTask[Any] | None:
        """Return a handle with the newest record of a task, None where there is none."""
        record = self.get_blocking(uuid)
        return None if record is None else BlockingTask(self, record, self.decoder_of(record))

    def cancel(self, uuid: str | UUID) -> bool:
        """Cancel a task, queued or running; False: it had ended by itself before.

        Raises `UnknownTask`.
        """
        return self.cancel_task_blocking(uuid)


class SyncResult:
    """Waits for a task of which only the uuid is known."""

    def __init__(self, uuid: str | UUID, app: App | None = None) -> None:
        self.uuid = str(uuid)
        self._app = app or default_app()

    def wait_result(self, timeout: float | None = None) -> BlockingTask[Any]:
        """Return the finished task. Raises `TaskTimeout` after `timeout` seconds."""
        record = self._app.wait_blocking(self.uuid, timeout)
        return BlockingTask(self._app, record, self._app.decoder_of(record))
