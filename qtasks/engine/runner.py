"""The half of a worker that lives on the user's loop: it runs the functions."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import traceback
from collections.abc import Awaitable, Callable, Mapping
from types import FrameType
from typing import Any

from qtasks.definition import TaskDefinition
from qtasks.engine.job import Job
from qtasks.engine.mailbox import Mailbox
from qtasks.executors import LoopExecutor, ThreadExecutor
from qtasks.signals import Reject, Retry
from qtasks_core.errors import SerializationError

logger = logging.getLogger("qtasks")

_MAX_TEXT = 64 * 1024
"""Characters of an error or traceback that a record keeps."""


class Runner:
    """Runs jobs on the loop it was built on, and posts them back when they ended."""

    def __init__(self, definitions: Mapping[str, TaskDefinition], concurrency: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._executors = {True: LoopExecutor(), False: ThreadExecutor()}
        for executor in self._executors.values():
            executor.start(concurrency)
        self._calls = {name: self._compile(d) for name, d in definitions.items()}
        self._definitions = definitions
        self._running: dict[Job, asyncio.Task[None]] = {}
        self._ended: list[Job] = []
        self._finished: Mailbox[Job] | None = None
        self.inbox: Mailbox[Job] = Mailbox(self._loop, self._start)
        """Where the worker posts jobs to run."""

    def report_to(self, finished: Mailbox[Job]) -> None:
        """Post ended jobs there from now on."""
        self._finished = finished

    def give_back(self) -> None:
        """Cancel what still runs; it ends without a record and is released. From any thread."""
        self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in self._running.values():
            task.cancel()

    def stop(self) -> None:
        """Free the executors."""
        for executor in self._executors.values():
            executor.stop()

    def _call_of(self, definition: TaskDefinition) -> Callable[[Job], Awaitable[Any]]:
        """Return the compiled call of a task; one may be declared while the worker runs."""
        call = self._calls.get(definition.name)
        if call is None:
            call = self._calls[definition.name] = self._compile(definition)
        return call

    def _compile(self, definition: TaskDefinition) -> Callable[[Job], Awaitable[Any]]:
        """Return what runs one job of this task: decode, then the function in its executor."""
        executor = self._executors[inspect.iscoroutinefunction(definition.function)]
        function = executor.bind(definition.function)

        async def call(job: Job) -> Any:
            args, kwargs = definition.decode(job.message.args, job.message.kwargs)
            return await function(*args, **kwargs)

        return call

    def _start(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._running[job] = self._loop.create_task(self._run(job))

    async def _run(self, job: Job) -> None:
        definition = self._definitions[job.message.task_name]
        try:
            result = await self._call_of(definition)(job)
        except asyncio.CancelledError:
            # Cancelled from outside, by `give_back` or with all of its loop, it runs again.
            if not self._running[job].cancelling():
                self._fail(job, "CancelledError: the function cancelled itself", None, None)
        except Retry as retry:
            after = _usual_delay(job.message.attempt) if retry.after is None else retry.after
            job.retry(after, "Retry: the function asked for another run", None)
        except Reject as reject:
            self._fail(job, f"Reject: {reject.reason}", None, reject.reason)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # recorded as the task's end
            self._raised(job, definition, error)
        else:
            self._succeed(job, definition, result)
        finally:
            del self._running[job]
            self._hand_over(job)

    def _succeed(self, job: Job, definition: TaskDefinition, result: Any) -> None:
        try:
            keep = job.message.store_result
            job.end("success", returning=definition.encode_result(result) if keep else None)
        except SerializationError as error:
            self._fail(job, f"the result cannot be stored: {error}", None, "unstorable result")

    def _raised(self, job: Job, definition: TaskDefinition, error: BaseException) -> None:
        line = f"{type(error).__name__}: {error}"[:_MAX_TEXT]
        trace = _trace(error)
        if job.message.attempt <= definition.options.retry:
            delay = _usual_delay(job.message.attempt)
            logger.warning(
                "task %s %s failed, attempt %d; again in %.1f s: %s",
                job.message.task_name, job.message.uuid, job.message.attempt, delay, line,
            )  # fmt: skip
            job.retry(delay, line, trace)
        else:
            tries = job.message.attempt
            self._fail(job, line, trace, f"failed {tries} times" if tries > 1 else None)

    def _fail(self, job: Job, error: str, trace: str | None, dead: str | None) -> None:
        logger.error("task %s %s failed: %s", job.message.task_name, job.message.uuid, error)
        job.end("error", error=error, traceback=trace, dead=dead or "no retry is configured")

    def _hand_over(self, job: Job) -> None:
        """Post the jobs that end in one turn of the loop together."""
        self._ended.append(job)
        if len(self._ended) == 1:
            self._loop.call_soon(self._post)

    def _post(self) -> None:
        ended, self._ended = self._ended, []
        if self._finished is not None:
            self._finished.post_all(ended)


def _trace(error: BaseException) -> str:
    """Return the traceback from the task's own function on, without the engine's frames."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and _is_engine(frames.tb_frame):
        frames = frames.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frames)))[-_MAX_TEXT:]


def _is_engine(frame: FrameType) -> bool:
    module: str = frame.f_globals.get("__name__", "")
    return module.startswith(("qtasks.", "concurrent.futures"))


def _usual_delay(attempt: int) -> float:
    """Seconds before the next attempt: 1, 2, 4 … 300 with full jitter."""
    return random.uniform(0.0, min(300.0, 2.0 ** (attempt - 1)))
