"""What decorators return: tasks that can be called, enqueued one by one, or many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Generic, ParamSpec, TypeVar

from qtasks.app import App
from qtasks.declare.calls import AsyncCall, Owner, SyncCall, message_of
from qtasks.declare.handle import BlockingTask, Task
from qtasks.execution.definition import TaskDefinition

P = ParamSpec("P")
R = TypeVar("R")
"""What a finished task returns."""
C = TypeVar("C")
"""What a call here and now gives: R of a plain function, a coroutine of it of an async one."""


class FixedApp:
    """The owner of a task that was told its app."""

    def __init__(self, app: App) -> None:
        self._app = app

    def find_app(self) -> App:
        """Return that app."""
        return self._app


class BaseTask(Generic[P, R, C]):
    """A registered function; calling it runs it here and now, as if it were not decorated."""

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
        """The name under which workers know it."""
        return self.definition.name


class AsyncTask(BaseTask[P, R, C]):
    """A task of the asynchronous face; its function may be a coroutine function or a plain one."""

    def using(self, app: App) -> AsyncTask[P, R, C]:
        """Return this task bound to an app."""
        return AsyncTask(self._function, self.definition, FixedApp(app))

    def call(self, *args: P.args, **kwargs: P.kwargs) -> AsyncCall[R]:
        """Return a call, its arguments checked by the type checker."""
        return AsyncCall(self.definition, self._owner, args, kwargs)

    async def add_task(
        self,
        *args: Any,
        timeout: float | None = None,
        delay: float | None = None,
        eta: datetime | None = None,
        queue: str | None = None,
        priority: int | None = None,
        expires: float | None = None,
        key: str | None = None,
        **kwargs: Any,
    ) -> Task[R]:
        """Enqueue a call with these arguments; the options are those of `AsyncCall.add_task`."""
        call: AsyncCall[R] = AsyncCall(self.definition, self._owner, args, kwargs)
        return await call.add_task(
            timeout=timeout,
            delay=delay,
            eta=eta,
            queue=queue,
            priority=priority,
            expires=expires,
            key=key,
        )

    async def map(self, arguments: Iterable[Sequence[Any]]) -> list[Task[R]]:
        """Enqueue one call for each sequence of positional arguments, in few round trips."""
        app = self._owner.find_app()
        messages = [message_of(app, self.definition, args, {}) for args in arguments]
        records = await app.submit_all(messages)
        return [Task(app, record, self.definition.decode_result) for record in records]


class SyncTask(BaseTask[P, R, C]):
    """A task of the blocking face; its function may be a plain one or a coroutine function."""

    def using(self, app: App) -> SyncTask[P, R, C]:
        """Return this task bound to an app."""
        return SyncTask(self._function, self.definition, FixedApp(app))

    def call(self, *args: P.args, **kwargs: P.kwargs) -> SyncCall[R]:
        """Return a call, its arguments checked by the type checker."""
        return SyncCall(self.definition, self._owner, args, kwargs)

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
        **kwargs: Any,
    ) -> BlockingTask[R]:
        """Enqueue a call with these arguments; the options are those of `SyncCall.add_task`."""
        call: SyncCall[R] = SyncCall(self.definition, self._owner, args, kwargs)
        return call.add_task(
            timeout=timeout,
            delay=delay,
            eta=eta,
            queue=queue,
            priority=priority,
            expires=expires,
            key=key,
        )

    def map(self, arguments: Iterable[Sequence[Any]]) -> list[BlockingTask[R]]:
        """Enqueue one call for each sequence of positional arguments, in few round trips."""
        app = self._owner.find_app()
        messages = [message_of(app, self.definition, args, {}) for args in arguments]
        records = app.submit_all_blocking(messages)
        return [BlockingTask(app, record, self.definition.decode_result) for record in records]
