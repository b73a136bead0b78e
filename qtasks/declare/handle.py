"""Handles: the record of one task, with the result typed as the function annotates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qtasks.bridge.crossing import block_on
from qtasks.codec.serializers import MsgpackSerializer
from qtasks_core import Status, schemas
from qtasks_core.errors import TaskCancelled, TaskFailed, TaskNotFinished

if TYPE_CHECKING:
    from qtasks.app import App

R = TypeVar("R")
_untyped = MsgpackSerializer()


class Handle(Generic[R]):
    """One task, as its record was when this handle was made.

    A handle does not change. `wait_result` and `get_task` return a newer one. Times are Unix times
    in seconds.
    """

    def __init__(self, app: App, record: schemas.Task, decode: Callable[[Any], R]) -> None:
        self._app = app
        self._decode = decode
        self.record = record

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uuid} {self.task_name} {self.status}>"

    @property
    def uuid(self) -> str:
        return self.record.uuid

    @property
    def task_name(self) -> str:
        return self.record.task_name

    @property
    def status(self) -> Status:
        return self.record.status

    @property
    def queue(self) -> str:
        return self.record.queue

    @property
    def priority(self) -> int:
        return self.record.priority

    @property
    def attempt(self) -> int:
        return self.record.attempt

    @property
    def created_at(self) -> float:
        return self.record.created_at

    @property
    def started_at(self) -> float | None:
        return self.record.started_at

    @property
    def finished_at(self) -> float | None:
        return self.record.finished_at

    @property
    def error(self) -> str | None:
        """The type and the message of the exception, in one line."""
        return self.record.error

    @property
    def traceback(self) -> str | None:
        """The traceback of the exception in the worker."""
        return self.record.traceback

    @property
    def dead(self) -> str | None:
        """Why a failed task is not retried: it is a dead letter."""
        return self.record.dead

    @property
    def args(self) -> list[Any]:
        """The positional arguments, decoded without the function's annotations."""
        return _untyped.decoder(Any)(self.record.args) if self.record.args else []

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments, decoded without the function's annotations."""
        return _untyped.decoder(Any)(self.record.kwargs) if self.record.kwargs else {}

    @property
    def finished(self) -> bool:
        """Whether the status is final: `success`, `error` or `cancel`."""
        return self.record.status in ("success", "error", "cancel")

    @property
    def returning(self) -> R:
        """The decoded result of the function; None if the task does not store its result.

        Raises `TaskFailed` (with the worker's traceback), `TaskCancelled` or `TaskNotFinished`.
        """
        record = self.record
        if record.status == "success":
            return self._decode(record.returning) if record.returning is not None else None  # type: ignore[return-value]
        if record.status == "error":
            raise TaskFailed(record)
        if record.status == "cancel":
            raise TaskCancelled(record)
        raise TaskNotFinished(f"task {record.task_name} {record.uuid} is in {record.status!r}")


class Task(Handle[R]):
    """The handle of a task in async code."""

    async def wait_result(self, timeout: float | None = None) -> Task[R]:
        """Wait until the task has finished; return a handle with its final record.

            finished = await task.wait_result(timeout=30)
            print(finished.returning)

        `timeout` is in seconds; None waits for ever. Raises `TaskTimeout` after that time: the
        task is not affected, and you may wait again.
        """
        if self.finished:
            return self
        return Task(self._app, await self._app.wait(self.uuid, timeout), self._decode)

    async def cancel(self) -> bool:
        """Cancel the task if it is queued or running.

        Returns False if it has already finished by itself. Raises `UnknownTask` if its record is
        gone, `Unavailable` if the servers do not answer for 10 seconds, and `Refused` if the
        storage does not accept the record.
        """
        return await self._app.cancel_task(self.uuid)


class BlockingTask(Handle[R]):
    """The handle of a task in blocking code."""

    def wait_result(self, timeout: float | None = None) -> BlockingTask[R]:
        """Block until the task has finished; return a handle with its final record.

            finished = task.wait_result(timeout=30)
            print(finished.returning)

        `timeout` is in seconds; None waits for ever. Raises `TaskTimeout` after that time: the
        task is not affected, and you may wait again.
        """
        if self.finished:
            return self
        record = block_on(self._app.wait, self.uuid, timeout)
        return BlockingTask(self._app, record, self._decode)

    def cancel(self) -> bool:
        """Cancel the task if it is queued or running.

        Returns False if it has already finished by itself. Raises `UnknownTask` if its record is
        gone, `Unavailable` if the servers do not answer for 10 seconds, and `Refused` if the
        storage does not accept the record.
        """
        return block_on(self._app.cancel_task, self.uuid)
