"""Routers: they declare tasks without an app, which includes them later."""

from __future__ import annotations

from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from typing import Any, Protocol, TypedDict, TypeVar, Unpack, cast, overload

from qtasks.app import App
from qtasks.declare.tasks import AsyncTask, Inclusions, P, SyncTask
from qtasks.execution.definition import TaskDefinition, TaskOptions, checked_plugins
from qtasks.execution.requires import Requires
from qtasks_core import Executor, Plugin, RoutePolicy
from qtasks_core.errors import ConfigurationError

R = TypeVar("R")
T = TypeVar("T")
"""The type of the values that a generator yields."""
H = TypeVar("H")
"""The type that a `generate_handler` returns."""


class Options(TypedDict, total=False):
    """The options of a task as keyword arguments. `TaskOptions` explains each."""

    queue: str | RoutePolicy
    priority: int
    retry: int | None
    store_result: bool
    retention: float | None
    max_time: float | None
    executor: Executor | None
    plugins: Sequence[Plugin]
    requires: Requires


class AsyncDecorator(Protocol):
    """Turns an async or plain function into an `AsyncTask` with the same result type."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self, function: Callable[P, AsyncIterator[T]], /
    ) -> AsyncTask[P, list[T], AsyncIterator[T]]: ...
    @overload
    def __call__(
        self, function: Callable[P, Iterator[T]], /
    ) -> AsyncTask[P, list[T], Iterator[T]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> AsyncTask[P, R, R]: ...


class SyncDecorator(Protocol):
    """Turns a plain or async function into a `SyncTask` with the same result type."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> SyncTask[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self, function: Callable[P, AsyncIterator[T]], /
    ) -> SyncTask[P, list[T], AsyncIterator[T]]: ...
    @overload
    def __call__(
        self, function: Callable[P, Iterator[T]], /
    ) -> SyncTask[P, list[T], Iterator[T]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R, R]: ...


class AsyncGeneratorDecorator(Protocol[H]):
    """Turns a generator function with a `generate_handler` into an `AsyncTask`."""

    @overload
    def __call__(
        self, function: Callable[P, AsyncIterator[T]], /
    ) -> AsyncTask[P, list[H], AsyncIterator[T]]: ...
    @overload
    def __call__(
        self, function: Callable[P, Iterator[T]], /
    ) -> AsyncTask[P, list[H], Iterator[T]]: ...


class SyncGeneratorDecorator(Protocol[H]):
    """Turns a generator function with a `generate_handler` into a `SyncTask`."""

    @overload
    def __call__(
        self, function: Callable[P, AsyncIterator[T]], /
    ) -> SyncTask[P, list[H], AsyncIterator[T]]: ...
    @overload
    def __call__(
        self, function: Callable[P, Iterator[T]], /
    ) -> SyncTask[P, list[H], Iterator[T]]: ...


class Router:
    """Task definitions, and the apps that have included them.

    `plugins` run around each task, inside the app's plugins; the first is the outermost. Raises
    `ConfigurationError` if one of them is not a plugin.
    """

    def __init__(self, *, plugins: Iterable[Plugin] = ()) -> None:
        self.plugins = checked_plugins(plugins)
        self.definitions: list[TaskDefinition] = []
        self._inclusions = Inclusions()

    def included_by(self, app: App) -> None:
        """Register all tasks with an app, also those that are declared later.

        Raises `ConfigurationError` if two functions have the same task name.
        """
        self._inclusions.add(app)
        for definition in self.definitions:
            app.register(definition)

    def define(
        self, function: Callable[..., Any], name: str | None, options: TaskOptions
    ) -> TaskDefinition:
        """Add a task to this router, and to the apps that have included it."""
        definition = TaskDefinition(function, name, options, plugins=self.plugins)
        self.definitions.append(definition)
        for app in self._inclusions:
            app.register(definition)
        return definition


def _refuse_bare(name: object) -> None:
    # Without parentheses the function would be taken for the name, and no task would be declared.
    if callable(name):
        called = getattr(name, "__qualname__", "the task")
        raise ConfigurationError(f"{called}: the decorator needs its parentheses: @….task()")


class AsyncRouter(Router):
    """Declares tasks for async code. `include_router` adds them to an app.

        router = AsyncRouter()

        @router.task()
        async def send(address: str) -> None: ...

        app.include_router(router)

    Several apps may include one router. Then call `send.using(app).add_task(…)`.
    """

    @overload
    def task(
        self,
        name: str | None = None,
        *,
        generate_handler: Callable[[Any], Awaitable[T]],
        **options: Unpack[Options],
    ) -> AsyncGeneratorDecorator[T]: ...
    @overload
    def task(
        self,
        name: str | None = None,
        *,
        generate_handler: Callable[[Any], T],
        **options: Unpack[Options],
    ) -> AsyncGeneratorDecorator[T]: ...
    @overload
    def task(self, name: str | None = None, **options: Unpack[Options]) -> AsyncDecorator: ...
    def task(
        self,
        name: str | None = None,
        *,
        generate_handler: Callable[[Any], Any] | None = None,
        **options: Unpack[Options],
    ) -> AsyncDecorator | AsyncGeneratorDecorator[Any]:
        """Declare a task. Write the parentheses even without arguments.

            @app.task(queue="mail", retry=3)
            async def send(address: str) -> None: ...

        `name`: the name of the task, by default `module.qualname` of the function.
        `generate_handler`: is called with each value that a generator function yields; the result
        is the list of its answers. `TaskOptions` explains the other options.

        Raises `ConfigurationError` for wrong options, and for a name that another function has.
        """
        _refuse_bare(name)
        chosen = TaskOptions(generate_handler=generate_handler, **options)

        def decorate(function: Callable[..., Any]) -> AsyncTask[..., Any, Any]:
            return AsyncTask(function, self.define(function, name, chosen), self._inclusions)

        return cast(AsyncDecorator, decorate)


class SyncRouter(Router):
    """Declares tasks for blocking code. `include_router` adds them to an app.

        router = SyncRouter()

        @router.task()
        def send(address: str) -> None: ...

        app.include_router(router)

    Several apps may include one router. Then call `send.using(app).add_task(…)`.
    """

    @overload
    def task(
        self,
        name: str | None = None,
        *,
        generate_handler: Callable[[Any], Awaitable[T]],
        **options: Unpack[Options],
    ) -> SyncGeneratorDecorator[T]: ...
    @overload
    def task(
        self,
        name: str | None = None,
        *,
        generate_handler: Callable[[Any], T],
        **options: Unpack[Options],
    ) -> SyncGeneratorDecorator[T]: ...
    @overload
    def task(self, name: str | None = None, **options: Unpack[Options]) -> SyncDecorator: ...
    def task(
        self,
        name: str | None = None,
        *,
        generate_handler: Callable[[Any], Any] | None = None,
        **options: Unpack[Options],
    ) -> SyncDecorator | SyncGeneratorDecorator[Any]:
        """Declare a task. Write the parentheses even without arguments.

            @app.task(queue="mail", retry=3)
            def send(address: str) -> None: ...

        `name`: the name of the task, by default `module.qualname` of the function.
        `generate_handler`: is called with each value that a generator function yields; the result
        is the list of its answers. `TaskOptions` explains the other options.

        Raises `ConfigurationError` for wrong options, and for a name that another function has.
        """
        _refuse_bare(name)
        chosen = TaskOptions(generate_handler=generate_handler, **options)

        def decorate(function: Callable[..., Any]) -> SyncTask[..., Any, Any]:
            return SyncTask(function, self.define(function, name, chosen), self._inclusions)

        return cast(SyncDecorator, decorate)
