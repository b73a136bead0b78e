"""Routers: tasks declared apart from any app."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar, cast, overload
from weakref import WeakSet

from qtasks.app import App, default_app
from qtasks.definition import TaskDefinition, TaskOptions
from qtasks.tasks import AsyncTask, P, SyncTask
from qtasks_core.errors import AmbiguousApp

R = TypeVar("R")


class AsyncDecorator(Protocol):
    """Turns a function, async or plain, into an `AsyncTask` of what it returns."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> AsyncTask[P, R, R]: ...


class SyncDecorator(Protocol):
    """Turns a function, plain or async, into a `SyncTask` of what it returns."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> SyncTask[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R, R]: ...


class Inclusions:
    """The apps of this process that included a router."""

    def __init__(self) -> None:
        self._apps: WeakSet[App] = WeakSet()

    def add(self, app: App) -> None:
        """Note an app."""
        self._apps.add(app)

    def __iter__(self) -> Iterator[App]:
        return iter(list(self._apps))

    def find_app(self) -> App:
        """Return the only one; without any, the process's default. Raises `AmbiguousApp`."""
        apps = list(self)
        if len(apps) > 1:
            names = ", ".join(sorted(repr(app.name) for app in apps))
            raise AmbiguousApp(f"several apps included this router ({names}): task.using(app)")
        return apps[0] if apps else default_app()


class Router:
    """Definitions, and the apps that included them."""

    def __init__(self) -> None:
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
        definition = TaskDefinition(function, name, options)
        self.definitions.append(definition)
        for app in self._inclusions:
            app.register(definition)
        return definition


class AsyncRouter(Router):
    """Declares tasks for async code; `include_router` brings them into an app."""

    def task(
        self,
        name: str | None = None,
        *,
        queue: str = "default",
        priority: int = 5,
        retry: int = 0,
        store_result: bool = True,
        retention: float | None = None,
    ) -> AsyncDecorator:
        """Declare a task. Options are those of `TaskOptions`; the name is `module.qualname`."""
        options = TaskOptions(
            queue=queue, priority=priority, retry=retry, store_result=store_result,
            retention=retention,
        )  # fmt: skip

        def decorate(function: Callable[..., Any]) -> AsyncTask[..., Any, Any]:
            return AsyncTask(function, self.define(function, name, options), self._inclusions)

        return cast(AsyncDecorator, decorate)


class SyncRouter(Router):
    """Declares tasks for blocking code; `include_router` brings them into an app."""

    def task(
        self,
        name: str | None = None,
        *,
        queue: str = "default",
        priority: int = 5,
        retry: int = 0,
        store_result: bool = True,
        retention: float | None = None,
    ) -> SyncDecorator:
        """Declare a task. Options are those of `TaskOptions`; the name is `module.qualname`."""
        options = TaskOptions(
            queue=queue, priority=priority, retry=retry, store_result=store_result,
            retention=retention,
        )  # fmt: skip

        def decorate(function: Callable[..., Any]) -> SyncTask[..., Any, Any]:
            return SyncTask(function, self.define(function, name, options), self._inclusions)

        return cast(SyncDecorator, decorate)
