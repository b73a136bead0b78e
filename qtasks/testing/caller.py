"""Plain functions in the thread of a blocking test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from copy import copy
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from msgspec.structs import replace

from qtasks.bridge.crossing import Reply
from qtasks.execution.definition import TaskDefinition
from qtasks.execution.thread import ThreadExecutor

R = TypeVar("R")


class CallerExecutor(ThreadExecutor):
    """Runs plain functions in the thread that waits in `serve`.

    So they see what belongs to the test's thread: a database connection with an open transaction,
    thread-local state.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    async def elsewhere(self, call: Callable[[], Any]) -> Any:
        """Make a call in the thread that waits in `serve`, and return its result."""
        reply: Reply[Any] = Reply()

        def make() -> None:
            try:
                reply.set(call())
            except BaseException as error:
                reply.fail(error)
                if isinstance(error, KeyboardInterrupt):
                    raise

        self._calls.put(make)
        return await reply

    def serve(self, work: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Run a coroutine function on a loop in another thread, and make its calls meanwhile."""
        reply: Reply[R] = Reply()
        cancel: Reply[Callable[[], object]] = Reply()

        async def main() -> R:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            if task is not None:
                cancel.set(partial(loop.call_soon_threadsafe, task.cancel))
            return await work()

        def run() -> None:
            try:
                reply.set(asyncio.run(main()))
            except BaseException as error:  # noqa: BLE001  # raised below
                reply.fail(error)
            finally:
                self._calls.put(None)

        thread = threading.Thread(target=run, name="qtasks-tester", daemon=True)
        thread.start()
        try:
            self._make_calls()
        except KeyboardInterrupt:
            # The work has to end first: its worker uses the app, which the test is about to stop.
            with suppress(RuntimeError):  # its loop is closed: it has ended
                cancel.result()()
            self._make_calls()
            raise
        thread.join()
        return reply.result()

    def _make_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def bound(self, definitions: Mapping[str, TaskDefinition]) -> dict[str, TaskDefinition]:
        """Return the definitions, with this executor for plain functions that name none."""
        return {name: self._bound(known) for name, known in definitions.items()}

    def _bound(self, known: TaskDefinition) -> TaskDefinition:
        if known.is_async or known.options.executor is not None:
            return known
        own = copy(known)
        own.options = replace(known.options, executor=self)
        return own
