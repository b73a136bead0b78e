"""Declared tasks and their calls: how the arguments of a function become a message."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, Generic, ParamSpec, Protocol, TypedDict, TypeVar, Unpack
from weakref import ref

from uuid_utils import uuid7

from qtasks.app import App, default_app
from qtasks.bridge.crossing import block_on
from qtasks.client.lifecycle import not_started
from qtasks.declare.handle import BlockingTask, Task
from qtasks.execution.definition import TaskDefinition
from qtasks_core import TaskMessage
from qtasks_core.errors import AmbiguousApp, ConfigurationError, PayloadTooLarge
from qtasks_core.names import checked_name, is_text
from qtasks_core.records import record_of
from qtasks_core.schemas import LONGEST

P = ParamSpec("P")
R = TypeVar("R")
"""The result type of a finished task."""
C = TypeVar("C")
"""What a direct call returns: R from a plain function, a coroutine of R from an async one."""
A = TypeVar("A")
"""What `add_task` returns: a handle, or a coroutine of one."""


class CallOptions(TypedDict, total=False):
    """Options of one call, beside `timeout`. None means the same as leaving the option out."""

    delay: float | None
    """Seconds until the task may run."""
    eta: datetime | None
    """The time from which the task may run, with a time zone. Use it instead of `delay`."""
    queue: str | None
    """The queue. By default the declared one."""
    priority: int | None
    """0 to 9; tasks with 9 run first. By default the declared one."""
    expires: float | None
    """Seconds from now. If a run would start later, the task finishes in `error` instead.

    Times are those of the broker's or the storage's clock. If neither has one, the sender and the
    worker each use the clock of their machine.
    """
    key: str | None
    """Makes enqueuing idempotent: only the first call of a task with a key enqueues it.

    This holds as long as the record is kept. Later calls return the existing record, whatever
    their arguments are.
    """


_LEFT_OUT = CallOptions(delay=None, eta=None, queue=None, priority=None, expires=None, key=None)
_each = itemgetter("delay", "eta", "queue", "priority", "expires", "key")
_NO_OPTIONS = _each(_LEFT_OUT)
"""Most calls have no option, and calls come by the thousand."""


class Owner(Protocol):
    """Finds the app of a task: a router does, or an app that was given to `using`."""

    def find_app(self) -> App:
        """Return the app that enqueues the task."""


class Call(Generic[R]):
    """A task with its arguments, not enqueued yet."""

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

    def message(self, app: App, **options: Unpack[CallOptions]) -> TaskMessage:
        """Return the message of this call."""
        return message_of(app, self.definition, self._args, self._kwargs, **options)


class AsyncCall(Call[R]):
    """A call that async code can enqueue."""

    async def add_task(
        self,
        *,
        timeout: float | None = None,
        transaction: object | None = None,
        **options: Unpack[CallOptions],
    ) -> Task[R]:
        """Enqueue this call. With `timeout` (seconds), wait for the task and return it finished.

        `CallOptions` explains the options, `AsyncTask.add_task` `transaction` and the errors.

            await send.call("ann@example.com").add_task(delay=60)
        """
        app = self.owner.find_app()
        message = self.message(app, **options)
        if transaction is None:
            record = await app.submit(message, timeout)
        elif timeout is not None:
            raise ConfigurationError(
                "timeout= and transaction= exclude each other: the task cannot start before the "
                "commit; after it, use wait_result(timeout)"
            )
        else:
            (record,) = await app.submit_within([message], transaction)
        return Task(app, record, self.definition.decode_result)


class SyncCall(Call[R]):
    """A call that blocking code can enqueue."""

    def add_task(
        self, *, timeout: float | None = None, **options: Unpack[CallOptions]
    ) -> BlockingTask[R]:
        """Enqueue this call. With `timeout` (seconds), wait for the task and return it finished.

        `CallOptions` explains the options. Raises the errors of `SyncTask.add_task`.

            send.call("ann@example.com").add_task(delay=60)
        """
        app = self.owner.find_app()
        record = block_on(app.submit, self.message(app, **options), timeout)
        return BlockingTask(app, record, self.definition.decode_result)


class Inclusions:
    """The apps of this process that have included one router."""

    def __init__(self) -> None:
        self._apps: list[ref[App]] = []
        self._last: str | None = None
        """The name of the app that was added last."""

    def add(self, app: App) -> None:
        """Add an app."""
        self._apps = [*(ref(known) for known in self if known is not app), ref(app)]
        self._last = app.name

    def __iter__(self) -> Iterator[App]:
        return iter([app for known in self._apps if (app := known()) is not None])

    def find_app(self) -> App:
        """Return the app that has included the router, or the default app if none ever has.

        If several apps have included it, stopped ones do not count, unless all are stopped.
        Raises `AmbiguousApp` if several apps count. Raises `Closed` if all apps that have included
        it are stopped and garbage-collected.
        """
        if len(self._apps) == 1 and (only := self._apps[0]()) is not None:
            return only
        apps = list(self)
        # A test may build an app and stop it; the garbage collector has not removed it yet.
        claiming = [app for app in apps if app.claims_routers] or apps[:1]
        if len(claiming) > 1:
            names = ", ".join(sorted(repr(app.name) for app in claiming))
            raise AmbiguousApp(f"several apps included this router ({names}): task.using(app)")
        if claiming:
            return claiming[0]
        if self._last is not None:
            # Not the default app: then the choice would depend on when the garbage collector runs.
            raise not_started(self._last)
        return default_app()


class FixedApp:
    """The owner of a task that is bound to one app."""

    def __init__(self, app: App) -> None:
        self._app = app

    def find_app(self) -> App:
        """Return the app."""
        return self._app


class BaseTask(ABC, Generic[P, R, C, A]):
    """A registered function. A direct call runs it in the caller, as without the decorator."""

    def __init__(self, function: Callable[P, C], definition: TaskDefinition, owner: Owner) -> None:
        self._function = function
        self.definition = definition
        self._owner = owner
        self.__name__ = getattr(function, "__name__", definition.name)
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C:
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    @property
    def name(self) -> str:
        """The name of the task, by which workers find its function."""
        return self.definition.name

    def add_task(
        self,
        *args: Any,
        timeout: float | None = None,
        delay: float | None = None,
        eta: datetime | None = None,
        queue: str | None = None,
        priority: int | None = None,
        expires: float | None = None,
        key: str | None = None,
        transaction: object | None = None,
        **kwargs: Any,
    ) -> A:
        """Enqueue a call with these arguments.

            task = await send.add_task("ann@example.com")  # enqueued, not finished
            task = await send.add_task("ann@example.com", timeout=5)  # finished
            print(task.returning)

        In blocking code leave `await` out. `timeout` is in seconds; it covers enqueuing and
        waiting. `CallOptions` explains the other options. If a parameter of the function has the
        name of an option, write `send.call(…).add_task(…)`.

        `transaction` enqueues the task in your own database transaction, if the broker and the
        storage are PostgreSQL on that database: a connection of asyncpg or an async one of psycopg,
        with an open transaction, or an async session or connection of SQLAlchemy on one of these.
        The task exists from the commit on, and not at all after a rollback. Other brokers raise
        `NotSupported`.

        Raises `TaskTimeout` if the task has not finished in time; the task is not affected. Raises
        `Unavailable` if the broker has not confirmed the task in time (without `timeout`: 30
        seconds); it may or may not be enqueued. Raises `Refused` if the broker refuses it. Raises
        `SignatureMismatch`, `SerializationError`, `PayloadTooLarge` or `ConfigurationError` for
        wrong arguments or options.
        """
        options = CallOptions(
            delay=delay, eta=eta, queue=queue, priority=priority, expires=expires, key=key
        )
        return self._add(args, kwargs, timeout, transaction, options)

    @abstractmethod
    def _add(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        timeout: float | None,
        transaction: object | None,
        options: CallOptions,
    ) -> A:
        """Enqueue a call with these arguments."""

    def _messages(self, app: App, arguments: Iterable[Sequence[Any]]) -> list[TaskMessage]:
        return [message_of(app, self.definition, args, {}) for args in arguments]


class AsyncTask(BaseTask[P, R, C, Coroutine[Any, Any, Task[R]]]):
    """A task for async code. Its function may be async or plain."""

    def using(self, app: App) -> AsyncTask[P, R, C]:
        """Return this task bound to an app, for routers that several apps have included."""
        return AsyncTask(self._function, self.definition, FixedApp(app))

    def call(self, *args: P.args, **kwargs: P.kwargs) -> AsyncCall[R]:
        """Return a call with these arguments, for `add_task` and `add_tasks`.

        Type checkers check the arguments. Nothing is enqueued yet.
        """
        return AsyncCall(self.definition, self._owner, args, kwargs)

    def _add(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        timeout: float | None,
        transaction: object | None,
        options: CallOptions,
    ) -> Coroutine[Any, Any, Task[R]]:
        call: AsyncCall[R] = AsyncCall(self.definition, self._owner, args, kwargs)
        return call.add_task(timeout=timeout, transaction=transaction, **options)

    async def map(
        self, arguments: Iterable[Sequence[Any]], *, transaction: object | None = None
    ) -> list[Task[R]]:
        """Enqueue one call for each sequence of positional arguments, in few round trips.

            tasks = await add.map([(1, 2), (3, 4)])

        The returned tasks are enqueued, not finished. Raises `Unavailable` or `Refused` if the
        broker has not confirmed all of them: then some may be enqueued. Raises
        `SignatureMismatch`, `SerializationError` or `PayloadTooLarge` for wrong arguments.
        `transaction` is that of `add_task`.
        """
        app = self._owner.find_app()
        messages = self._messages(app, arguments)
        if transaction is None:
            await app.submit_all(messages)
        else:
            await app.submit_within(messages, transaction)
        return [Task(app, record_of(m), self.definition.decode_result) for m in messages]


class SyncTask(BaseTask[P, R, C, BlockingTask[R]]):
    """A task for blocking code. Its function may be plain or async."""

    def using(self, app: App) -> SyncTask[P, R, C]:
        """Return this task bound to an app, for routers that several apps have included."""
        return SyncTask(self._function, self.definition, FixedApp(app))

    def call(self, *args: P.args, **kwargs: P.kwargs) -> SyncCall[R]:
        """Return a call with these arguments, for `add_task` and `add_tasks`.

        Type checkers check the arguments. Nothing is enqueued yet.
        """
        return SyncCall(self.definition, self._owner, args, kwargs)

    def _add(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        timeout: float | None,
        transaction: object | None,
        options: CallOptions,
    ) -> BlockingTask[R]:
        if transaction is not None:
            raise ConfigurationError(
                "transaction= is for async code: declare the task by AsyncRouter or "
                "qtasks.asyncio.QueueTasks"
            )
        call: SyncCall[R] = SyncCall(self.definition, self._owner, args, kwargs)
        return call.add_task(timeout=timeout, **options)

    def map(self, arguments: Iterable[Sequence[Any]]) -> list[BlockingTask[R]]:
        """Enqueue one call for each sequence of positional arguments, in few round trips.

            tasks = add.map([(1, 2), (3, 4)])

        The returned tasks are enqueued, not finished. Raises `Unavailable` or `Refused` if the
        broker has not confirmed all of them: then some may be enqueued. Raises
        `SignatureMismatch`, `SerializationError` or `PayloadTooLarge` for wrong arguments.
        """
        app = self._owner.find_app()
        messages = self._messages(app, arguments)
        block_on(app.submit_all, messages)
        return [BlockingTask(app, record_of(m), self.definition.decode_result) for m in messages]


def message_of(
    app: App,
    definition: TaskDefinition,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    **options: Unpack[CallOptions],
) -> TaskMessage:
    """Return the message of a call.

    With `key`, all calls of this task in this app with the same key have the same uuid.
    Raises `SignatureMismatch`, `SerializationError`, `PayloadTooLarge` or `ConfigurationError`.
    """
    chosen = _each({**_LEFT_OUT, **options}) if options else _NO_OPTIONS
    delay, eta, queue, priority, expires, key = chosen
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
    declared = definition.options
    if queue is not None:
        checked_name(queue, "a queue")
    elif isinstance(declared.queue, str):
        queue = declared.queue
    else:
        queue = app.routed(declared.queue, definition.bound(args, kwargs))
    now = time.time()
    message = TaskMessage(
        uuid=str(uuid7()) if key is None else app.uuid_of(definition.name, key),
        task_name=definition.name,
        queue=queue,
        args=encoded_args,
        kwargs=encoded_kwargs,
        encoding=definition.serializer.name,
        priority=declared.priority if priority is None else priority,
        delay=0.0 if delay is None and eta is None else _delay(delay, eta, now),
        created_at=now,
        expires_at=None if expires is None else now + expires,
        store_result=declared.store_result,
        retention=declared.retention,
        submission="" if key is None else str(uuid7()),
    )
    if priority is not None and priority not in range(10):
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
