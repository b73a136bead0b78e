"""Calls of tasks: arguments checked against a signature, and the message that carries them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

from uuid_utils import uuid7

from qtasks.app import App
from qtasks.declare.handle import BlockingTask, Task
from qtasks.execution.definition import TaskDefinition
from qtasks_core import TaskMessage
from qtasks_core.errors import ConfigurationError, PayloadTooLarge
from qtasks_core.names import checked_name, is_text
from qtasks_core.schemas import LONGEST

R = TypeVar("R")
"""What a finished task returns."""


class Owner(Protocol):
    """Whom a task asks for its app: an app itself, or a router."""

    def find_app(self) -> App:
        """Return the app to enqueue with."""


class Call(Generic[R]):
    """Arguments checked against a task, not yet enqueued."""

    def __init__(
        self,
        definition: TaskDefinition,
        owner: Owner,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.definition = definition
        self.owner = owner
        self._args = args
        self._kwargs = kwargs

    def message(self, app: App, **options: Any) -> TaskMessage:
        """Return the message of this call."""
        return message_of(app, self.definition, self._args, self._kwargs, **options)


class AsyncCall(Call[R]):
    """A call that an async caller can enqueue."""

    async def add_task(
        self,
        *,
        timeout: float | None = None,
        delay: float | None = None,
        eta: datetime | None = None,
        queue: str | None = None,
        priority: int | None = None,
        expires: float | None = None,
        key: str | None = None,
    ) -> Task[R]:
        """Enqueue. With `timeout` (seconds) return the finished task, else a `new` one.

        A run that would begin more than `expires` seconds from now ends in `error` instead; the
        worker compares its clock with the sender's, so they have to agree. Of all calls with one
        `key` only the first enqueues, as long as its record is kept: the others return what is
        there, whatever their arguments.
        Raises `TaskTimeout`, `Unavailable`, `Refused`, and what `message_of` raises.
        """
        app = self.owner.find_app()
        message = self.message(
            app, delay=delay, eta=eta, queue=queue, priority=priority, expires=expires, key=key
        )
        record = await app.submit(message, timeout)
        return Task(app, record, self.definition.decode_result)


class SyncCall(Call[R]):
    """A call that a blocking caller can enqueue."""

    def add_task(
        self,
        *,
        timeout: float | None = None,
        delay: float | None = None,
        eta: datetime | None = None,
        queue: str | None = None,
        priority: int | None = None,
        expires: float | None = None,
        key: str | None = None,
    ) -> BlockingTask[R]:
        """Enqueue. With `timeout` (seconds) return the finished task, else a `new` one."""
        app = self.owner.find_app()
        message = self.message(
            app, delay=delay, eta=eta, queue=queue, priority=priority, expires=expires, key=key
        )
        record = app.submit_blocking(message, timeout)
        return BlockingTask(app, record, self.definition.decode_result)


def message_of(
    app: App,
    definition: TaskDefinition,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    queue: str | None = None,
    priority: int | None = None,
    delay: float | None = None,
    eta: datetime | None = None,
    expires: float | None = None,
    key: str | None = None,
) -> TaskMessage:
    """Return the message of a call.

    With `key` its uuid is that of every call of this task, in this app, with that key.
    Raises `SignatureMismatch`, `SerializationError`, `PayloadTooLarge`, `ConfigurationError`.
    """
    encoded_args, encoded_kwargs = definition.encode(args, kwargs)
    size = len(encoded_args) + len(encoded_kwargs)
    if size > app.max_payload:
        raise PayloadTooLarge(
            f"{definition.name}: the arguments take {size} bytes, the limit is "
            f"{app.max_payload}; pass a reference, or raise max_payload of the app"
        )
    if key is not None and not (key and isinstance(key, str) and is_text(key)):
        raise ConfigurationError(
            f"key={key!r} is no text, or empty, or has a NUL or a lone surrogate: write it "
            "like key='order 7', or leave it out"
        )
    options = definition.options
    now = time.time()
    message = TaskMessage(
        uuid=str(uuid7()) if key is None else app.uuid_of(definition.name, key),
        task_name=definition.name,
        queue=options.queue if queue is None else checked_name(queue, "a queue"),
        args=encoded_args,
        kwargs=encoded_kwargs,
        encoding=definition.serializer.name,
        priority=options.priority if priority is None else priority,
        delay=_delay(delay, eta, now),
        created_at=now,
        expires_at=None if expires is None else now + expires,
        store_result=options.store_result,
        retention=options.retention,
        submission="" if key is None else str(uuid7()),
    )
    if message.priority not in range(10):
        raise ConfigurationError(f"priority={priority!r} is no whole number between 0 and 9")
    if expires is not None and not expires <= LONGEST:
        raise ConfigurationError(f"expires={expires} is not within {LONGEST:.0e} s from now")
    if expires is not None and expires <= message.delay:
        raise ConfigurationError(
            f"expires={expires}: the task would be due after {message.delay:.3f} s only"
        )
    return message


def _delay(delay: float | None, eta: datetime | None, now: float) -> float:
    if delay is not None and eta is not None:
        raise ConfigurationError("give delay= or eta=, not both")
    if eta is not None:
        if eta.tzinfo is None:
            raise ConfigurationError("eta= needs a time zone, e.g. datetime.now(UTC)")
        delay = eta.timestamp() - now
    if delay is not None and not -math.inf < delay <= LONGEST:
        given = f"delay={delay}" if eta is None else f"eta={eta}"
        raise ConfigurationError(f"{given} is not within {LONGEST:.0e} s from now")
    return max(0.0, delay or 0.0)
