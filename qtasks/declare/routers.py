"""Routers: tasks declared apart from any app."""

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
from qtasks_core import Executor, Plugin
from qtasks_core.errors import ConfigurationError

R = TypeVar("R")
T = TypeVar("T")
"""What a generator's result is a list of."""
H = TypeVar("H")
"""What a `generate_handler` makes of each yield."""


class Options(TypedDict, total=False):
    """Options of a task as keywords; `TaskOptions` says what each means."""

    queue: str
    priority: int
    retry: int | None
    store_result: bool
    retention: float | None
    max_time: float | None
    executor: Executor | None
    plugins: Sequence[Plugin]


class AsyncDecorator(Protocol):
    """Turns a function, async or plain, into an `AsyncTask` of what it returns."""

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
    """Turns a function, plain or async, into a `SyncTask` of what it returns."""

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
    """Turns a generator function whose yields a handler takes into an `AsyncTask`."""

    @overload
    def __call__(
        self, function: Callable[P, AsyncIterator[T]], /
    ) -> AsyncTask[P, list[H], AsyncIterator[T]]: ...
    @overload
    def __call__(
        self, function: Callable[P, Iterator[T]], /
    ) -> AsyncTask[P, list[H], Iterator[T]]: ...


class SyncGeneratorDecorator(Protocol[H]):
    """Turns a generator function whose yields a handler takes into a `SyncTask`."""

    @overload
    def __call__(
        self, function: Callable[P, AsyncIterator[T]], /
    ) -> SyncTask[P, list[H], AsyncIterator[T]]: ...
    @overload
    def __call__(
        self, function: Callable[P, Iterator[T]], /
    ) -> SyncTask[P, list[H], Iterator[T]]: ...


class Router:
    """Definitions, and the apps that included them.

    `plugins` are put around each task, within those of the app, the first outermost.
    Raises `ConfigurationError` for what is no plugin.
    """

    def __init__(self, *, plugins: Iterable[Plugin] = ()) -> None:
        self.plugins = checked_plugins(plugins)
        self.definitions: list[TaskDefinition] = []
        self._inclusions = Inclusions()

    def included_by(self, app: App) -> None:
        """Register everything with an app, now and what is declared later."""
        self._inclusions.add(app)
        for definition in self.definitions:
            app.register(definition)

    def define(
        self, function: Callable[..., Any], name: str | None, options: TaskOptions
    ) -> TaskDefinition:
        """Add a task to this router and to the apps that included it already."""
        definition = TaskDefinition(function, name, options, plugins=self.plugins)
        self.definitions.append(definition)
        for app in self._inclusions:
            app.register(definition)
        return definition


def _refuse_bare(name: object) -> None:
    # Without parentheses the function would be the name, and the task would be lost in silence.
    if callable(name):
        called = getattr(name, "__qualname__", "the task")
        raise ConfigurationError(f"{called}: the decorator needs its parentheses: @….task()")


class AsyncRouter(Router):
    """Declares tasks for async code; `include_router` brings them into an app."""

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
        """Declare a task. Options are those of `TaskOptions`; the name is `module.qualname`."""
        _refuse_bare(name)
        chosen = TaskOptions(generate_handler=generate_handler, **options)

        def decorate(function: Callable[..., Any]) -> AsyncTask[..., Any, Any]:
            return AsyncTask(function, self.define(function, name, chosen), self._inclusions)

        return cast(AsyncDecorator, decorate)


class SyncRouter(Router):
    """Declares tasks for blocking code; `include_router` brings them into an app."""

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
        """Declare a task. Options are those of `TaskOptions`; the name is `module.qualname`."""
        _refuse_bare(name)
        chosen = TaskOptions(generate_handler=generate_handler, **options)

        def decorate(function: Callable[..., Any]) -> SyncTask[..., Any, Any]:
            return SyncTask(function, self.define(function, name, chosen), self._inclusions)

        return cast(SyncDecorator, decorate)
