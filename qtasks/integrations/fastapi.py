"""FastAPI (and Starlette): an app's life within the API's, and what failures are over HTTP.

api = FastAPI(lifespan=lifespan(app))
install_error_handlers(api)
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Lifespan, StatefulLifespan

from qtasks.app import App, default_app
from qtasks_core.errors import TaskCancelled, TaskFailed, TaskTimeout, Unavailable

__all__ = ["install_error_handlers", "lifespan"]

logger = logging.getLogger("qtasks")

A = TypeVar("A")


def lifespan(app: App | None = None, inner: Lifespan[A] | None = None) -> StatefulLifespan[A]:
    """Return a lifespan that starts `app` (the process's default app) and stops it at the end.

    `inner` is another lifespan, which runs within this one; what it yields is the API's state. A
    server that is out of reach fails the API's start with `Unavailable` instead of its requests.
    """

    @asynccontextmanager
    async def started(api: A) -> AsyncIterator[Mapping[str, Any]]:
        queue_app = app or default_app()
        await queue_app.start_async()
        try:
            if inner is None:
                yield {}
            else:
                async with inner(api) as state:
                    yield state or {}
        finally:
            await queue_app.stop_async()

    return started


def install_error_handlers(api: Starlette) -> None:
    """Answer 500 with the task's error where one failed, 504 past a timeout, 503 without a server.

    The body is JSON with `detail` and, where it is known, the task's `uuid`, by which the client
    can ask again: past a timeout the task goes on. Tracebacks and addresses of servers stay here.
    """
    api.add_exception_handler(TaskFailed, _failed)
    api.add_exception_handler(TaskCancelled, _failed)
    api.add_exception_handler(TaskTimeout, _late)
    api.add_exception_handler(Unavailable, _unavailable)


# What Starlette wants is a handler of any exception; it calls each with its own.


async def _failed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TaskFailed | TaskCancelled)
    record = error.record
    detail = record.error or "the task was cancelled"
    body = {"detail": detail, "uuid": record.uuid, "task_name": record.task_name}
    return JSONResponse(body, 500)


async def _late(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TaskTimeout)
    return JSONResponse({"detail": str(error), "uuid": error.uuid}, 504)


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.warning("%s %s: %s", request.method, request.url.path, error)
    return JSONResponse({"detail": "the task queue cannot be reached"}, 503)
