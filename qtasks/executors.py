"""How a worker runs functions: coroutines on its loop, plain functions in threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

from qtasks_core import Executor
from qtasks_core.errors import Closed

THREAD_NAME = "qtasks-task"
"""What the names of threads begin with that run functions."""


class LoopExecutor(Executor):
    """Runs coroutine functions on the worker's own loop."""

    def start(self, concurrency: int) -> None:
        """Need nothing: the loop runs already."""

    def bind(self, function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """Return the coroutine function itself."""
        return function

    def stop(self) -> None:
        """Have nothing to free."""


class ThreadExecutor(Executor):
    """Runs plain functions in threads of its own."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def start(self, concurrency: int) -> None:
        """Allow `concurrency` threads; each is started when it is first needed."""
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix=THREAD_NAME)

    def bind(self, function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """Return a coroutine function that awaits `function` in a thread."""

        pid = os.getpid()

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except StopIteration as error:
                # A future cannot hold it: whoever awaits it would wait for ever.
                raise RuntimeError(f"the function raised {error!r}") from error
            finally:
                if os.getpid() != pid:
                    # The function forked; of the worker, the child has nothing but this thread.
                    os._exit(0)

        async def run(*args: Any, **kwargs: Any) -> Any:
            if self._pool is None:
                raise Closed("ThreadExecutor is not started")
            in_context = partial(copy_context().run, call, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(self._pool, in_context)

        return run

    def stop(self) -> None:
        """Let the threads go; a function that still runs goes on, its result is not used."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
