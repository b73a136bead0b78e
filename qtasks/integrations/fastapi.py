"""FastAPI (and Starlette): an app's life within the API's, and what failures are over HTTP.

api = FastAPI(lifespan=lifespan(app))
install_error_handlers(api)
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Lifespan, StatefulLifespan

from qtasks.app import App, default_app
from qtasks.control import workers
from qtasks_core.errors import (
    Closed,
    NotSupported,
    PayloadTooLarge,
    QTasksError,
    Refused,
    SerializationError,
    TaskCancelled,
    TaskFailed,
    TaskNotFinished,
    TaskTimeout,
    Unavailable,
    UnknownTask,
)

__all__ = ["install_error_handlers", "lifespan"]

logger = logging.getLogger("qtasks")

A = TypeVar("A")


def lifespan(app: App | None = None, inner: Lifespan[A] | None = None) -> StatefulLifespan[A]:
    """Return a lifespan that starts `app` (the process's default app) and stops it at the end.

    `inner` is another lifespan, which runs within this one; what it yields is the API's state. A
    server that is out of reach fails the API's start with `Unavailable` instead of its requests.
    The default app logs where it writes tasks to if no worker is there.
    """

    @asynccontextmanager
    async def started(api: A) -> AsyncIterator[Mapping[str, Any]]:
        queue_app = app or default_app()
        await queue_app.connect()
        try:
            if app is None:
                await _warn_of_no_worker(queue_app)
            if inner is None:
                yield {}
            else:
                async with inner(api) as state:
                    yield state or {}
        finally:
            await queue_app.disconnect()

    return started


async def _warn_of_no_worker(app: App) -> None:
    """Log that no worker takes the tasks of a default app, whose broker no code has named."""
    with suppress(NotSupported, Unavailable):
        if not await app.control(workers):
            logger.warning(
                "no worker of the app %r is alive at %s: tasks wait until one starts there",
                app.name, app.addresses()[0],
            )  # fmt: skip


def install_error_handlers(api: Starlette) -> None:
    """Answer requests whose endpoint raised an error of QTasks: a status that fits, and JSON.

    The body has `detail` and, where it is known, the task's `uuid`, by which the client can ask
    again: past a timeout the task goes on. Tracebacks and addresses of servers go to the log alone.
    """
    api.add_exception_handler(TaskFailed, _failed)
    api.add_exception_handler(TaskCancelled, _failed)
    for error, status, detail in ANSWERS:
        api.add_exception_handler(error, _answering(status, detail))


ANSWERS: tuple[tuple[type[QTasksError], int, str | None], ...] = (
    (TaskTimeout, 504, None),
    (Unavailable, 503, "the task queue cannot be reached"),
    (Closed, 503, "the task queue is not started"),
    (NotSupported, 501, None),
    (UnknownTask, 404, None),
    (TaskNotFinished, 409, None),
    (PayloadTooLarge, 413, None),
    (SerializationError, 422, None),
    (Refused, 502, "the task queue does not take this task"),
    (QTasksError, 500, "the task queue has failed"),
)
"""Errors, the status of their answer and its `detail`; None: what the error says. The last one is
for all others: a wrong configuration, a call that does not fit the task."""

Handler: TypeAlias = Callable[[Request, Exception], Awaitable[JSONResponse]]


async def _failed(_: Request, error: Exception) -> JSONResponse:
    # Starlette wants a handler of any exception; it calls each with its own.
    assert isinstance(error, TaskFailed | TaskCancelled)
    record = error.record
    detail = record.error or "the task was cancelled"
    body = {"detail": detail, "uuid": record.uuid, "task_name": record.task_name}
    return JSONResponse(body, 500)


def _answering(status: int, detail: str | None) -> Handler:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        if status >= 500:
            # Where it was raised matters only when it should not have been.
            logger.log(
                logging.ERROR if status == 500 else logging.WARNING,
                "%s %s: %s",
                request.method, request.url.path, error,
                exc_info=error if status == 500 else None,
            )  # fmt: skip
        # `args` are what the error says without the address of a server.
        told = str(error.args[0]) if error.args else type(error).__name__
        body = {"detail": told if detail is None else detail}
        if isinstance(error, TaskTimeout) and error.uuid is not None:
            body["uuid"] = error.uuid
        return JSONResponse(body, status)

    return answer
