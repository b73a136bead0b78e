"""FastAPI and Starlette: starts and stops the app with the API, and turns errors into responses.

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
    """Return a lifespan that starts `app` with the API and stops it at the end.

        api = FastAPI(lifespan=lifespan(app))

    `app` is the process's default app unless you pass one. `inner` is your own lifespan: it runs
    while the app is started, and yields the API's state. If a server cannot be reached, the API
    does not start: `Unavailable` is raised. For the default app, a warning is logged if no worker
    is alive.
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
    """Log a warning if no worker is alive: the default app may use another broker than it does."""
    with suppress(NotSupported, Unavailable):
        if not await app.control(workers):
            logger.warning(
                "no worker of the app %r is alive at %s: tasks wait until one starts there",
                app.name, app.addresses()[0],
            )  # fmt: skip


def install_error_handlers(api: Starlette) -> None:
    """Turn errors of QTasks that an endpoint raises into JSON responses with a fitting status.

        install_error_handlers(api)

    For instance, `TaskTimeout` becomes 504 and `Unavailable` becomes 503. The body has `detail`,
    and the task's `uuid` if it is known. With it the client can ask again after a timeout: the task
    keeps running. Tracebacks and addresses of servers are only logged.
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
    (Refused, 502, "the task queue refused this task"),
    (QTasksError, 500, "the task queue has failed"),
)
"""The status and the `detail` for each class of errors; None: the message of the error. The last
entry is for all others, for instance a wrong configuration or arguments that do not fit the task.
"""

Handler: TypeAlias = Callable[[Request, Exception], Awaitable[JSONResponse]]


async def _failed(_: Request, error: Exception) -> JSONResponse:
    # The type is for any exception, but Starlette calls this only for the registered classes.
    assert isinstance(error, TaskFailed | TaskCancelled)
    record = error.record
    detail = record.error or "the task was cancelled"
    body = {"detail": detail, "uuid": record.uuid, "task_name": record.task_name}
    return JSONResponse(body, 500)


def _answering(status: int, detail: str | None) -> Handler:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        if status >= 500:
            # A traceback is useful only for an unexpected error.
            logger.log(
                logging.ERROR if status == 500 else logging.WARNING,
                "%s %s: %s",
                request.method, request.url.path, error,
                exc_info=error if status == 500 else None,
            )  # fmt: skip
        # `args[0]` is the message without the address of a server.
        message = str(error.args[0]) if error.args else type(error).__name__
        body = {"detail": message if detail is None else detail}
        if isinstance(error, TaskTimeout) and error.uuid is not None:
            body["uuid"] = error.uuid
        return JSONResponse(body, status)

    return answer
